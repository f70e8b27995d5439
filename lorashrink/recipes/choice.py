"""Scores of dimensions, and the choice of those that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lorashrink.errors import RecipeError
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.terms import TERMS, LayerFacts
from lorashrink.text import size_text

if TYPE_CHECKING:
    from lorashrink.recipes.terms import Indices, Values

# (rank to write of each layer, threshold) -> exact bytes of the file
FileSize = Callable[[Sequence[int], float | None], int]


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """The outcome of a recipe for one file."""

    kept: tuple[tuple[int, ...], ...]  # per layer the kept dimensions, best first; () = removed
    widths: tuple[int, ...]  # per layer the rank to write: len(kept), or more with `uniform`
    threshold: float | None  # lowest kept score; None if no score decided, or everything was kept
    dtypes: tuple[str, ...] = ()  # per layer the dtype to write, where there is a choice


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """One of several files that are written under one budget."""

    layers: Sequence[LayerFacts]
    file_size: FileSize
    weight: float = 1.0  # how strongly it is used beside the others; not 0


def score(recipe: Recipe, facts: LayerFacts) -> Values:
    """[r] float64: log10 of rescaled σ over its references; -inf past the numerical rank."""
    import numpy as np

    rescale = abs(recipe.rescale)
    with np.errstate(divide="ignore"):
        scores = np.log10(facts.sigma * rescale)
        for key, weight in recipe.normalised.items():
            if weight:
                term = TERMS[key]
                reference = np.asarray(term.reference(facts)) * (rescale if term.of_adapter else 1.0)
                # A zero reference is as if it were tiny: the dimension counts as large.
                scores = scores - weight * np.log10(np.maximum(reference, 1e-30))
    scores = scores - 0.5 * recipe.bytes_weight * math.log10(facts.bytes_per_rank)
    return np.where(facts.sigma > 0, scores, -np.inf)


def quantiles(recipe: Recipe, layers: Sequence[LayerFacts]) -> dict[float, float]:
    """Quantiles .01 to .99 of all finite scores, to choose a threshold by."""
    import numpy as np

    scores = _joined([score(recipe, facts) for facts in layers])
    scores = scores[np.isfinite(scores)]
    shares = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    return {share: float(np.quantile(scores, share)) for share in shares} if len(scores) else {}


def caps(recipe: Recipe, facts: LayerFacts, kept: Sequence[int]) -> Values | None:
    """[k] float64 up to 1: what the limits of a recipe multiply the kept dimensions with, None if with nothing.

    `clip` limits each singular value, `fro_limit` then all of them together; both after `rescale`. A base weight that
    is unknown or zero limits nothing.
    """
    import numpy as np

    sigma = abs(recipe.rescale) * facts.sigma[list(kept)]
    factors = np.ones(len(sigma))
    if facts.base_spn and "clip" in recipe.caps:
        factors = np.minimum(1.0, recipe.caps["clip"] * facts.base_spn / sigma)
    if facts.base_fro and "fro_limit" in recipe.caps:
        norm = float(np.linalg.norm(factors * sigma))
        factors = factors * min(1.0, recipe.caps["fro_limit"] * facts.base_fro / norm) if norm else factors
    return factors if (factors < 1).any() else None


# --- one file -----------------------------------------------------------------------------------


def select(
    recipe: Recipe, layers: Sequence[LayerFacts], file_size: FileSize, scores: Sequence[Values] | None = None
) -> Selection:
    """Apply a recipe to all layers of a file.

    `file_size` is asked only by `size=`; `scores` are those of `score`, where they are known already. Raises
    RecipeError if `size=` is smaller than the parts of the file that cannot shrink.
    """
    import numpy as np

    scores = scores or [score(recipe, facts) for facts in layers]
    orders = _best_first(scores)
    threshold: float | None = None
    if recipe.select == "size":
        counts, threshold = _by_size(recipe, layers, scores, file_size)
    elif recipe.select == "error":
        counts, threshold = _by_energy_of_file(layers, scores, 1 - recipe.value**2)
    elif recipe.select == "energy" and recipe.calibrated:
        counts, threshold = _by_energy_of_file(layers, scores, recipe.value)
    elif recipe.select == "thr":
        threshold = recipe.value
        counts = [int((values >= threshold).sum()) for values in scores]
    else:
        counts = [_PER_LAYER[recipe.select](recipe, facts) for facts in layers]
        orders = [np.arange(len(values)) for values in scores]
    return _selection(recipe, layers, orders, counts, threshold)


def _by_size(
    recipe: Recipe, layers: Sequence[LayerFacts], scores: Sequence[Values], file_size: FileSize
) -> tuple[list[int], float | None]:
    """Ranks of the longest run of best dimensions whose file fits into `size=` MiB, and the lowest score in it."""
    import numpy as np

    ranking = _Ranking(scores)
    finite = int(np.isfinite(ranking.scores).sum())  # these come first

    def threshold(taken: int) -> float | None:
        return float(ranking.scores[taken - 1]) if 0 < taken < finite else None

    @cache
    def size(taken: int) -> int:
        return file_size(widths_of(recipe, layers, adjusted(recipe, layers, ranking.counts(taken))), threshold(taken))

    if size(0) > budget(recipe):
        raise RecipeError(
            f"recipe '{recipe}': the parts of this file that cannot shrink need {size_text(size(0))}; "
            f"the smallest possible is size={size_for(size(0))}."
        )
    of_owner = np.array([facts.bytes_per_rank for facts in layers], np.int64)
    numbers = np.concatenate([[0], of_owner[ranking.owners[:finite]].cumsum()])
    taken = _most(finite, budget(recipe), size, numbers)
    return ranking.counts(taken), threshold(taken)


def _by_energy_of_file(
    layers: Sequence[LayerFacts], scores: Sequence[Values], share: float
) -> tuple[list[int], float | None]:
    """The fewest dimensions of best score that together have this share of the file's energy, and the lowest score."""
    import numpy as np

    ranking = _Ranking(scores)
    energies = _joined([facts.sigma**2 for facts in layers])[ranking.order]
    tail = sum(facts.tail for facts in layers)
    taken = _smallest(np.append(energies.cumsum(), energies.sum() + tail), share)
    taken = min(taken, len(energies))
    return ranking.counts(taken), float(ranking.scores[taken - 1]) if taken else None


