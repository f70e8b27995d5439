"""Ranks and dtypes chosen together, by one price per byte.

For a price, every layer takes the rank and the dtype at which dropped + weight · rounding + price · bytes is least. The
price is then the lowest for which the file fits, or the highest for which the predicted quality is reached. Where the
recipe decides the ranks, it is the highest for which rounding harms no more than what the recipe drops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lorashrink.errors import RecipeError
from lorashrink.recipes.choice import Selection, adjusted, budget, score, select, size_for, widths_of
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.quality import ANCHOR, allowed_distortion, distortion, predicted_db, rounding_weight
from lorashrink.recipes.terms import LayerFacts
from lorashrink.text import size_text

if TYPE_CHECKING:
    import numpy as np

    from lorashrink.recipes.terms import Indices, Values

    Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# What is known of a layer in each dtype that it may be written in, the preferred one first.
Offer = Mapping[str, LayerFacts]

# Factors that 8 bits change by more than this part of the layer's norm are kept in the next dtype on offer.
_COARSE = 0.25

# (rank to write of each layer, threshold, dtype of each layer) -> exact bytes of the file
SizeInDtypes = Callable[[Sequence[int], float | None, Sequence[str]], int]

# `auto` leaves one dtype where mixing them could gain no more than this part of what is lost, 0.3 dB.
_SHOWS = 0.1

_SAME_PRICE = 1 + 1e-5


def fine_enough(offer: Offer) -> Offer:
    """What is on offer without dtypes that round the layer too coarsely; the last one always stays."""
    *coarser, last = offer
    fine = {}
    for name in coarser:
        facts, squares = offer[name], offer[name].sigma ** 2
        if facts.noise is None or float((facts.noise * squares).sum()) <= _COARSE**2 * float(squares.sum()):
            fine[name] = facts
    return {**fine, last: offer[last]}


def select_in_dtypes(
    recipe: Recipe,
    offers: Sequence[Offer],
    dtype: str,
    file_size: SizeInDtypes,
    anchor: float = ANCHOR,
    *,
    scores: Sequence[Values] | None = None,
) -> Selection:
    """What a recipe keeps of each layer, and in which of the dtypes on offer.

    dtype: "mixed" and "auto" choose dtypes by price; any other word takes the first of each layer. anchor: see
    `recipes.quality`. scores: those of `score` in the first dtype of each layer, where they are computed already.
    Raises RecipeError if `size=` or `quality=` cannot be reached.
    """
    plain = [dict([next(iter(offer.items()))]) for offer in offers]
    if dtype == "mixed":
        return _selected(recipe, offers, file_size, anchor)
    try:
        selection = _selected(recipe, plain, file_size, anchor, scores)
    except RecipeError:
        if dtype != "auto" or recipe.select != "quality":
            raise
        return _selected(recipe, offers, file_size, anchor)
    if dtype == "auto":
        market = _Market(recipe, plain)
        dropped, rounding = market.losses([len(kept) for kept in selection.kept], selection.dtypes)
        if rounding_weight(recipe.calibrated) * rounding > _SHOWS * dropped:
            return _selected(recipe, offers, file_size, anchor)
    return selection


def _selected(
    recipe: Recipe,
    offers: Sequence[Offer],
    file_size: SizeInDtypes,
    anchor: float,
    scores: Sequence[Values] | None = None,
) -> Selection:
    several = any(len(offer) > 1 for offer in offers)
    if recipe.select == "quality":
        return _Market(recipe, offers).for_quality(anchor)
    if recipe.select == "size" and several:
        return _Market(recipe, offers).for_size(file_size)
    dtypes = tuple(next(iter(offer)) for offer in offers)
    facts = [next(iter(offer.values())) for offer in offers]
    selection = select(recipe, facts, lambda widths, threshold: file_size(widths, threshold, dtypes), scores)
    if several:
        dtypes = _Market(recipe, offers).dtypes([len(kept) for kept in selection.kept])
    return replace(selection, dtypes=dtypes)


@dataclass(eq=False)
class _Market:
    """All layers with what their dimensions are worth, what rounding them costs, and their bytes."""

    recipe: Recipe
    offers: Sequence[Offer]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All dtypes on offer."""
        return tuple(dict.fromkeys(name for offer in self.offers for name in offer))

    @cached_property
    def _facts(self) -> list[LayerFacts]:
        return [next(iter(offer.values())) for offer in self.offers]

    @cached_property
    def _worth(self) -> list[Array]:
        """Per layer [r]: what each dimension is worth, whatever its bytes; that is σ² where it is calibrated."""
        by_size = [0.5 * self.recipe.bytes_weight * math.log10(facts.bytes_per_rank) for facts in self._facts]
        scores = [score(self.recipe, facts) + own for facts, own in zip(self._facts, by_size, strict=True)]
        return [self._unit * 10.0 ** (2 * values) for values in scores]

    @cached_property
    def _unit(self) -> float:
        """What squared scores are multiplied with to be calibrated σ²; 1 for others."""
        return (self._facts[0].file_norm or 1.0) ** 2 if self._facts else 1.0

    @cached_property
    def _orders(self) -> list[Indices]:
        import numpy as np

        return [np.argsort(-worth, kind="stable") for worth in self._worth]

    @cached_property
    def _width(self) -> int:
        return max((len(worth) for worth in self._worth), default=0) + 1

    @cached_property
    def _dropped(self) -> Array:
        """[layers, k]: what is lost if k dimensions are kept; infinite past the rank."""
        import numpy as np

        table = np.full((len(self.offers), self._width), np.inf)
        for row, worth, order, facts in zip(table, self._worth, self._orders, self._facts, strict=True):
            rest = worth[order][::-1].cumsum()[::-1]
            row[: facts.rank + 1] = np.append(rest, 0.0)[: facts.rank + 1]
        return table

    @cached_property
    def _rounding(self) -> Array:
        """[layers, dtypes, k]: what rounding k dimensions costs; infinite in dtypes that are not on offer."""
        import numpy as np

        table = np.full((len(self.offers), len(self.names), self._width), np.inf)
        for row, offer, worth, order in zip(table, self.offers, self._worth, self._orders, strict=True):
            for name, facts in offer.items():
                noise = np.zeros(len(worth)) if facts.noise is None else facts.noise
                row[self.names.index(name), : len(worth) + 1] = np.append(0.0, (noise * worth)[order].cumsum())
        return table

    @cached_property
    def _bytes(self) -> Array:
        """[layers, dtypes]: bytes of one rank."""
        import numpy as np

        return np.array(
            [[offer[name].bytes_per_rank if name in offer else 0 for name in self.names] for offer in self.offers]
        )

    @cached_property
    def highest(self) -> float:
        """A price for which nothing is kept."""
        return 2 * self._extreme(max)

    @cached_property
    def lowest(self) -> float:
        """A price for which everything is kept in the best dtype."""
        return 1e-9 * self._extreme(min)

    def _extreme(self, choose: Callable[[Sequence[float]], float]) -> float:
        prices = [
            worth[worth > 0] / facts.bytes_per_rank for worth, facts in zip(self._worth, self._facts, strict=True)
        ]
        return choose([float(choose(list(values))) for values in prices if len(values)] or [1.0])

    def selection(self, price: float) -> Selection:
        """What is kept at a price per byte: of each layer the rank and the dtype that cost least."""
        import numpy as np

        ranks = np.arange(self._width)
        weight = rounding_weight(self.recipe.calibrated)
        costs = self._dropped[:, None, :] + weight * self._rounding + price * self._bytes[:, :, None] * ranks
        columns, counts = np.divmod(costs.reshape(len(costs), -1).argmin(1), self._width)
        dtypes = tuple(self.names[column] for column in columns.tolist())
        counts = adjusted(self.recipe, self._facts, counts.tolist())
        kept = tuple(tuple(order[:count].tolist()) for order, count in zip(self._orders, counts, strict=True))
        everything = all(count == facts.rank for count, facts in zip(counts, self._facts, strict=True))
        threshold = None if everything else 0.5 * math.log10(price / self._unit)
        return Selection(kept, tuple(widths_of(self.recipe, self._facts, counts)), threshold, dtypes)

    def for_quality(self, anchor: float) -> Selection:
        """The smallest selection for which the recipe's quality is predicted. Raises RecipeError if none is enough."""
        allowed = allowed_distortion(self.recipe.value, anchor)
        least = distortion(*self.losses_at(self.lowest))
        if least > allowed:
            best = predicted_db(least, anchor)
            raise RecipeError(
                f"recipe '{self.recipe}': about {best:.1f} dB is the most that this dtype gives. Use -t mixed, or less."
            )
        price, _ = self._bisected(lambda price: distortion(*self.losses_at(price)) > allowed)
        return self.selection(price)

    def for_size(self, file_size: SizeInDtypes) -> Selection:
        """The best selection within the recipe's size. Raises RecipeError if nothing is small enough."""

        def size(price: float) -> int:
            selection = self.selection(price)
            return file_size(selection.widths, selection.threshold, selection.dtypes)

        limit, least = budget(self.recipe), size(self.highest)
        if least > limit:
            raise RecipeError(
                f"recipe '{self.recipe}': the parts of this file that cannot shrink need {size_text(least)}; "
                f"the smallest possible is size={size_for(least)}."
            )
        if size(self.lowest) <= limit:
            return self.selection(self.lowest)
        _, price = self._bisected(lambda price: size(price) <= limit)
        return self.selection(price)

    def _bisected(self, high_enough: Callable[[float], bool]) -> tuple[float, float]:
        """Two neighbouring prices: the upper one is `high_enough`, the lower one is not."""
        low, high = self.lowest, self.highest
        while high > low * _SAME_PRICE:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if high_enough(middle) else (middle, high)
        return low, high

    def losses_at(self, price: float) -> tuple[float, float]:
        """(dropped, rounding) of what is kept at a price."""
        selection = self.selection(price)
        return self.losses([len(kept) for kept in selection.kept], selection.dtypes)

    def losses(self, counts: Sequence[int], dtypes: Sequence[str]) -> tuple[float, float]:
        """(dropped, rounding) of so many dimensions of each layer in these dtypes."""
        rows = range(len(counts))
        columns = [self.names.index(name) for name in dtypes]
        dropped = self._dropped[rows, list(counts)].sum()
        return float(dropped), float(self._rounding[rows, columns, list(counts)].sum())

    def dtypes(self, counts: Sequence[int]) -> tuple[str, ...]:
        """The cheapest dtypes for ranks that are decided, whose rounding harms no more than what is dropped."""
        rows, ranks = range(len(counts)), [[count] for count in counts]
        rounding = rounding_weight(self.recipe.calibrated) * self._rounding[rows, :, list(counts)]
        dropped = self._dropped[rows, list(counts)].sum()

        def columns(price: float) -> list[int]:
            least: list[int] = (rounding + price * self._bytes * ranks).argmin(1).tolist()
            return least

        def harms(price: float) -> bool:
            return bool(rounding[rows, columns(price)].sum() > dropped)

        price, _ = self._bisected(harms) if harms(self.highest) else (self.highest, None)
        return tuple(self.names[column] for column in columns(price))
