"""OFT and BOFT: rotations multiply the base weight, W' = rotation · W; ΔW = W' − W.

The rotations are Cayley transforms of skew-symmetric matrices Q: R = (I + Q)·(I − Q)⁻¹.

- Diag-OFT of LyCORIS and kohya, `oft_blocks` [k, b, b], out = k·b: Q = B − Bᵀ, and Rᵀ turns each block of b rows.
- BOFT of LyCORIS, `oft_blocks` [m, k, b, b]: m such stages one after another, and R turns rows that are 2ⁱ·b/2 apart.
- Both with `rescale` [out, 1, ...], which multiplies the rows of W'. Their alpha is no scale but a bound: over all
  blocks ‖Q‖ is at most alpha·out; 0 and below mean no bound.
- kohya's for FLUX, `oft_blocks.0` [k, b, b] and so on: a Diag-OFT for each part of a fused weight's rows.
- OFT of PEFT and OneTrainer, `oft_R.weight` [k, b·(b−1)/2], in·kh·kw = k·b: the upper triangle of Q, divided
  by 2·√(b−1) if there is `scaled_oft` beside it. Each block of b columns is multiplied by Rᵀ, where R is a truncated
  series, or the inverse of the R above if the settings say that it is exact. One block alone is repeated.

Sources: OFT (https://arxiv.org/abs/2306.07280); BOFT (https://arxiv.org/abs/2311.06243); the series is that of OFTv2
(https://arxiv.org/abs/2506.19847).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorashrink.adapters.family import Family, Infos, Needs, Stored, unscaled
from lorashrink.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Dense

# PEFT's defaults; OneTrainer has no other values.
_SERIES_TERMS = 5
_MOST_TERMS = 1000
_COFT_EPS = 6e-5


# --- rotations of rows --------------------------------------------------------------------------


def _parts(roles: Mapping[str, object]) -> list[str]:
    """The roles of the rotations of a layer: one, or one for each part of a fused weight."""
    return sorted(role for role in roles if role.startswith("blocks"))


def check_rows(infos: Infos) -> str | None:
    """Square blocks, whose butterfly stages pair all rows, and a number for each row."""
    parts = _parts(infos)
    if parts != ["blocks"] and parts != [f"blocks{number}" for number in range(len(parts))]:
        return f"it has {', '.join(parts)}, and others are missing"
    for part in parts:
        blocks = infos[part].shape
        if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
            return f"oft_blocks {list(blocks)} are no square blocks"
        if 0 in blocks:
            return f"oft_blocks {list(blocks)} are empty"
        if len(blocks) == 4:
            stages, count, size, _ = blocks
            # compared first, because 2 to the power of a number in a header may be anything
            if size % 2 or stages > count.bit_length() or count % 2 ** (stages - 1):
                return f"{count} blocks of {size} rows have no {stages} butterfly stages"
    if "rescale" in infos:
        rescale, out = infos["rescale"].shape, turned_rows(infos)
        if rescale[:1] != (out,) or math.prod(rescale) != out:
            return f"rescale is {list(rescale)} for {out} rows"
    return None


def turned_rows(infos: Infos) -> int:
    """How many rows all rotations together turn: the outputs of the base weight."""
    return sum(infos[part].shape[-3] * infos[part].shape[-1] for part in _parts(infos))


def _turn_less_one(skew: Tensor) -> Tensor:
    """R − I, without the cancellation: 2·(I − Q)⁻¹·Q = (I + QᵀQ)⁻¹·2·(I + Q)·Q."""
    import torch

    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    # Not `solve`: batched LU of torch 2.13 hangs in processes that have called torch.set_num_threads.
    # The root of NaN is no error here; they are refused with the layer's name elsewhere.
    root = torch.linalg.cholesky_ex(identity + skew.mT @ skew)[0]
    return torch.cholesky_solve(2 * (skew + skew @ skew), root)


def _butterfly(skew: Tensor, rows: Tensor) -> Tensor:
    """What the stages change in rows [k·b, m]."""
    import torch

    _, count, size, _ = skew.shape
    change = torch.zeros_like(rows)
    for stage, turns in enumerate(_turn_less_one(skew).to(rows.dtype)):
        apart, columns = 2**stage * size // 2, rows.shape[1]
        moved = (rows + change).reshape(-1, 2, apart, columns).transpose(1, 2).reshape(count, size, columns)
        turned = (turns @ moved).reshape(-1, apart, 2, columns)
        change += turned.transpose(1, 2).reshape(rows.shape)
    return change


def delta_rows(stored: Stored) -> Dense:
    """What the rotations change in W. Raises ShapeError if the base weight has other rows."""
    import torch

    from lorashrink.engine.delta import Dense

    weight = stored.base_weight
    rotations = [stored.tensors[part] for part in _parts(stored.tensors)]
    sizes = [blocks.shape[-3] * blocks.shape[-1] for blocks in rotations]
    if sum(sizes) != weight.shape[0]:
        raise ShapeError(f"Rotations of {sum(sizes)} rows do not fit a weight of {weight.shape[0]} rows.")
    changes = []
    for blocks, rows in zip(rotations, torch.split(weight, sizes), strict=True):
        skew = blocks.double()
        skew = skew - skew.mT
        norm, bound = float(skew.norm()), stored.scale * len(rows)
        if 0 < bound < norm:
            skew = skew * (bound / norm)
        if skew.ndim == 4:
            changes.append(_butterfly(skew, rows))
        else:
            turns = _turn_less_one(-skew).to(rows.dtype)  # the transposed rotation is that of −Q
            changes.append((turns @ rows.reshape(*skew.shape[:2], -1)).flatten(0, 1))
    change = torch.cat(changes)
    if "rescale" in stored.tensors:
        rescale = stored.tensors["rescale"].float().reshape(-1, 1)
        change = rescale * change + (rescale - 1) * weight
    return Dense(change, 1.0, stored.shape)


# --- rotations of columns -----------------------------------------------------------------------


def check_columns(infos: Infos) -> str | None:
    """A list of triangles, each of them the upper half of a square."""
    triangles = infos["triangles"].shape
    if len(triangles) != 2 or 0 in triangles:
        return f"oft_R {list(triangles)} is no list of triangles"
    size = _side(triangles[1])
    if size * (size - 1) // 2 != triangles[1]:
        return f"oft_R {list(triangles)}: no square has {triangles[1]} numbers above its diagonal"
    return None


def _side(numbers: int) -> int:
    """The side of a square that has so many numbers above its diagonal."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def delta_columns(stored: Stored) -> Dense:
    """What the rotations change in W. Raises ShapeError if the base weight has other columns."""
    import torch

    from lorashrink.engine.delta import Dense

    weight, triangles = stored.base_weight, stored.tensors["triangles"].double()
    count, size = len(triangles), _side(triangles.shape[1])
    if weight.shape[1] % size or count not in (1, weight.shape[1] // size):
        raise ShapeError(f"{count} rotations of {size} columns each do not fit a weight of {weight.shape[1]} columns.")
    upper = torch.zeros(count, size, size, dtype=triangles.dtype)
    row, column = torch.triu_indices(size, size, 1)
    upper[:, row, column] = triangles
    if "scaled" in stored.tensors:
        upper /= 2 * math.sqrt(size - 1)
    skew = upper - upper.mT
    if stored.config.get("coft"):  # each block is no longer than eps/√k
        eps = stored.config.get("eps", _COFT_EPS)
        if not isinstance(eps, int | float):
            raise ShapeError(f"eps in the adapter's settings should be a number, it is {eps!r}.")
        shorter: Tensor = eps / math.sqrt(count) / skew.flatten(1).norm(dim=1)[:, None, None]
        skew = skew * shorter.clamp(max=1).nan_to_num(nan=1.0)
    turns = _series_or_exact(skew, stored.config)
    # OneTrainer, whose files come without settings, turns the inputs of a linear layer but the kernel of a convolution
    turns = turns if len(stored.shape) > 2 and not stored.config else turns.mT
    blocks = weight.reshape(len(weight), -1, size).transpose(0, 1)
    change = (blocks @ turns.to(weight.dtype)).transpose(0, 1).flatten(1)
    return Dense(change, 1.0, stored.shape)


def depends_on_settings(config: Mapping[str, Any], shape: tuple[int, ...]) -> bool:
    """Whether the rotations of columns change if PEFT's settings are not beside them."""
    series = config.get("use_cayley_neumann", True) and config.get("num_cayley_neumann_terms") in (None, _SERIES_TERMS)
    return bool(config) and (len(shape) > 2 or bool(config.get("coft")) or not series)


def _series_or_exact(skew: Tensor, config: Mapping[str, Any]) -> Tensor:
    """R − I for R = (I − Q)·(I + Q)⁻¹, or PEFT's series for its inverse, I + 2Q + 2Q² + ... + Qᵗ⁻¹."""
    if not config.get("use_cayley_neumann", True):
        return _turn_less_one(-skew)
    terms = config.get("num_cayley_neumann_terms", _SERIES_TERMS)
    if not isinstance(terms, int) or not 0 <= terms <= _MOST_TERMS:
        raise ShapeError(f"num_cayley_neumann_terms in the adapter's settings should be a small number, not {terms!r}.")
    if terms < 3:
        return 2 * skew if terms == 2 else 0 * skew
    power = skew @ skew
    total = 2 * (skew + power)
    for _ in range(3, terms - 1):
        power = power @ skew
        total += 2 * power
    return total + power @ skew


def _turning_rows(**suffixes: str) -> Family:
    parts = _parts(suffixes)
    return Family(
        name="oft",
        suffixes=suffixes,
        required=(frozenset({parts[0]}),),
        check=check_rows,
        shape=lambda infos: (turned_rows(infos),),
        rank=lambda infos: infos[_parts(infos)[0]].shape[-1],  # side of a block
        delta=delta_rows,
        delta_rank=turned_rows,
        own_scale=lambda infos, alpha, config_scale: alpha or 0.0,  # the bound of the rotations
        marks=frozenset(parts),
        needs=Needs.MULTIPLICATION,
    )


FAMILIES = (
    _turning_rows(blocks=r"\.oft_blocks", rescale=r"\.rescale"),
    _turning_rows(**{f"blocks{part}": rf"\.oft_blocks\.{part}" for part in range(4)}),
    Family(
        name="oft",
        suffixes={"triangles": r"\.oft_R(?:\.[^.]+)?\.weight", "scaled": r"\.oft_R\.scaled_oft"},
        required=(frozenset({"triangles"}),),
        check=check_columns,
        shape=lambda infos: (),
        rank=lambda infos: _side(infos["triangles"].shape[1]),
        delta=delta_columns,
        delta_rank=lambda infos: infos["triangles"].shape[0] * _side(infos["triangles"].shape[1]),
        own_scale=unscaled,
        marks=frozenset({"triangles"}),
        needs=Needs.MULTIPLICATION,
        needs_settings=depends_on_settings,
    ),
)
