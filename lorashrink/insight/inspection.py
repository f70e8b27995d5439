"""What is inside an adapter: ranks, alphas, norms and spectra per layer and block, against the base if given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import Adapter, Layer, adapter_family, open_adapter
from lorashrink.bases import Base, Views, open_base, views_id
from lorashrink.errors import LorashrinkError, Progress, UsageError
from lorashrink.insight.health import SPIKE, check_health
from lorashrink.insight.training_notes import training_notes
from lorashrink.linking.inputs import find_adapters
from lorashrink.linking.matching import bind, fits
from lorashrink.names import block, kind, naming
from lorashrink.results.inspection import AdapterTable, BlockRow, Inspection, LayerRow, Recommendation

if TYPE_CHECKING:
    from lorashrink.bases.norms import Norms
    from lorashrink.engine.spectrum import Spectrum


ENERGIES = ("0.9", "0.95", "0.99")

# Shares of a file's size that are recommended to try, and what else; sizes only for files that are more than names.
_SHARES, _WORTH_IT = (0.5, 0.25), 500_000

_WITH_BASE, _ANYWAY = ("fro_ckpt=1,thr=-3.55",), ("energy=0.99", "energy=0.95")


def inspect(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    header: bool = False,
    spectrum: bool = False,
    recommend: bool = False,
    recursive: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look into adapters. `header` answers from headers alone; `spectrum` lists all singular values.

    `recommend` tells what some recipes would make of each file, as `resize` with a dry run does; recipes that keep
    nothing of it, or cannot reach their size, are left out.

    Files that cannot be read are in `Inspection.failed`. Raises InputError or NotABase if there is nothing to
    look at or the base cannot be used, UsageError if headers do not tell what is asked for.
    """
    if header and (spectrum or recommend):
        raise UsageError("header: headers alone tell neither singular values nor what a recipe would keep.")
    sources = find_adapters([adapters] if isinstance(adapters, (str, Path)) else adapters, recursive=recursive)
    files, failed = [], {}
    with ExitStack() as stack:
        opened = stack.enter_context(open_base(base)) if base is not None else None
        measure = _no_measures if header else _measuring(stack, opened, spectrum, device, jobs, progress)
        for source in sources:
            try:
                with open_adapter(source) as adapter:
                    table = _table(adapter, opened, measure)
                if recommend:
                    table = replace(table, recommendations=_recommended(source, table, base, device, jobs))
                files.append(table)
            except LorashrinkError as error:
                failed[str(source)] = str(error)
    return Inspection(tuple(files), failed)


# What is measured of each layer of an adapter whose layers change these base weights.
_Measure = Callable[[Adapter, Sequence[Views]], Sequence[Mapping[str, object]]]


def _no_measures(adapter: Adapter, views: Sequence[Views]) -> Sequence[Mapping[str, object]]:
    return [{}] * len(views)


