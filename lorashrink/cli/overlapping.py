"""`overlap`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Base, Csv, Device, Force, Jobs, split_base
from lorashrink.cli.printing import check_outputs, new_console, write_csv
from lorashrink.cli.tables import TextTable
from lorashrink.results.shown import plain
from lorashrink.text import count_text, number_text, share_text

if TYPE_CHECKING:
    from lorashrink.results.overlap import BlockOverlap, LayerOverlap, Overlap

_SHOWN = 8  # layers and blocks without -v


def print_overlap(result: Overlap, terminal: Terminal) -> None:
    """Matrices of all pairs, the blocks and layers that the adapters share most, and what to do about it."""
    from lorashrink.results.overlap import short_names

    console = new_console()
    names = [f"{number} {name}" for number, name in enumerate(short_names([m.path for m in result.adapters]), 1)]
    digits = 3 if len(names) <= 8 else 2
    for title, matrix in (("cosine", result.cosine), ("subspace overlap", result.subspace)):
        columns = {str(i + 1): [_cosine_text(row[i], digits) for row in matrix] for i in range(len(names))}
        console.print(TextTable({title: names, **columns}))
    console.print(block_table(result, terminal.verbose > 0))
    console.print(layer_table(result, terminal.verbose > 0))
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


def block_table(result: Overlap, everything: bool) -> TextTable:
    """The blocks, those with the most alike pairs first."""
    blocks = sorted(result.blocks, key=lambda block: -_closest_pair(block)[0])
    blocks = blocks if everything else blocks[:_SHOWN]
    columns = {
        "block": [block.block for block in blocks],
        "layers": [str(block.layers) for block in blocks],
        **_pair_columns(blocks),
        "norm of the sum": [number_text(block.sum_fro) for block in blocks],
        "of the base": [share_text(block.fro_ratio) for block in blocks],
    }
    return TextTable(columns, extra=("of the base", "norm of the sum", "layers"), everything=everything)


def layer_table(result: Overlap, everything: bool) -> TextTable:
    """The layers in their order, or those that the sum amplifies most."""
    rows = [(layer, layer.sum) for layer in result.layers if layer.sum]
    if not everything:
        rows = sorted(rows, key=lambda row: -(row[1].amplification or 0.0))[:_SHOWN]
    columns = {
        "layer": [layer.name for layer, _ in rows],
        **_pair_columns([layer for layer, _ in rows]),
        "σ of the sum": [number_text(total.spectral) for _, total in rows],
        "over one alone": [number_text(total.amplification, ".2f") for _, total in rows],
        "of the base": [share_text(total.spectral_ratio) for _, total in rows],
        "flags": [" ".join(layer.flags) for layer, _ in rows],
    }
    return TextTable(columns, extra=("of the base", "flags", "subspace", "σ of the sum"), everything=everything)


def _pair_columns(rows: Sequence[BlockOverlap | LayerOverlap]) -> dict[str, list[str]]:
    """Of the most alike pair in each row, its numbers, cosine and overlap; dashes where one adapter is alone."""
    columns: dict[str, list[str]] = {"pair": [], "cosine": [], "subspace": []}
    for row in rows:
        _, a, b = _closest_pair(row)
        cosine = row.cosine[a][b]
        columns["pair"].append("-" if cosine is None else f"{a + 1} {b + 1}")
        columns["cosine"].append(_cosine_text(cosine, 3))
        columns["subspace"].append(_cosine_text(row.subspace[a][b], 3))
    return columns


def _closest_pair(row: BlockOverlap | LayerOverlap) -> tuple[float, int, int]:
    """(absolute cosine, the two adapters) of the pair with the highest one."""
    pairs = combinations(range(len(row.cosine)), 2)
    return max(((abs(row.cosine[a][b] or 0.0), a, b) for a, b in pairs), key=lambda pair: pair[0])


def _cosine_text(value: float | None, digits: int) -> str:
    """The rounded value; adding zero takes the sign from a negative zero."""
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def csv_row(layer: LayerOverlap) -> dict[str, Any]:
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


@command(print_overlap, verbose_help="List every block and layer.")
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

    base, adapters = split_base("overlap", files, base)
    check_outputs([*[split_weight(text)[0] for text in files], base], force, as_csv=as_csv, plots=[plot])
    if plot:
        from lorashrink.plots import style

        style.check(plot)
    from lorashrink.insight.overlapping import overlap as run

    result = run(adapters, base=base, limit=limit, device=device, jobs=jobs, progress=terminal.progress)
    if plot:
        from lorashrink.plots.overlap import overlap_matrices

        style.save(overlap_matrices(result), plot)
    if as_csv:
        write_csv(as_csv, [csv_row(layer) for layer in result.layers])
    return result
