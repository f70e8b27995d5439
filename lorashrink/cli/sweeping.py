"""`sweep`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashrink._version import __version__
from lorashrink.cli.application import session, split_base
from lorashrink.cli.options import (
    Base,
    Calibration,
    Csv,
    Debug,
    Device,
    Dtype,
    Force,
    Jobs,
    Json,
    Quiet,
    Recipes,
    Verbose,
    numbers_of,
    whole_number,
)
from lorashrink.cli.printing import (
    check_result,
    new_console,
    new_table,
    number_text,
    plain,
    print_json,
    share_text,
    size_text,
    write_csv,
)
from lorashrink.errors import UsageError

if TYPE_CHECKING:
    from lorashrink.results.sweep import Pictures, Point, Sweep


def sweep(
    adapter: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="One adapter: a file or PEFT folder.")],
    recipe: Recipes = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Sizes to try, in MiB: 4,8,16,32.")] = None,
    base: Base = None,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    calibration: Calibration = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Model that draws pictures with each recipe: SDXL, SD 1 to 3 or FLUX.1."),
    ] = None,
    images_config: Annotated[
        Path | None,
        typer.Option("--images-config", help="For --images in one file: a model folder with settings and tokenizers."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="What to draw: .txt, .toml or .json as for training.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of each prompt, on top of its own: 0,1,2.")] = "0",
    images_out: Annotated[
        Path | None, typer.Option("--images-out", help="Folder of the pictures; those there are not drawn again.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="Folder of a CLIP model that compares pictures too; optional.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw size against error, or against pictures, into a .png or .svg.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Try many recipes on one adapter: size against error, and which to begin with. Writes no adapter.

    Example: lorashrink sweep -r fro_ckpt=1,thr=-4.5..-2.5/9 -r rank=4 model.safetensors lora.safetensors
    Example: lorashrink sweep --images sdxl/ --prompts prompts.txt --plot curve.png model.safetensors lora.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        sheet = plot.with_name(f"{plot.stem}_sheet.png") if plot and images else None
        figure = plot.with_name(f"{plot.stem}_pictures{plot.suffix}") if plot and images else None
        for path in (as_csv, plot, figure, sheet):
            check_result(path, adapter, force)
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
            seeds=[whole_number("--seeds", seed) for seed in numbers_of("--seeds", seeds)],
            pictures=images_out,
            settings=images_config,
            clip=clip,
            progress=progress,
        )
        if plot:
            from lorashrink.plots.quality import size_and_error

            style.save(size_and_error(result), plot)
        if figure and sheet:
            from lorashrink.plots.comparison_sheet import pictures_by_size
            from lorashrink.plots.quality import size_and_pictures

            style.save(size_and_pictures(result), figure)
            style.save_picture(pictures_by_size(result), sheet)
    if as_csv:
        write_csv(as_csv, [_with_pictures(point) for point in result.points])
    if as_json:
        print_json({"version": __version__, **plain(result)})
    elif not quiet:
        print_sweep(result)


def _with_pictures(point: Point) -> dict[str, Any]:
    """A row of numbers: means and deviations of its pictures without the pictures."""
    row: dict[str, Any] = plain(point)
    pictures = row.pop("pictures") or {}
    return row | {name: number for name, number in pictures.items() if name not in ("files", "values")}


def print_sweep(result: Sweep) -> None:
    console = new_console()
    drawn = result.drawn
    columns = _likeness(drawn.none) if drawn else {}
    table = new_table("recipe", "size", "of before", "error", "energy", "mean rank", *columns, "best")
    for point in result.points:
        table.add_row(
            point.recipe,
            size_text(point.bytes),
            share_text(point.bytes / result.bytes),
            share_text(point.relative_error),
            number_text(point.energy),
            number_text(point.mean_rank, ".1f"),
            *_likeness(point.pictures).values(),
            "*" if point.best else "",
        )
    console.print(table)
    console.print("* no other recipe is both smaller and closer", markup=False)
    if drawn:
        count = len(drawn.files)
        ends = (("without the adapter", drawn.none), (f"the whole adapter in {drawn.other_dtype}", drawn.floor))
        for what, pictures in ends:
            if pictures:
                numbers = ", ".join(f"{title} {text}" for title, text in _likeness(pictures).items())
                console.print(f"{what}: {numbers}", markup=False)
        console.print(f"{count} picture{'s' * (count != 1)} each, in {Path(drawn.files[0]).parent}", markup=False)
    if result.suggestion:
        console.print(f"begin with -r {result.suggestion.recipe}: {result.suggestion.reason}", markup=False)


def _likeness(pictures: Pictures | None) -> dict[str, str]:
    """Title of each measure -> its mean as text."""
    from lorashrink.pictures.likeness import MEASURES

    means = {name: statistics.fmean(values) for name, values in pictures.values.items()} if pictures else {}
    return {measure.title: measure.text(means[measure.name]) for measure in MEASURES if measure.name in means}
