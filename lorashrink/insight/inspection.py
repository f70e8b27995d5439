"""What is inside an adapter: ranks, alphas, norms and spectra per layer and block, against the base if given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import Adapter, Layer, Tensors, in_memory, open_adapter
from lorashrink.bases import Base, Views, use_base, views_id
from lorashrink.errors import LorashrinkError, Progress, UsageError, boundary
from lorashrink.insight.health import SPIKE, check_health
from lorashrink.insight.summaries import by_block, joined, norm_ratio, summary
from lorashrink.insight.training_notes import training_notes
from lorashrink.linking.inputs import check_exists, find_adapters
from lorashrink.linking.loaders import loads
from lorashrink.linking.matching import bind, find_fitting
from lorashrink.names import block, kind
from lorashrink.results.inspection import AdapterTable, BlockRow, Inspection, LayerRow, Recommendation
from lorashrink.results.shrinking import Failure

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.bases.norms import Norms
    from lorashrink.engine.spectrum import Spectrum

ENERGIES = ("0.9", "0.95", "0.99")

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
    sources = _sources(adapters, recursive)
    files: list[AdapterTable] = []
    errors: dict[Path | Tensors, LorashrinkError] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(use_base(base)) if base is not None else None
        measure = None if header else _measuring(stack, sources, opened, spectrum, device, jobs, progress)
        for source in sources:
            with boundary(source, partial(errors.__setitem__, source)):
                with open_adapter(source) as adapter:
                    table = _table(adapter, opened, measure)
                if recommend:
                    table = replace(table, recommendations=_recommended(source, table, base, device, jobs))
                files.append(table)
    return Inspection(tuple(files), tuple(Failure(str(source), str(error)) for source, error in errors.items()))


def _sources(adapters: Any, recursive: bool) -> Sequence[Path | Tensors]:
    held = in_memory(adapters)
    if held is not None:
        return [held]
    if isinstance(adapters, (str, Path)):
        check_exists(adapters)
        adapters = [adapters]
    return find_adapters(adapters, recursive=recursive)


# Of an adapter and the base weights that its layers change: the measured fields of each layer's row.
_Measure = Callable[[Adapter, Sequence[Views]], Sequence[Mapping[str, object]]]


def _table(adapter: Adapter, base: Base | None, measure: _Measure | None) -> AdapterTable:
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
            **measures,  # type: ignore[arg-type]  # the fields of LayerRow that `_measures` fills
        )
        for layer, layer_views, measures in zip(adapter, views, measured, strict=True)
    )
    facts, metadata = summary(adapter), adapter.store.metadata
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
        health=check_health(rows, metadata, family=facts["family"], naming=facts["naming"]),
        layers=rows,
        blocks=tuple(
            _block(name, [adapter.layers[i] for i in indices], [rows[i] for i in indices])
            for name, indices in by_block(rows)
        ),
        others=adapter.others,
        loads=loads(adapter, base.family.name if base else None),
    )


def _block(name: str, layers: Sequence[Layer], rows: Sequence[LayerRow]) -> BlockRow:
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


# --- measuring ----------------------------------------------------------------------------------


def _measuring(
    stack: ExitStack,
    sources: Sequence[Path | Tensors],
    base: Base | None,
    spectrum: bool,
    device: str,
    jobs: int | None,
    progress: Progress | None,
) -> _Measure:
    """The measuring function of this run. torch is imported here, for `header` never."""
    from lorashrink.bases.norms import BaseNorms
    from lorashrink.engine.devices import pick_device, worker_pool
    from lorashrink.engine.spectrum import Item, decompose

    pool = stack.enter_context(worker_pool(jobs))
    norms = BaseNorms(base) if base else None
    files = [*(source for source in sources if isinstance(source, Path)), *([base.path] if base else [])]
    device = pick_device(device, files)

    def measure(adapter: Adapter, views: Sequence[Views]) -> Sequence[Mapping[str, object]]:
        present = [layer for layer in adapter.layers if layer.bound]
        items = [Item(partial(getattr, layer, "delta"), layer.width) for layer in present]
        spectra: dict[str, Spectrum] = {}
        for layer, future in zip(present, decompose(items, pool, device=device), strict=True):
            spectra[layer.name] = future.result()
            if progress:
                progress(f"decomposing {adapter.path.name}", len(spectra), len(items))
        widest = max((layer.rank for layer in adapter.layers), default=0)
        base_norms: Norms = {}
        if norms:
            report = partial(progress, "norms of the base") if progress else None
            base_norms = norms.look_up(
                list(filter(None, views)), ("fro", "spn"), pool=pool, device=device, progress=report
            )
        return [
            _measures(layer, spectra[layer.name], base_norms.get(views_id(rows), {}) if rows else {}, spectrum, widest)
            if layer.name in spectra
            else {"alpha": layer.alpha, "flags": ("needs_base",)}
            for layer, rows in zip(adapter.layers, views, strict=True)
        ]

    return measure


def _measures(
    layer: Layer, spectrum: Spectrum, norms: Mapping[str, float], singular_values: bool, widest: int
) -> dict[str, object]:
    facts: dict[str, object] = {"alpha": layer.alpha, "scale": layer.scale, "flags": _flags(layer, spectrum, widest)}
    facts |= {"base_fro": norms.get("fro"), "base_spectral": norms.get("spn")}
    if not spectrum.finite:
        return facts
    sigma = spectrum.sigma.numpy()
    energies = (sigma**2).cumsum()
    fro, top = math.sqrt(float(energies[-1])), float(sigma[0])
    facts |= {"fro": fro, "spectral": top}
    if singular_values:
        facts["singular_values"] = tuple(sigma.tolist())
    if top > 0:
        shares = (sigma[sigma > 0] / fro) ** 2
        facts["stable_rank"] = fro**2 / top**2
        facts["effective_rank"] = math.exp(-sum(share * math.log(share) for share in shares.tolist()))
        facts["rank_for_energy"] = {
            share: int(energies.searchsorted(float(share) * energies[-1])) + 1 for share in ENERGIES
        }
    if norms:
        facts["fro_ratio"] = fro / norms["fro"] if norms["fro"] else None
        facts["spectral_ratio"] = top / norms["spn"] if norms["spn"] else None
    return facts


def _flags(layer: Layer, spectrum: Spectrum, widest: int) -> tuple[str, ...]:
    if not spectrum.finite:
        return ("nan",)
    sigma, alpha, scale = spectrum.sigma, layer.alpha, layer.scale
    # Programs may disagree about an alpha above every rank of the file, or one that is no whole number, if it scales
    # anything. An alpha above the layer's own rank is usual: layers that share one alpha have the largest rank for it.
    odd = alpha is not None and scale != 1 and (alpha > widest or (alpha != int(alpha) and scale > 0))
    tests = {
        "zero": spectrum.rank == 0,
        "padded_rank": 0 < spectrum.rank < min(layer.rank, layer.shape[0], math.prod(layer.shape[1:])),
        "spike": spectrum.rank > 1 and float(sigma[0]) > SPIKE * float(sigma[1]),
        "negative_alpha": alpha is not None and scale < 0,
        "zero_alpha": layer.off,
        "odd_alpha": odd,
    }
    return tuple(flag for flag, present in tests.items() if present)


# --- recommendations ----------------------------------------------------------------------------


def _recommended(
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
