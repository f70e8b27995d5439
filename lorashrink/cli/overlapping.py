"""`overlap`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashrink.cli.application import exit_with, session, split_base
from lorashrink.cli.options import Base, Csv, Debug, Device, Force, Jobs, Json, Quiet
from lorashrink.cli.printing import (
    check_result,
    new_console,
    new_table,
    number_text,
    plain,
    print_json,
    share_text,
    write_csv,
)

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.results.overlap import BlockOverlap, LayerOverlap, Overlap, Table

_SHOWN = 8  # layers and blocks without -v


def overlap(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASE] A[:WEIGHT] B[:WEIGHT]...", help="Two adapters or more; a weight is 1 if not given."
        ),
    ],
    base: Base = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", help="Highest σ of a layer of the sum, with a base relative to its weight's."),
    ] = None,
    device: Device = "auto",
    jobs: Jobs = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw both matrices into this .png or .svg.")] = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="List every block and layer.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell how adapters get along when they are used together: what they share, and what their sum does.

    Example: lorashrink overlap style.safetensors:0.8 hero.safetensors:0.6 --base model.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.linking.inputs import split_weight

        base, adapters = split_base(files, base)
        for path in (as_csv, plot):
            check_result(path, [split_weight(each)[0] for each in files], force)
        if plot:
            from lorashrink.plots import style

            style.check(plot)
        from lorashrink.insight.overlapping import overlap as run

        result = run(adapters, base=base, limit=limit, device=device, jobs=jobs, progress=progress)
        if plot:
            from lorashrink.plots.overlap import overlap_matrices

            style.save(overlap_matrices(result), plot)
        if as_csv:
            write_csv(as_csv, [_row(layer) for layer in result.layers])
    if as_json:
        print_json(plain(result))
    elif not quiet:
        _print_overlap(result, verbose)
    exit_with([each.error for each in result.failed], done=True)


def _row(layer: LayerOverlap) -> dict[str, Any]:
    """A line of plain numbers; adapters are counted from 1, and a column of two is about a pair."""
    row: dict[str, Any] = {"name": layer.name, "block": layer.block, "shape": plain(layer.shape)}
    numbers = range(len(layer.fro))
    for what in ("fro", "spectral"):
        row |= {f"{what}_{number + 1}": getattr(layer, what)[number] for number in numbers}
    for what in ("cosine", "subspace", "left", "right"):
        row |= {f"{what}_{a + 1}_{b + 1}": getattr(layer, what)[a][b] for a, b in combinations(numbers, 2)}
    row |= {"base_fro": layer.base_fro, "base_spectral": layer.base_spectral}
    whole = plain(layer.sum) or {}
    for what in ("fro", "spectral", "second", "fro_amplification", "amplification", "fro_ratio", "spectral_ratio"):
        row[f"sum_{what}"] = whole.get(what)
    row |= {f"share_{number + 1}": layer.sum.shares[number] if layer.sum else None for number in numbers}
    return {**row, "flags": " ".join(layer.flags)}


def _print_overlap(result: Overlap, verbose: int) -> None:
    from lorashrink.results.overlap import short_names

    console = new_console()
    members = result.adapters
    _print_matrix(console, "cosine", result.cosine, short_names([member.path for member in members]))
    _print_matrix(console, "subspace overlap", result.subspace, short_names([member.path for member in members]))
    _print_blocks(console, result, verbose)
    _print_layers(console, result, verbose)
    for number, member in enumerate(members, 1):
        ranks = " to ".join(map(str, dict.fromkeys(member.ranks))) or "none"
        facts = f"weight {member.weight:g}, norm {number_text(member.fro)}, {member.layers} layers of rank {ranks}"
        console.print(f"{number} {member.path}: {facts}, {member.algo}", markup=False)
    whole = result.sum
    share = f", {share_text(whole.fro_ratio)} of the base weights'" if whole.fro_ratio is not None else ""
    console.print(f"norm of the sum: {number_text(whole.fro)}{share}", markup=False)
    for advice in result.advice:
        console.print(f"{advice.kind}: {advice.text}", markup=False)


def _print_matrix(console: Console, title: str, values: Table, names: list[str]) -> None:
    table = new_table("file", *map(str, range(1, len(names) + 1)))
    table.columns[0].header = title
    digits = 3 if len(names) <= 8 else 2
    for number, (name, line) in enumerate(zip(names, values, strict=True), 1):
        table.add_row(f"{number} {name}", *(_signed(value, digits) for value in line))
    console.print(table)


def _print_blocks(console: Console, result: Overlap, verbose: int) -> None:
    table = new_table("block", "layers", "pair", "cosine", "subspace", "norm of the sum", "of the base")
    ordered = sorted(result.blocks, key=lambda each: -_most_alike(each)[0])
    for block in ordered if verbose else ordered[:_SHOWN]:
        share = share_text(block.fro_ratio)
        table.add_row(block.block, str(block.layers), *_alike(block), number_text(block.sum_fro), share)
    console.print(table)


def _most_alike(part: BlockOverlap | LayerOverlap) -> tuple[float, int, int]:
    """(absolute cosine, the two adapters) of the pair with the highest one."""
    pairs = combinations(range(len(part.cosine)), 2)
    return max(((abs(part.cosine[a][b] or 0.0), a, b) for a, b in pairs), key=lambda each: each[0])


def _print_layers(console: Console, result: Overlap, verbose: int) -> None:
    table = new_table("layer", "pair", "cosine", "subspace", "σ of the sum", "over one alone", "of the base", "flags")
    known = [(layer, layer.sum) for layer in result.layers if layer.sum]
    ordered = known if verbose else sorted(known, key=lambda each: -(each[1].amplification or 0.0))[:_SHOWN]
    for layer, whole in ordered:
        over, share = number_text(whole.amplification, ".2f"), share_text(whole.spectral_ratio)
        table.add_row(layer.name, *_alike(layer), number_text(whole.spectral), over, share, " ".join(layer.flags))
    console.print(table)


def _alike(part: BlockOverlap | LayerOverlap) -> tuple[str, str, str]:
    """The most alike pair, its cosine and its overlap; dashes where one adapter is alone."""
    _, a, b = _most_alike(part)
    cosine, subspace = part.cosine[a][b], part.subspace[a][b]
    return "-" if cosine is None else f"{a + 1} {b + 1}", _signed(cosine, 3), _signed(subspace, 3)


def _signed(value: float | None, digits: int) -> str:
    """Without a sign before zero."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"
