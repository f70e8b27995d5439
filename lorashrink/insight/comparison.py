"""How far one adapter is from another, in what they add to the base: per layer, per block, and in total.

All numbers are those of ΔW, not of factors, so that it does not matter how an adapter was factored, named or scaled.
Where both sides are factors, ΔW is not formed: with the factors of A and B side by side, U = [up_a, up_b] and
V = [down_a; down_b], all norms and products are sums over the blocks of UᵀU ∘ VVᵀ. Sums lose digits where A and B are
nearly the same; there R factors of U and Vᵀ replace the Gram matrices, and A − B is taken before it is squared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import Source, in_memory, open_adapter
from lorashrink.bases import Base, use_base
from lorashrink.engine.devices import core_device, pick_device, worker_pool
from lorashrink.errors import Progress, UsageError
from lorashrink.insight.beside import metadata_differences, other_differences
from lorashrink.insight.differences import FIRST, SECOND, InnerProducts, inner_products
from lorashrink.insight.summaries import by_block, joined, summary
from lorashrink.linking.inputs import only_adapter
from lorashrink.linking.pairing import Unit, bind_all, matched, units
from lorashrink.names import block
from lorashrink.results.comparison import BlockDifference, Comparison, LayerDifference, Side

_ONE_BY_ONE = "two are compared, one by one"


def compare(
    a: Source,
    b: Source,
    *,
    base: str | Path | Mapping[str, Tensor] | Base | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare what two adapters add to the base. The base, or its norm table, tells which layers belong together.

    a, b: paths, mappings of names to tensors, PeftModels, or pipelines. base: also the tensors of a model by name.
    Without one, equal names do, and names of two programs where one of them writes dots. Layers that multiply the base
    weight need the base itself. Raises InputError if a file cannot be used, FamilyMismatch or ShapeError if the
    adapters were made for different models, and UsageError if only a base could tell which layers are the same.
    """
    with ExitStack() as stack:
        sides = [
            stack.enter_context(open_adapter(in_memory(side) or only_adapter(side, needed=_ONE_BY_ONE)))
            for side in (a, b)
        ]
        device = pick_device(device, [path for side in sides for path in side.store.files])
        opened = stack.enter_context(use_base(base)) if base is not None else None
        dictionary, views = matched(sides, opened)
        bound = bind_all(sides, views, opened)
        pairs = units(bound, views)
        pool = stack.enter_context(worker_pool(jobs))
        rows, sums = [], []
        measured = pool.map(partial(inner_products, device=core_device(device)), pairs)
        for unit, products in zip(pairs, measured, strict=True):
            rows.append(layer_difference(unit, products))
            sums.append(products)
            if progress:
                progress("comparing", len(rows), len(pairs))
        if sums and not any(sums):
            raise UsageError(
                f"{a} and {b}: {rows[0].algo_a or rows[0].algo_b} exists only together with the base weight. Give the "
                "checkpoint with --base; a norm table is not enough."
            )
        others, equal = other_differences(bound, dictionary)
        return Comparison(
            version=__version__,
            base=opened.info if opened else None,
            a=Side(**summary(bound[FIRST])),
            b=Side(**summary(bound[SECOND])),
            total=block_difference("total", sums),
            blocks=tuple(block_difference(name, [sums[i] for i in indices]) for name, indices in by_block(rows)),
            layers=tuple(row for row in rows if row.names_a and row.names_b),
            only_a=tuple(row for row in rows if not row.names_b),
            only_b=tuple(row for row in rows if not row.names_a),
            others=tuple(others),
            others_equal=equal,
            metadata=metadata_differences(*bound),
        )


# --- tables -------------------------------------------------------------------------------------


def layer_difference(unit: Unit, sums: InnerProducts | None) -> LayerDifference:
    """The row of the layers that change one weight."""
    a, b = unit.of(FIRST), unit.of(SECOND)
    shortest = min((layers for layers in (a, b) if layers), key=len)
    flags = {
        "needs_base": sums is None,
        "nan_a": sums and not math.isfinite(sums.a),
        "nan_b": sums and not math.isfinite(sums.b),
        "zero_a": sums and a and sums.a == 0,
        "zero_b": sums and b and sums.b == 0,
    }
    return LayerDifference(
        name=shortest[0].name,
        names_a=tuple(layer.name for layer in a),
        names_b=tuple(layer.name for layer in b),
        block=block((a or b)[0].name),
        shape=(unit.rows, *shortest[0].shape[1:]),
        algo_a=joined(layer.algo for layer in a) or None,
        algo_b=joined(layer.algo for layer in b) or None,
        rank_a=max((layer.rank for layer in a), default=None),
        rank_b=max((layer.rank for layer in b), default=None),
        dtype_a=joined(layer.dtype for layer in a) or None,
        dtype_b=joined(layer.dtype for layer in b) or None,
        flags=tuple(flag for flag, present in flags.items() if present),
        **(_numbers(sums) if sums and sums.finite else {}),
    )


def block_difference(name: str, sums: Sequence[InnerProducts | None]) -> BlockDifference:
    """The row of several weights together."""
    finite = [products for products in sums if products and products.finite]
    if sums and not finite:
        return BlockDifference(name, len(sums), len(sums))
    total = InnerProducts(*(math.fsum(products[i] for products in finite) for i in range(4)))
    return BlockDifference(name, len(sums), len(sums) - len(finite), **_numbers(total))


def _numbers(sums: InnerProducts) -> dict[str, float | None]:
    a, b, difference = (math.sqrt(max(0.0, square)) for square in (sums.a, sums.b, sums.difference))
    relative = difference / a if a else None
    cosine = max(-1.0, min(1.0, sums.product / a / b)) if a and b else None
    return {
        "fro_a": a,
        "fro_b": b,
        "difference": difference,
        "cosine": 1.0 if cosine is not None and difference == 0 else cosine,
        "relative_difference": relative,
        "energy_kept": None if relative is None else 1 - relative**2,
    }
