"""What is inside an adapter: ranks, alphas, norms and spectra per layer and block, against the base if given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import Adapter, Layer, Tensors, in_memory, open_adapter
from lorashrink.bases import Base, use_base
from lorashrink.bases.families import family_title
from lorashrink.errors import LorashrinkError, Progress, UsageError, boundary
from lorashrink.insight.health import check_health
from lorashrink.insight.summaries import by_block, joined, norm_ratio, summary
from lorashrink.insight.training_notes import training_notes
from lorashrink.linking.inputs import check_exists, find_adapters
from lorashrink.linking.loaders import loads
from lorashrink.linking.matching import bind, find_fitting
from lorashrink.names import block, kind
from lorashrink.results.inspection import AdapterTable, BlockRow, Finding, Inspection, LayerRow, Recommendation
from lorashrink.results.shrinking import Failure

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.insight.layer_numbers import Measure

# Shares of a file's size that are recommended to try, and what else; sizes only for files that are more than names.
_SHARES, _WORTH_IT = (0.5, 0.25), 500_000

_WITH_BASE, _ANYWAY = ("fro_ckpt=1,thr=-3.55",), ("energy=0.99", "energy=0.95")


def inspect(
    adapters: Any,
    *,
    base: str | Path | Mapping[str, Tensor] | Base | None = None,
    header: bool = False,
    spectrum: bool = False,
    recommend: bool = False,
    recursive: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look into adapters: files, folders or globs, or one in memory (a mapping of names to tensors, a PeftModel, ...).

    base: also the tensors of a model by their names. `header` answers from headers alone; `spectrum` lists all
    singular values.

    `recommend` tells what some recipes would make of each file, as `resize` with a dry run does; recipes that keep
    nothing of it, or cannot reach their size, are left out.

    Files that cannot be read are in `Inspection.failed`. Raises InputError or NotABase if there is nothing to
    look at or the base cannot be used, UsageError if headers do not tell what the options need.
    """
    if header and (spectrum or recommend):
        raise UsageError("header: headers alone tell neither singular values nor what a recipe would keep.")
    if isinstance(adapters, (str, Path)):
        check_exists(adapters)
        adapters = [adapters]
    held = in_memory(adapters)
    sources = find_adapters(adapters, recursive=recursive) if held is None else [held]
    files: list[AdapterTable] = []
    errors: dict[Path | Tensors, LorashrinkError] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(use_base(base)) if base is not None else None
        measure: Measure | None = None
        if not header:  # torch takes longer to import than headers to read
            from lorashrink.insight.layer_numbers import measuring

            files_read = [source for source in sources if isinstance(source, Path)]
            measure = stack.enter_context(measuring(files_read, opened, spectrum, device, jobs, progress))
        for source in sources:
            with boundary(source, partial(errors.__setitem__, source)):
                with open_adapter(source) as adapter:
                    table = adapter_table(adapter, opened, measure)
                if recommend:
                    table = replace(table, recommendations=recommendations(source, table, base, device, jobs))
                files.append(table)
    return Inspection(tuple(files), tuple(Failure(str(source), str(error)) for source, error in errors.items()))


def adapter_table(adapter: Adapter, base: Base | None, measure: Measure | None) -> AdapterTable:
    """The table of an open adapter; without `measure`, of its header."""
    views = find_fitting(adapter, base) if base else [()] * len(adapter)
    adapter = bind(adapter, views, base)
    measured = measure(adapter, views) if measure else [{}] * len(views)
    rows = tuple(
        LayerRow(
            name=layer.name,
            block=block(layer.name),
            kind=kind(layer.name, layer.shape),
            shape=layer.shape,
            algo=layer.algo,
            rank=layer.rank,
            dtype=layer.dtype,
            bytes=sum(info.nbytes for info in layer.infos.values()),
            base_keys=tuple(view.key for view in layer_views),
            **measures,  # type: ignore[arg-type]  # fields of LayerRow
        )
        for layer, layer_views, measures in zip(adapter, views, measured, strict=True)
    )
    facts, metadata = summary(adapter), adapter.store.metadata
    health = check_health(rows, metadata, family=facts["family"], naming=facts["naming"])
    foreign = base is not None and not any(views) and facts["family"] not in (None, base.family.name)
    if base is not None and foreign:
        titles = family_title(facts["family"]), base.family.title
        text = f"the adapter is for {titles[0]}, and {base.path.name} is {titles[1]}, which has none of its layers"
        health = (Finding("other_base", len(rows), text), *health)
    return AdapterTable(
        path=facts["path"],
        bytes=facts["bytes"],
        family=facts["family"],
        algo=facts["algo"],
        naming=facts["naming"],
        dtype=joined(row.dtype for row in rows),
        fro=_norm(rows),
        fro_ratio=norm_ratio((row.fro, row.base_fro) for row in rows),
        metadata=metadata,
        notes=training_notes(metadata),
        health=health,
        layers=rows,
        blocks=tuple(
            block_row(name, [adapter.layers[i] for i in indices], [rows[i] for i in indices])
            for name, indices in by_block(rows)
        ),
        others=adapter.others,
        loads=loads(adapter, base.family.name if base and not foreign else None),
    )


def block_row(name: str, layers: Sequence[Layer], rows: Sequence[LayerRow]) -> BlockRow:
    """The row of a block, of its layers and their rows."""
    infos = [info for layer in layers for role, info in layer.infos.items() if role != "alpha"]
    return BlockRow(
        block=name,
        layers=len(rows),
        parameters=sum(math.prod(info.shape) for info in infos),
        bytes=sum(row.bytes for row in rows),
        fro=_norm(rows),
        fro_ratio=norm_ratio((row.fro, row.base_fro) for row in rows),
    )


def _norm(rows: Sequence[LayerRow]) -> float | None:
    """‖ΔW‖_F over the layers that have numbers."""
    norms = [row.fro for row in rows if row.fro is not None]
    return math.hypot(*norms) if norms else None


def recommendations(
    source: Path | Tensors,
    table: AdapterTable,
    base: str | Path | Mapping[str, Tensor] | Base | None,
    device: str,
    jobs: int | None,
) -> tuple[Recommendation, ...]:
    """What a handful of recipes would make of a file, in their order; nothing of one that adds nothing."""
    if not table.fro:
        return ()
    from lorashrink.recipes.grammar import parse_recipes
    from lorashrink.shrinking.options import ResizeOptions
    from lorashrink.shrinking.run import shrink

    score = "bytes" if base is None else "fro_ckpt,bytes"
    sizes = [f"{score},size={share * table.bytes / 2**20:.4g}" for share in _SHARES if table.bytes > _WORTH_IT]
    recipes = parse_recipes([*(_WITH_BASE if base is not None else ()), *_ANYWAY, *sizes])
    path = Path(str(source))
    unwritten = {path.with_name(f"{index}.safetensors"): recipe for index, recipe in enumerate(recipes)}
    options = ResizeOptions(base=base, device=device, jobs=jobs, dry_run=True)
    report = shrink({path: unwritten}, options, opener=lambda path, base: open_adapter(source), lenient=True)
    return tuple(Recommendation(run.recipe, run.bytes_after, run.relative_error, run.energy) for run in report.results)
