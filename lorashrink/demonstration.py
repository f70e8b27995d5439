"""Inspect, shrink and report on the package lorashrink_example: a small trained model and adapters for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorashrink.automatic.run import shrink
from lorashrink.errors import OutputError, Progress, UsageError
from lorashrink.files.reading import PICKLE_SUFFIXES
from lorashrink.insight.inspection import inspect
from lorashrink.pictures.pipelines import PACKAGES
from lorashrink.recipes.grammar import DEFAULT
from lorashrink.reports.report import ReportFile, report
from lorashrink.results.automatic import ShrinkReport
from lorashrink.results.inspection import Inspection
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.run import resize

_RECIPES = (DEFAULT, "rank=1", "fro_ckpt=1,thr=-2", "fro_ckpt,bytes", "calib,bytes")
_SIZES = (0.25, 0.39)  # MiB, of the recipes that name no size
_DTYPE = "auto"  # as `shrink` takes it


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did and wrote."""

    commands: tuple[str, ...]  # the same by hand
    inspection: Inspection
    shrunk: ShrinkReport
    page: ReportFile
    pictures: tuple[str, ...]  # figures; without a model that draws, of sizes and errors only


def demo(output: str | Path = "demo-out", *, progress: Progress | None = None) -> Demo:
    """Inspect a style that was trained on the example model, shrink it, and try recipes.

    With the packages of `lorashrink[pictures]` the model draws with every one of them. Writes the adapter, figures and
    pages into the folder `output`, over those of an earlier demo. Raises UsageError without the package
    lorashrink_example, and OutputError.
    """
    example, folder = _Example.installed(), Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"-o {output}: is a file. Name a folder.")
    if folder.suffix in (".safetensors", *PICKLE_SUFFIXES) and not folder.exists():
        raise OutputError(f"-o {output}: is the name of a file. Name a folder.")
    drawing = all(find_spec(name) for name in PACKAGES)
    inspection = inspect(example.adapter, base=example.model, progress=progress)
    means: dict[str, Any] = {"model": example.model, "prompts": example.prompts} if drawing else {"base": example.model}
    shrunk = shrink(example.adapter, **means, output=folder / "shrunk", force=True, progress=progress)
    shared: dict[str, Any] = {"base": example.model, "calibration": example.table}
    recipe = shrunk.results[0].recipe
    plan = resize(example.adapter, **shared, recipes=recipe, dtype=_DTYPE, output=folder, dry_run=True)
    page = report(
        example.adapter,
        **shared,
        recipes=_RECIPES,
        sizes=_SIZES,
        dtype=_DTYPE,
        output=folder / "report.html",
        force=True,
        images=example.model if drawing else None,
        prompts=example.prompts if drawing else None,
        pictures=folder / "pictures" if drawing else None,
        progress=progress,
    )
    try:
        pictures = write_figures(page, plan.results[0], folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written into ({error.strerror or error}).") from error
    return Demo(example.commands(folder, drawing), inspection, shrunk, page, pictures)


@dataclass(frozen=True, slots=True)
class _Example:
    """The paths of the files that the demo works on."""

    model: Path
    adapter: Path
    table: Path
    prompts: Path

    @classmethod
    def installed(cls) -> _Example:
        """Raises UsageError without the package."""
        try:
            from lorashrink_example import path
        except ModuleNotFoundError:
            raise UsageError(
                "the demo's model and adapter are a package of their own. Install it: pip install lorashrink-example "
                "(in a copy of the repository: pip install ./example)"
            ) from None
        return cls(path("model"), path("loras", "style.safetensors"), path("table.safetensors"), path("prompts.txt"))

    def commands(self, folder: Path, drawing: bool) -> tuple[str, ...]:
        """The same by hand: inspect, shrink and report."""
        shrinking: list[object] = ["--base", self.model]
        trying: list[object] = [word for recipe in _RECIPES for word in ("-r", recipe)]
        trying += ["--sizes", ",".join(map(str, _SIZES)), "-t", _DTYPE, "--calibration", self.table]
        if drawing:
            shrinking = ["--model", self.model, "--prompts", self.prompts]
            trying += ["--images", self.model, "--prompts", self.prompts, "--images-out", folder / "pictures"]
        commands: tuple[Sequence[object], ...] = (
            ["inspect", self.model, self.adapter],
            ["shrink", "-o", folder / "shrunk", *shrinking, self.adapter],
            ["report", "-o", folder / "report.html", *trying, self.model, self.adapter],
        )
        return tuple(shlex.join(["lorashrink", *map(str, words)]) for words in commands)


def write_figures(page: ReportFile, shrunk: FileResult, folder: Path) -> tuple[str, ...]:
    """Write ranks, sizes and pictures into a folder; their paths."""
    from lorashrink.pictures.drawing import write_picture
    from lorashrink.plots import style
    from lorashrink.plots.comparison_sheet import pictures_by_size
    from lorashrink.plots.quality import size_and_error, size_and_pictures
    from lorashrink.plots.ranks import rank_per_block

    assert page.sweep, "the example can be shrunk"
    figures = {
        "ranks.png": rank_per_block(shrunk),
        "sizes.png": size_and_pictures(page.sweep) if page.sweep.drawn else size_and_error(page.sweep),
    }
    for name, figure in figures.items():
        style.save(figure, folder / name)
    names = list(figures)
    if page.sweep.drawn:
        write_picture(folder / "sheet.png", pictures_by_size(page.sweep))
        names.append("sheet.png")
    return tuple(str(folder / name) for name in names)
