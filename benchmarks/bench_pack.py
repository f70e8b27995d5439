"""Whether several adapters of one base take fewer bytes with a basis in common than as separate files.

python benchmarks/bench_pack.py [STACK ...]     STACK is title=a.safetensors,b.safetensors,...; two files or more each

Prints tables in Markdown: one of random adapters that share a stated part of their dimensions, one for every stack of
files. Both sides get the best allocation of bytes over layers and adapters, and are compared at equal relative error of
ΔW, every adapter of a stack scaled to ‖ΔW‖_F = 1. Bytes are those of the numbers in fp16, without headers. All
computations are in float64 on ΔW itself, so that it does not matter how an adapter splits it into factors.

A layer of N adapters with a basis in common is ΔW_i ≈ U · C_i · V, U [out, R], V [R, in], C_i [R, R].
See docs/shared-basis.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lorashrink import overlap
from lorashrink.adapters import open_adapter

TARGETS = (0.01, 0.05, 0.1, 0.25, 0.5)  # relative errors
FP16 = 2  # bytes
WIDTH, RANK = 1280, 16  # of random layers
COUNTS = (2, 4, 8, 16, 32)
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
DECAY = 0.8  # σ_i ∝ i^-decay, as of trained ones in the other benchmarks

_STEP = 1.25  # between the ranks of a basis that are tried
_ROUNDS = 1  # of improving V for U and U for V
_DIAGONAL_STEP = 1.5
_DIAGONAL_ROUNDS = 8
_RIDGE = 1e-10  # relative; two equal columns make the least squares of a round singular


# --- a layer of a stack ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Stacked:
    """What N adapters add to one weight: up[i] @ down[i], in coordinates of the space that all columns and rows span.

    up [N, p, k], its columns orthogonal and as long as σ; down [N, k, q], its rows orthonormal.
    """

    up: Tensor
    down: Tensor
    out: int
    fan_in: int

    @property
    def sigma(self) -> Tensor:
        """[N, k]."""
        return self.up.norm(dim=1)

    @property
    def total(self) -> float:
        """Σ‖ΔW_i‖_F²."""
        return float(self.up.square().sum())


def stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> Stacked:
    """The layer of these (up [out, r_i], down [r_i, in]), float64; lower ranks are filled up with zeros."""
    columns, ups = torch.linalg.qr(torch.cat([up for up, _ in pairs], 1))
    rows, downs = torch.linalg.qr(torch.cat([down for _, down in pairs]).mT)
    ranks = [up.shape[1] for up, _ in pairs]
    cores = [up @ down.mT for up, down in zip(ups.split(ranks, 1), downs.split(ranks, 1), strict=True)]
    u, sigma, v = torch.linalg.svd(torch.stack(cores), full_matrices=False)
    k = max(ranks)
    return Stacked((u * sigma[:, None])[..., :k], v[:, :k], columns.shape[0], rows.shape[0])


# --- what a layer costs ------------------------------------------------------------------------


def separate(layer: Stacked) -> Tensor:
    """Every adapter truncated by itself. [P, 2]: numbers that are stored, and Σ‖ΔW_i − ΔW_i'‖_F² for it."""
    return _truncated(layer.sigma, 0.0, 0, layer.out, layer.fan_in)


def both_sides(layer: Stacked) -> Tensor:
    """A basis for the columns and one for the rows; a core is full, or two factors where they are smaller."""
    return torch.cat([_in_bases(layer, u, v) for u, v in _bases(layer)])


def free_cores(layer: Stacked) -> Tensor:
    """As `both_sides` if cores took no bytes: what no width of a layer can go below."""
    points = []
    for u, v in _bases(layer):
        lost = layer.total - float((u.mT @ layer.up @ (layer.down @ v)).square().sum())
        points.append((u.shape[1] * layer.out + v.shape[1] * layer.fan_in, max(0.0, lost)))
    return torch.tensor(points, dtype=torch.float64)


def _bases(layer: Stacked) -> Iterator[tuple[Tensor, Tensor]]:
    """U [p, R] and V [q, R] for several R, each the best one for the other; U starts as the best one by itself."""
    first = _directions(layer.up, layer.down)
    for rank in _ranks(max(len(first), layer.down.shape[2]), _STEP):
        u = first[:, :rank]
        for _ in range(_ROUNDS):
            v = _directions(layer.down.mT, layer.up.mT @ u)[:, :rank]
            u = _directions(layer.up, layer.down @ v)[:, :rank]
        yield u, v


