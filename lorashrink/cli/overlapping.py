"""`overlap`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Base, Csv, Device, Force, Jobs, split_base
from lorashrink.cli.printing import check_outputs, new_console, new_table, write_csv
from lorashrink.results.shown import plain
from lorashrink.text import count_text, number_text, share_text

if TYPE_CHECKING:
    from lorashrink.cli.tables import TextTable
    from lorashrink.results.overlap import BlockOverlap, LayerOverlap, Overlap
    from lorashrink.results.overlap import Table as Matrix

_SHOWN = 8  # layers and blocks without -v


def _print_overlap(result: Overlap, terminal: Terminal) -> None:
    from lorashrink.results.overlap import short_names

    console = new_console()
    names = short_names([member.path for member in result.adapters])
    console.print(_matrix_table("cosine", result.cosine, names))
    console.print(_matrix_table("subspace overlap", result.subspace, names))
    console.print(_block_table(result, terminal.verbose))
    console.print(_layer_table(result, terminal.verbose))
    for number, member in enumerate(result.adapters, 1):
        ranks = " to ".join(map(str, dict.fromkeys(member.ranks))) or "none"
        facts = f"weight {member.weight:g}, norm {number_text(member.fro)}"
        layers = f"{count_text(member.layers, 'layer')} of rank {ranks}"
        console.print(f"{number} {member.path}: {facts}, {layers}, {member.algo}")
    total = result.sum
    share = f", {share_text(total.fro_ratio)} of the base weights'" if total.fro_ratio is not None else ""
    console.print(f"norm of the sum: {number_text(total.fro)}{share}")
    for advice in result.advice:
        console.print(f"{advice.kind}: {advice.text}")


def _matrix_table(title: str, values: Matrix, names: list[str]) -> TextTable:
    table = new_table(title, *map(str, range(1, len(names) + 1)))
    digits = 3 if len(names) <= 8 else 2
    for number, (name, row) in enumerate(zip(names, values, strict=True), 1):
        table.add_row(f"{number} {name}", *(_cosine_text(value, digits) for value in row))
    return table


def _block_table(result: Overlap, verbose: int) -> TextTable:
    table = new_table(
        "block",
        "layers",
        "pair",
        "cosine",
        "subspace",
        "norm of the sum",
        "of the base",
        extra=("of the base", "norm of the sum", "layers"),
        everything=verbose > 0,
    )
    ordered = sorted(result.blocks, key=lambda block: -_closest_pair(block)[0])
    for block in ordered if verbose else ordered[:_SHOWN]:
        share = share_text(block.fro_ratio)
        table.add_row(block.block, str(block.layers), *_pair_cells(block), number_text(block.sum_fro), share)
    return table


def _layer_table(result: Overlap, verbose: int) -> TextTable:
    table = new_table(
        "layer",
        "pair",
        "cosine",
        "subspace",
        "σ of the sum",
        "over one alone",
        "of the base",
        "flags",
        extra=("of the base", "flags", "subspace", "σ of the sum"),
        everything=verbose > 0,
    )
    layers = [(layer, layer.sum) for layer in result.layers if layer.sum]
    if not verbose:
        layers = sorted(layers, key=lambda pair: -(pair[1].amplification or 0.0))[:_SHOWN]
    for layer, total in layers:
        amplification, share = number_text(total.amplification, ".2f"), share_text(total.spectral_ratio)
        sigma = number_text(total.spectral)
        table.add_row(layer.name, *_pair_cells(layer), sigma, amplification, share, " ".join(layer.flags))
    return table


def _pair_cells(row: BlockOverlap | LayerOverlap) -> tuple[str, str, str]:
    """The most alike pair, its cosine and its overlap; dashes where one adapter is alone."""
    _, a, b = _closest_pair(row)
    cosine, subspace = row.cosine[a][b], row.subspace[a][b]
    return "-" if cosine is None else f"{a + 1} {b + 1}", _cosine_text(cosine, 3), _cosine_text(subspace, 3)


def _closest_pair(row: BlockOverlap | LayerOverlap) -> tuple[float, int, int]:
    """(absolute cosine, the two adapters) of the pair with the highest one."""
    pairs = combinations(range(len(row.cosine)), 2)
    return max(((abs(row.cosine[a][b] or 0.0), a, b) for a, b in pairs), key=lambda pair: pair[0])


def _cosine_text(value: float | None, digits: int) -> str:
    """The rounded value; adding zero takes the sign from a negative zero."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _csv_row(layer: LayerOverlap) -> dict[str, Any]:
    """A line of plain numbers; adapters are counted from 1, and a column of two is about a pair."""
    row: dict[str, Any] = {"name": layer.name, "block": layer.block, "shape": plain(layer.shape)}
    numbers = range(len(layer.fro))
    for field in ("fro", "spectral"):
        row |= {f"{field}_{number + 1}": getattr(layer, field)[number] for number in numbers}
    for field in ("cosine", "subspace", "left", "right"):
        row |= {f"{field}_{a + 1}_{b + 1}": getattr(layer, field)[a][b] for a, b in combinations(numbers, 2)}
    row |= {"base_fro": layer.base_fro, "base_spectral": layer.base_spectral}
    total = plain(layer.sum) or {}
    for field in ("fro", "spectral", "second", "fro_amplification", "amplification", "fro_ratio", "spectral_ratio"):
        row[f"sum_{field}"] = total.get(field)
    row |= {f"share_{number + 1}": layer.sum.shares[number] if layer.sum else None for number in numbers}
    return {**row, "flags": " ".join(layer.flags)}


@command(_print_overlap, verbose_help="List every block and layer.")
def overlap(
    terminal: Terminal,
    files: Annotated[
        list[str],
        typer.Argument(metavar="[BASE] A[:WEIGHT] B[:WEIGHT]...", help="Two LoRAs or more. The default weight is 1."),
    ],
    base: Base = None,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit",
            metavar="X",
            help="Largest strength a layer of the sum may have; relative to the base layer if a base is given.",
        ),
    ] = None,
    device: Device = "auto",
    jobs: Jobs = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw both matrices, as .png or .svg.")] = None,
    force: Force = False,
    as_csv: Csv = None,
) -> object:
    """Predict how LoRAs behave when you load them together.

    Example: lorashrink overlap style.safetensors:0.8 hero.safetensors:0.6 --base model.safetensors
    """
    from lorashrink.linking.inputs import split_weight

    base, adapters = split_base(files, base)
    check_outputs([*[split_weight(text)[0] for text in files], base], force, as_csv=as_csv, plot=plot)
    if plot:
        from lorashrink.plots import style

        style.check(plot)
    from lorashrink.insight.overlapping import overlap as run

    result = run(adapters, base=base, limit=limit, device=device, jobs=jobs, progress=terminal.progress)
    if plot:
        from lorashrink.plots.overlap import overlap_matrices

        style.save(overlap_matrices(result), plot)
    if as_csv:
        write_csv(as_csv, [_csv_row(layer) for layer in result.layers])
    return result
