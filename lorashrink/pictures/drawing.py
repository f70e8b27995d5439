"""Pictures that a model draws with an adapter and without, kept between runs."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import open_adapter, peft
from lorashrink.bases import Base, open_base
from lorashrink.engine.devices import pick_device
from lorashrink.errors import InputError, NonFinite, UsageError
from lorashrink.files.disk import content_fingerprint, sha256_file, user_cache, write_bytes
from lorashrink.files.reading import open_tensors
from lorashrink.pictures.adapting import adapted, check_adapter
from lorashrink.pictures.pipelines import (
    KINDS,
    Kind,
    check_model,
    check_packages,
    companions,
    enough_memory,
    open_pipeline,
)
from lorashrink.pictures.prompts import OWN, Prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Picture = NDArray[np.uint8]

_log = logging.getLogger(__name__)

# Part of the keys of pictures: change it whenever pictures may change.
_ALGORITHM = 1

_KEY = 24  # hexadecimal digits in a file name

_FILE_NAME = re.compile(rf"_[0-9a-f]{{{_KEY}}}\.png$")

CACHE_BYTES = 2_000_000_000  # of pictures in the user's cache, about 1,500 of 1024 × 1024

PIXELS_AT_ONCE = 1 << 20  # what a model can draw at once on any device: one picture of SDXL, hundreds of a small model

_SMALL = 1 << 24  # bytes: a model's settings and vocabularies are smaller, and their contents are part of its key


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
        """Seed of the noise: the prompt's seed (0 if it has none) plus the shot's own."""
        return ((self.prompt.seed or 0) + self.seed) % 2**63


def shots_of(prompts: Sequence[Prompt], seeds: Sequence[int]) -> tuple[Shot, ...]:
    """Every prompt with every seed, prompt by prompt."""
    return tuple(Shot(number, prompt, seed) for number, prompt in enumerate(prompts) for seed in seeds)


def default_folder() -> Path:
    """The folder that pictures are kept in between runs. Raises UsageError where there is no such place."""
    folder = user_cache()
    if folder is None:
        raise UsageError("no home folder to keep pictures in. Set HOME, or give --images-out where a command has it.")
    return folder / "pictures"


def read_picture(path: str | Path) -> Picture:
    """A picture from its file. Raises InputError if it cannot be read."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}).") from error


def write_picture(path: Path, picture: Picture | Image) -> Path:
    """Write a PNG file of pixels or a picture of PIL; returns its path. Raises OutputError."""
    import numpy as np
    from PIL import Image

    data = io.BytesIO()
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    image.save(data, "png")
    write_bytes(path, data.getvalue())
    return path


