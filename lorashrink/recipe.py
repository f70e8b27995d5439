"""Recipes: which dimensions of each layer survive. Parse once, score, select.

The strings are those of resize_lora, with extensions that cannot collide with them:

    recipes := recipe (":" recipe)*        recipe := item ("," item)*        item := key ["=" number]

`TERMS` is the table of score terms: a new term is one row.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorashrink.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    Values = np.ndarray[tuple[int], np.dtype[np.float64]]
    Indices = np.ndarray[tuple[int], np.dtype[np.int64]]

DEFAULT = "fro_ckpt=1,thr=-3.55"


@dataclass(frozen=True, eq=False, slots=True)
class LayerFacts:
    """What a recipe may know about one layer."""

    sigma: Values  # [r] float64, largest first, 0 past the numerical rank
    numbers: int  # out + in·kh·kw: numbers stored per rank
    bytes_per_rank: int  # in the output dtype
    kernel: bool  # a convolution larger than 1×1
    removable: bool = True  # False where even a ΔW of zero would change the model: DoRA
    base_fro: float | None = None
    base_spn: float | None = None
    base_alignment: Values | None = None  # [r], |u_iᵀ·W·v_i|
    tail: float = 0.0  # Σσ² of dimensions that were not computed, because no recipe can keep them
    whole: float | None = None  # sqrt(Σσ²) over the whole file, of σ that are comparable across layers: calibrated ones

    @property
    def total(self) -> float:
        """Σσ², all dimensions included: ‖ΔW‖_F², where σ is not calibrated."""
        return float((self.sigma**2).sum()) + self.tail

    @property
    def rank(self) -> int:
        """The numerical rank."""
        return int((self.sigma > 0).sum())

    def base_norm(self, name: str) -> float | None:
        """A norm of the base weight, "fro" or "spn"."""
        return {"fro": self.base_fro, "spn": self.base_spn}[name]


@dataclass(frozen=True, slots=True)
class Term:
    """A reference that σ is divided by. `needs`: "layer", "norms", "weight" or "calibration"."""

    needs: str
    reference: Callable[[LayerFacts], float | Values]
    of_adapter: bool = False  # a norm of the adapter itself, which moves with `rescale`
    alone: bool = False  # stands beside no other term


def _known(value: float | Values | None) -> float | Values:
    assert value is not None, "the caller looks up what Recipe.needs names"
    return value


TERMS: dict[str, Term] = {
    "spn_lora": Term("layer", lambda f: float(f.sigma[0]), True),
    "spn_ckpt": Term("norms", lambda f: _known(f.base_spn)),
    "fro_lora": Term("layer", lambda f: math.sqrt(f.total), True),
    "fro_ckpt": Term("norms", lambda f: _known(f.base_fro)),
    "subspace": Term("weight", lambda f: _known(f.base_alignment)),
    "params": Term("layer", lambda f: float(f.numbers)),
    "calib": Term("calibration", lambda f: _known(f.whole), True, alone=True),
}
BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    whole: bool = False
    open_low: bool = False

    def __str__(self) -> str:
        if self.whole:
            return f"a whole number of at least {self.low:g}"
        if math.isinf(self.high):
            return (
                "any number"
                if math.isinf(self.low)
                else f"a number {'above' if self.open_low else 'from'} {self.low:g}"
            )
        return f"a number above {self.low:g} and up to {self.high:g}"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and (not self.whole or value == int(value))


_ANY = _Range(-math.inf, math.inf)
_POSITIVE = _Range(0, math.inf, open_low=True)
_SHARE = _Range(0, 1, open_low=True)
_COUNT = _Range(1, math.inf, whole=True)

SELECTIONS: dict[str, _Range] = {
    "thr": _ANY,
    "size": _POSITIVE,
    "rank": _COUNT,
    "energy": _SHARE,
    "sv_fro": _SHARE,
    "sv_cumulative": _SHARE,
    "sv_ratio": _Range(1, math.inf),
}
MODIFIERS: dict[str, _Range] = {
    "conv_rank": _COUNT,
    "max_rank": _COUNT,
    "min_rank": _COUNT,
    "multiple": _COUNT,
    "pow2": _ANY,
    "rescale": _ANY,
    "uniform": _ANY,
    "clip": _POSITIVE,
    "fro_limit": _POSITIVE,
}
# Modifiers that limit what is kept by a norm of the base weight -> which norm.
CAPS = {"clip": "spn", "fro_limit": "fro"}
_WEIGHTS = (*TERMS, BYTES)
_SWITCHES = ("pow2", "uniform")
_BARE = (*_WEIGHTS, *_SWITCHES)  # keys that mean 1 when no number follows
KEYS = (*_WEIGHTS, *SELECTIONS, *MODIFIERS)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe. `str()` of it is canonical and parses back to an equal one."""

    select: str  # a key of SELECTIONS
    value: float
    weights: tuple[tuple[str, float], ...] = ()  # as given, in the order of TERMS; see `normalised`
    modifiers: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parse one recipe. Raises RecipeError naming the recipe, the item, and what would be right."""
        items = dict(_item(text, part) for part in _split(text))
        selected = [key for key in items if key in SELECTIONS]
        if len(selected) != 1:
            found = "has none" if not selected else f"has {' and '.join(selected)}"
            raise RecipeError(f"recipe '{text}': needs exactly one of {', '.join(SELECTIONS)}; it {found}.")
        weights = tuple((key, items[key]) for key in _WEIGHTS if key in items)
        modifiers = {key: items[key] for key in MODIFIERS if key in items}
        recipe = cls(selected[0], items[selected[0]], weights, modifiers)
        recipe._check(text)
        return recipe

    def _check(self, text: str) -> None:
        terms = {key: weight for key, weight in self.weights if key in TERMS}
        if terms and abs(sum(terms.values())) < 1e-12:
            raise RecipeError(f"recipe '{text}': the weights of its score terms sum to 0; change one of them.")
        if len(terms) > 1 and (alone := next((key for key in terms if TERMS[key].alone), None)):
            raise RecipeError(f"recipe '{text}': {alone} stands alone (with {BYTES}); remove the other terms.")
        if self.caps and self.calibrated:
            raise RecipeError(
                f"recipe '{text}': {' and '.join(self.caps)} limit singular values of ΔW, and calib goes by others. "
                "Shrink first, and give the output the limits in a second run: energy=1,clip=0.5."
            )
        if "conv_rank" in self.modifiers and self.select != "rank":
            raise RecipeError(f"recipe '{text}': conv_rank= goes with rank= only. Did you mean max_rank=?")
        if self.rescale == 0:
            raise RecipeError(f"recipe '{text}': rescale=0 would remove the whole adapter; give another number.")
        if self.modifiers.get("pow2") and "multiple" in self.modifiers:
            raise RecipeError(f"recipe '{text}': pow2 and multiple= both round the ranks; remove one of them.")
        low, high = self.modifiers.get("min_rank", 1), self.modifiers.get("max_rank", math.inf)
        if low > high:
            raise RecipeError(f"recipe '{text}': min_rank={low:g} is above max_rank={high:g}.")
        if self.modifiers.get("multiple", 1) > high:
            raise RecipeError(
                f"recipe '{text}': no multiple of {self.modifiers['multiple']:g} is up to max_rank={high:g}."
            )

    @property
    def normalised(self) -> dict[str, float]:
        """Weights of the score terms, divided by their sum; `bytes` is not among them."""
        terms = {key: weight for key, weight in self.weights if key in TERMS}
        total = sum(terms.values())
        return {key: weight / total for key, weight in terms.items()}

    @property
    def needs(self) -> frozenset[str]:
        """What must be looked up for the score: "layer", "norms", "weight" or "calibration"."""
        return frozenset(TERMS[key].needs for key, weight in self.normalised.items() if weight)

    @property
    def base_norms(self) -> frozenset[str]:
        """Which norms of the base weights the recipe uses: "fro", "spn"."""
        scored = {
            key.partition("_")[0] for key, weight in self.normalised.items() if weight and TERMS[key].needs == "norms"
        }
        return frozenset(scored.union(CAPS[key] for key in self.caps))

    @property
    def judges_by_base(self) -> bool:
        """Whether a layer without a base weight has no score."""
        return bool(self.needs & {"norms", "weight"})

    @property
    def needs_base(self) -> bool:
        """Whether the recipe cannot be applied without a base."""
        return self.judges_by_base or bool(self.caps)

    @property
    def caps(self) -> Mapping[str, float]:
        """The modifiers that limit what is kept, and their values."""
        return {key: value for key, value in self.modifiers.items() if key in CAPS}

    @property
    def calibrated(self) -> bool:
        """Whether dimensions are those of calibration statistics, and not of ΔW alone."""
        return "calibration" in self.needs

    @property
    def rescale(self) -> float:
        """Factor on ΔW in the output."""
        return self.modifiers.get("rescale", 1.0)

    @property
    def uniform(self) -> bool:
        """Whether all layers are written with one rank."""
        return bool(self.modifiers.get("uniform", 0))

    @property
    def limit(self) -> int | None:
        """The largest rank that the recipe can give to any layer, None if that depends on the spectrum."""
        if self.select == "sv_cumulative":  # the one selection that asks for every σ
            return None
        ranks = [self.value, self.modifiers.get("conv_rank", 0)] if self.select == "rank" else [math.inf]
        most = min(max(ranks, default=0), self.modifiers.get("max_rank", math.inf))
        if math.isinf(most):
            return None
        return _rounded(self, int(max(most, self.modifiers.get("min_rank", 0))))

    def __str__(self) -> str:
        items = [*self.weights, (self.select, self.value), *self.modifiers.items()]
        return ",".join(f"{key}={_number(value)}" for key, value in items)

    def file_items(self) -> str:
        """The recipe as a part of a file name: `frockpt1_th-3.55`."""
        named = {**self.normalised, **{key: weight for key, weight in self.weights if key not in TERMS}}
        parts = sorted(f"{key.replace('_', '')}{_short(weight)}" for key, weight in named.items() if weight)
        modifiers = {
            key: value
            for key, value in self.modifiers.items()
            if key != "rescale" and not (key in _SWITCHES and not value)
        }
        # A limit is a small number, of which two decimals would not tell much.
        texts = {key: f"{value:g}" if key in CAPS else _short(value) for key, value in modifiers.items()}
        parts += [f"{key.replace('_', '')}{text}" for key, text in sorted(texts.items())]
        if self.rescale != 1:
            parts.append(f"scale{_short(self.rescale)}")
        parts.append(f"{'th' if self.select == 'thr' else self.select.replace('_', '')}{_short(self.value)}")
        return "_".join(parts)


def parse_recipes(texts: Sequence[str]) -> list[Recipe]:
    """Parse recipes, each text holding one or, separated by `:`, several. Raises RecipeError."""
    recipes = [Recipe.parse(part) for text in texts for part in text.split(":")]
    for number, recipe in enumerate(recipes):
        if recipe in recipes[:number]:
            raise RecipeError(f"recipe '{recipe}' is given twice.")
    return recipes


def _split(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise RecipeError(f"recipe '{text}': an item is empty. Example: {DEFAULT}")
    keys = [part.partition("=")[0].strip() for part in parts]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(f"recipe '{text}': {key} is given twice.")
    return parts


def _item(text: str, part: str) -> tuple[str, float]:
    key, equals, number = (piece.strip() for piece in part.partition("="))
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(KEYS)}."
        raise RecipeError(f"recipe '{text}': unknown key '{key}'. {hint}")
    allowed = SELECTIONS.get(key) or MODIFIERS.get(key, _ANY)
    if not equals and key in _BARE:
        return key, 1.0
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value not in allowed:
        raise RecipeError(f"recipe '{text}': {key}= needs {allowed}, not '{number}'.")
    return key, value


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


# --- scoring and selecting ----------------------------------------------------------------------


def score(recipe: Recipe, facts: LayerFacts) -> Values:
    """[r] float64: log10 of rescaled σ over its references; -inf past the numerical rank."""
    import numpy as np

    rescale = abs(recipe.rescale)
    with np.errstate(divide="ignore"):
        result = np.log10(facts.sigma * rescale)
        for key, weight in recipe.normalised.items():
            term = TERMS[key]
            if weight:
                reference = np.asarray(term.reference(facts)) * (rescale if term.of_adapter else 1.0)
                # A zero reference is as if it were tiny: the dimension counts as large.
                result = result - weight * np.log10(np.maximum(reference, 1e-30))
    result = result - 0.5 * dict(recipe.weights).get(BYTES, 0.0) * math.log10(facts.bytes_per_rank)
    return np.where(facts.sigma > 0, result, -np.inf)


@dataclass(frozen=True, eq=False, slots=True)
class Selection:
    """The outcome of a recipe for a whole file."""

    kept: tuple[tuple[int, ...], ...]  # per layer the kept dimensions, best first; () = removed
    widths: tuple[int, ...]  # per layer the rank to write: len(kept), or more with `uniform`
    threshold: float | None  # lowest kept score; None if no score decided, or everything was kept


def select(
    recipe: Recipe, layers: Sequence[LayerFacts], file_size: Callable[[Sequence[int], float | None], int]
) -> Selection:
    """Apply a recipe to all layers of a file.

    `file_size(widths, threshold)` is the exact size in bytes of the file with these ranks. It is asked only
    by `size=`. Raises RecipeError if `size=` is smaller than the parts of the file that cannot shrink.
    """
    import numpy as np

    scores = [score(recipe, facts) for facts in layers]
    # Best first; stable, so that equal scores keep the order of σ. A `subspace` score need not fall with σ.
    orders = [np.argsort(-values, kind="stable") for values in scores]
    threshold: float | None = None
    if recipe.select == "size":
        counts, threshold = _fit(recipe, layers, scores, file_size)
    elif recipe.select == "energy" and recipe.calibrated:
        counts, threshold = _by_energy_of_file(recipe, layers, scores)
    elif recipe.select == "thr":
        threshold = recipe.value
        counts = [int((values >= threshold).sum()) for values in scores]
    else:
        counts = [_PER_LAYER[recipe.select](recipe, facts) for facts in layers]
        orders = [np.arange(len(values)) for values in scores]
    return _selection(recipe, layers, orders, counts, threshold)


def _selection(
    recipe: Recipe,
    layers: Sequence[LayerFacts],
    orders: Sequence[Indices],
    counts: Sequence[int],
    threshold: float | None,
) -> Selection:
    counts = _adjusted(recipe, layers, counts)
    kept = tuple(tuple(order[:count].tolist()) for order, count in zip(orders, counts, strict=True))
    return Selection(kept, tuple(_widths(recipe, counts)), threshold)


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


@dataclass(frozen=True, eq=False, slots=True)
class Member:
    """One of several files that are written under one budget."""

    layers: Sequence[LayerFacts]
    file_size: Callable[[Sequence[int], float | None], int]  # as of `select`
    weight: float = 1.0  # how strongly it is used beside the others; not 0


def select_together(recipe: Recipe, members: Sequence[Member]) -> list[Selection]:
    """Apply a recipe with `size=` to several files, whose sizes add up to no more than that.

    All dimensions of all files compete by their scores, those of a file moved by log10 of its weight. What is kept is
    what reaches one threshold, the lowest that fits, so that equal dimensions are kept or dropped together and the
    order of the files does not matter. Raises RecipeError if the parts that cannot shrink are larger than the budget.
    """
    import numpy as np

    scores = [[score(recipe, facts) + math.log10(abs(member.weight)) for facts in member.layers] for member in members]
    flat = np.concatenate([np.empty(0), *(values for each in scores for values in each)])
    levels = np.unique(flat[np.isfinite(flat)])[::-1]
    limit = int(recipe.value * 2**20)

    def counts(place: int, taken: int) -> list[int]:
        lowest = levels[taken - 1] if taken else math.inf
        return [int((values >= lowest).sum()) for values in scores[place]]

    def threshold(taken: int) -> float | None:
        return float(levels[taken - 1]) if 0 < taken < len(levels) else None

    def size(taken: int) -> int:
        return sum(
            member.file_size(_widths(recipe, _adjusted(recipe, member.layers, counts(place, taken))), threshold(taken))
            for place, member in enumerate(members)
        )

    if size(0) > limit:
        raise RecipeError(
            f"recipe '{recipe}': the parts of these {len(members)} files that cannot shrink need "
            f"{_smallest_size(size(0))} MiB together; the smallest possible is size={_smallest_size(size(0))}."
        )
    taken = _most(len(levels), limit, size)
    orders = [[np.argsort(-values, kind="stable") for values in each] for each in scores]
    return [
        _selection(recipe, member.layers, orders[place], counts(place, taken), threshold(taken))
        for place, member in enumerate(members)
    ]


def quantiles(recipe: Recipe, layers: Sequence[LayerFacts]) -> dict[float, float]:
    """Quantiles .01 to .99 of all finite scores, to choose a threshold by."""
    import numpy as np

    scores = np.concatenate([np.empty(0), *(score(recipe, facts) for facts in layers)])
    scores = scores[np.isfinite(scores)]
    places = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    return {place: float(np.quantile(scores, place)) for place in places} if len(scores) else {}


def _fit(
    recipe: Recipe,
    layers: Sequence[LayerFacts],
    scores: Sequence[Values],
    file_size: Callable[[Sequence[int], float | None], int],
) -> tuple[list[int], float | None]:
    """Ranks of the longest run of best dimensions whose file fits into `size=` MiB, and the lowest score in it."""
    import numpy as np

    flat = np.concatenate(scores) if scores else np.empty(0)
    owner = np.repeat(np.arange(len(scores)), [len(values) for values in scores])
    order = np.argsort(-flat, kind="stable")
    order = order[np.isfinite(flat[order])]
    limit = int(recipe.value * 2**20)

    def counts(taken: int) -> list[int]:
        return [int(n) for n in np.bincount(owner[order[:taken]], minlength=len(scores))]

    def threshold(taken: int) -> float | None:
        return float(flat[order[taken - 1]]) if 0 < taken < len(order) else None

    def size(taken: int) -> int:
        return file_size(_widths(recipe, _adjusted(recipe, layers, counts(taken))), threshold(taken))

    if size(0) > limit:
        raise RecipeError(
            f"recipe '{recipe}': the parts of this file that cannot shrink need {size(0) / 2**20:.4f} MiB; "
            f"the smallest possible is size={_smallest_size(size(0))}."
        )
    fits = _most(len(order), limit, size)
    return counts(fits), threshold(fits)


def _smallest_size(needed: int) -> str:
    """MiB for `size=` that are enough for so many bytes."""
    return f"{math.ceil(needed / 2**20 * 1e4) / 1e4:.10g}"


def _most(count: int, limit: int, size: Callable[[int], int]) -> int:
    """The largest number up to `count` whose size is within the limit; that of 0 is."""
    fits, too_many = 0, count + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if size(middle) <= limit:
            fits = middle
        else:
            too_many = middle
    while size(fits) > limit:  # the text of a threshold may be some bytes longer than its neighbour's
        fits -= 1
    return fits


def _by_energy_of_file(
    recipe: Recipe, layers: Sequence[LayerFacts], scores: Sequence[Values]
) -> tuple[list[int], float | None]:
    """The fewest dimensions of best score that together have this share of the file's energy, and the lowest score."""
    import numpy as np

    flat = np.concatenate([np.empty(0), *scores])
    squares = np.concatenate([np.empty(0), *(facts.sigma**2 for facts in layers)])
    owner = np.repeat(np.arange(len(layers)), [len(values) for values in scores])
    order = np.argsort(-flat, kind="stable")
    taken = _smallest(squares[order].cumsum(), recipe.value)
    counts = np.bincount(owner[order[:taken]], minlength=len(layers))
    return [int(count) for count in counts], float(flat[order[taken - 1]]) if taken else None