def one_side(layer: Stacked) -> Tensor:
    """A basis for the columns or one for the rows, the other factor is each adapter's own."""
    columns, rows = _directions(layer.up, layer.down), _directions(layer.down.mT, layer.up.mT)
    return torch.cat(
        [_in_bases(layer, columns[:, :rank], None) for rank in _ranks(len(columns), _STEP)]
        + [_in_bases(layer, None, rows[:, :rank]) for rank in _ranks(len(rows), _STEP)]
    )


def diagonal(layer: Stacked) -> Tensor:
    """U and V that need not be orthogonal, and cores that are diagonal."""
    numbers = layer.out + layer.fan_in + len(layer.up)
    ranks = _ranks(min(layer.sigma.numel(), 2 * min(layer.up.shape[1], layer.down.shape[2])), _DIAGONAL_STEP)
    return torch.tensor([(numbers * rank, diagonal_error(layer, rank)) for rank in ranks], dtype=torch.float64)


def _ranks(most: int, step: float) -> list[int]:
    """From 1 to `most`, in steps of one and then by this factor."""
    ranks = [1]
    while ranks[-1] < most:
        ranks.append(min(most, max(ranks[-1] + 1, int(ranks[-1] * step))))
    return ranks


def _directions(near: Tensor, far: Tensor) -> Tensor:
    """Left singular vectors [p, p] of all near[i] @ far[i] side by side, the strongest first."""
    gram = (near @ (far @ far.mT) @ near.mT).sum(0)
    return torch.linalg.eigh(gram).eigenvectors.flip(1)


def _in_bases(layer: Stacked, u: Tensor | None, v: Tensor | None) -> Tensor:
    """As `separate`, for cores in the bases U [p, R] and V [q, R] with orthonormal columns; None is no basis."""
    up = layer.up if u is None else u.mT @ layer.up
    down = layer.down if v is None else layer.down @ v
    sigma = torch.linalg.svdvals(torch.linalg.qr(up).R @ torch.linalg.qr(down.mT).R.mT)
    height, width = layer.out if u is None else u.shape[1], layer.fan_in if v is None else v.shape[1]
    # A basis of the whole space is the identity, which need not be stored.
    stored = height * layer.out * (height < layer.out) + width * layer.fan_in * (width < layer.fan_in)
    return _truncated(sigma, max(0.0, layer.total - float(sigma.square().sum())), stored, height, width)


def _truncated(sigma: Tensor, lost: float, stored: int, height: int, width: int) -> Tensor:
    """Cores [height, width] with these singular values [N, k], of which one after the other is kept."""
    energy, order = sigma.square().flatten().sort(descending=True)
    ranks = torch.nn.functional.one_hot(order // sigma.shape[1], len(sigma)).cumsum(0)
    numbers = stored + (ranks * (height + width)).clamp(max=height * width).sum(1)
    return torch.stack([numbers, (lost + energy.sum() - energy.cumsum(0)).clamp(min=0.0)], 1)


def diagonal_error(layer: Stacked, rank: int) -> float:
    """Σ‖ΔW_i − U · diag(c_i) · V‖² by alternating least squares, the better of two beginnings."""
    return min(_alternate(layer, u, v) for u, v in (_strongest(layer, rank), _of_the_mean(layer, rank)))


def _strongest(layer: Stacked, rank: int) -> tuple[Tensor, Tensor]:
    """The largest singular vectors of all adapters: with their own σ, this is separate truncation."""
    order = layer.sigma.flatten().argsort(descending=True)[:rank]
    adapter, dimension = order // layer.sigma.shape[1], order % layer.sigma.shape[1]
    return _unit(layer.up[adapter, :, dimension].mT), layer.down[adapter, dimension].mT


def _of_the_mean(layer: Stacked, rank: int) -> tuple[Tensor, Tensor]:
    """Singular vectors of one random mixture of the ΔW_i: right if they have all of them in common."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(layer.up), 1, 1, generator=generator, dtype=torch.float64) + 0.5
    mixture = (weights * layer.up).transpose(0, 1).flatten(1) @ layer.down.flatten(0, 1)
    u, _, v = torch.linalg.svd(mixture, full_matrices=False)
    missing = max(0, rank - len(v))
    more_u, more_v = (
        _unit(torch.randn(len(side), missing, generator=generator, dtype=torch.float64)) for side in (u, v.mT)
    )
    return torch.cat([u[:, :rank], more_u], 1), torch.cat([v[:rank].mT, more_v], 1)


def _alternate(layer: Stacked, u: Tensor, v: Tensor) -> float:
    """The error after some rounds from U [p, R] and V [q, R]."""
    for number in range(_DIAGONAL_ROUNDS):
        weights, inner = _weights(layer, u, v)
        if number + 1 == _DIAGONAL_ROUNDS:
            break
        u = _side(layer.up, layer.down @ v, weights, v)
        v = _side(layer.down.mT, layer.up.mT @ u, weights, u)
    return max(0.0, layer.total - float((weights * inner).sum()))


def _weights(layer: Stacked, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(c [N, R] of least squares, ⟨ΔW_i, u_r v_r⟩)."""
    inner = ((layer.up.mT @ u) * (layer.down @ v)).sum(1)
    return _solve((u.mT @ u) * (v.mT @ v), inner), inner


def _side(near: Tensor, far: Tensor, weights: Tensor, other_side: Tensor) -> Tensor:
    """The least squares of one side; near [N, p, k], far [N, k, R], weights [N, R], other_side [q, R] -> [p, R]."""
    seen = (near @ (far * weights[:, None])).sum(0)
    return _unit(_solve((weights.mT @ weights) * (other_side.mT @ other_side), seen))


def _unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0).clamp(min=1e-30)


