"""A model, as a folder or a single file, opened as one of diffusers' pipelines. Nothing is ever downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.bases import Base, open_base
from lorashrink.errors import InputError, LorashrinkError, UsageError
from lorashrink.pictures.clip_tokenizer import bundled_tokenizer, has_vocabulary

if TYPE_CHECKING:
    import torch

PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "PIL", "skimage")


@dataclass(frozen=True, slots=True)
class Kind:
    """One of diffusers' pipelines from text to a picture, and how it is drawn with."""

    title: str
    takes: Mapping[str, Any] = field(default_factory=dict)  # arguments besides its parts
    family: str = ""  # of bases: the family that a single file of this kind is recognised as
    settings: tuple[str, str] | None = None  # package and folder of the published settings, for single files
    denoiser: str = "unet"
    half: str = "float16"
    scale: float = 7.5  # the guidance of prompts that give none
    patch: int = 1  # latents along each side that belong together
    packed: bool = False  # whether the pipeline takes latents as a list of patches
    negative: bool = True  # whether it reads negative prompts
    flow: bool = False  # flow matching, to which the samplers of noise prediction mean nothing


# What FLUX.1 and SD 3 have in common. Their activations leave the range of float16.
_FLOW: Mapping[str, Any] = {"denoiser": "transformer", "half": "bfloat16", "patch": 2, "flow": True}

# diffusers' class -> how pictures are drawn with it; another one is another row. Scales are those of diffusers' pages.
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
    "FluxPipeline": Kind("FLUX.1", family="flux", scale=3.5, packed=True, negative=False, **_FLOW),
    "StableDiffusion3Pipeline": Kind("SD 3", family="sd3", scale=7.0, **_FLOW),
}

_TITLES = ", ".join(kind.title for kind in KINDS.values())

# A file with these keys predicts velocities, or was trained down to a signal of zero.
_VELOCITY, _ZERO_SIGNAL = "v_pred", "ztsnr"
_STATED = "modelspec.prediction_type"  # "v" or "epsilon" in the metadata, by programs that follow ModelSpec

