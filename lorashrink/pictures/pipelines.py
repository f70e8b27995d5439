"""A model as one of diffusers' pipelines, and an adapter on it for a while. Nothing is ever downloaded."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import Adapter, open_adapter
from lorashrink.bases import Base, open_base
from lorashrink.errors import InputError, LorashrinkError, UsageError
from lorashrink.linking.renaming import renamed

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "PIL", "skimage")


@dataclass(frozen=True, slots=True)
class Kind:
    """One of diffusers' pipelines from text to a picture, and how it is drawn with."""

    title: str
    takes: Mapping[str, Any] = field(default_factory=dict)  # besides its parts
    family: str = ""  # of bases: what a single file of this kind is recognised as
    settings: tuple[str, str] | None = None  # package and folder of the published settings, for single files
    denoiser: str = "unet"
    half: str = "float16"
    scale: float = 7.5  # the guidance of prompts that give none
    patch: int = 1  # latents along each side that belong together
    packed: bool = False  # whether the pipeline takes latents as a list of patches
    negative: bool = True  # whether it reads negative prompts
    flow: bool = False  # flow matching, to which the samplers of noise prediction mean nothing


# diffusers' class -> how pictures are drawn with it; another one is another row
KINDS: Mapping[str, Kind] = {
    "StableDiffusionXLPipeline": Kind(
        "SDXL", {"add_watermarker": False}, family="sdxl", settings=("lorashrink.train", "sdxl")
    ),
    "StableDiffusionPipeline": Kind(
        "SD 1 and 2",
        {"safety_checker": None, "requires_safety_checker": False},
        family="sd15",
        settings=("lorashrink", "settings/sd15"),
    ),
    # Their activations leave the range of float16. Guidances are those of diffusers' own pages.
    "FluxPipeline": Kind(
        "FLUX.1",
        family="flux",
        denoiser="transformer",
        half="bfloat16",
        scale=3.5,
        patch=2,
        packed=True,
        negative=False,
        flow=True,
    ),
    "StableDiffusion3Pipeline": Kind(
        "SD 3", family="sd3", denoiser="transformer", half="bfloat16", scale=7.0, patch=2, flow=True
    ),
}

_DRAWN_WITH = ", ".join(kind.title for kind in KINDS.values())

# A file of these keys predicts velocities, or was trained down to a signal of zero; there is no other place to say so.
_VELOCITY, _ZERO_SIGNAL = "v_pred", "ztsnr"

# Where a CLIP tokenizer may lie: beside a single file, and in the cache of the hub's tools.
_BESIDE = ("tokenizer",)

_IN_CACHE = (
    "models--openai--clip-vit-large-patch14/snapshots/*",
    "models--*--stable-diffusion-*/snapshots/*/tokenizer",
)


def check_packages() -> None:
    """Raises UsageError if a package that pictures need is missing."""
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        names = {"PIL": "pillow", "skimage": "scikit-image"}
        raise UsageError(
            f"pictures need {', '.join(names.get(name, name) for name in missing)}: pip install 'lorashrink[pictures]'"
        )


# --- the model ----------------------------------------------------------------------------------


def pipeline_kind(model: Path) -> str:
    """The name of diffusers' class for this model, one of `KINDS`.

    model: a folder as diffusers saves it, or a checkpoint in one file. Raises UsageError if pictures cannot be drawn
    with it, and InputError if a single file cannot be read.
    """
    if model.is_file():
        return _kind_of_file(model)
    if not model.is_dir():
        raise UsageError(f"{model}: there is no such model, neither a folder nor a file.")
    try:
        name = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{model}: holds no model_index.json that names diffusers' pipeline.") from None
    if name not in KINDS:
        raise UsageError(f"{model}: is a {name}, and pictures are drawn with {_DRAWN_WITH} only.")
    return str(name)


