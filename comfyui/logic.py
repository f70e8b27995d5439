"""What the nodes do, without ComfyUI: targets, shrunk LoRAs, reports, pictures and files."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import lorashrink as ls
from lorashrink.automatic.method import Method
from lorashrink.automatic.methods import Methods
from lorashrink.automatic.sidecars import copy_sidecar, sidecars
from lorashrink.bases import Base
from lorashrink.errors import NotABase, OutputError, UsageError
from lorashrink.files.store import MIXTURES, OUTPUT_DTYPES
from lorashrink.linking.inputs import is_sum, to_sum
from lorashrink.pictures.likeness import ms_ssim, psnr
from lorashrink.recipes.levels import LEVELS
from lorashrink.results.prepared import Outcome
from lorashrink.shrinking.prepared import Prepared
from lorashrink.text import decibel_text, percent_text, share_text, size_text, span_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

DTYPES = (*MIXTURES, *(name for name in OUTPUT_DTYPES if not name.isdigit()))

# --- targets ------------------------------------------------------------------------------------

QUALITY, SIZE, RANK, RECIPE = "quality", "size in MB", "rank", "recipe"
TARGETS = (QUALITY, SIZE, RANK, RECIPE)
QUALITIES = tuple(LEVELS)


def method_for(source: str, base: Base | None) -> Method:
    """What `lorashrink shrink` would compare the LoRA, or the first of a sum, with: a table, the model or itself alone.

    Raises LorashrinkError.
    """
    first = to_sum([source]).terms[0][0] if is_sum(source) else source
    with Methods(base, None) as methods:
        return methods.of(first)


def recipe_for(
    target: str,
    method: Method,
    *,
    quality: str = "high",
    megabytes: float = 50.0,
    rank: int = 16,
    recipe: str = "",
) -> ls.Recipe:
    """The recipe of a target, by the method that `shrink` would take. megabytes: millions of bytes.

    Raises RecipeError.
    """
    texts = {
        QUALITY: method.of_level(LEVELS[quality]),
        SIZE: method.of_size(megabytes * 1e6),
        RANK: method.of_rank(rank),
        RECIPE: recipe.strip(),
    }
    return ls.Recipe.parse(texts[target])


# --- the model that ComfyUI has loaded ----------------------------------------------------------


class Weights(Mapping[str, Any]):
    """The weights of a loaded model by the names that a file would have, without what LoRAs added to them.

    Tensors are taken from the model when they are read, and the model is not kept alive.

    parts: prefix of the names -> (module, the original weights that are put back when LoRAs are taken off).
    """

    def __init__(self, parts: Mapping[str, tuple[torch.nn.Module, Mapping[str, Any]]]) -> None:
        self._names: dict[str, tuple[Callable[[], torch.nn.Module | None], Mapping[str, Any], str]] = {}
        for prefix, (module, originals) in parts.items():
            reference = weakref.ref(module)
            tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
            for name, _ in tensors:
                self._names[prefix + name] = (reference, originals, name)

    def __getitem__(self, key: str) -> Tensor:
        reference, originals, name = self._names[key]
        module = reference()
        if module is None:
            raise NotABase("the model was unloaded meanwhile. Queue the workflow again.")
        original = originals.get(name)
        path, _, last = name.rpartition(".")
        held: Tensor = getattr(module.get_submodule(path), last) if original is None else original.weight
        weight = held.detach()
        return weight if type(weight) is torch.Tensor else weight.dequantize()  # ComfyUI has packed tensors of its own

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# Module of a diffusion model -> (id of the text encoders' module, base). Opening one samples all weights.
_bases: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, Base]] = weakref.WeakKeyDictionary()


def base_of(model: Any, clip: Any = None) -> Base | None:
    """The base in a MODEL and a CLIP of ComfyUI; None where lorashrink does not know this kind of model."""
    encoder = None if clip is None else clip.cond_stage_model
    remembered = _bases.get(model.model)
    if remembered and remembered[0] == id(encoder):
        return remembered[1]
    parts = {"": (model.model, model.backup)}
    if clip is not None:
        parts["text_encoders."] = (encoder, clip.patcher.backup)
    try:
        base = ls.open_base(Weights(parts))
    except NotABase:
        return None
    _bases[model.model] = (id(encoder), base)
    return base


# --- shrunk LoRAs -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A LoRA and what is to become of it: the value of LORASHRINK sockets."""

    prepared: Prepared
    outcome: Outcome
    source: str  # path, or a weighted sum of paths
    bytes_before: int

    @property
    def recipe(self) -> str:
        """The recipe as text."""
        return self.outcome.recipe

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the shrunk LoRA."""
        return self.prepared.state_dict(self.recipe, dtype=self.outcome.dtype)

    @property
    def title(self) -> str:
        """The source's name, or those of a sum with their weights."""
        if not is_sum(self.source):
            return Path(self.source).name
        return " + ".join(f"{weight:g} × {path.name}" for path, weight in to_sum([self.source]).terms)