class _Ranking:
    """All dimensions of a file, best first."""

    def __init__(self, scores: Sequence[Values]) -> None:
        import numpy as np

        joined = _joined(scores)
        self.order = np.argsort(-joined, kind="stable")
        self.scores = joined[self.order]
        self.owners = np.repeat(np.arange(len(scores)), [len(values) for values in scores])[self.order]
        self._layers = len(scores)

    def counts(self, taken: int) -> list[int]:
        """How many of the best dimensions belong to each layer."""
        import numpy as np

        return [int(count) for count in np.bincount(self.owners[:taken], minlength=self._layers)]


# .8² is a little above .64; shares that close are equal.
_SLACK = 1 - 1e-15


def _smallest(rising: Values, share: float) -> int:
    """The smallest k with rising[k-1] >= share of the last value, for a rising [r]; 0 if that is 0."""
    import numpy as np

    return int(np.searchsorted(rising, share * rising[-1] * _SLACK)) + 1 if len(rising) and rising[-1] > 0 else 0


def _by_energy(facts: LayerFacts, share: float) -> int:
    import numpy as np

    return _smallest(np.append((facts.sigma**2).cumsum(), facts.total), share)


_PER_LAYER: dict[str, Callable[[Recipe, LayerFacts], int]] = {
    "rank": lambda recipe, facts: min(
        int(recipe.modifiers.get("conv_rank", recipe.value) if facts.kernel else recipe.value), facts.rank
    ),
    "energy": lambda recipe, facts: _by_energy(facts, recipe.value),
    "sv_fro": lambda recipe, facts: _by_energy(facts, recipe.value**2),
    "sv_cumulative": lambda recipe, facts: _smallest(facts.sigma.cumsum(), recipe.value),
    "sv_ratio": lambda recipe, facts: int((facts.sigma > facts.sigma[0] / recipe.value).sum()),
}


# --- several files under one budget -------------------------------------------------------------


def select_together(recipe: Recipe, members: Sequence[Member]) -> list[Selection]:
    """Apply a recipe with `size=` to several files, whose sizes add up to no more than that.

    All dimensions of all files compete by their scores plus log10 of the file's weight. Those that reach one threshold
    are kept, the lowest threshold that fits, so equal dimensions are kept or dropped together and the order of the
    files does not matter. Raises RecipeError if the parts that cannot shrink are larger than the budget.
    """
    import numpy as np

    scores = [[score(recipe, facts) + math.log10(abs(member.weight)) for facts in member.layers] for member in members]
    joined = _joined([values for layers in scores for values in layers])
    levels = np.unique(joined[np.isfinite(joined)])[::-1]

    def counts(layers: Sequence[Values], taken: int) -> list[int]:
        lowest = levels[taken - 1] if taken else math.inf
        return [int((values >= lowest).sum()) for values in layers]

    def threshold(taken: int) -> float | None:
        return float(levels[taken - 1]) if 0 < taken < len(levels) else None

    def size(taken: int) -> int:
        return sum(
            member.file_size(
                widths_of(recipe, member.layers, adjusted(recipe, member.layers, counts(layers, taken))),
                threshold(taken),
            )
            for member, layers in zip(members, scores, strict=True)
        )

    if size(0) > budget(recipe):
        raise RecipeError(
            f"recipe '{recipe}': the parts of these {len(members)} files that cannot shrink need "
            f"{size_text(size(0))} together; the smallest possible is size={size_for(size(0))}."
        )
    taken = _most(len(levels), budget(recipe), size, np.zeros(len(levels) + 1))
    return [
        _selection(recipe, member.layers, _best_first(layers), counts(layers, taken), threshold(taken))
        for member, layers in zip(members, scores, strict=True)
    ]


