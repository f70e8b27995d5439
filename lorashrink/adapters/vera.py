"""VeRA: ΔW = diag(b) · B · diag(d) · A, where all layers have the random matrices A and B in common.

d [r], b [out]; A [r, ≥ in] and B [≥ out, r] are as large as the largest layer, and the first columns and rows of them
are a layer's own. Source: https://arxiv.org/abs/2310.11454, as PEFT stores it with `save_projection`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Needs, Stored, unscaled
from lorashrink.errors import ShapeError

if TYPE_CHECKING:
    from lorashrink.engine.delta import Delta


def check(infos: Infos) -> str | None:
    """Matrices and vectors of one rank, and B with enough rows."""
    a, b = infos["A"].shape, infos["B"].shape
    d, rows = infos["lambda_d"].shape, infos["lambda_b"].shape
    if len(a) != 2 or len(b) != 2 or len(d) != 1 or len(rows) != 1:
        return f"A {list(a)} and B {list(b)} with {list(d)} and {list(rows)} are no matrices with their factors"
    if not a[0] == b[1] == d[0]:
        return f"A is {list(a)}, B is {list(b)}, lambda_d is {list(d)}; their ranks differ"
    if rows[0] > b[0]:
        return f"lambda_b is {list(rows)}, B is {list(b)}: it has too few rows"
    return f"A {list(a)} or lambda_b {list(rows)} is empty" if 0 in (*a, *rows) else None


def delta(stored: Stored) -> Delta:
    """ΔW of rank r. Raises ShapeError if the base weight is wider than A, or has other rows than b."""
    from lorashrink.engine.delta import Delta

    tensors, columns = stored.tensors, math.prod(stored.shape[1:])
    rows = tensors["lambda_b"].float()[:, None]
    if len(stored.shape) < 2 or columns > tensors["A"].shape[1] or len(rows) != stored.shape[0]:
        raise ShapeError(
            f"A layer of {len(rows)} rows and at most {tensors['A'].shape[1]} columns does not fit a weight "
            f"of {list(stored.shape)}."
        )
    up = rows * tensors["B"][: len(rows)].float()
    down = tensors["lambda_d"].float()[:, None] * tensors["A"][:, :columns].float()
    return Delta(up, down, stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="vera",
        suffixes={"lambda_d": r"\.vera_lambda_d(?:\.[^.]+)?", "lambda_b": r"\.vera_lambda_b(?:\.[^.]+)?"},
        required=(frozenset({"lambda_d", "lambda_b", "A", "B"}),),
        check=check,
        shape=lambda infos: infos["lambda_b"].shape,
        rank=lambda infos: infos["lambda_d"].shape[0],
        delta=delta,
        own_scale=unscaled,
        needs=Needs.SHAPE,
        common={"A": r"(?:.*\.)?vera_A(?:\..+)?", "B": r"(?:.*\.)?vera_B(?:\..+)?"},
    ),
)