def _kind_of_file(model: Path) -> str:
    with open_base(model) as base:
        family = base.family
    name = next((name for name, kind in KINDS.items() if kind.family == family.name), None)
    if name is None:
        raise UsageError(
            f"{model}: is {family.title} in one file, and pictures are drawn with {_DRAWN_WITH} only. "
            "If it is one of them, give the model's folder as diffusers saves it."
        )
    return name


def check_model(model: Path, settings: Path | None = None) -> str:
    """`pipeline_kind`, after a look at what a single file needs besides itself.

    Raises UsageError also if `settings`, or a tokenizer, are missing, or are for another kind of models.
    """
    name = pipeline_kind(model)
    if model.is_dir():
        return name
    title = KINDS[name].title
    if settings is not None:
        if not settings.is_dir() or pipeline_kind(settings) != name:
            raise UsageError(f"--images-config {settings}: must be a folder of {title}, as {model} is.")
    elif _published(name) is None:
        raise UsageError(
            f"{model}: is {title} in one file, which tells neither how the model is built nor how it reads text. Give "
            "the model's folder as diffusers saves it, or besides the file such a folder with --images-config."
        )
    elif _tokenizer_folder(model) is None:
        raise UsageError(
            f"{model}: a single file holds no tokenizer, and there is none in a folder `tokenizer` beside it. Give "
            f"a folder of any {title} model as diffusers saves it with --images-config; its weights are not read."
        )
    return name


def open_pipeline(model: Path, *, device: str, dtype: str, settings: Path | None = None) -> Any:
    """The model as diffusers' pipeline, on the device and in "float32", "float16" or "bfloat16"; it says nothing.

    settings: for a single file, a folder of a model of the same kind, whose settings and tokenizers are taken, and for
    FLUX.1 and SD 3 all but the transformer. SDXL and SD 1 need none where a CLIP tokenizer lies beside the file or in
    the hub's cache.

    Raises:
        UsageError: as `check_model`, or not enough memory.
        InputError: its files cannot be read, or lack tensors.
    """
    name = check_model(model, settings)
    import torch

    _quiet()
    try:
        with enough_memory(f"{model}: it does not fit into memory", device, "Take --device cpu, or a smaller model."):
            pipeline = _loaded(model, name, getattr(torch, dtype), settings)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline.to(device)
    except LorashrinkError:
        raise
    except NotImplementedError as error:  # that a tensor without data cannot be copied
        raise InputError(
            f"{model}: lacks tensors of its family. The file is damaged, or not the whole model."
        ) from error
    except Exception as error:  # what diffusers and transformers raise has no common class
        raise InputError(f"{model}: diffusers cannot load it ({_first_sentence(error)}).") from error


def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # before diffusers makes it say what else could be installed
    import diffusers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _loaded(model: Path, name: str, dtype: torch.dtype, settings: Path | None) -> Any:
    if model.is_dir():
        return _of_folder(model, name, dtype)
    if KINDS[name].denoiser == "transformer" and settings:
        return _of_folder(settings, name, dtype, transformer=_transformer(model, settings, dtype))
    return _of_file(model, name, dtype, settings)


def _of_folder(model: Path, name: str, dtype: torch.dtype, **parts: Any) -> Any:
    import diffusers

    kind = KINDS[name]
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    # Such as the third text encoder of SD 3, which many leave out; diffusers wants that said.
    without = {part: None for part, value in index.items() if value == [None, None]}
    return getattr(diffusers, name).from_pretrained(
        model,
        dtype=dtype,
        local_files_only=True,
        variant=_variant(model / kind.denoiser),
        **without | dict(kind.takes) | parts,
    )


def _transformer(model: Path, settings: Path, dtype: torch.dtype) -> Any:
    """All that most files of FLUX and SD 3 hold."""
    import diffusers

    kind = json.loads((settings / "transformer" / "config.json").read_text(encoding="utf-8"))["_class_name"]
    made = getattr(diffusers, kind).from_single_file(
        str(model), config=str(settings), subfolder="transformer", torch_dtype=dtype, local_files_only=True
    )
    _check_filled(model, "transformer", made)
    return made