def _measuring(
    stack: ExitStack, base: Base | None, spectrum: bool, device: str, jobs: int | None, progress: Progress | None
) -> _Measure:
    """The measuring function of this run. torch is imported here, for `header` never."""
    from lorashrink.bases.norms import BaseNorms
    from lorashrink.engine.devices import pick_device, worker_pool
    from lorashrink.engine.spectrum import Item, decompose

    pool = stack.enter_context(worker_pool(jobs))
    norms = BaseNorms(base) if base else None
    device = pick_device(device)

    def measure(adapter: Adapter, views: Sequence[Views]) -> Sequence[Mapping[str, object]]:
        present = [layer for layer in adapter.layers if layer.bound]
        items = [Item(partial(getattr, layer, "delta"), layer.width) for layer in present]
        spectra: dict[str, Spectrum] = {}
        for layer, future in zip(present, decompose(items, device=device, pool=pool), strict=True):
            spectra[layer.name] = future.result()
            if progress:
                progress(f"decomposing {adapter.path.name}", len(spectra), len(items))
        widest = max((layer.rank for layer in adapter.layers), default=0)
        known: Norms = {}
        if norms:
            report = partial(progress, "norms of the base") if progress else None
            known = norms.look_up([each for each in views if each], ("fro", "spn"), pool=pool, progress=report)
        return [
            _measures(layer, spectra[layer.name], known.get(views_id(each), {}) if each else {}, spectrum, widest)
            if layer.name in spectra
            else {"alpha": layer.alpha, "flags": ("needs_base",)}
            for layer, each in zip(adapter.layers, views, strict=True)
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
    sigma = spectrum.sigma
    tests = {
        "zero": spectrum.rank == 0,
        "padded_rank": 0 < spectrum.rank < min(layer.rank, layer.shape[0], math.prod(layer.shape[1:])),
        "spike": spectrum.rank > 1 and float(sigma[0]) > SPIKE * float(sigma[1]),
        "negative_alpha": layer.alpha is not None and layer.scale < 0,
        "zero_alpha": layer.off,
        "odd_alpha": layer.alpha is not None and _odd(layer.alpha, layer.scale, widest),
    }
    return tuple(flag for flag, present in tests.items() if present)


def _odd(alpha: float, scale: float, widest: int) -> bool:
    """Whether programs may disagree about an alpha: it is above every rank of the file, or no whole number.

    Not where it does not scale anything, nor above the rank of its own layer alone: files whose layers share one alpha
    have the largest rank for it.
    """
    return scale != 1 and (alpha > widest or (alpha != int(alpha) and scale > 0))


def _table(adapter: Adapter, base: Base | None, measure: _Measure) -> AdapterTable:
    found = [base.find(layer.name) if base else () for layer in adapter.layers]
    views = [each if each and fits(layer, each) else () for layer, each in zip(adapter.layers, found, strict=True)]
    adapter = bind(adapter, views, base)
    rows = tuple(
        LayerRow(
            name=layer.name,
            block=block(layer.name),
            kind=kind(layer.name, layer.shape),
            shape=layer.shape,
            algo=layer.algo,
            rank=layer.rank,
            dtype=layer.dtype,
            bytes=_bytes(layer),
            base_keys=tuple(view.key for view in each),
            **measures,  # type: ignore[arg-type]  # the fields of LayerRow that `_measures` fills
        )
        for layer, each, measures in zip(adapter.layers, views, measure(adapter, views), strict=True)
    )
    family, metadata, names = adapter_family(adapter), adapter.store.metadata, naming([row.name for row in rows])
    return AdapterTable(
        path=str(adapter.path),
        bytes=sum(path.stat().st_size for path in adapter.store.files),
        family=family,
        algo="+".join(sorted({row.algo for row in rows})) or "none",
        naming=names,
        dtype="+".join(sorted({row.dtype for row in rows})),
        fro=_together([row.fro for row in rows]),
        fro_ratio=_ratio([(row.fro, row.base_fro) for row in rows]),
        metadata=metadata,
        notes=training_notes(metadata),
        health=check_health(rows, metadata, family=family, naming=names),
        layers=rows,
        blocks=_blocks(adapter.layers, rows),
        others=adapter.others,
    )


def _blocks(layers: Sequence[Layer], rows: Sequence[LayerRow]) -> tuple[BlockRow, ...]:
    members: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(row.block, []).append(index)
    return tuple(
        BlockRow(
            block=name,
            layers=len(indices),
            parameters=sum(_parameters(layers[i]) for i in indices),
            bytes=sum(rows[i].bytes for i in indices),
            fro=_together([rows[i].fro for i in indices]),
            fro_ratio=_ratio([(rows[i].fro, rows[i].base_fro) for i in indices]),
        )
        for name, indices in sorted(members.items())
    )


def _parameters(layer: Layer) -> int:
    return sum(math.prod(info.shape) for role, info in layer.infos.items() if role != "alpha")


def _bytes(layer: Layer) -> int:
    return sum(info.nbytes for info in layer.infos.values())


def _together(norms: Sequence[float | None]) -> float | None:
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if known else None


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    known = [(fro, base) for fro, base in pairs if fro is not None and base]
    return math.hypot(*(fro for fro, _ in known)) / math.hypot(*(base for _, base in known)) if known else None


def _recommended(
    source: Path, table: AdapterTable, base: str | Path | None, device: str, jobs: int | None
) -> tuple[Recommendation, ...]:
    """What a handful of recipes would make of a file, in their order; nothing of one that adds nothing."""
    if not table.fro:
        return ()
    from lorashrink.recipes.grammar import parse_recipes
    from lorashrink.shrinking.run import shrink

    score = "bytes" if base is None else "fro_ckpt,bytes"
    sizes = [f"{score},size={share * table.bytes / 2**20:.4g}" for share in _SHARES if table.bytes > _WORTH_IT]
    recipes = parse_recipes([*(_WITH_BASE if base is not None else ()), *_ANYWAY, *sizes])
    unwritten = {source.with_name(f"{place}.safetensors"): recipe for place, recipe in enumerate(recipes)}
    found = shrink({source: unwritten}, _open, base=base, device=device, jobs=jobs, dry_run=True, lenient=True).results
    return tuple(Recommendation(each.recipe, each.bytes_after, each.relative_error, each.energy) for each in found)


def _open(source: Path, base: Base | None) -> Adapter:
    return open_adapter(source)