def _stamp(source: str) -> tuple[object, ...]:
    path = Path(source)
    if not path.is_file():
        return (source,)
    stat = path.stat()
    return source, stat.st_size, stat.st_mtime_ns


# What files and bases were prepared, so that files are not hashed again; lorashrink itself bounds the memory.
_prepared: weakref.WeakValueDictionary[tuple[object, ...], Prepared] = weakref.WeakValueDictionary()


def prepare(source: str, base: Base | None, calibration: Path | None = None) -> Prepared:
    """The decomposed LoRA, at once if it was asked for before. Raises LorashrinkError."""
    key = (*_stamp(source), base.fingerprint if base else None, *(_stamp(str(calibration)) if calibration else ()))
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = ls.prepare(source, base=base, calibration=calibration)
        _prepared[key] = prepared
    return prepared


def shrink(
    source: str, recipe: ls.Recipe, *, dtype: str = "same", base: Base | None = None, calibration: Path | None = None
) -> Shrunk:
    """What the recipe makes of a LoRA; tensors are not computed yet. Raises LorashrinkError."""
    prepared = prepare(source, base, calibration)
    if recipe.needs_base and base is None:
        raise UsageError(
            f"recipe '{recipe}' compares the LoRA with its model, and lorashrink does not know this kind of model. "
            "Choose another target, or a recipe without fro_ckpt, such as bytes,size=32."
        )
    outcome = prepared.at(recipe, dtype=dtype)
    return Shrunk(prepared, outcome, source, prepared.adapter.store.nbytes)


def report(shrunk: Shrunk, method: Method | None = None) -> str:
    """What happened, in plain words. method: what the target was reached with."""
    outcome, before = shrunk.outcome, shrunk.bytes_before
    ranks = [rank for rank in outcome.ranks.values() if rank]
    removed = len(outcome.ranks) - len(ranks)
    lines = [
        shrunk.title,
        f"{size_text(before)} before, {size_text(outcome.bytes)} now: {share_text(outcome.bytes / before)}",
        f"error of the weights {percent_text(outcome.relative_error)}, energy kept {share_text(outcome.energy)}",
        f"ranks {span_text(ranks)} in {len(ranks)} layers" + (f", {removed} layers removed" if removed else ""),
        f"recipe {outcome.recipe}, dtype {outcome.dtype}",
        *([method.why] if method else []),
    ]
    if outcome.copied:
        lines.append(
            f"{outcome.copied} tensors stay as they are. With a recipe that looks at the model, connect CLIP too: the "
            "layers of the text encoders are compared with it."
        )
    if outcome.bytes >= before:
        lines.append("This is no smaller than the file itself: choose a smaller target, or keep the file.")
    return "\n".join(lines)


def curve_figure(shrunk: Shrunk, method: Method) -> Figure:
    """Size against error of the LoRA by a method, with the target ringed."""
    from lorashrink.plots.curve import size_and_choice

    return size_and_choice(shrunk.prepared.curve(method.score, dtype=shrunk.outcome.dtype), shrunk.outcome)


# --- looking ------------------------------------------------------------------------------------


def facts(source: str, base: Base | None) -> tuple[str, Figure]:
    """(what is known of a LoRA in plain words, its spectra per block or, with a base, its norms per block and kind).

    Raises LorashrinkError.
    """
    from lorashrink.plots.heat import norms_by_kind
    from lorashrink.plots.spectra import spectra_per_block

    inspection = ls.inspect([source], base=base, spectrum=True)
    if inspection.failed:
        raise UsageError(inspection.failed[0].error)
    (table,) = inspection.files
    ranks = span_text([row.rank for row in table.layers])
    lines = [
        f"{Path(source).name}: {size_text(table.bytes)}, {table.algo} for {table.family or 'an unknown model'}",
        f"{len(table.layers)} layers of rank {ranks}, {table.dtype}, names as {table.naming} writes them",
        *(f"{label}: {text}" for label, text in table.notes.items()),
        *table.loads.lines,
        *(finding.text for finding in table.health),
    ]
    return "\n".join(lines), norms_by_kind(table) if base is not None else spectra_per_block(table)


def overlap(weighted: Sequence[tuple[str, float]], base: Base | None) -> tuple[str, Figure]:
    """(advice on LoRAs that are used together, their likeness as tables). Raises LorashrinkError."""
    from lorashrink.plots.overlap import overlap_matrices

    result = ls.overlap([f"{path}:{weight:.12g}" for path, weight in weighted], base=base)
    problems = [failure.error for failure in result.failed]
    return "\n".join([*(line.text for line in result.advice), *problems]), overlap_matrices(result)


