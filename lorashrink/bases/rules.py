"""One weight under the names of several layouts: the mechanism behind the tables of the model families.

A rule is a row of spellings of one weight. A spelling is one module name, or several for a layout that splits the
weight into modules of their own. `{}` in a name stands for any single segment between dots, and at the end for the
rest of the name. Whichever spelling a base uses, its weight then has all of them: where the base is fused, parts are
ranges of its rows; where it is split, the fused weight is its parts stacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import itemgetter

from lorashrink.bases.views import Views, cut, stacked, views_shape

LAYOUTS = ("native", "diffusers")
_DIFFUSERS = 1  # its index among the spellings of a rule


@dataclass(frozen=True, slots=True)
class Parts:
    """One spelling: the modules that hold the weight, in row order.

    `shares` gives their rows: n stands for n times the width of the input, 0 for an equal share of the remaining ones.
    Rows of a part named "" have no name in this spelling. `swapped` says that a weight of two rows per input has its
    halves the other way round than natively. `adapter_only` marks names that adapters use and bases do not.
    """

    names: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool = False
    adapter_only: bool = False

    def sizes(self, views: Views) -> list[int] | None:
        """Rows of the parts of this weight; None if it cannot be split so."""
        rows, width = views_shape(views)[:2]
        rest, free = rows - width * sum(self.shares), self.shares.count(0)
        if rest < 0 or (rest % free if free else rest):
            return None
        return [width * share if share else rest // free for share in self.shares]

    def turned(self, views: Views) -> Views:
        """The rows in the order of this spelling, from the native one, and back."""
        rows, width = views_shape(views)[:2]
        if not self.swapped or rows != 2 * width:
            return views
        halves = cut(views, [width, width])
        return views if halves is None else halves[1] + halves[0]


Spelling = str | tuple[str, ...] | Parts


def parts(*names: str, shares: tuple[int, ...] = (), swapped: bool = False, adapter_only: bool = False) -> Parts:
    """A spelling of several parts, of equal size unless `shares` says otherwise."""
    return Parts(names, shares or (0,) * len(names), swapped, adapter_only)


def swapped(name: str) -> Parts:
    """A name under which the two halves (shift and scale) stand in the other order."""
    return parts(name, swapped=True)


def adapter_only(*names: str, shares: tuple[int, ...] = ()) -> Parts:
    """A spelling that only adapters use."""
    return parts(*names, shares=shares, adapter_only=True)


@dataclass(frozen=True, slots=True)
class Rule:
    """The spellings of one weight: native, diffusers, any others.

    `own` says that the first two are no layouts to choose from: a base keeps the names that it has. For a base with
    diffusers names, the rule holds only if some module begins with `beside`.
    """

    spellings: tuple[Parts, ...]
    own: bool = False
    beside: str = ""


# What diffusers calls these modules of an attention once they are fused: a pipeline can do that, no file does.
_FUSED = {
    ("to_q", "to_k", "to_v"): "to_qkv",
    ("to_k", "to_v"): "to_kv",
    ("add_q_proj", "add_k_proj", "add_v_proj"): "to_added_qkv",
}


def rule(native: Spelling, diffusers: Spelling, *others: Spelling, beside: str = "") -> Rule:
    """A rule from names."""
    spellings = tuple(map(_spelling, (native, diffusers, *others)))
    split = spellings[_DIFFUSERS].names
    if fused := _FUSED.get(tuple(name.rpartition(".")[2] for name in split)):
        spellings += (adapter_only(f"{split[0].rpartition('.')[0]}.{fused}"),)
    return Rule(spellings, beside=beside)


def same(*names: Spelling) -> Rule:
    """A rule from names of one module that belong to no layout."""
    return Rule(tuple(map(_spelling, names)), own=True)


def below(native: str, diffusers: str, *rows: tuple[Spelling, ...]) -> tuple[Rule, ...]:
    """Rules for modules of a block: (name in the native block, name in the diffusers block, native names besides)."""
    return tuple(
        rule(_inside(native, first), _inside(diffusers, second), *(_inside(native, name) for name in more))
        for first, second, *more in rows
    )


def sequential(native: str, diffusers: str) -> tuple[Rule, ...]:
    """Rules for two layers with an activation between them, as `nn.Sequential` numbers them."""
    return tuple(rule(f"{native}.{2 * index}", f"{diffusers}.linear_{index + 1}") for index in range(2))


def embedder(native: str, diffusers: str) -> tuple[Rule, ...]:
    """Rules for two layers that are called `in_layer` and `out_layer` natively."""
    sides = enumerate(("in", "out"), 1)
    return tuple(rule(f"{native}.{side}_layer", f"{diffusers}.linear_{number}") for number, side in sides)


def _spelling(spelling: Spelling) -> Parts:
    if isinstance(spelling, Parts):
        return spelling
    return parts(spelling) if isinstance(spelling, str) else parts(*spelling)


def _inside(block: str, spelling: Spelling) -> Parts:
    inner = _spelling(spelling)
    return replace(inner, names=tuple(f"{block}.{name}" if name else "" for name in inner.names))


# --- from the names of a base to all others -----------------------------------------------------

# A part of a base that a rule names: index of the rule, of its spelling, and of the part in it.
Position = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules with an index; the first that fits a module names it."""

    rules: tuple[Rule, ...]

    def find(self, module: str, modules: Mapping[str, Views]) -> tuple[Position, tuple[str, ...]] | None:
        """Where a module of a base stands in the rules, and what its wildcards stand for."""
        heads = ["", *(module[: dot.end()] for dot in re.finditer(r"\.", module)), module]
        candidates = [candidate for head in heads for candidate in self._index.get(head, ())]
        for position, pattern in sorted(candidates, key=itemgetter(0)):
            if match := pattern.fullmatch(module):
                beside = self.rules[position[0]].beside if position[1] == _DIFFUSERS else ""
                if not beside or any(name.startswith(beside) for name in modules):
                    return position, match.groups()
        return None

    @cached_property
    def _index(self) -> dict[str, list[tuple[Position, re.Pattern[str]]]]:
        """The levels before the first wildcard of a name -> the names that begin so."""
        index: dict[str, list[tuple[Position, re.Pattern[str]]]] = {}
        for number, rule in enumerate(self.rules):
            for spelled, spelling in enumerate(rule.spellings):
                for part, name in enumerate(spelling.names if not spelling.adapter_only else ()):
                    level, dot, _ = name.partition("{")[0].rpartition(".")
                    head = level + dot if "{" in name else name
                    start, rest = (name[:-2], "(.+)") if name.endswith("{}") else (name, "")
                    pattern = re.compile("([^.]+)".join(map(re.escape, start.split("{}"))) + rest)
                    index.setdefault(head, []).append(((number, spelled, part), pattern))
        return index


