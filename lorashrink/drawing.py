"""Pictures that a model draws with an adapter and without, kept between runs."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import Adapter, open_adapter, peft
from lorashrink.bases import Base, open_base
from lorashrink.errors import InputError, NonFinite, OutputError, UsageError
from lorashrink.files import content_fingerprint, open_tensors, sha256_file, write_bytes
from lorashrink.machine import pick_device
from lorashrink.prompts import Prompt
from lorashrink.renaming import renamed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]  # [height, width, 3]

_log = logging.getLogger(__name__)

PACKAGES = ("diffusers", "transformers", "accelerate", "peft", "PIL", "skimage")
# diffusers' class in model_index.json -> what it takes besides its parts
_PIPELINES: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"add_watermarker": False},
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
}
# Part of the keys of pictures: change it whenever pictures may change.
_ALGORITHM = 1
_KEY = 24  # hexadecimal digits in a file name
_SMALL = 1 << 24  # bytes: smaller files of a model that are no tensors count with all they hold


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture to draw."""

    number: int  # of the prompt in its file
    prompt: Prompt
    seed: int

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"prompt {self.number:02d}, seed {self.start}"

    @property
    def start(self) -> int:
        """What the noise is drawn from: the prompt's seed (0 if it has none) and the given one on top."""
        return ((self.prompt.seed or 0) + self.seed) % 2**63