# .8² is a little above .64; shares that close are equal.
_SLACK = 1 - 1e-15


def _smallest(rising: Values, share: float) -> int:
    """The smallest k with rising[k-1] >= share of the last value, for a rising [r]; 0 if that is 0."""
    import numpy as np

    return int(np.searchsorted(rising, share * rising[-1] * _SLACK)) + 1 if len(rising) and rising[-1] > 0 else 0


def _by_energy(facts: LayerFacts, share: float) -> int:
    import numpy as np

    return _smallest(np.append((facts.sigma**2).cumsum(), facts.total), share)


def _by_sum(recipe: Recipe, facts: LayerFacts) -> int:
    return _smallest(facts.sigma.cumsum(), recipe.value)


def _by_rank(recipe: Recipe, facts: LayerFacts) -> int:
    wanted = recipe.modifiers.get("conv_rank", recipe.value) if facts.kernel else recipe.value
    return min(int(wanted), facts.rank)


_PER_LAYER: dict[str, Callable[[Recipe, LayerFacts], int]] = {
    "rank": _by_rank,
    "energy": lambda recipe, facts: _by_energy(facts, recipe.value),
    "sv_fro": lambda recipe, facts: _by_energy(facts, recipe.value**2),
    "sv_cumulative": _by_sum,
    "sv_ratio": lambda recipe, facts: int((facts.sigma > facts.sigma[0] / recipe.value).sum()),
}


