"""Factors in 8-bit floats, e4m3: 3 bits of mantissa, normal from 2⁻⁶ to 448, in steps of 2⁻⁹ below.

A dimension u·vᵀ stays the same if u is multiplied by what v is divided by. So both sides get one root mean square, and
from there on balances within an octave are tried: each rounds other numbers up and down, and the best is taken. With
statistics of a model, which weigh some directions of u and v far more than others, that is worth several decibels;
without them it is luck over all numbers of a vector, and worth a decibel in narrow layers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Values = np.ndarray[tuple[int], np.dtype[np.float64]]

# [k, n] float32 -> [k]: how much errors of k vectors change; without statistics their squared lengths.
Energy = Callable[[Tensor], Tensor]

FLOAT8 = torch.float8_e4m3fn

_LARGEST = 448.0

# Balances that are tried, within an octave: in the normal range all others round as these do.
_BALANCES = 16

# Without statistics wider layers gain less than 0.4 dB by trying them.
_NARROW = 512

_AT_ONCE = 1 << 16  # numbers that are rounded in one go, so that they are used while still in the cache


class Rounded(NamedTuple):
    """Two factors in e4m3."""

    up: Tensor  # [out, k] e4m3
    down: Tensor  # [k, n] e4m3
    error: float  # ‖up · down − before‖_F, as if dimensions were orthogonal
    norm: float  # ‖before‖_F of the same kind


def squares(vectors: Tensor) -> Tensor:
    """The energy without statistics: [k, n] -> [k]."""
    return (vectors * vectors).sum(1)


def to_float8(up: Tensor, down: Tensor, of_up: Energy = squares, of_down: Energy = squares) -> Rounded:
    """up [out, k] and down [k, n], on the CPU, rounded so that their product changes least.

    `of_up` and `of_down` are energies from statistics. Numbers beyond 448 become 448.
    """
    up, down = up.mT.contiguous().float(), down.float()
    lengths = [torch.linalg.vector_norm(factor, dim=1, dtype=torch.float64) for factor in (up, down)]
    ratio = lengths[1] / lengths[0] * math.sqrt(up.shape[1] / down.shape[1])
    balance = torch.where(lengths[0] * lengths[1] > 0, ratio.sqrt(), 1.0)[:, None].float()
    if of_up is not squares or max(up.shape[1], down.shape[1]) <= _NARROW:
        balance = balance * best_balance(up * balance, down / balance, of_up, of_down)
    up, down = up * balance, down / balance
    rounded_up, rounded_down = _nearest(up), _nearest(down)
    norms = lengths[0] * lengths[1]  # ‖u·vᵀ‖ of each dimension
    changes = _change(up, rounded_up) * (lengths[1] / balance[:, 0]).square()
    changes += _change(down, rounded_down) * (lengths[0] * balance[:, 0]).square()
    return Rounded(
        rounded_up.to(FLOAT8).mT,
        rounded_down.to(FLOAT8),
        float(changes.sum().sqrt()),
        float(norms.square().sum().sqrt()),
    )


def _change(factor: Tensor, rounded: Tensor) -> Tensor:
    """[k]: the squared length of what rounding changes; `factor` is used up."""
    lengths: Tensor = torch.linalg.vector_norm(factor.sub_(rounded), dim=1, dtype=torch.float64)
    return lengths.square()


def best_balance(up: Tensor, down: Tensor, of_up: Energy, of_down: Energy) -> Tensor:
    """[k, 1]: what each row of `up` is best multiplied by before it is rounded, and that of `down` divided by."""
    energy_up, energy_down = of_up(up), of_down(down)
    balances = 2.0 ** (torch.arange(_BALANCES) / _BALANCES - 0.5)
    costs = []
    for some in torch.split(balances, max(1, _AT_ONCE // max(up.numel(), down.numel()))):
        factors = some[:, None, None]
        errors_up = _nearest(up * factors) / factors - up  # [balances, k, out]
        errors_down = _nearest(down / factors) * factors - down
        costs.append(
            of_up(errors_up.flatten(0, 1)).reshape(-1, len(up)) * energy_down
            + of_down(errors_down.flatten(0, 1)).reshape(-1, len(up)) * energy_up
        )
    return balances[torch.cat(costs).argmin(0)][:, None]


def _nearest(tensor: Tensor) -> Tensor:
    """The nearest numbers that e4m3 has, float32; a fifth of the time of a conversion there and back.

    In float16 a number divided by 2⁸ is normal and subnormal where it is in e4m3; 7 bits of mantissa are too many.
    """
    bits = tensor.mul(2.0**-8).half().clamp_(-_LARGEST * 2.0**-8, _LARGEST * 2.0**-8).view(torch.int16)
    return bits.add_(64).bitwise_and_(-128).view(torch.float16).float().mul_(2.0**8)


def relative_error(rms: Values, dtype: torch.dtype) -> Values:
    """[r]: ‖x' − x‖ / ‖x‖ of vectors of normally distributed numbers of this root mean square, rounded to a dtype."""
    grid, errors = measured_errors(dtype)
    return np.interp(np.log2(np.maximum(rms, 1e-30)), grid, errors)


@cache
def measured_errors(dtype: torch.dtype) -> tuple[Values, Values]:
    """(log2 of root mean squares, relative errors), measured on quantiles of the normal distribution."""
    levels = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    normal = torch.special.ndtri(levels)
    grid = torch.arange(-30.0, 21.0, 0.5, dtype=torch.float64)
    numbers = normal * 2.0 ** grid[:, None]
    limit = torch.finfo(dtype).max
    errors = (numbers.clamp(-limit, limit).float().to(dtype).double() - numbers).norm(dim=1) / numbers.norm(dim=1)
    return grid.numpy(), errors.numpy()
