"""`inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Adapters, Base, Csv, Device, Force, Jobs, Recursive, split_base
from lorashrink.cli.printing import check_outputs, new_console, new_table, write_csv
from lorashrink.errors import UsageError
from lorashrink.results.shown import plain
from lorashrink.text import count_text, number_text, share_text, size_text, span_text

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.cli.tables import TextTable
    from lorashrink.results.inspection import AdapterTable, BlockRow, Inspection, LayerRow, Recommendation


def _print_inspection(inspection: Inspection, terminal: Terminal) -> None:
    console = new_console()
    if len(inspection.files) == 1 or terminal.verbose:
        for adapter in inspection.files:
            _print_adapter(console, adapter, terminal.verbose)
    if len(inspection.files) > 1:
        console.print(_file_table(inspection.files, terminal.verbose))


def _print_adapter(console: Console, adapter: AdapterTable, verbose: int) -> None:
    width = max(map(len, adapter.notes), default=0)
    for label, text in adapter.notes.items():
        console.print(f"{label:<{width}}  {text}")
    console.print(_layer_table(adapter.layers, verbose))
    console.print(_block_table(adapter.blocks))
    if adapter.recommendations:
        console.print(_recommendation_table(adapter.recommendations, adapter.bytes))
    elif adapter.recommendations is not None:
        console.print("no recipe to recommend: none of the usual ones can be applied to this file")
    for line in adapter.loads.lines:
        console.print(line)
    for finding in adapter.health:
        console.print(f"{finding.flag}: {finding.text}")
    ranks = f" of rank {span_text([row.rank for row in adapter.layers])}" if adapter.layers else ""
    console.print(
        f"{adapter.path}: {size_text(adapter.bytes)}, {adapter.family or 'unknown family'}, {adapter.algo} in "
        f"{adapter.naming} names, {adapter.dtype or 'no dtype'}, {count_text(len(adapter.layers), 'layer')}{ranks}, "
        f"{count_text(len(adapter.others), 'other tensor')}"
    )


def _layer_table(layers: Sequence[LayerRow], verbose: int) -> TextTable:
    table = new_table(
        *("layer", "block", "kind", "algo", "shape", "rank", "alpha", "dtype"),
        *("fro", "spectral", "eff. rank", "fro/base", "flags"),
        extra=("fro/base", "flags", "shape", "spectral", "eff. rank", "algo", "dtype", "kind", "block"),
        everything=verbose > 0,
    )
    for row in layers:
        table.add_row(
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
    return table


def _block_table(blocks: Sequence[BlockRow]) -> TextTable:
    table = new_table("block", "layers", "parameters", "bytes", "fro", "fro/base", extra=("parameters",))
    for block in blocks:
        table.add_row(
            block.block,
            str(block.layers),
            f"{block.parameters:,}",
            size_text(block.bytes),
            number_text(block.fro),
            share_text(block.fro_ratio),
        )
    return table


def _recommendation_table(recommendations: Sequence[Recommendation], bytes_before: int) -> TextTable:
    table = new_table("recipe", "size", "of before", "error", "energy", extra=("energy",))
    for row in recommendations:
        table.add_row(
            row.recipe,
            size_text(row.bytes),
            share_text(row.bytes / bytes_before),
            share_text(row.relative_error),
            share_text(row.energy),
        )
    return table


def _file_table(adapters: Sequence[AdapterTable], verbose: int) -> TextTable:
    table = new_table(
        "file",
        "size",
        "family",
        "algo",
        "layers",
        "rank",
        "alpha",
        "fro",
        "fro/base",
        "flags",
        extra=("fro/base", "algo", "flags", "alpha", "layers"),
        everything=verbose > 0,
    )
    for adapter in adapters:
        table.add_row(
            Path(adapter.path).name,
            size_text(adapter.bytes),
            adapter.family or "-",
            adapter.algo,
            str(len(adapter.layers)),
            span_text([row.rank for row in adapter.layers]),
            span_text([row.alpha for row in adapter.layers if row.alpha is not None]),
            number_text(adapter.fro),
            share_text(adapter.fro_ratio),
            " ".join(finding.flag for finding in adapter.health),
        )
    return table


@command(_print_inspection, done=lambda inspection: bool(inspection.files))
def inspect(
    terminal: Terminal,
    files: Adapters,
    base: Base = None,
    header: Annotated[bool, typer.Option("--header", help="Read file headers only: fast, but no norms.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="List all singular values, with --json.")] = False,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Show the size and error that common recipes would give.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the spectra; with a base, the norms too. X.png makes X_spectra.png, ..."),
    ] = None,
    recursive: Recursive = False,
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    as_csv: Csv = None,
) -> object:
    """Show what is inside a LoRA: training, ranks, alphas, norms, and problems.

    Example: lorashrink inspect model.safetensors lora.safetensors
    """
    from lorashrink.insight.inspection import inspect as run

    spectra, heat = (plot and plot.with_name(f"{plot.stem}_{name}{plot.suffix}") for name in ("spectra", "norms"))
    check_outputs([*files, base], force, as_csv=as_csv, spectra=spectra, heat=heat)
    base, adapters = split_base(files, base)
    if plot:
        from lorashrink.plots import style

        style.check(plot)
        if header:
            raise UsageError("--plot: headers alone tell nothing to draw; leave --header out.")
        if len(adapters) > 1:
            raise UsageError(f"--plot: draws one adapter, and {len(adapters)} are given.")
    inspection = run(
        adapters,
        base=base,
        header=header,
        spectrum=spectrum or plot is not None,
        recommend=recommend,
        recursive=recursive,
        device=device,
        jobs=jobs,
        progress=terminal.progress,
    )
    if as_csv:
        from lorashrink.results.inspection import LayerRow

        rows = [{"path": adapter.path, **plain(row)} for adapter in inspection.files for row in adapter.layers]
        write_csv(as_csv, rows, ["path", *(field.name for field in fields(LayerRow))])
    if spectra and heat:
        _draw(inspection, spectra, heat if base else None)
    return inspection


def _draw(inspection: Inspection, spectra: Path, heat: Path | None) -> None:
    from lorashrink.plots import style
    from lorashrink.plots.heat import norms_by_kind
    from lorashrink.plots.spectra import spectra_per_block

    if len(inspection.files) > 1:
        raise UsageError(f"--plot: draws one adapter, and {len(inspection.files)} were found.")
    for adapter in inspection.files:
        style.save(spectra_per_block(adapter), spectra)
        if heat:
            style.save(norms_by_kind(adapter), heat)
