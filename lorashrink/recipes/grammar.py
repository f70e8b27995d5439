"""Recipes as text: parsing and printing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lorashrink.errors import RecipeError, nearest
from lorashrink.recipes.habits import meant
from lorashrink.recipes.terms import BYTES, NORMS, TERMS
from lorashrink.text import bytes_in

DEFAULT = "fro_ckpt=1,thr=-3.55"

DEFAULT_ALONE = "energy=0.99"  # without a base


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    integer: bool = False
    open_low: bool = False

    def __str__(self) -> str:
        if self.integer:
            return f"a whole number of at least {self.low:g}"
        if math.isfinite(self.high):
            return f"a number {'above' if self.open_low else 'from'} {self.low:g} and up to {self.high:g}"
        if math.isfinite(self.low):
            return f"a number {'above' if self.open_low else 'from'} {self.low:g}"
        return "any number"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and (not self.integer or value == int(value))


_ANY = _Range(-math.inf, math.inf)

_POSITIVE = _Range(0, math.inf, open_low=True)

_SHARE = _Range(0, 1, open_low=True)

_COUNT = _Range(1, math.inf, integer=True)

# Selections, which decide how many dimensions are kept -> the numbers that they allow. A recipe has exactly one.
SELECTIONS: dict[str, _Range] = {
    "thr": _ANY,
    "size": _Range(0, 2.0**43, open_low=True),  # MiB: what a file system can count
    "quality": _Range(10, 80),  # dB: PSNR to the pictures of the original adapter, as predicted
    "rank": _COUNT,
    "energy": _SHARE,
    "sv_fro": _SHARE,
    "sv_cumulative": _SHARE,
    "sv_ratio": _Range(1, math.inf),
    "error": _SHARE,
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

_SWITCHES = ("pow2", "uniform")


def keys() -> list[str]:
    """All keys that a recipe may have."""
    return [*TERMS, BYTES, *SELECTIONS, *MODIFIERS]


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe. `str()` of it is canonical and parses back to an equal one."""

    select: str  # a key of SELECTIONS
    value: float
    weights: tuple[tuple[str, float], ...] = ()  # as given, in the order of TERMS; see `normalised`
    modifiers: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parse one recipe. Raises RecipeError naming the recipe, the item, and what would be right."""
        split = [[piece.strip() for piece in item.partition("=")] for item in text.split(",")]
        if not all(any(pieces) for pieces in split):
            raise RecipeError(f"recipe '{text}': an item is empty. Example: {DEFAULT}")
        names = [key for key, _, _ in split]
        if not set(names) <= set(keys()) and (recipe_meant := meant({key: number for key, _, number in split})):
            raise RecipeError(f"recipe '{text}': unknown here. Did you mean {recipe_meant}?")
        for key in names:
            if names.count(key) > 1:
                raise RecipeError(f"recipe '{text}': {key} is given twice.")
        items = {key: _item_value(text, key, equals, number) for key, equals, number in split}
        selections = [key for key in items if key in SELECTIONS]
        if len(selections) != 1:
            fault = f"it has {' and '.join(selections)}" if selections else f"such as {text},thr=-3.55"
            raise RecipeError(f"recipe '{text}': needs exactly one of {', '.join(SELECTIONS)}; {fault}.")
        if selections == ["quality"] and not items.keys() & {*TERMS, BYTES}:
            items |= {"calib": 1.0, BYTES: 1.0}  # what predicts quality
        weights = tuple((key, items[key]) for key in (*TERMS, BYTES) if key in items)
        modifiers = {key: items[key] for key in MODIFIERS if key in items}
        recipe = cls(selections[0], items[selections[0]], weights, modifiers)
        recipe._check(text)
        return recipe

    def _check(self, text: str) -> None:
        terms = self._terms
        if terms and abs(sum(terms.values())) < 1e-12:
            raise RecipeError(f"recipe '{text}': the weights of its score terms sum to 0; change one of them.")
        if len(terms) > 1 and (alone := next((key for key in terms if TERMS[key].alone), None)):
            raise RecipeError(f"recipe '{text}': {alone} goes with no other score but {BYTES}; remove the others.")
        if self.select == "quality" and not (self.calibrated and self.bytes_weight == 1):
            raise RecipeError(
                f"recipe '{text}': quality= is predicted from statistics of the model and goes with calib,bytes alone. "
                "Example: quality=40"
            )
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
    def _terms(self) -> dict[str, float]:
        return {key: weight for key, weight in self.weights if key in TERMS}

    @property
    def bytes_weight(self) -> float:
        """The weight of `bytes`, 0 without it."""
        return dict(self.weights).get(BYTES, 0.0)

    @cached_property
    def normalised(self) -> dict[str, float]:
        """Weights of the score terms, divided by their sum; `bytes` is not among them."""
        terms = self._terms
        total = sum(terms.values())
        return {key: weight / total for key, weight in terms.items()}

    @cached_property
    def needs(self) -> frozenset[str]:
        """The `Term.needs` of all score terms with a weight."""
        return frozenset(TERMS[key].needs for key, weight in self.normalised.items() if weight)

    @property
    def base_norms(self) -> frozenset[str]:
        """Which norms of the base weights the recipe uses: "fro", "spn"."""
        return (self.needs & NORMS).union(CAPS[key] for key in self.caps)

    @cached_property
    def judges_by_base(self) -> bool:
        """Whether a layer without a base weight has no score."""
        return bool(self.needs & {*NORMS, "weight"})

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
        """Whether the singular values are calibrated by statistics."""
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
        most = min(max(ranks), self.modifiers.get("max_rank", math.inf))
        if math.isinf(most):
            return None
        return self.rounded_rank(int(max(most, self.modifiers.get("min_rank", 0))))

    def rounded_rank(self, count: int) -> int:
        """`count` rounded up to a multiple or power of two, or down where it would pass `max_rank`."""
        high = self.modifiers.get("max_rank", math.inf)
        if self.modifiers.get("pow2"):
            power = 1 << (count - 1).bit_length() if count else 0
            return power if power <= high else 1 << (int(high).bit_length() - 1)
        multiple = int(self.modifiers.get("multiple", 1))
        count = -(-count // multiple) * multiple
        return count if count <= high else int(high) // multiple * multiple

    def __str__(self) -> str:
        items = [*self.weights, (self.select, self.value), *self.modifiers.items()]
        return ",".join(f"{key}={(_size_text if key == 'size' else _shortest)(value)}" for key, value in items)

    def file_items(self) -> str:
        """The recipe as a part of a file name: `frockpt1_th-3.55`."""
        weights = {**self.normalised, BYTES: self.bytes_weight}
        items = sorted(_file_item(key, weight) for key, weight in weights.items() if weight)
        for key, value in sorted(self.modifiers.items()):
            if key != "rescale" and (value or key not in _SWITCHES):
                items.append(_file_item(key, value))
        if self.rescale != 1:
            items.append(_file_item("scale", self.rescale))
        if self.select == "size":
            items.append(f"size{_size_text(self.value, '.10g')}")
        else:
            items.append(_file_item("th" if self.select == "thr" else self.select, self.value))
        return "_".join(items)


def _size_text(value: float, form: str = "") -> str:
    """A number of MiB, in MB where that is as exact and shorter."""
    own = format(value, form) if form else _shortest(value)
    megabytes = f"{value * 2**20 / 1e6:.10g}MB"
    return megabytes if len(megabytes) < len(own) and bytes_in(megabytes) / 2**20 == value else own


def _shortest(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _file_item(key: str, number: float) -> str:
    # Ten digits hide what floats make of 0.1 + 0.2, and nothing that a user writes.
    return f"{key.replace('_', '')}{number:.10g}"


def parse_recipes(texts: str | Sequence[str]) -> list[Recipe]:
    """Parse recipes, each text holding one or, separated by `:`, several. Raises RecipeError."""
    texts = [texts] if isinstance(texts, str) else texts
    recipes = [Recipe.parse(part) for text in texts for part in text.split(":")]
    for number, recipe in enumerate(recipes):
        if recipe in recipes[:number]:
            raise RecipeError(f"recipe '{recipe}' is given twice.")
    return recipes


def _item_value(text: str, key: str, equals: str, number: str) -> float:
    """The number of one item: 1 for `bytes` or `uniform` without one."""
    if key not in keys():
        near = nearest(key, keys())
        hint = f"Did you mean {near}?" if near else f"Known keys: {', '.join(keys())}."
        raise RecipeError(f"recipe '{text}': unknown key '{key}'. {hint}")
    allowed = SELECTIONS.get(key) or MODIFIERS.get(key, _ANY)
    if not equals and (key in TERMS or key == BYTES or key in _SWITCHES):
        return 1.0
    try:
        value = bytes_in(number) / 2**20 if key == "size" else float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value not in allowed:
        unit = ", in MiB or with a unit such as 300MB" if key == "size" else ""
        percent = f" {value:g} % is {key}={value / 100:g}." if allowed is _SHARE and 1 < value <= 100 else ""
        raise RecipeError(f"recipe '{text}': {key}= needs {allowed}{unit}, not '{number}'.{percent}")
    return value
