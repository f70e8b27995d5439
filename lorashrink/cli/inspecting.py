"""`inspect`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Adapters, Base, Csv, Device, Force, Jobs, Recursive, split_base
from lorashrink.cli.printing import check_outputs, new_console, write_csv
from lorashrink.cli.tables import table_of
from lorashrink.errors import UsageError
from lorashrink.results.shown import plain
from lorashrink.text import count_text, number_text, share_text, size_text, span_text

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.results.inspection import AdapterTable, BlockRow, Inspection, LayerRow, Recommendation


_LAYERS: Mapping[str, Callable[[LayerRow], str]] = {
    "layer": lambda row: row.name,
    "block": lambda row: row.block,
    "kind": lambda row: row.kind,
    "algo": lambda row: row.algo,
    "shape": lambda row: "×".join(map(str, row.shape)),
    "rank": lambda row: str(row.rank),
    "alpha": lambda row: number_text(row.alpha, "g"),
    "dtype": lambda row: row.dtype,
    "fro": lambda row: number_text(row.fro),
    "spectral": lambda row: number_text(row.spectral),
    "eff. rank": lambda row: number_text(row.effective_rank, ".1f"),
    "fro/base": lambda row: share_text(row.fro_ratio),
    "flags": lambda row: " ".join(row.flags),
}
_LESS_OF_LAYERS = ("fro/base", "flags", "shape", "spectral", "eff. rank", "algo", "dtype", "kind", "block")

_BLOCKS: Mapping[str, Callable[[BlockRow], str]] = {
    "block": lambda block: block.block,
    "layers": lambda block: str(block.layers),
    "parameters": lambda block: f"{block.parameters:,}",
    "bytes": lambda block: size_text(block.bytes),
    "fro": lambda block: number_text(block.fro),
    "fro/base": lambda block: share_text(block.fro_ratio),
}

_FILES: Mapping[str, Callable[[AdapterTable], str]] = {
    "file": lambda adapter: Path(adapter.path).name,
    "size": lambda adapter: size_text(adapter.bytes),
    "family": lambda adapter: adapter.family or "-",
    "algo": lambda adapter: adapter.algo,
    "layers": lambda adapter: str(len(adapter.layers)),
    "rank": lambda adapter: span_text([row.rank for row in adapter.layers]),
    "alpha": lambda adapter: span_text([row.alpha for row in adapter.layers if row.alpha is not None]),
    "fro": lambda adapter: number_text(adapter.fro),
    "fro/base": lambda adapter: share_text(adapter.fro_ratio),
    "flags": lambda adapter: " ".join(finding.flag for finding in adapter.health),
}
_LESS_OF_FILES = ("fro/base", "algo", "flags", "alpha", "layers")


def print_inspection(inspection: Inspection, terminal: Terminal) -> None:
    """One adapter with its layers and blocks; of several adapters a line each, and the rest with -v."""
    console = new_console()
    if len(inspection.files) == 1 or terminal.verbose:
        for adapter in inspection.files:
            print_adapter(console, adapter, terminal.verbose > 0)
    if len(inspection.files) > 1:
        console.print(table_of(inspection.files, _FILES, extra=_LESS_OF_FILES, everything=terminal.verbose > 0))


def print_adapter(console: Console, adapter: AdapterTable, everything: bool) -> None:
    """All about one adapter, its facts last, where they are seen first."""
    width = max(map(len, adapter.notes), default=0)
    for label, text in adapter.notes.items():
        console.print(f"{label:<{width}}  {text}")
    console.print(table_of(adapter.layers, _LAYERS, extra=_LESS_OF_LAYERS, everything=everything))
    console.print(table_of(adapter.blocks, _BLOCKS, extra=("parameters",)))
    if adapter.recommendations:
        columns: Mapping[str, Callable[[Recommendation], str]] = {
            "recipe": lambda row: row.recipe,
            "size": lambda row: size_text(row.bytes),
            "of before": lambda row: share_text(row.bytes / adapter.bytes),
            "error": lambda row: share_text(row.relative_error),
            "energy": lambda row: share_text(row.energy),
        }
        console.print(table_of(adapter.recommendations, columns, extra=("energy",)))
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


@command(print_inspection)
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
    check_outputs([*files, base], force, as_csv=as_csv, plots=[spectra, heat])
    base, adapters = split_base("inspect", files, base)
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
        from lorashrink.plots.heat import norms_by_kind
        from lorashrink.plots.spectra import spectra_per_block

        if len(inspection.files) > 1:
            raise UsageError(f"--plot: draws one adapter, and {len(inspection.files)} were found.")
        for adapter in inspection.files:
            style.save(spectra_per_block(adapter), spectra)
            if base:
                style.save(norms_by_kind(adapter), heat)
    return inspection