def _solve(gram: Tensor, rows: Tensor) -> Tensor:
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, rows.mT).mT


# --- the least bytes of a stack ----------------------------------------------------------------

FORMS: Mapping[str, Callable[[Stacked], Tensor]] = {
    "separate": separate,
    "both sides": both_sides,
    "one side": one_side,
    "diagonal": diagonal,
}


def costs(stack: Sequence[Stacked], forms: Sequence[str]) -> dict[str, list[float]]:
    """Least bytes of these forms for each of TARGETS, and of "any of them", the best one for each layer."""
    points = {form: [FORMS[form](layer) for layer in stack] for form in forms}
    points["any of them"] = [torch.cat(of_layer) for of_layer in zip(*points.values(), strict=True)]
    totals = [layer.total for layer in stack]
    return {form: least_bytes(of_layers, totals) for form, of_layers in points.items()}


def least_bytes(points: Sequence[Tensor], totals: Sequence[float]) -> list[float]:
    """Bytes that all layers together need for each of TARGETS: next is always what takes most error away per byte.

    Best possible for the corners of the layers' convex hulls; between two corners it is interpolated.
    """
    steps = torch.cat([lower_hull(of_layer, total).diff(dim=0) for of_layer, total in zip(points, totals, strict=True)])
    numbers, gains = steps[(steps[:, 1] / steps[:, 0]).argsort()].cumsum(0).T
    needed = sum(totals) * (1 - np.square(TARGETS))
    return [FP16 * float(count) for count in np.interp(needed, -gains.numpy(), numbers.numpy(), right=math.inf)]


def lower_hull(points: Tensor, total: float) -> Tensor:
    """Corners [C, 2] of the lower left of the convex hull, from (0, total): more numbers, less and less error."""
    corners = [(0.0, total)]
    points = points[points[:, 0].argsort()]
    better = torch.ones(len(points), dtype=torch.bool)
    better[1:] = points[1:, 1] < points[:, 1].cummin(0).values[:-1]
    for point in points[better].tolist():
        while len(corners) > 1 and _above(*corners[-2:], point):
            corners.pop()
        corners.append(point)
    return torch.tensor(corners, dtype=torch.float64)


def _above(first: Sequence[float], middle: Sequence[float], last: Sequence[float]) -> bool:
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])


# --- random stacks -----------------------------------------------------------------------------


