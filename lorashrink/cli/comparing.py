"""`compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.application import session, split_base
from lorashrink.cli.options import Base, Csv, Debug, Device, Force, Jobs, Json, Quiet
from lorashrink.cli.printing import (
    check_result,
    new_console,
    new_table,
    number_text,
    percent_text,
    plain,
    print_json,
    share_text,
    size_text,
    some_names,
    write_csv,
)
from lorashrink.errors import UsageError

if TYPE_CHECKING:
    from lorashrink.results.comparison import BlockDifference, Comparison, LayerDifference


def compare(
    files: Annotated[
        list[str], typer.Argument(metavar="[BASE] A B", help="Two adapters: files or PEFT folders; A is the reference.")
    ],
    base: Base = None,
    device: Device = "auto",
    jobs: Jobs = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the difference of each block into this .png or .svg.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="List every layer.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare what two adapters add to the base, whatever their names, families and ranks.

    Example: lorashrink compare lora.safetensors shrunk.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        for path in (as_csv, plot):
            check_result(path, files, force)
        if plot:
            from lorashrink.plots import style

            style.check(plot)
        base, adapters = split_base(files, base)
        if len(adapters) != 2:
            raise UsageError(f"compare: takes two adapters, A and B, and was given {len(adapters)}.")
        from lorashrink.insight.comparison import compare as run

        comparison = run(*adapters, base=base, device=device, jobs=jobs, progress=progress)
        if plot:
            from lorashrink.plots.difference import difference_per_block

            style.save(difference_per_block(comparison), plot)
        if as_csv:
            rows = (*comparison.layers, *comparison.only_a, *comparison.only_b)
            write_csv(as_csv, [plain(row) for row in rows])
    if as_json:
        print_json(plain(comparison))
    elif not quiet:
        _print_comparison(comparison, verbose)


def _print_comparison(comparison: Comparison, verbose: int) -> None:
    console = new_console()
    a, b, total = comparison.a, comparison.b, comparison.total
    everything = [*comparison.layers, *comparison.only_a, *comparison.only_b]
    columns = ("norm of A", "norm of B", "error", "energy", "cosine")
    if verbose:
        layers = new_table("layer", *columns, "rank", "flags")
        for row in everything:
            ranks = f"{row.rank_a or '-'} -> {row.rank_b or '-'}"
            layers.add_row(row.name, *_difference(row), ranks, " ".join(row.flags))
        console.print(layers)
    blocks = new_table("block", *columns)
    for block in comparison.blocks:
        blocks.add_row(block.block, *_difference(block))
    console.print(blocks)
    for which, rows in (("A", comparison.only_a), ("B", comparison.only_b)):
        if rows:
            console.print(
                f"{len(rows)} only in {which}: {some_names([row.name for row in rows], verbose)}", markup=False
            )
    for flag, meaning in _LEFT_OUT.items():
        if flagged := [row.name for row in everything if flag in row.flags]:
            console.print(f"{meaning}: {some_names(flagged, verbose)}", markup=False)
    if comparison.others or comparison.others_equal:
        keys = [str(other.a or other.b) for other in comparison.others]
        console.print(
            f"tensors beside the layers: {comparison.others_equal} equal, {len(keys)} not"
            + (f": {some_names(keys, verbose)}" if keys else ""),
            markup=False,
        )
    for entry in comparison.metadata:
        console.print(f"metadata {entry.key}: {_shortened(entry.a)} -> {_shortened(entry.b)}", markup=False)
    for letter, side in (("A", a), ("B", b)):
        ranks = " to ".join(map(str, dict.fromkeys(side.ranks))) or "none"
        facts = f"{size_text(side.bytes)}, {side.layers} layers of rank {ranks}, {side.algo}, {side.dtype}"
        console.print(f"{letter} {side.path}: {facts}", markup=False)
    console.print(_verdict(total, b.bytes / a.bytes), markup=False)


_LEFT_OUT = {
    "needs_base": "left out, for want of the base weight",
    "nan_a": "left out, because A holds NaN or infinity",
    "nan_b": "left out, because B holds NaN or infinity",
}


def _verdict(total: BlockDifference, bytes_kept: float) -> str:
    """The whole comparison in one sentence."""
    size = f"{100 * bytes_kept:.3g} % of its bytes"
    if total.relative_difference is None:
        return f"A adds nothing that B could be measured against; B has {size}"
    if total.difference == 0:
        return f"B adds exactly what A adds, with {size}"
    error = percent_text(total.relative_difference)
    facts = f"cosine {number_text(total.cosine, '.6g')}, norm {number_text(total.fro_a)} -> {number_text(total.fro_b)}"
    if total.cosine is None or total.cosine < 0.5:
        return f"B is not A: the difference is {error} of A, with {size} ({facts})"
    return f"B is A with {error} error, {size} ({facts})"


def _difference(row: BlockDifference | LayerDifference) -> tuple[str, ...]:
    error = "-" if row.relative_difference is None else percent_text(row.relative_difference)
    return number_text(row.fro_a), number_text(row.fro_b), error, share_text(row.energy_kept), number_text(row.cosine)


def _shortened(text: str | None) -> str:
    if not text:
        return "(none)" if text is None else "(empty)"
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
