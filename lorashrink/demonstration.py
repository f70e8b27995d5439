"""The whole story on the example that is part of the package: a model of SDXL's architecture and adapters for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorashrink.automatic.run import shrink
from lorashrink.errors import OutputError, Progress
from lorashrink.insight.inspection import inspect
from lorashrink.pictures.pipelines import PACKAGES
from lorashrink.recipes.grammar import DEFAULT
from lorashrink.reports.report import ReportFile, report
from lorashrink.results.automatic import ShrinkReport
from lorashrink.results.inspection import Inspection
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.run import resize

EXAMPLE = Path(__file__).parent / "example"
MODEL, ADAPTER, TABLE = EXAMPLE / "model", EXAMPLE / "loras" / "style.safetensors", EXAMPLE / "table.safetensors"
_RECIPES = (DEFAULT, "rank=1", "fro_ckpt=1,thr=-2", "fro_ckpt,bytes", "calib,bytes")
_SIZES = (0.3, 0.5)  # MiB, of the recipes that name no size


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did and left behind."""

    commands: tuple[str, ...]  # the same by hand
    inspection: Inspection
    shrunk: ShrinkReport
    page: ReportFile
    pictures: tuple[str, ...]  # figures; without a model that draws, of sizes and errors only


def demo(output: str | Path = "demo-out", *, progress: Progress | None = None) -> Demo:
    """Inspect a style that was trained on the example model, shrink it, and try recipes.

    With the packages of `lorashrink[pictures]` the model draws with every one of them. Writes the adapter, figures and
    pages into the folder `output`, over those of an earlier demo. Raises OutputError.
    """
    folder = Path(output)
    drawing = all(find_spec(name) for name in PACKAGES)
    inspection = inspect(ADAPTER, base=MODEL, progress=progress)
    prompts = EXAMPLE / "prompts.txt"
    means: dict[str, Any] = {"model": MODEL, "prompts": prompts} if drawing else {"base": MODEL}
    shrunk = shrink(ADAPTER, **means, output=folder / "shrunk", force=True, progress=progress)
    recipe = shrunk.results[0].recipe
    plan = resize(ADAPTER, base=MODEL, calibration=TABLE, recipes=recipe, dtype="auto", output=folder, dry_run=True)
    page = report(
        ADAPTER,
        base=MODEL,
        recipes=_RECIPES,
        sizes=_SIZES,
        calibration=TABLE,
        output=folder / "report.html",
        force=True,
        images=MODEL if drawing else None,
        prompts=prompts if drawing else None,
        pictures=folder / "pictures" if drawing else None,
        progress=progress,
    )
    try:
        pictures = _figures(page, plan.results[0], folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written into ({error.strerror or error}).") from error
    return Demo(_commands(folder, drawing), inspection, shrunk, page, pictures)


def _figures(page: ReportFile, shrunk: FileResult, folder: Path) -> tuple[str, ...]:
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
        style.save_picture(pictures_by_size(page.sweep), folder / "sheet.png")
        names.append("sheet.png")
    return tuple(str(folder / name) for name in names)


def _commands(folder: Path, drawing: bool) -> tuple[str, ...]:
    recipes = [word for recipe in _RECIPES for word in ("-r", recipe)]
    images = ["--images", MODEL, "--prompts", EXAMPLE / "prompts.txt", "--images-out", folder / "pictures"]
    means = ["--model", MODEL, "--prompts", EXAMPLE / "prompts.txt"] if drawing else ["--base", MODEL]
    options = [*recipes, "--sizes", ",".join(map(str, _SIZES)), "--calibration", TABLE, *(images if drawing else ())]
    commands: tuple[Sequence[str | Path], ...] = (
        ["inspect", MODEL, ADAPTER],
        ["shrink", "-o", folder / "shrunk", *means, ADAPTER],
        ["report", "-o", folder / "report.html", *options, MODEL, ADAPTER],
    )
    return tuple(shlex.join(["lorashrink", *map(str, words)]) for words in commands)