def random_stack(count: int, in_columns: float, in_rows: float, *, same: bool = False, tilted: bool = False) -> Stacked:
    """One layer of `count` adapters whose columns and rows overlap by these shares.

    ΔW_i = U_i · C_i · V_i with random cores, or with diagonal ones if the common dimensions are the `same` pairs of
    singular vectors. σ as in the other benchmarks, its order random.
    """
    generator = torch.Generator().manual_seed(count)
    subspaces = _tilted if tilted else _subspaces
    columns, rows = (subspaces(count, share, generator) for share in (in_columns, in_rows))
    pairs = []
    for u, v in zip(columns, rows, strict=True):
        sigma = torch.arange(1, RANK + 1, dtype=torch.float64)[torch.randperm(RANK, generator=generator)] ** -DECAY
        core = torch.diag(sigma / sigma.norm())
        if not same:
            core = _orthonormal(RANK, RANK, generator) @ core @ _orthonormal(RANK, RANK, generator)
        pairs.append((u @ core, v.mT))
    return stacked(pairs)


def _subspaces(count: int, share: float, generator: torch.Generator) -> list[Tensor]:
    """Orthonormal [WIDTH, RANK] of which this share of the columns is the same."""
    common = round(RANK * share)
    first = torch.randn(WIDTH, common, generator=generator, dtype=torch.float64)
    own = [torch.randn(WIDTH, RANK - common, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [torch.linalg.qr(torch.cat([first, directions], 1)).Q for directions in own]


def _tilted(count: int, share: float, generator: torch.Generator) -> list[Tensor]:
    """Orthonormal [WIDTH, RANK] that all lean the same way: squared cosines between any two have this mean, nearly."""
    common, *own = (_orthonormal(WIDTH, RANK, generator) for _ in range(count + 1))
    near = math.sqrt(share)  # the squared cosine to `common`
    return [torch.linalg.qr(math.sqrt(near) * common + math.sqrt(1 - near) * directions).Q for directions in own]


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def expected(count: int, share: float) -> float:
    """Bytes with bases for both sides by those of separate files, if nothing is lost."""
    rank = RANK * (share + count * (1 - share))
    cores = count * min(rank * rank, 2 * rank * RANK)
    return (2 * WIDTH * rank + cores) / (2 * WIDTH * RANK * count)


@dataclass(frozen=True, slots=True)
class Kind:
    """One way in which adapters can overlap, and the form that is meant for it."""

    title: str
    form: str
    shares: tuple[float, ...]
    make: Callable[[int, float], Stacked]
    counts: int | None = None  # how many of COUNTS; more take minutes
    computed: bool = False  # whether `expected` is about it


KINDS = (
    Kind("dimensions", "both sides", SHARES, lambda count, share: random_stack(count, share, share), computed=True),
    Kind("dimensions of rows", "one side", (0.5, 1.0), lambda count, share: random_stack(count, 0.0, share)),
    Kind(
        "pairs of singular vectors",
        "diagonal",
        (0.5, 1.0),
        lambda count, share: random_stack(count, share, share, same=True),
        counts=3,
    ),
    Kind(
        "directions, nearly",
        "both sides",
        (0.25, 0.5, 0.75, 0.9),
        lambda count, share: random_stack(count, share, share, tilted=True),
        counts=4,
    ),
)
_AT = TARGETS.index(0.1)


def random_table() -> list[str]:
    """Bytes with a basis in common by those of separate files, for shares in common and numbers of adapters."""
    lines = _head(["overlap", "share", "form", *(f"N = {count}" for count in COUNTS)])
    for kind in KINDS:
        for share in kind.shares:
            cells = [kind.title, f"{share:.0%}", kind.form]
            for count in COUNTS[: kind.counts]:
                costs_of_forms = costs([kind.make(count, share)], ["separate", kind.form])
                theory = f" ({expected(count, share):.2f})" if kind.computed else ""
                cells.append(f"{costs_of_forms[kind.form][_AT] / costs_of_forms['separate'][_AT]:.2f}{theory}")
            lines.append(_row([*cells, *[""] * (len(COUNTS[kind.counts :]) if kind.counts else 0)]))
    return lines


# --- stacks of files ---------------------------------------------------------------------------


def read_stack(paths: Sequence[Path]) -> list[Stacked]:
    """The layers that all of these adapters have, by name."""
    by_name: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path in paths:
        with open_adapter(path) as adapter:
            parts = {layer.name: layer.delta.factored() for layer in adapter}
        pairs = {name: (part.scale * part.up.double(), part.down.double()) for name, part in parts.items()}
        size = math.sqrt(sum(float(((up.mT @ up) * (down @ down.mT)).sum()) for up, down in pairs.values()))
        for name, (up, down) in pairs.items():
            by_name.setdefault(name, []).append((up / size, down))
    return [stacked(pairs) for pairs in by_name.values() if len(pairs) == len(paths)]


def file_table(stack: Sequence[Stacked]) -> list[str]:
    """Bytes of every form by those of separate files."""
    by_form = costs(stack, list(FORMS))
    totals = [layer.total for layer in stack]
    by_form["cores free"] = least_bytes([free_cores(layer) for layer in stack], totals)
    by_form["cores free, turned"] = least_bytes([free_cores(turned(layer)) for layer in stack], totals)
    separately = by_form.pop("separate")
    lines = _head(["error", "separate", *by_form])
    for number, target in enumerate(TARGETS):
        ratios = [_ratio(costs_of_form[number], separately[number]) for costs_of_form in by_form.values()]
        lines.append(_row([f"{target:.0%}", f"{separately[number] / 1e3:.0f} kB", *ratios]))
    return lines


def turned(layer: Stacked) -> Stacked:
    """Every adapter turned at random: what is left in common is due to layers that are narrow."""
    generator = torch.Generator().manual_seed(0)
    p, q = layer.up.shape[1], layer.down.shape[2]
    pairs = [
        (_orthonormal(layer.out, p, generator) @ up, down @ _orthonormal(layer.fan_in, q, generator).mT)
        for up, down in zip(layer.up, layer.down, strict=True)
    ]
    return stacked(pairs)


def newcomer(stack: Sequence[Stacked]) -> float:
    """Relative error of the last adapter in bases made for the others, which have 10 % in every layer."""
    lost = total = 0.0
    for layer in stack:
        sides = []
        for near, far in ((layer.up, layer.down), (layer.down.mT, layer.up.mT)):
            gram = (near[:-1] @ (far[:-1] @ far[:-1].mT) @ near[:-1].mT).sum(0)
            energy, vectors = torch.linalg.eigh(gram)
            sides.append(vectors[:, energy.cumsum(0) > TARGETS[_AT] ** 2 * energy.sum()])
        kept = sides[0].mT @ layer.up[-1] @ (layer.down[-1] @ sides[1])
        total += float(layer.up[-1].square().sum())
        lost += float(layer.up[-1].square().sum() - kept.square().sum())
    return math.sqrt(lost / total)


def likeness(paths: Sequence[Path]) -> str:
    """How alike the pairs of these adapters are, as `lorashrink overlap` has it."""
    overlaps = overlap(paths)
    tables = {"cosine": overlaps.cosine, "overlap of columns": overlaps.left, "of rows": overlaps.right}
    parts = []
    for name, table in tables.items():
        numbers = [table[a][b] or 0.0 for a in range(len(paths)) for b in range(a)]
        parts.append(
            f"{name} {min(numbers):.2f} to {max(numbers):.2f}" if len(numbers) > 1 else f"{name} {numbers[0]:.2f}"
        )
    chance = [pair.chance or 0.0 for pair in overlaps.pairs]
    return f"{', '.join(parts)}; random ones of these dimensions {sum(chance) / len(chance):.2f}"


def _ratio(cost: float, separate_cost: float) -> str:
    return f"{cost / separate_cost:.2f}" if math.isfinite(cost) else "not reached"


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def stack_argument(text: str) -> tuple[str, list[Path]]:
    """title=a,b,... as (title, paths)."""
    title, _, files = text.partition("=")
    paths = [Path(file) for file in files.split(",")]
    if len(paths) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give at least two files, as title=a.safetensors,b.safetensors")
    return title, paths


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stacks", nargs="*", type=stack_argument, metavar="STACK")
    parser.add_argument("--every", type=int, default=3, help="take every n-th layer of files only (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{WIDTH}×{WIDTH}, rank {RANK}, error {TARGETS[_AT]:.0%}; in brackets without error, computed\n")
    print("\n".join(random_table()), flush=True)
    for title, paths in options.stacks:
        stack = read_stack(paths)
        some = stack[:: options.every]
        print(f"\n{title}: {len(paths)} adapters, {len(some)} of {len(stack)} layers; {likeness(paths)}\n")
        print("\n".join(file_table(some)))
        print(f"\nThe last one in bases made for the others, at 10 %: error {newcomer(some):.0%}", flush=True)


if __name__ == "__main__":
    main()
