"""`sweep`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.conditions import FailOn, Measured
from lorashrink.cli.options import (
    Adapter,
    Base,
    Calibration,
    Clip,
    Csv,
    Device,
    Dtype,
    Force,
    Images,
    ImagesConfig,
    ImagesOut,
    Jobs,
    Prompts,
    Recipes,
    Seeds,
    Sizes,
    Text,
    seeds_of,
    sizes_of,
    split_base,
)
from lorashrink.cli.printing import check_outputs, new_console, write_csv
from lorashrink.cli.tables import TextTable
from lorashrink.errors import UsageError
from lorashrink.results.shown import plain
from lorashrink.text import count_text, decibel_text, number_text, share_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.sweep import Pictures, Point, Sweep


def print_sweep(result: Sweep, terminal: Terminal) -> None:
    """The table of recipes, and the recommended one."""
    console = new_console()
    points, drawn = result.points, result.drawn
    likeness = [_likeness(point.pictures) for point in points]
    means = {title: [texts[title] for texts in likeness] for title in _likeness(drawn.none if drawn else None)}
    worst: dict[str, list[str]] = {}
    if drawn:
        worst["worst picture"] = [decibel_text(point.pictures.worst_psnr) for point in points if point.pictures]
    elif result.read:
        worst["worst passage"] = [f"{point.texts.worst_distance:.2g}" for point in points if point.texts]
        worst["perplexity"] = [number_text(point.texts.perplexity) for point in points if point.texts]
    predicted = {}
    if any(point.predicted_db for point in points):
        predicted["predicted"] = [decibel_text(point.predicted_db) if point.predicted_db else "-" for point in points]
    columns = {
        "recipe": [point.recipe for point in points],
        "size": [size_text(point.bytes) for point in points],
        "of before": [share_text(point.bytes / result.bytes) for point in points],
        **worst,
        "error": [share_text(None if point.calibrated else point.relative_error) for point in points],
        **predicted,
        "energy": [share_text(point.energy) for point in points],
        "mean rank": [number_text(point.mean_rank, ".1f") for point in points],
        **means,
        "best": ["*" * point.best + " recommended" * (point is result.suggested) for point in points],
    }
    extra = ("error", "of before", "predicted", *means, "energy", "mean rank")
    console.print(TextTable(columns, extra, everything=terminal.verbose > 0))
    console.print("* no other recipe is both smaller and closer")
    if any(point.calibrated for point in result.points):
        console.print("calibrated recipes keep what matters for outputs; their error of the weights says little")
    if drawn:
        for label, pictures in (
            ("without the adapter", drawn.none),
            (f"the original adapter in {drawn.other_dtype}", drawn.floor),
        ):
            if pictures:
                console.print(f"{label}: {', '.join(f'{title} {text}' for title, text in _likeness(pictures).items())}")
        console.print(f"{count_text(len(drawn.files), 'picture')} each, in {Path(drawn.files[0]).parent}")
    if result.read:
        read = result.read
        console.print(
            f"worst passage: {read.measure} from the original adapter; without it {read.none.worst_distance:.2g}"
        )
        console.print(f"{count_text(read.passages, 'passage')} with {count_text(read.tokens, 'token')}")
    if result.suggestion:
        console.print(f"recommended: -r {result.suggestion.recipe}, {result.suggestion.reason}")


def _likeness(pictures: Pictures | None) -> dict[str, str]:
    """Title of each measure -> its mean as text."""
    from lorashrink.pictures.likeness import MEASURES

    return {
        measure.title: measure.text(getattr(pictures, measure.name))
        for measure in MEASURES
        if pictures and measure.name in pictures.values
    }


def csv_row(point: Point) -> dict[str, Any]:
    """A row of numbers: means and deviations of its pictures without the pictures."""
    row: dict[str, Any] = plain(point)
    texts = row.pop("texts") or {}
    row |= {name: texts[name] for name in ("distance", "worst_distance", "perplexity") if texts}
    pictures = row.pop("pictures") or {}
    return row | {name: number for name, number in pictures.items() if name not in ("files", "values")}


def measured(result: Sweep) -> Iterator[tuple[str, Measured]]:
    """What `--fail-on` compares: of pictures the worst."""
    for point in result.points:
        worst = point.pictures.worst_psnr if point.pictures else None
        yield point.recipe, {"error": point.relative_error, "psnr": worst, "size": point.bytes}


@command(print_sweep, measure=measured, quantities=("error", "psnr", "size"))
def sweep(
    terminal: Terminal,
    adapter: Adapter,
    recipe: Recipes = None,
    sizes: Sizes = None,
    base: Base = None,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    calibration: Calibration = None,
    images: Images = None,
    images_config: ImagesConfig = None,
    prompts: Prompts = None,
    seeds: Seeds = "0",
    images_out: ImagesOut = None,
    clip: Clip = None,
    text: Text = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw size against error and pictures, as .png or .svg.")
    ] = None,
    force: Force = False,
    fail_on: FailOn = None,
    as_csv: Csv = None,
) -> object:
    """Try many recipes on a LoRA and recommend one; writes no LoRA.

    Example: lorashrink sweep -r fro_ckpt=1,thr=-4.5..-2.5/9 -r rank=4 model.safetensors lora.safetensors
    Example: lorashrink sweep --images sdxl/ --prompts prompts.txt --plot curve.png model.safetensors lora.safetensors
    """
    from lorashrink.pictures.prompts import prompt_file

    sheet = plot.with_name(f"{plot.stem}_sheet.png") if plot and images else None
    likeness = plot.with_name(f"{plot.stem}_pictures{plot.suffix}") if plot and images else None
    answers = plot.with_name(f"{plot.stem}_text{plot.suffix}") if plot and text else None
    check_outputs(
        [*adapter, base, calibration, images, images_config, prompts and prompt_file(prompts), text],
        force,
        as_csv=as_csv,
        plots=[plot, likeness, sheet, answers],
        pictures=images_out,
    )
    if plot:
        from lorashrink.plots import style

        style.check(plot)
    base, adapters = split_base("sweep", adapter, base)
    if len(adapters) > 1:
        raise UsageError(f"{adapters[1]}: a sweep takes one adapter.")
    from lorashrink.sweeping.sweep import sweep as run

    result = run(
        adapters[0],
        base=base,
        recipes=recipe or (),
        sizes=sizes_of("--sizes", sizes),
        dtype=dtype,
        device=device,
        jobs=jobs,
        calibration=calibration,
        images=images,
        prompts=prompts,
        seeds=seeds_of(seeds),
        pictures=images_out,
        settings=images_config,
        clip=clip,
        text=text,
        progress=terminal.progress,
    )
    if plot:
        from lorashrink.plots.quality import size_and_error

        style.save(size_and_error(result), plot)
    if answers:
        from lorashrink.plots.quality import size_and_texts

        style.save(size_and_texts(result), answers)
    if likeness and sheet:
        from lorashrink.pictures.drawing import write_picture
        from lorashrink.plots.comparison_sheet import pictures_by_size
        from lorashrink.plots.quality import size_and_pictures

        style.save(size_and_pictures(result), likeness)
        write_picture(sheet, pictures_by_size(result))
    if as_csv:
        write_csv(as_csv, [csv_row(point) for point in result.points])
    return result
