"""`sweep`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import (
    Adapter,
    Base,
    Calibration,
    Clip,
    Csv,
    Device,
    Dtype,
    Force,
    ImagesConfig,
    ImagesOut,
    Jobs,
    Prompts,
    Recipes,
    Seeds,
    Sizes,
    numbers_of,
    seeds_of,
    split_base,
)
from lorashrink.cli.printing import check_outputs, new_console, new_table, plain, write_csv
from lorashrink.errors import UsageError
from lorashrink.text import count_text, number_text, share_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.sweep import Pictures, Point, Sweep


def print_sweep(result: Sweep, terminal: Terminal) -> None:
    """The table of recipes, and which to begin with."""
    console = new_console()
    drawn = result.drawn
    columns = _likeness(drawn.none) if drawn else {}
    table = new_table(
        "recipe",
        "size",
        "of before",
        "error",
        "energy",
        "mean rank",
        *columns,
        "best",
        extra=(*columns, "energy", "mean rank"),
        everything=terminal.verbose > 0,
    )
    for point in result.points:
        table.add_row(
            point.recipe,
            size_text(point.bytes),
            share_text(point.bytes / result.bytes),
            share_text(point.relative_error),
            share_text(point.energy),
            number_text(point.mean_rank, ".1f"),
            *_likeness(point.pictures).values(),
            "*" if point.best else "",
        )
    console.print(table)
    console.print("* no other recipe is both smaller and closer")
    if drawn:
        for label, pictures in (
            ("without the adapter", drawn.none),
            (f"the whole adapter in {drawn.other_dtype}", drawn.floor),
        ):
            if pictures:
                console.print(f"{label}: {', '.join(f'{title} {text}' for title, text in _likeness(pictures).items())}")
        console.print(f"{count_text(len(drawn.files), 'picture')} each, in {Path(drawn.files[0]).parent}")
    if result.suggestion:
        console.print(f"begin with -r {result.suggestion.recipe}: {result.suggestion.reason}")


def _likeness(pictures: Pictures | None) -> dict[str, str]:
    """Title of each measure -> its mean as text."""
    from lorashrink.pictures.likeness import MEASURES

    means = {name: statistics.fmean(values) for name, values in pictures.values.items()} if pictures else {}
    return {measure.title: measure.text(means[measure.name]) for measure in MEASURES if measure.name in means}


def _csv_row(point: Point) -> dict[str, Any]:
    """A row of numbers: means and deviations of its pictures without the pictures."""
    row: dict[str, Any] = plain(point)
    pictures = row.pop("pictures") or {}
    return row | {name: number for name, number in pictures.items() if name not in ("files", "values")}


@command(print_sweep)
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
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Model to draw pictures with each recipe: SDXL, SD 1 to 3, or FLUX.1."),
    ] = None,
    images_config: ImagesConfig = None,
    prompts: Prompts = None,
    seeds: Seeds = "0",
    images_out: ImagesOut = None,
    clip: Clip = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw size against error and pictures, as .png or .svg.")
    ] = None,
    force: Force = False,
    as_csv: Csv = None,
) -> object:
    """Try many recipes on a LoRA and recommend one; writes no LoRA.

    Example: lorashrink sweep -r fro_ckpt=1,thr=-4.5..-2.5/9 -r rank=4 model.safetensors lora.safetensors
    Example: lorashrink sweep --images sdxl/ --prompts prompts.txt --plot curve.png model.safetensors lora.safetensors
    """
    from lorashrink.pictures.prompts import prompt_file

    sheet = plot.with_name(f"{plot.stem}_sheet.png") if plot and images else None
    likeness = plot.with_name(f"{plot.stem}_pictures{plot.suffix}") if plot and images else None
    check_outputs(
        [*adapter, base, calibration, images, images_config, prompts and prompt_file(prompts)],
        force,
        as_csv=as_csv,
        plot=plot,
        likeness=likeness,
        sheet=sheet,
    )
    if plot:
        from lorashrink.plots import style

        style.check(plot)
    base, adapters = split_base(adapter, base)
    if len(adapters) > 1:
        raise UsageError(f"{adapters[1]}: a sweep takes one adapter.")
    from lorashrink.sweeping.sweep import sweep as run

    result = run(
        adapters[0],
        base=base,
        recipes=recipe or (),
        sizes=numbers_of("--sizes", sizes),
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
        progress=terminal.progress,
    )
    if plot:
        from lorashrink.plots.quality import size_and_error

        style.save(size_and_error(result), plot)
    if likeness and sheet:
        from lorashrink.plots.comparison_sheet import pictures_by_size
        from lorashrink.plots.quality import size_and_pictures

        style.save(size_and_pictures(result), likeness)
        style.save_picture(pictures_by_size(result), sheet)
    if as_csv:
        write_csv(as_csv, [_csv_row(point) for point in result.points])
    return result