def shots_of(prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[Shot, ...]:
    """Every prompt with every seed, prompt by prompt."""
    return tuple(Shot(number, prompt, seed) for number, prompt in enumerate(prompts) for seed in seeds)


def check_packages() -> None:
    """Raises UsageError if a package that pictures need is missing."""
    from importlib.util import find_spec

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        names = {"PIL": "pillow", "skimage": "scikit-image"}
        raise UsageError(
            f"pictures need {', '.join(names.get(name, name) for name in missing)}: pip install 'lorashrink[pictures]'"
        )


def default_folder() -> Path:
    """Where pictures are kept between runs."""
    import platformdirs

    return platformdirs.user_cache_path("lorashrink", appauthor=False) / "pictures"


def read_picture(path: str | Path) -> Picture:
    """A written picture. Raises InputError if it cannot be read."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}).") from error


class Studio:
    """A model that draws the same shots with one adapter after the other; pictures that are there are not drawn again.

    The model is loaded when the first picture is missing. Use it as a context manager.
    """

    def __init__(
        self, model: str | Path, shots: Sequence[Shot], *, folder: Path | None = None, device: str = "auto"
    ) -> None:
        """model: a folder as diffusers saves SDXL or SD 1 and 2.

        Raises:
            UsageError: a package is missing, the folder is no such model, no such device.
            InputError: the folder's files cannot be read.
        """
        check_packages()
        self.model, self.shots = Path(model), tuple(shots)
        self.device = pick_device(device)
        self.kind = _pipeline_kind(self.model)
        self.base: Base = open_base(self.model)
        self.folder = default_folder() if folder is None else folder
        self._model_key = _model_key(self.model)
        self._loaded: tuple[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """What the model works in: "float32" on a CPU, else "float16"."""
        return "float32" if self.device == "cpu" else "float16"

    @property
    def other_dtype(self) -> str:
        """What it could work in as well, for a comparison of the two."""
        return "float16" if self.device == "cpu" else "float32"

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loaded = None
        self.base.close()

    def check(self, adapter: Path) -> None:
        """That the model can draw with this adapter.

        Raises:
            InputError: it is for another family of models, or has layers that diffusers does not know.
        """
        with open_adapter(adapter) as opened:
            _renamed(opened, self.base)

    def draw(
        self,
        adapter: Path | None,
        label: str,
        *,
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Path]:
        """The picture of every shot with an adapter, or with none; `label` is part of the names of their files.

        Raises:
            InputError: the adapter cannot be loaded.
            NonFinite: what becomes of a shot is NaN.
            OutputError: a picture cannot be written.
        """
        dtype = dtype or self.dtype
        content = _content(adapter) if adapter else ""
        keys = [self._key(shot, content, dtype) for shot in self.shots]
        paths = [self._found(key) for key in keys]
        if None in paths:
            pipeline = self._pipeline(dtype)
            with _adapted(pipeline, adapter, self.base):
                for place, (shot, key) in enumerate(zip(self.shots, keys, strict=True)):
                    if paths[place] is None:
                        name = f"{shot.number:02d}_seed{shot.seed}_{label}_{key}.png"
                        paths[place] = _write_png(self.folder / name, _drawn(pipeline, shot, self.device, dtype))
                    if progress:
                        progress(place + 1, len(self.shots))
        return [path for path in paths if path is not None]

    def _found(self, key: str) -> Path | None:
        return next(filter(_is_picture, sorted(self.folder.glob(f"*_{key}.png"))), None)

    def _key(self, shot: Shot, content: str, dtype: str) -> str:
        """Everything that decides a picture."""
        import diffusers
        import torch

        facts = {
            "algorithm": _ALGORITHM,
            "model": self._model_key,
            "adapter": content,
            "prompt": asdict(shot.prompt),
            "seed": shot.start,
            "device": self.device.partition(":")[0],
            "dtype": dtype,
            "versions": [diffusers.__version__, torch.__version__],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY]

    def _pipeline(self, dtype: str) -> Any:
        if self._loaded is None or self._loaded[0] != dtype:
            self._loaded = None  # two of them may not fit into memory
            gc.collect()
            self._loaded = (dtype, _load(self.model, self.kind, self.device, dtype))
        return self._loaded[1]


def _is_picture(path: Path) -> bool:
    """Whether a file that has the name of a picture is one, and whole."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except OSError:
        _log.warning("%s: damaged, drawn anew", path)
        return False
    return True


def _content(adapter: Path) -> str:
    """The hashes of all that the adapter is made of: a file, or the two of a PEFT folder."""
    with open_adapter(adapter) as opened:
        files = opened.store.files
        settings = [files[0].parent / peft.CONFIG_FILE] if opened.as_folder else []
    return " ".join(map(sha256_file, [*files, *settings]))


# --- the model ----------------------------------------------------------------------------------


def _pipeline_kind(model: Path) -> str:
    """The name of diffusers' class for this model."""
    if not model.is_dir():
        what = "is one file" if model.is_file() else "there is no such folder"
        raise UsageError(
            f"--images {model}: {what}, and pictures are drawn with a model's folder as diffusers saves it "
            "(model_index.json, unet, vae, ...)."
        )
    try:
        kind = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"--images {model}: holds no model_index.json that names diffusers' pipeline.") from None
    if kind not in _PIPELINES:
        raise UsageError(f"--images {model}: is a {kind}, and pictures are drawn with SDXL, SD 1 and SD 2 only.")
    return str(kind)


