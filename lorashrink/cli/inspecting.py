"""`inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.application import exit_with, session, split_base
from lorashrink.cli.options import Base, Csv, Debug, Device, Force, Jobs, Json, Quiet, Recursive, Verbose
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
    from rich.console import Console

    from lorashrink.results.inspection import AdapterTable, Inspection


def inspect(
    files: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="Adapters: files, folders or globs.")],
    base: Base = None,
    header: Annotated[bool, typer.Option("--header", help="Read headers only: instant, without norms.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="List all singular values (with --json).")] = False,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Tell the size and error that some recipes would give.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw spectra, and norms with a base: NAME.png gives NAME_spectra.png, ..."),
    ] = None,
    recursive: Recursive = False,
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what is inside adapters: how they were trained, ranks, alphas and norms, and what is unusual.

    Example: lorashrink inspect model.safetensors lora.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.insight.inspection import inspect as run

        spectra, heat = (plot and plot.with_name(f"{plot.stem}_{what}{plot.suffix}") for what in ("spectra", "norms"))
        for path in (as_csv, spectra, heat):
            check_result(path, files, force)
        base, adapters = split_base(files, base)
        if plot:
            from lorashrink.plots import style

            style.check(plot)
            _check_drawable(adapters, header)
        inspection = run(
            adapters,
            base=base,
            header=header,
            spectrum=spectrum or plot is not None,
            recommend=recommend,
            recursive=recursive,
            device=device,
            jobs=jobs,
            progress=progress,
        )
        if as_csv:
            write_csv(as_csv, [{"path": each.path, **plain(row)} for each in inspection.files for row in each.layers])
        if spectra and heat:
            _draw_inspection(inspection, spectra, heat if base else None)
    if as_json:
        print_json(plain(inspection))
    elif not quiet:
        _print_inspection(inspection, verbose)
    exit_with(list(inspection.failed.values()), done=bool(inspection.files))


def _check_drawable(adapters: Sequence[str], header: bool) -> None:
    if header:
        raise UsageError("--plot: headers alone tell nothing to draw; leave --header out.")
    if len(adapters) > 1:
        raise UsageError(f"--plot: draws one adapter, and {len(adapters)} are given.")


def _draw_inspection(inspection: Inspection, spectra: Path, heat: Path | None) -> None:
    from lorashrink.plots import style
    from lorashrink.plots.heat import norms_by_kind
    from lorashrink.plots.spectra import spectra_per_block

    if len(inspection.files) > 1:
        raise UsageError(f"--plot: draws one adapter, and {len(inspection.files)} were found.")
    for each in inspection.files:
        style.save(spectra_per_block(each), spectra)
        if heat:
            style.save(norms_by_kind(each), heat)


def _print_inspection(inspection: Inspection, verbose: int) -> None:
    console = new_console()
    if len(inspection.files) == 1 or verbose:
        for each in inspection.files:
            _print_adapter(console, each)
    if len(inspection.files) > 1:
        _print_side_by_side(console, inspection.files)


def _print_side_by_side(console: Console, files: Sequence[AdapterTable]) -> None:
    table = new_table("file", "size", "family", "algo", "layers", "rank", "alpha", "fro", "fro/base", "flags")
    for each in files:
        table.add_row(
            Path(each.path).name,
            size_text(each.bytes),
            each.family or "-",
            each.algo,
            str(len(each.layers)),
            _span([row.rank for row in each.layers]),
            _span([row.alpha for row in each.layers if row.alpha is not None]),
            number_text(each.fro),
            share_text(each.fro_ratio),
            " ".join(finding.flag for finding in each.health),
        )
    console.print(table)


def _span(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _print_recommendations(console: Console, each: AdapterTable) -> None:
    if not each.recommendations:
        console.print("no recipe to recommend: none of the usual ones can be applied to this file", markup=False)
        return
    table = new_table("recipe", "size", "of before", "error", "energy")
    for row in each.recommendations:
        table.add_row(
            row.recipe,
            size_text(row.bytes),
            share_text(row.bytes / each.bytes),
            share_text(row.relative_error),
            share_text(row.energy),
        )
    console.print(table)


def _print_adapter(console: Console, each: AdapterTable) -> None:
    width = max(map(len, each.notes), default=0)
    for label, text in each.notes.items():
        console.print(f"{label:<{width}}  {text}", markup=False)
    layers = new_table(
        "layer",
        "block",
        "kind",
        "algo",
        "shape",
        "rank",
        "alpha",
        "dtype",
        "fro",
        "spectral",
        "eff. rank",
        "fro/base",
        "flags",
    )
    for row in each.layers:
        layers.add_row(
            row.name,
            row.block,
            row.kind,
            row.algo,
            "×".join(map(str, row.shape)),
            str(row.rank),
            number_text(row.alpha, "g"),
            row.dtype,
            number_text(row.fro),
            number_text(row.spectral),
            number_text(row.effective_rank, ".1f"),
            share_text(row.fro_ratio),
            " ".join(row.flags),
        )
    console.print(layers)
    blocks = new_table("block", "layers", "parameters", "bytes", "fro", "fro/base")
    for block in each.blocks:
        blocks.add_row(
            block.block,
            str(block.layers),
            f"{block.parameters:,}",
            size_text(block.bytes),
            number_text(block.fro),
            share_text(block.fro_ratio),
        )
    console.print(blocks)
    if each.recommendations is not None:
        _print_recommendations(console, each)
    for finding in each.health:
        console.print(f"{finding.flag}: {finding.text}", markup=False)
    ranks = f"layers of rank {_span([row.rank for row in each.layers])}" if each.layers else "layers"
    console.print(
        f"{each.path}: {size_text(each.bytes)}, {each.family or 'unknown family'}, {each.algo} in {each.naming} names, "
        f"{each.dtype or 'no dtype'}, {len(each.layers)} {ranks}, {len(each.others)} other tensors",
        markup=False,
    )