class Studio:
    """A model that draws the same shots with one adapter after the other, and keeps the pictures for later runs.

    The model is loaded when the first picture is missing. Use it as a context manager: at its end the oldest pictures
    leave the user's cache if it is too large, but none that this studio used.
    """

    def __init__(
        self,
        model: str | Path,
        shots: Sequence[Shot],
        *,
        folder: Path | None = None,
        device: str = "auto",
        settings: Path | None = None,
        pixels_at_once: int = 0,
    ) -> None:
        """model: a folder as diffusers saves it, or a single file; settings: as for `open_pipeline`.

        pixels_at_once: shots that differ in texts and seeds alone are drawn together, as many as have so many pixels,
        which is quicker where pictures are small. What is drawn with a picture may change its last bits.

        Raises:
            UsageError: a package is missing, the model is none of `KINDS`, no such device.
            InputError: the model's files cannot be read.
        """
        check_packages()
        self.model, self.settings, self.shots = Path(model), settings, tuple(shots)
        self.device = pick_device(device)
        self.kind = KINDS[check_model(self.model, settings)]
        self.base: Base = open_base(self.model)
        self.folder = default_folder() if folder is None else folder
        self._pixels_at_once = pixels_at_once
        self._own_cache = folder is None
        self._used: set[Path] = set()
        self.model_key = " ".join(map(_model_key, (self.model, *companions(self.model, settings))))
        self._loaded: tuple[str, Any] | None = None

    @property
    def dtype(self) -> str:
        """Dtype that the model works in: "float32" on a CPU, else its half precision, "float16" or "bfloat16"."""
        return "float32" if self.device == "cpu" else self.kind.half

    @property
    def other_dtype(self) -> str:
        """The other dtype that the model can work in, for a comparison of the two."""
        return self.kind.half if self.device == "cpu" else "float32"

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loaded = None
        self.base.close()
        if self._own_cache:
            trim(self.folder, CACHE_BYTES, self._used)

    def check(self, adapter: Path) -> None:
        """Check that the model can draw with this adapter; warnings say what of it and of the prompts is left out.

        Raises:
            InputError: the adapter is for another family of models, or has layers that diffusers does not know.
        """
        check_adapter(adapter, self.base)
        if not self.kind.negative and any(shot.prompt.negative for shot in self.shots):
            _log.warning("%s has no negative prompts; they are left out", self.kind.title)

    def draw(
        self,
        adapter: Path | None,
        label: str,
        *,
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        enough: Callable[[int, Path], bool] | None = None,
    ) -> list[Path]:
        """The picture files of all shots, with an adapter or with none; `label` is part of the names of new ones.

        enough: told the number and the file of each picture in turn; no more are drawn after the first for which it
        is true.

        Raises:
            InputError: the adapter cannot be loaded.
            NonFinite: a picture is NaN.
            OutputError: a picture cannot be written.
            UsageError: not enough memory.
        """
        dtype = dtype or self.dtype
        keys = self.picture_keys(adapter, dtype)
        paths = [next(filter(_is_complete, sorted(self.folder.glob(f"*_{key}.png"))), None) for key in keys]
        if None in paths:
            if self._loaded is None or self._loaded[0] != dtype:
                self.release()  # two of them may not fit into memory
                loaded = open_pipeline(self.model, device=self.device, dtype=dtype, settings=self.settings)
                self._loaded = (dtype, loaded)
            pipeline = self._loaded[1]
            with adapted(pipeline, adapter, self.base):
                for index, shot in enumerate(self.shots):
                    if paths[index] is None:
                        # It goes through the model together with other missing ones of its settings.
                        missing = [number for number, path in enumerate(paths) if not path]
                        settings = _settings(shot.prompt)
                        same = [number for number in missing if _settings(self.shots[number].prompt) == settings]
                        group = same[: max(1, self._pixels_at_once // (settings.width * settings.height))]
                        what = f"{shot.label}: {shot.prompt.width} × {shot.prompt.height} pixels do not fit into memory"
                        advice = "Give it a smaller --w and --h; pictures that are drawn stay."
                        with enough_memory(what, self.device, advice):
                            shots = [self.shots[number] for number in group]
                            pictures = draw_pictures(pipeline, self.kind, shots, self.device, dtype)
                        for number, picture in zip(group, pictures, strict=True):
                            drawn = self.shots[number]
                            name = f"{drawn.number:02d}_seed{drawn.seed}_{label}_{keys[number]}.png"
                            paths[number] = write_picture(self.folder / name, picture)
                    if progress:
                        progress(index + 1, len(self.shots))
                    path = paths[index]
                    if enough and path and enough(index, path):
                        break
        complete = [path for path in paths if path is not None]
        self._used.update(complete)
        return complete

    def release(self) -> None:
        """Forget the loaded model, until the next picture is drawn."""
        self._loaded = None
        gc.collect()

    def picture_keys(self, adapter: Path | None, dtype: str) -> list[str]:
        """For each shot a hash of everything that decides its picture."""
        import diffusers
        import torch

        files: list[Path] = []
        if adapter:
            with open_adapter(adapter) as opened:
                files += opened.store.files
                files += [files[0].parent / peft.CONFIG_FILE] if opened.as_folder else []
        facts = {
            "algorithm": _ALGORITHM,
            "model": self.model_key,
            "adapter": " ".join(map(sha256_file, files)),
            "device": self.device.partition(":")[0],
            "dtype": dtype,
            "versions": [diffusers.__version__, torch.__version__],
        }
        texts = (
            json.dumps(facts | {"prompt": asdict(shot.prompt), "seed": shot.start}, sort_keys=True)
            for shot in self.shots
        )
        return [hashlib.sha256(text.encode()).hexdigest()[:_KEY] for text in texts]


def _is_complete(path: Path) -> bool:
    """Whether a picture's file can be read to its end; an interrupted run may have cut it short."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except OSError:
        _log.warning("%s: damaged, drawn anew", path)
        return False
    return True


def trim(folder: Path, limit: int, keep: Collection[Path]) -> None:
    """Remove the oldest pictures of a folder until the rest has `limit` bytes, but none of `keep`."""
    stats = {path: path.stat() for path in folder.glob("*.png") if _FILE_NAME.search(path.name)}
    total = sum(stat.st_size for stat in stats.values())
    for path in sorted(stats, key=lambda path: stats[path].st_mtime_ns):
        if total <= limit:
            return
        if path not in keep:
            path.unlink(missing_ok=True)
            total -= stats[path].st_size


def _model_key(model: Path) -> str:
    """A quick identity of all the model's files: samples of their tensors, and small files from end to end."""
    if model.is_file():
        with open_tensors(model) as store:
            return content_fingerprint(store)
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*")):
        relative = path.relative_to(model)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        digest.update(f"{relative.as_posix()} {path.stat().st_size} ".encode())
        if path.suffix == ".safetensors":
            with open_tensors(path) as store:
                digest.update(content_fingerprint(store).encode())
        elif path.stat().st_size < _SMALL:
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- one picture --------------------------------------------------------------------------------


def draw_picture(
    pipeline: Any, kind: Kind, shot: Shot, device: str, dtype: str, encoded: Mapping[str, Any] | None = None
) -> Picture:
    """Draw one shot with the pipeline as it is: uint8 [height, width, 3].

    encoded: arguments of the pipeline instead of the prompt's texts. Raises NonFinite if the picture is NaN.
    """
    return draw_pictures(pipeline, kind, [shot], device, dtype, encoded)[0]


def draw_pictures(
    pipeline: Any,
    kind: Kind,
    shots: Sequence[Shot],
    device: str,
    dtype: str,
    encoded: Mapping[str, Any] | None = None,
) -> list[Picture]:
    """Draw shots that differ in texts and seeds alone, all at once; otherwise as `draw_picture`."""
    import numpy as np
    import torch
    from torch.nn.functional import pixel_shuffle, pixel_unshuffle

    prompt, vae = shots[0].prompt, pipeline.vae
    stride = pipeline.vae_scale_factor
    width, height = (side // (kind.patch * stride) * kind.patch * stride for side in (prompt.width, prompt.height))
    generators = [torch.Generator().manual_seed(shot.start) for shot in shots]
    # Float32 on the CPU gives the same noise on every machine and in every precision.
    size = (1, vae.config.latent_channels, height // stride, width // stride)
    noise = torch.cat([torch.randn(size, generator=generator) for generator in generators])
    noise = noise.to(device, getattr(torch, dtype))
    texts = {"prompt": [shot.prompt.prompt for shot in shots]}
    texts |= {"negative_prompt": [shot.prompt.negative for shot in shots]} if kind.negative else {}
    cuda = [device] if device.startswith("cuda") else []
    with torch.no_grad(), torch.random.fork_rng(cuda), _sampled_by(pipeline, prompt.sampler):
        latents = pipeline(
            latents=pixel_unshuffle(noise, 2).flatten(2).mT if kind.packed else noise,  # [n, h/2 · w/2, 4c] if packed
            generator=generators,
            width=width,
            height=height,
            num_inference_steps=prompt.steps,
            guidance_scale=prompt.scale,
            output_type="latent",
            return_dict=False,
            **texts if encoded is None else encoded,
        )[0]
        if kind.packed:
            latents = pixel_shuffle(latents.mT.reshape(len(shots), -1, noise.shape[2] // 2, noise.shape[3] // 2), 2)
        # Each VAE knows how its latents were scaled; SDXL's overflows in half precision.
        latents = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        with torch.autocast(device.partition(":")[0], enabled=False):
            decoded = vae.float().decode(latents, return_dict=False)[0]  # [n, 3, height, width]
    for shot, pixels in zip(shots, decoded, strict=True):
        if not pixels.isfinite().all():
            raise NonFinite(f"{shot.label}: becomes no picture in {dtype}, but NaN.")
    scaled = (decoded / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy() * 255
    return [np.rint(picture).astype(np.uint8) for picture in scaled]


def _settings(prompt: Prompt) -> Prompt:
    """What the pictures of a batch have in common."""
    return replace(prompt, prompt="", negative="", seed=None)


@contextmanager
def _sampled_by(pipeline: Any, sampler: str) -> Iterator[None]:
    """The pipeline with one of `SAMPLERS`, or with its own, for as long as this lasts."""
    from lorashrink.pictures.samplers import scheduler

    own = pipeline.scheduler
    velocity = own.config.get("prediction_type") == "v_prediction"
    try:
        # Fresh even if it is its own: some remember the picture before.
        pipeline.scheduler = (
            type(own).from_config(own.config) if sampler == OWN else scheduler(sampler, v_parameterization=velocity)
        )
        yield
    finally:
        pipeline.scheduler = own
