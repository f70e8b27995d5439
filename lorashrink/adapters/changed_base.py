"""LoRA whose first factors PEFT takes out of the base at load: W' = W − s·B₀·A₀, so that ΔW = s·(B·A − B₀·A₀).

The first factors follow from the base weight W [out, in], the rank r and the scale s, and are in no file:

- PiSSA (https://arxiv.org/abs/2404.02948): s·B₀·A₀ is the best approximation of W of rank r.
- OLoRA (https://arxiv.org/abs/2406.01775): B₀·A₀ is the first r columns of Q times the first r rows of R, W = Q·R.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Needs, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """s·B₀ [out, r] and A₀ [r, in] by PiSSA, float32 as in PEFT."""
    import torch

    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank]


def _olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """s·B₀ [out, r] and A₀ [r, in] by OLoRA, float32 as in PEFT."""
    import torch

    q, r = torch.linalg.qr(weight)
    return scale * q[:, :rank], r[:rank]


# initialisation -> its first factors, of (W, r, s)
_FIRST: Mapping[str, Callable[[Tensor, int, float], tuple[Tensor, Tensor]]] = {"pissa": _pissa, "olora": _olora}


@cache
def against_true_base(family: Family, initialisation: str) -> Family:
    """The family of layers of this LoRA family that began so; they are written as ordinary LoRA."""

    def delta(stored: Stored) -> Delta:
        import torch

        from lorashrink.engine.delta import Delta

        trained = family.delta(stored)
        assert isinstance(trained, Delta), "LoRA has factors"
        first_up, first_down = _FIRST[initialisation](stored.base_weight, trained.rank, stored.scale)
        up = torch.cat([trained.up.float() * stored.scale, -first_up], dim=1)
        return Delta(up, torch.cat([trained.down.float(), first_down]), 1.0, stored.shape)

    return replace(
        family,
        name=initialisation,
        delta=delta,
        delta_rank=lambda infos: 2 * family.rank(infos),
        needs=Needs.ADDITION,
        changed_base=initialisation,
        written=None,
    )