def _variant(folder: Path) -> str | None:
    """fp16 where the folder has nothing else."""
    names = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _of_file(model: Path, name: str, dtype: torch.dtype, settings: Path | None) -> Any:
    import diffusers

    # What a model's folder has itself is not passed: diffusers reads it there.
    parts = {} if settings else {"scheduler": _published_scheduler(model), **_tokenizers(model, name)}
    pipeline = getattr(diffusers, name).from_single_file(
        str(model),
        config=str(settings or _published(name)),
        torch_dtype=dtype,
        local_files_only=True,
        **KINDS[name].takes,
        **parts,
    )
    for part, module in pipeline.components.items():
        _check_filled(model, part, module)
    return pipeline


def _check_filled(model: Path, part: str, module: Any) -> None:
    tensors = module.state_dict() if hasattr(module, "state_dict") else {}
    lacking = [key for key, tensor in tensors.items() if tensor.is_meta]
    if lacking:
        raise InputError(
            f"{model}: its {part} lacks {len(lacking)} tensors, such as {lacking[0]}. The file is damaged."
        )


def _published(name: str) -> Path | None:
    place = KINDS[name].settings
    return Path(str(resources.files(place[0]) / place[1])) if place else None


def _published_scheduler(model: Path) -> Any:
    from diffusers import EulerDiscreteScheduler

    with open_base(model) as base:
        keys = base.store.tensors if base.store else {}
        return EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type="v_prediction" if _VELOCITY in keys else "epsilon",
            rescale_betas_zero_snr=_ZERO_SIGNAL in keys,
        )