def _adjusted(recipe: Recipe, layers: Sequence[LayerFacts], counts: Sequence[int]) -> list[int]:
    """Kept dimensions after the modifiers; never more than the layer has."""
    low = int(recipe.modifiers.get("min_rank", 0))
    adjusted = [
        min(_rounded(recipe, max(count, low, 0 if facts.removable else 1)), facts.rank)
        for count, facts in zip(counts, layers, strict=True)
    ]
    if recipe.uniform:
        widest = _rounded(recipe, max(adjusted, default=0))
        adjusted = [min(widest, facts.rank) if count else 0 for count, facts in zip(adjusted, layers, strict=True)]
    return adjusted


def _widths(recipe: Recipe, counts: Sequence[int]) -> list[int]:
    """Ranks to write. Only `uniform` and `pow2` promise ranks that a layer may not have; zeros fill it up to them."""
    widest = max(counts, default=0)
    wanted = [widest if recipe.uniform and count else count for count in counts]
    return [_rounded(recipe, count) for count in wanted] if recipe.modifiers.get("pow2") else wanted


def _rounded(recipe: Recipe, count: int) -> int:
    """`count` rounded up to a multiple or power of two, or down where it would pass `max_rank`."""
    high = recipe.modifiers.get("max_rank", math.inf)
    if recipe.modifiers.get("pow2"):
        power = 1 << (count - 1).bit_length() if count else 0
        return power if power <= high else 1 << (int(high).bit_length() - 1)
    multiple = int(recipe.modifiers.get("multiple", 1))
    count = -(-count // multiple) * multiple
    return count if count <= high else int(high) // multiple * multiple