def _model_key(model: Path) -> str:
    """A quick identity of all the model's files: tensors by samples, small files whole."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*")):
        place = path.relative_to(model)
        if not path.is_file() or any(part.startswith(".") for part in place.parts):
            continue
        digest.update(f"{place.as_posix()} {path.stat().st_size} ".encode())
        if path.suffix == ".safetensors":
            with open_tensors(path) as store:
                digest.update(content_fingerprint(store).encode())
        elif path.stat().st_size < _SMALL:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _load(model: Path, kind: str, device: str, dtype: str) -> Any:
    import diffusers
    import torch
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        pipeline: Any = getattr(diffusers, kind).from_pretrained(
            model, dtype=getattr(torch, dtype), local_files_only=True, variant=_variant(model), **_PIPELINES[kind]
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{model}: diffusers cannot load it ({_first_line(error)}).") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _variant(model: Path) -> str | None:
    """fp16 where the folder has nothing else."""
    names = [path.name for path in (model / "unet").glob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- the adapter --------------------------------------------------------------------------------


@contextmanager
def _adapted(pipeline: Any, adapter: Path | None, base: Base) -> Iterator[None]:
    """The adapter on the model for as long as this lasts."""
    try:
        if adapter is not None:
            _put_on(pipeline, adapter, base)
        yield
    finally:
        pipeline.unload_lora_weights()


def _put_on(pipeline: Any, adapter: Path, base: Base) -> None:
    """PEFT's layers around those of the model.

    diffusers' own loader guesses by names: ranks that differ in layers it does not list, and DoRA in kohya's names, are
    too much for it.
    """
    with open_adapter(adapter) as opened:
        store = _renamed(opened, base).store
        tensors = {key: store.read(key) for key in store.tensors if ".lora_" in key}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        # transformers 5 dropped this level of the first text encoder
        name = name if hasattr(getattr(pipeline, part), "text_model") else name.removeprefix("text_model.")
        parts.setdefault(part, {})[name] = tensor
    try:
        for part, state in parts.items():
            _inject(getattr(pipeline, part), state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{adapter}: PEFT cannot put it on the model ({_first_line(error)}).") from error


def _inject(model: Any, state: dict[str, torch.Tensor]) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    names: dict[int, list[str]] = {}
    for key, tensor in state.items():
        if ".lora_A." in key:
            names.setdefault(len(tensor), []).append(key.partition(".lora_A.")[0])
    # One pattern for each rank, because PEFT tries all of them on every layer. Scales are inside the factors, so that
    # alpha is the rank.
    patterns = {f"^(?:{'|'.join(map(re.escape, each))})": rank for rank, each in names.items()}
    config = LoraConfig(
        target_modules=[name for each in names.values() for name in each],
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


def _renamed(adapter: Adapter, base: Base) -> Adapter:
    """The adapter under diffusers' own names, which diffusers reads without guessing.

    Raises:
        FamilyMismatch, ShapeError: it does not belong to the model.
        InputError: some of its layers are not LoRA.
    """
    other = next((layer for layer in adapter.layers if layer.family.name != "lora"), None)
    if other:
        raise InputError(
            f"{adapter.path}: {other.name} is {other.algo}, and pictures are drawn with LoRA only. "
            "Make one of it with `lorashrink resize --as lora -r energy=1`."
        )
    return renamed(adapter, "diffusers", base).adapter


# --- the pictures -------------------------------------------------------------------------------


def _drawn(pipeline: Any, shot: Shot, device: str, dtype: str) -> Picture:
    import numpy as np
    import torch

    from lorashrink.samplers import scheduler

    prompt = shot.prompt
    generator = torch.Generator().manual_seed(shot.start)
    stride = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, prompt.height // stride, prompt.width // stride)
    # Float32 on the CPU gives the same noise on every machine and in every precision.
    noise = torch.randn(shape, generator=generator).to(device, getattr(torch, dtype))
    velocity = pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    pipeline.scheduler = scheduler(prompt.sampler, v_parameterization=velocity)
    with torch.no_grad(), torch.random.fork_rng([device] if device.startswith("cuda") else []):
        latents = pipeline(
            prompt.prompt,
            negative_prompt=prompt.negative,
            latents=noise,
            generator=generator,
            width=prompt.width,
            height=prompt.height,
            num_inference_steps=prompt.steps,
            guidance_scale=prompt.scale,
            output_type="latent",
            return_dict=False,
        )[0]
        # Each VAE knows what its latents were scaled by; SDXL's overflows in half precision.
        vae = pipeline.vae.float()
        (pixels,) = vae.decode(latents.float() / vae.config.scaling_factor, return_dict=False)[0]
    if not pixels.isfinite().all():
        raise NonFinite(f"{shot.label}: becomes no picture in {dtype}, but NaN.")
    drawn: Picture = np.rint((pixels / 2 + 0.5).clamp(0, 1).cpu().permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    return drawn


def _write_png(path: Path, picture: Picture) -> Path:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png")
    try:
        write_bytes(path, data.getvalue())
    except OutputError as error:
        raise OutputError(f"--images-out {error}") from error
    return path