def _tokenizers(model: Path, name: str) -> dict[str, Any]:
    """CLIP's tokenizers; those of SDXL differ in their padding alone."""
    from transformers import CLIPTokenizer

    folder, settings = _tokenizer_folder(model), _published(name)
    found = {"tokenizer": CLIPTokenizer.from_pretrained(folder, local_files_only=True)}
    if settings and (settings / "text_encoder_2").is_dir():
        found["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        found["tokenizer_2"].pad_token_id = 0
    return found


def _tokenizer_folder(model: Path) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = [
        each
        for place, names in ((model.parent, _BESIDE), (Path(HF_HUB_CACHE), _IN_CACHE))
        for name in names
        for each in sorted(place.glob(name))
    ]
    return next((each for each in places if (each / "merges.txt").is_file()), None)


def companions(model: Path, settings: Path | None = None) -> tuple[Path, ...]:
    """The folders that a single file is read together with; none for a folder."""
    if model.is_dir():
        return ()
    found = (settings,) if settings else (_published(pipeline_kind(model)), _tokenizer_folder(model))
    return tuple(folder for folder in found if folder)


def _first_sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")


# What torch says on CPUs and MPS, where it has no class of its own for it.
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


@contextmanager
def enough_memory(what: str, device: str, advice: str) -> Iterator[None]:
    """Raises UsageError, with what happened and what helps, where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            raise UsageError(f"{what} (out of memory on {device}). {advice}") from error
        raise


# --- the adapter --------------------------------------------------------------------------------


@contextmanager
def adapted(pipeline: Any, adapter: Path | None, base: Base) -> Iterator[None]:
    """The adapter on the model for as long as this lasts; with None the model stays as it is.

    base: the same model. Afterwards the model is what it was, bit by bit. Raises InputError if the adapter cannot be
    put on it.
    """
    changed: Sequence[Any] = ()
    try:
        if adapter is not None:
            parts = _factors(adapter, pipeline, base)
            changed = [getattr(pipeline, part) for part in parts]
            _put_on(adapter, pipeline, parts)
        yield
    finally:
        for module in changed:
            _take_off(module)


def _factors(adapter: Path, pipeline: Any, base: Base) -> dict[str, dict[str, torch.Tensor]]:
    """Part of the pipeline -> tensors under PEFT's names."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with open_adapter(adapter) as opened:
        store = in_diffusers_names(opened, base).store
        for key in store.tensors:
            part, _, name = key.partition(".")
            if ".lora_" not in key or part not in pipeline.components:
                continue
            # transformers 5 dropped this level of the first text encoder
            name = name if hasattr(getattr(pipeline, part), "text_model") else name.removeprefix("text_model.")
            parts.setdefault(part, {})[name] = store.read(key)
    return parts


def _put_on(adapter: Path, pipeline: Any, parts: Mapping[str, dict[str, torch.Tensor]]) -> None:
    """PEFT's layers around those of the model.

    diffusers' own loader guesses by names: ranks that differ in layers it does not list, and DoRA in kohya's names, are
    too much for it.
    """
    try:
        for part, state in parts.items():
            if getattr(pipeline, part) is None:
                raise ValueError(f"the model comes without its {part}")
            _inject(getattr(pipeline, part), state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{adapter}: PEFT cannot put it on the model ({_first_sentence(error)}).") from error


def _inject(model: Any, state: dict[str, torch.Tensor]) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    names: dict[int, list[str]] = {}
    for key, tensor in state.items():
        if ".lora_A." in key:
            names.setdefault(len(tensor), []).append(key.partition(".lora_A.")[0])
    # One pattern for each rank, because PEFT tries all of them on every layer. Scales are inside the factors, so that
    # alpha is the rank.
    patterns = {f"^(?:{'|'.join(map(re.escape, each))})$": rank for rank, each in names.items()}
    config = LoraConfig(
        # A list would be taken for endings of names, such as the `proj_out` that each block of FLUX has too.
        target_modules="|".join(re.escape(name) for each in names.values() for name in each),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        use_dora=any(".lora_magnitude_vector" in key for key in state),
        lora_bias=any(".lora_B.bias" in key for key in state),
    )
    inject_adapter_in_model(config, model)
    result: Any = set_peft_model_state_dict(model, state)
    missing = [key for key in result.missing_keys if ".lora_" in key]
    if missing or result.unexpected_keys:
        raise ValueError(f"no place for {(missing + result.unexpected_keys)[0]}")


def _take_off(model: Any) -> None:
    """The model's own layers in the places of PEFT's, which leave them as they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model is None:
        return
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def in_diffusers_names(adapter: Adapter, base: Base) -> Adapter:
    """The adapter under diffusers' own names, which diffusers reads without guessing.

    Raises:
        FamilyMismatch, ShapeError: it does not belong to the model.
        InputError: some of its layers are not LoRA, or it has none.
    """
    if not adapter.layers:
        raise InputError(
            f"{adapter.path}: has no layers of LoRA, only {len(adapter.others)} other tensors, which all recipes keep."
        )
    other = next((layer for layer in adapter.layers if layer.family.name != "lora"), None)
    if other:
        raise InputError(
            f"{adapter.path}: {other.name} is {other.algo}, and pictures are drawn with LoRA only. "
            "Make one of it with `lorashrink resize --as lora -r energy=1`."
        )
    return renamed(adapter, "diffusers", base).adapter


def check_adapter(adapter: Path, base: Base) -> None:
    """That the model of this base can draw with the adapter; tensors that pictures leave out are named in a warning.

    Raises:
        InputError: it is for another family of models, or has layers that diffusers does not know.
    """
    with open_adapter(adapter) as opened:
        new = in_diffusers_names(opened, base)
        known = tuple(f"{base.family.folder(part)}." for part in {part for part, _ in base.weights})
        left = [key for key in new.store.tensors if not (".lora_" in key and key.startswith(known))]
    if len(left) == len(new.store.tensors):
        raise InputError(f"{adapter}: changes no weight of {base.path}.")
    if left:
        _log.warning("%s: pictures are drawn without %d of its tensors, such as %s", adapter, len(left), left[0])