# Where a CLIP tokenizer lies in a model's folder, in sd-scripts' cache and in that of the hub's tools.
_TOKENIZERS = (
    "tokenizer",
    "openai_clip-vit-large-patch14",
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


# --- which pipeline -----------------------------------------------------------------------------


def pipeline_kind(model: Path) -> str:
    """The name of diffusers' class for this model, one of `KINDS`.

    model: a folder as diffusers saves it, or a checkpoint in one file. Raises UsageError if pictures cannot be drawn
    with it, and InputError if a single file cannot be read.
    """
    if model.is_file():
        with open_base(model) as base:
            family = base.family
        names = [name for name, kind in KINDS.items() if kind.family == family.name]
        if not names:
            raise UsageError(
                f"{model}: is {family.title} in one file, and pictures are drawn with {_TITLES} only. "
                "If it is one of them, give the model's folder as diffusers saves it."
            )
        return names[0]
    if not model.is_dir():
        raise UsageError(f"{model}: there is no such model, neither a folder nor a file.")
    try:
        name = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        if _is_of_transformers(model):
            raise UsageError(
                f"{model}: is no pipeline of diffusers and draws no pictures. If it is a language model, compare what "
                f"it answers: lorashrink sweep --text TEXT.txt --base {model} ADAPTER"
            ) from None
        raise UsageError(f"{model}: holds no model_index.json that names diffusers' pipeline.") from None
    if name not in KINDS:
        raise UsageError(f"{model}: is a {name}, and pictures are drawn with {_TITLES} only.")
    return str(name)


def _is_of_transformers(model: Path) -> bool:
    try:
        return "architectures" in json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


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
    elif _published_settings(name) is None:
        raise UsageError(
            f"{model}: is {title} in one file, which tells neither how the model is built nor how it reads text. Give "
            "the model's folder as diffusers saves it, or besides the file such a folder with --images-config."
        )
    elif _tokenizer_of_file(model) is None and not has_vocabulary():
        raise UsageError(
            f"{model}: a single file holds no tokenizer. Run pip install instant-clip-tokenizer (to Python 3.12), or "
            f"put the folder `tokenizer` of any {title} model beside the file."
        )
    return name


def companions(model: Path, settings: Path | None = None) -> tuple[Path, ...]:
    """The folders that a single file is read together with; none for a folder."""
    if model.is_dir():
        return ()
    folders = (settings,) if settings else (_published_settings(pipeline_kind(model)), _tokenizer_of_file(model))
    return tuple(folder for folder in folders if folder)


def _published_settings(name: str) -> Path | None:
    location = KINDS[name].settings
    return Path(str(resources.files(location[0]) / location[1])) if location else None


# Of denoisers whose configuration does not say it: latents along a side, as in diffusers' pipelines.
_SAMPLE_SIZES = {"unet": 64, "transformer": 128}


def own_side(model: Path, settings: Path | None = None) -> int:
    """Pixels along a side of the pictures that a model was made for; `settings` as for `open_pipeline`.

    Source: `default_sample_size` of diffusers' pipelines. Raises UsageError or InputError as `pipeline_kind`.
    """
    name = pipeline_kind(model)
    denoiser = KINDS[name].denoiser
    folder = model if model.is_dir() else settings or _published_settings(name)
    latents, stride = _SAMPLE_SIZES[denoiser], 8
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # what is missing is named on opening it
        if folder:
            stride = 2 ** (len(_config(folder / "vae")["block_out_channels"]) - 1)
            size = _config(folder / denoiser).get("sample_size") or latents
            latents = int(max(size) if isinstance(size, list) else size)
    return latents * stride


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


# --- opening it ---------------------------------------------------------------------------------


def open_pipeline(model: Path, *, device: str, dtype: str, settings: Path | None = None) -> Any:
    """The model as diffusers' pipeline, on the device and in "float32", "float16" or "bfloat16"; it says nothing.

    settings: for a single file, a folder of a model of the same kind, whose settings and tokenizers are taken, and for
    FLUX.1 and SD 3 all but the transformer. SDXL and SD 1 need none.

    Raises:
        UsageError: as `check_model`, or not enough memory.
        InputError: its files cannot be read, or lack tensors.
    """
    name = check_model(model, settings)
    import torch

    number_type = getattr(torch, dtype)
    quiet_libraries()
    with (
        loading(model),
        enough_memory(f"{model}: it does not fit into memory", device, "Take --device cpu, or a smaller model."),
    ):
        if model.is_dir():
            pipeline = _load_folder(model, name, number_type)
        elif KINDS[name].denoiser == "transformer" and settings:  # most files of FLUX and SD 3 hold nothing else
            import diffusers

            class_name = _config(settings / "transformer")["_class_name"]
            transformer = getattr(diffusers, class_name).from_single_file(
                str(model),
                config=str(settings),
                subfolder="transformer",
                torch_dtype=number_type,
                local_files_only=True,
            )
            check_filled(model, "transformer", transformer)
            pipeline = _load_folder(settings, name, number_type, transformer=transformer)
        else:
            published = _published_settings(name)
            assert settings or published  # `check_model` has looked
            parts: dict[str, Any] = {}
            if published and not settings:  # what a model's folder has itself is not passed: diffusers reads it there
                tokenizer, second_tokenizer = clip_tokenizers(_tokenizer_of_file(model))
                parts = {"scheduler": scheduler_of_file(model), "tokenizer": tokenizer}
                if (published / "text_encoder_2").is_dir():
                    parts["tokenizer_2"] = second_tokenizer
            pipeline = read_file(model, name, number_type, settings or published, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)


def _load_folder(model: Path, name: str, dtype: torch.dtype, **parts: Any) -> Any:
    import diffusers
    import transformers

    kind = KINDS[name]
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    # Such as the third text encoder of SD 3, which many leave out; diffusers wants that said.
    absent = {part: None for part, value in index.items() if value == [None, None]}
    for part, value in index.items():
        class_name = value[1] if isinstance(value, list) and value[0] == "transformers" else ""
        encoder = getattr(transformers, class_name, None)
        if part not in parts and isinstance(encoder, type) and issubclass(encoder, transformers.PreTrainedModel):
            parts[part] = load_part(encoder, model / part, dtype)  # diffusers does not see what it lacks
    return getattr(diffusers, name).from_pretrained(
        model,
        dtype=dtype,
        local_files_only=True,
        variant=weights_variant(model / kind.denoiser),
        **absent | dict(kind.takes) | parts,
    )


# --- the parts of a model, for all that load one ------------------------------------------------


def quiet_libraries() -> None:
    """Silence what diffusers and transformers say, except errors, and their progress bars."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # before diffusers makes it say what else could be installed
    import diffusers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def read_file(model: Path, name: str, dtype: torch.dtype, settings: Path | None, **parts: Any) -> Any:
    """A model in one file as diffusers' pipeline of this name; `parts` are not read from it, and None leaves one out.

    settings: a folder of a model of the same kind. Raises InputError if tensors are missing.
    """
    import diffusers

    pipeline = getattr(diffusers, name).from_single_file(
        str(model), config=str(settings), torch_dtype=dtype, local_files_only=True, **KINDS[name].takes, **parts
    )
    for part, module in pipeline.components.items():
        check_filled(model, part, module)
    return pipeline


@contextmanager
def loading(model: Path, hint: str = "") -> Iterator[None]:
    """Raises InputError, which names the model, for whatever diffusers and transformers raise while they load it.

    hint: what more there is to say of a model that they cannot load; it begins with a space.
    """
    try:
        yield
    except (LorashrinkError, MemoryError):
        raise
    except NotImplementedError as error:  # that a tensor without data cannot be copied
        raise InputError(
            f"{model}: lacks tensors of its family. The file is damaged, or not the whole model."
        ) from error
    except Exception as error:  # they have no common class
        raise InputError(f"{model}: diffusers cannot load it ({first_sentence(error)}).{hint}") from error


def first_sentence(error: Exception) -> str:
    """The first sentence of what a library says, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")


def weights_variant(folder: Path, *, half: bool = False) -> str | None:
    """diffusers' name for the weights to take in a part's folder: "fp16", or None for those without a variant.

    "fp16" where the folder has nothing else, and with `half` wherever it has them.
    """
    names = [path.name for path in folder.glob("*.safetensors")] or [path.name for path in folder.glob("*.bin")]
    halves = [name for name in names if ".fp16" in name]
    return "fp16" if halves and (half or len(halves) == len(names)) else None


def load_part(kind: Any, folder: Path, dtype: torch.dtype, hint: str = " The file is damaged.") -> Any:
    """A part of a model, of a class of diffusers or transformers, from its folder.

    Raises InputError, with `hint`, if it cannot be read, or lacks tensors, which transformers would draw at random.
    """
    import diffusers
    import torch

    named = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    variant = weights_variant(folder, half=dtype == torch.float16)
    more = {named: dtype, "variant": variant, "local_files_only": True, "output_loading_info": True}
    with loading(folder, hint):
        part, info = kind.from_pretrained(folder, **more)
    if missing := sorted(info["missing_keys"]):
        lack = f"its {folder.name} lacks {len(missing)} tensors, such as {missing[0]}"
        raise InputError(f"{folder.parent}: {lack}.{hint}")
    return part


def check_filled(model: Path, part: str, module: Any) -> None:
    """Raises InputError if a part of the loaded model, which need not be a module, has tensors without data."""
    tensors = module.state_dict() if hasattr(module, "state_dict") else {}
    lacking = [key for key, tensor in tensors.items() if tensor.is_meta]
    if lacking:
        raise InputError(
            f"{model}: its {part} lacks {len(lacking)} tensors, such as {lacking[0]}. The file is damaged."
        )


def tokenizer_folder(folders: Iterable[Path]) -> Path | None:
    """The first CLIP tokenizer that lies in these folders, which may be tokenizers, models or caches."""
    for folder in folders:
        for path in (folder, *(match for pattern in _TOKENIZERS for match in sorted(folder.glob(pattern)))):
            if (path / "merges.txt").is_file() or (path / "tokenizer.json").is_file():
                return path
    return None


def clip_tokenizers(folder: Path | None) -> tuple[Any, Any]:
    """Both tokenizers of SDXL, which have one vocabulary; the first one is that of SD 1. None: the published ones.

    They differ in their padding alone. The published tokenizer_2 takes every "!" for its padding; sd-scripts, ComfyUI
    and A1111 take it for the word that it is, as the first tokenizer does.
    """
    from transformers import CLIPTokenizer

    first, second = (
        CLIPTokenizer.from_pretrained(folder, local_files_only=True) if folder else bundled_tokenizer()
        for _ in range(2)
    )
    second.pad_token_id = 0
    return first, second


def scheduler_of_file(model: Path) -> Any:
    """The published scheduler of SDXL and SD 1, with what a single file says of its prediction."""
    from diffusers import EulerDiscreteScheduler

    from lorashrink.pictures.samplers import NOISE_SCHEDULE

    with open_base(model) as base:
        prediction, zero_signal = prediction_of_file(base)
        return EulerDiscreteScheduler(
            steps_offset=1,
            timestep_spacing="leading",
            prediction_type=prediction or "epsilon",
            rescale_betas_zero_snr=zero_signal,
            **NOISE_SCHEDULE,
        )


def prediction_of_file(base: Base) -> tuple[str, bool]:
    """What a single file says of its prediction, in diffusers' words or "", and whether its signal ends at zero."""
    if base.store is None:
        return "", False
    stated = base.store.metadata.get(_STATED)
    velocity = _VELOCITY in base.store.tensors or stated == "v"
    return "v_prediction" if velocity else "epsilon" if stated else "", _ZERO_SIGNAL in base.store.tensors


def _tokenizer_of_file(model: Path) -> Path | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    return tokenizer_folder((model.parent / "tokenizer", Path(HF_HUB_CACHE)))


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