@dataclass(frozen=True, eq=False, slots=True)
class Spelled:
    """All names of the weights of one part of a base."""

    aliases: tuple[tuple[str, Views], ...]  # names beside those that the base uses itself
    layouts: Mapping[str, Mapping[str, Views]]  # layout -> module name -> views; each weight once


def spell(modules: Mapping[str, Views], rules: Rules) -> Spelled:
    """Name the modules of one part of a base in all the ways that the rules know."""
    groups: dict[tuple[int, int, tuple[str, ...]], dict[int, str]] = {}
    layouts: dict[str, dict[str, Views]] = {layout: {} for layout in LAYOUTS}
    for module, views in modules.items():
        if hit := rules.find(module, modules):
            (number, spelled, part), words = hit
            groups.setdefault((number, spelled, words), {})[part] = module
        else:
            for names in layouts.values():
                names[module] = views
    aliases: list[tuple[str, Views]] = []
    for (number, spelled, words), members in groups.items():
        rule = rules.rules[number]
        stored = {part: modules[module] for part, module in members.items()}
        source = rule.spellings[spelled]
        by_spelling = [
            {filled(name, words): views for name, views in _respelled(source, target, stored)}
            for target in rule.spellings
        ]
        for names in by_spelling:
            aliases += names.items()
        own = {module: modules[module] for module in members.values()}
        for layout, names in zip(LAYOUTS, by_spelling, strict=False):
            layouts[layout] |= own if rule.own or not names else names
    return Spelled(tuple(aliases), layouts)


def _respelled(source: Parts, target: Parts, stored: Mapping[int, Views]) -> Iterable[tuple[str, Views]]:
    """Names and views of a weight in the spelling `target`; the base has `stored` of its parts in `source`."""
    if (source.shares, source.swapped) == (target.shares, target.swapped):
        return [(target.names[part], views) for part, views in stored.items()]
    if len(stored) < len(source.names):
        return []
    weight = stacked([stored[part] for part in sorted(stored)])
    if weight is None:
        return []
    weight = target.turned(source.turned(weight))
    sizes = target.sizes(weight)
    pieces = cut(weight, sizes) if sizes else None
    return [(name, piece) for name, piece in zip(target.names, pieces or (), strict=False) if name]


def filled(name: str, words: tuple[str, ...]) -> str:
    """A template with these words for its wildcards."""
    for word in words:
        name = name.replace("{}", word, 1)
    return name