# --- what these share ---------------------------------------------------------------------------


def _joined(values: Sequence[Values]) -> Values:
    import numpy as np

    return np.concatenate([np.empty(0), *values])


def _best_first(scores: Sequence[Values]) -> list[Indices]:
    """Per layer the order of its dimensions; stable, so that equal scores keep the order of σ.

    A `subspace` score need not fall with σ.
    """
    import numpy as np

    return [np.argsort(-values, kind="stable") for values in scores]


def budget(recipe: Recipe) -> int:
    """The bytes of `size=`."""
    return int(recipe.value * 2**20)


def size_for(needed: int) -> str:
    """What `size=` must be for so many bytes."""
    return f"{math.ceil(needed / 100) / 1e4:.10g}MB"


def _most(count: int, limit: int, size: Callable[[int], int], about: Values) -> int:
    """The largest number up to `count` whose size is within the limit; size(0) is.

    about: [count + 1], rising, how sizes grow by and large. Each guess is what it says, moved by what it was wrong
    about before; every fourth guess is the middle, so that it need not be right.
    """
    import numpy as np

    taken, above = 0, count + 1  # within the limit, and not
    wrong, guesses = size(0) - float(about[0]), 0
    while above - taken > 1:
        guesses += 1
        guess = (taken + above) // 2
        if guesses % 4:
            guess = int(np.searchsorted(about, limit - wrong, side="right")) - 1
            guess = min(max(guess, taken + 1), above - 1)
        actual = size(guess)
        wrong = actual - float(about[guess])
        taken, above = (guess, above) if actual <= limit else (taken, guess)
    while size(taken) > limit:  # the text of a threshold may be some bytes longer than its neighbour's
        taken -= 1
    return taken


def _selection(
    recipe: Recipe,
    layers: Sequence[LayerFacts],
    orders: Sequence[Indices],
    counts: Sequence[int],
    threshold: float | None,
) -> Selection:
    counts = adjusted(recipe, layers, counts)
    kept = tuple(tuple(order[:count].tolist()) for order, count in zip(orders, counts, strict=True))
    return Selection(kept, tuple(widths_of(recipe, layers, counts)), threshold)


def adjusted(recipe: Recipe, layers: Sequence[LayerFacts], counts: Sequence[int]) -> list[int]:
    """Kept dimensions after the modifiers; never more than the layer has."""
    low = int(recipe.modifiers.get("min_rank", 0))
    ranks = [
        min(recipe.rounded_rank(max(count, low, 0 if facts.removable else 1)), facts.rank)
        for count, facts in zip(counts, layers, strict=True)
    ]
    if recipe.uniform:
        widest = recipe.rounded_rank(max(ranks, default=0))
        ranks = [min(widest, facts.rank) if count else 0 for count, facts in zip(ranks, layers, strict=True)]
    for widest, positions in _together(layers, ranks):
        for position in positions:
            ranks[position] = min(widest, layers[position].rank)
    return ranks


def widths_of(recipe: Recipe, layers: Sequence[LayerFacts], counts: Sequence[int]) -> list[int]:
    """Ranks to write.

    Layers of one rank, and those of `uniform` and `pow2`, may have one that is not theirs; zeros fill them up to it.
    """
    widest = max(counts, default=0)
    widths = [widest if recipe.uniform and count else count for count in counts]
    for most, positions in _together(layers, widths):
        for position in positions:
            widths[position] = most
    return [recipe.rounded_rank(width) for width in widths] if recipe.modifiers.get("pow2") else widths


def _together(layers: Sequence[LayerFacts], ranks: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(largest rank, positions) of the layers that are written with one rank."""
    groups: dict[str, list[int]] = {}
    for position, facts in enumerate(layers):
        if facts.together:
            groups.setdefault(facts.together, []).append(position)
    return [(max(ranks[position] for position in positions), positions) for positions in groups.values()]