def sum_of(weighted: Sequence[tuple[str, float]]) -> str:
    """The weighted sum of LoRAs, as `merge` and `shrink` take it. Raises UsageError."""
    if not any(weight for _, weight in weighted):
        raise UsageError("the strengths are all 0, and so is the sum. Give at least one LoRA another strength.")
    return ",".join(f"{path}:{weight:.12g}" for path, weight in weighted)


def to_image(figure: Figure) -> Tensor:
    """A figure as an IMAGE of ComfyUI: float32 [1, height, width, 3] from 0 to 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(144)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels.copy()).float()[None] / 255


# --- pictures side by side ----------------------------------------------------------------------

_GAP, _LINE, _TEXT, _SMALLEST = 12, 24, 18, 256  # pixels


def grid(full: Tensor, columns: Sequence[tuple[Tensor, Shrunk | None]], bytes_before: int | None = None) -> Tensor:
    """Pictures with the full LoRA beside those with shrunk ones, with sizes, PSNR and MS-SSIM over each column.

    full and each column: IMAGE, float [pictures, height, width, 3] from 0 to 1. Returns one IMAGE. Raises UsageError
    if columns have other pictures than `full`.
    """
    from PIL import Image, ImageDraw

    from lorashrink.plots.sheet import sheet_font
    from lorashrink.plots.style import INK

    for pictures, _ in columns:
        if pictures.shape != full.shape:
            raise UsageError(
                f"pictures of {_shape(pictures)} stand beside {_shape(full)}. Draw both with the same seed and size."
            )
    heads = [["full LoRA", size_text(bytes_before) if bytes_before else ""]]
    for pictures, shrunk in columns:
        heads.append([size_text(shrunk.outcome.bytes) if shrunk else "shrunk LoRA", *_likeness(full, pictures)])
    times = max(1, _SMALLEST // max(full.shape[1:3]))  # specks are enlarged
    count, height, width = full.shape[0], full.shape[1] * times, full.shape[2] * times
    font = sheet_font(_TEXT)
    step = _GAP + max(width, *(round(font.getlength(line)) for lines in heads for line in lines))
    top = _GAP + max(map(len, heads)) * _LINE
    sheet = Image.new("RGB", (_GAP + step * len(heads), top + (height + _GAP) * count), "white")
    drawing = ImageDraw.Draw(sheet)
    for number, (lines, pictures) in enumerate(zip(heads, [full, *(column for column, _ in columns)], strict=True)):
        left = _GAP + number * step
        for line, text in enumerate(lines):
            drawing.text((left, _GAP // 2 + line * _LINE), text, fill=INK, font=font)
        for row in range(count):
            picture = Image.fromarray(_bytes(pictures[row])).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top + row * (height + _GAP)))
    return torch.from_numpy(np.asarray(sheet).copy()).float()[None] / 255


def _likeness(full: Tensor, pictures: Tensor) -> list[str]:
    """Lines with the mean PSNR and MS-SSIM."""
    pairs = [(_bytes(a), _bytes(b)) for a, b in zip(full, pictures, strict=True)]
    lines = [f"PSNR {decibel_text(sum(psnr(a, b) for a, b in pairs) / len(pairs))}"]
    if min(full.shape[1:3]) >= 11:  # MS-SSIM needs a window
        lines.append(f"MS-SSIM {sum(ms_ssim(a, b) for a, b in pairs) / len(pairs):.4f}")
    return lines


def _bytes(picture: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()


def _shape(pictures: Tensor) -> str:
    return f"{pictures.shape[0]} × {pictures.shape[2]}×{pictures.shape[1]}"


# --- saving -------------------------------------------------------------------------------------


def save(shrunk: Shrunk, name: str = "", *, overwrite: bool = False) -> list[Path]:
    """Write the shrunk LoRA beside its source, with copies of the files that go with it; the paths, LoRA first.

    name: without folder or ending; "" is the source's with the recipe behind it. Raises OutputError if files exist
    and `overwrite` is not set; the source itself is never replaced.
    """
    merged = is_sum(shrunk.source)
    source = to_sum([shrunk.source]).location if merged else Path(shrunk.source)
    stem = name.strip().removesuffix(".safetensors") or f"{source.stem}_{ls.Recipe.parse(shrunk.recipe).file_items()}"
    if Path(stem).name != stem or stem.startswith(".") or "\\" in stem:
        raise OutputError(f"'{stem}' is no name of a file; give one without a folder.")
    path = source.with_name(f"{stem}.safetensors")
    result = shrunk.prepared.save(shrunk.recipe, path, dtype=shrunk.outcome.dtype, force=overwrite)
    paths = [Path(result.output)]
    if not merged:
        for sidecar, copy in sidecars(source, path, overwrite=overwrite):
            copy_sidecar(sidecar, copy, path)
            paths.append(copy)
    return paths
