"""`compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.conditions import FailOn
from lorashrink.cli.options import Base, Csv, Device, Force, Jobs, split_base
from lorashrink.cli.printing import check_outputs, new_console, some_names, write_csv
from lorashrink.cli.tables import table_of
from lorashrink.errors import UsageError
from lorashrink.results.shown import plain
from lorashrink.text import count_text, number_text, percent_text, share_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.comparison import BlockDifference, Comparison, LayerDifference

# Flag -> why a layer with it was not compared.
_NOT_COMPARED = {
    "needs_base": "left out, for want of the base weight",
    "nan_a": "left out, because A holds NaN or infinity",
    "nan_b": "left out, because B holds NaN or infinity",
}


_NUMBERS: Mapping[str, Callable[[BlockDifference | LayerDifference], str]] = {
    "norm of A": lambda row: number_text(row.fro_a),
    "norm of B": lambda row: number_text(row.fro_b),
    "error": lambda row: "-" if row.relative_difference is None else percent_text(row.relative_difference),
    "energy": lambda row: share_text(row.energy_kept),
    "cosine": lambda row: number_text(row.cosine),
}

_LAYERS: Mapping[str, Callable[[LayerDifference], str]] = {
    "layer": lambda row: row.name,
    **_NUMBERS,
    "rank": lambda row: f"{row.rank_a or '-'} -> {row.rank_b or '-'}",
    "flags": lambda row: " ".join(row.flags),
}

_BLOCKS: Mapping[str, Callable[[BlockDifference], str]] = {"block": lambda row: row.block, **_NUMBERS}


def print_comparison(comparison: Comparison, terminal: Terminal) -> None:
    """The differences of layers and blocks, what only one side has, and a verdict."""
    console = new_console()
    verbose = terminal.verbose
    rows = [*comparison.layers, *comparison.only_a, *comparison.only_b]
    if verbose:
        console.print(table_of(rows, _LAYERS, everything=True))
    console.print(table_of(comparison.blocks, _BLOCKS, extra=("cosine", "energy"), everything=verbose > 0))
    for letter, only in (("A", comparison.only_a), ("B", comparison.only_b)):
        if only:
            console.print(f"{len(only)} only in {letter}: {some_names([row.name for row in only], verbose)}")
    for flag, reason in _NOT_COMPARED.items():
        if flagged := [row.name for row in rows if flag in row.flags]:
            console.print(f"{reason}: {some_names(flagged, verbose)}")
    if comparison.others or comparison.others_equal:
        keys = [str(tensor.a or tensor.b) for tensor in comparison.others]
        names = f": {some_names(keys, verbose)}" if keys else ""
        console.print(f"tensors beside the layers: {comparison.others_equal} equal, {len(keys)} not{names}")
    for entry in comparison.metadata:
        console.print(f"metadata {entry.key}: {_one_line(entry.a)} -> {_one_line(entry.b)}")
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        ranks = " to ".join(map(str, dict.fromkeys(side.ranks))) or "none"
        facts = (
            f"{size_text(side.bytes)}, {count_text(side.layers, 'layer')} of rank {ranks}, {side.algo}, {side.dtype}"
        )
        console.print(f"{letter} {side.path}: {facts}")
    console.print(verdict(comparison.total, comparison.b.bytes / comparison.a.bytes))


def _one_line(text: str | None) -> str:
    """The start of a text of any length."""
    if not text:
        return "(none)" if text is None else "(empty)"
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def verdict(total: BlockDifference, bytes_kept: float) -> str:
    """The whole comparison in one sentence."""
    size = f"{100 * bytes_kept:.3g} % of A's size"
    if total.fro_a is None:
        return f"no layer of A and B can be compared; B has {size}"
    if total.relative_difference is None:
        return f"A adds nothing that B could be measured against; B has {size}"
    if total.difference == 0:
        return f"B adds exactly what A adds, with {size}"
    error = percent_text(total.relative_difference)
    facts = f"cosine {number_text(total.cosine, '.6g')}, norm {number_text(total.fro_a)} -> {number_text(total.fro_b)}"
    if total.cosine is None or total.cosine < 0.5:
        return f"B is another LoRA: it has {size} and differs from A by {error} ({facts})"
    return f"B has {size} and differs from A by {error} (weights, not pictures; {facts})"


@command(
    print_comparison,
    verbose_help="List every layer, and name all that differ.",
    measure=lambda comparison: [
        (comparison.b.path, {"error": comparison.total.relative_difference, "size": comparison.b.bytes})
    ],
    quantities=("error", "size"),
)
def compare(
    terminal: Terminal,
    files: Annotated[
        list[str], typer.Argument(metavar="[BASE] A B", help="Two adapters: files or PEFT folders; A is the reference.")
    ],
    base: Base = None,
    device: Device = "auto",
    jobs: Jobs = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the difference per block, as .png or .svg.")] = None,
    force: Force = False,
    fail_on: FailOn = None,
    as_csv: Csv = None,
) -> object:
    """Measure how much two LoRAs differ, whatever their format and rank.

    Example: lorashrink compare lora.safetensors shrunk.safetensors
    """
    check_outputs([*files, base], force, as_csv=as_csv, plots=[plot])
    if plot:
        from lorashrink.plots import style

        style.check(plot)
    base, adapters = split_base("compare", files, base)
    if len(adapters) != 2:
        taken = f" The first file, {base}, was taken as the base." if str(base) in files else ""
        checkpoints = " Two checkpoints are compared by: lorashrink extract TUNED BASE -o difference.safetensors"
        raise UsageError(f"compare takes two LoRAs, A and B, not {len(adapters)}.{taken}{checkpoints if taken else ''}")
    from lorashrink.insight.comparison import compare as run

    comparison = run(*adapters, base=base, device=device, jobs=jobs, progress=terminal.progress)
    if plot:
        from lorashrink.plots.difference import difference_per_block

        style.save(difference_per_block(comparison), plot)
    if as_csv:
        rows = (*comparison.layers, *comparison.only_a, *comparison.only_b)
        write_csv(as_csv, [plain(row) for row in rows])
    return comparison
