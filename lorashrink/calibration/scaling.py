"""A factor for each dimension of a shrunk adapter that brings the model nearest to the original, in closed form.

What truncation takes away acts together, so that the dimensions that are left can make up for a part of it. With a
random projection v of a prediction p, one backward pass gives the effects ∂(v·p)/∂log s_i of all scales s_i, and
v·(p* - p) is what is missing. Ridge regression over many of these gives 1 + δ for each dimension. Tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the ridge, as parts of the mean square of an effect; held-out predictions choose among them.
DAMPINGS = (0.3, 1.0, 3.0)


def effects(projection: Tensor, ups: Sequence[Tensor]) -> Tensor:
    """[dimensions] float64: how the projection changes with the scale of each column of the factors [out, r]."""
    gradients = torch.autograd.grad([projection], list(ups), allow_unused=True)
    sums = [
        torch.zeros(up.shape[1]) if gradient is None else (up.detach() * gradient).sum(0)
        for up, gradient in zip(ups, gradients, strict=True)
    ]
    return torch.cat([values.double().cpu() for values in sums])


def ridge(rows: Tensor, missing: Tensor, damping: float) -> Tensor:
    """δ [dimensions] that minimises ‖rows·δ - missing‖² + damping·(mean square of a row)·‖δ‖², all float64.

    rows: [samples, dimensions]. missing: [samples].
    """
    kernel = rows @ rows.mT
    level = damping * kernel.diagonal().mean()
    weights: Tensor = torch.linalg.solve(kernel + level * torch.eye(len(kernel), dtype=kernel.dtype), missing)
    return rows.mT @ weights
