"""One weight under the names of several layouts: the mechanism behind the tables of the model families.

A rule is a row of spellings of one weight. A spelling is one module name, or several for a layout that splits the
weight into modules of their own. `{}` in a name stands for any one segment between dots, and at the end for all that
is left. Whichever spelling a base uses, the weight is then known under all of them: where the base is fused, parts are
ranges of its rows; where it is split, the fused weight is its parts stacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from lorashrink.bases.views import Views, cut, stacked, views_shape

LAYOUTS = ("native", "diffusers")
_DIFFUSERS = 1  # its place among the spellings of a rule


@dataclass(frozen=True, slots=True)
class Parts:
    """One spelling: the modules that hold the weight, in row order.

    `shares` gives their rows: n stands for n times the width of the input, 0 for an equal share of what is left.
    Rows of a part named "" have no name in this spelling. `swapped` says that a weight of two rows per input has its
    halves the other way round than natively. `asked` marks names that adapters use and bases do not.
    """

    names: tuple[str, ...]
    shares: tuple[int, ...]
    swapped: bool = False
    asked: bool = False

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


def parts(*names: str, shares: tuple[int, ...] = (), swapped: bool = False, asked: bool = False) -> Parts:
    """A spelling of several parts, of equal size unless `shares` says otherwise."""
    return Parts(names, shares or (0,) * len(names), swapped, asked)


def swapped(name: str) -> Parts:
    """A name under which the two halves (shift and scale) stand in the other order."""
    return parts(name, swapped=True)


def asked(*names: str, shares: tuple[int, ...] = ()) -> Parts:
    """A spelling that only adapters use."""
    return parts(*names, shares=shares, asked=True)


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
    where, _, _ = spellings[1].names[0].rpartition(".")
    fused = _FUSED.get(tuple(name.rpartition(".")[2] for name in spellings[1].names))
    return Rule((*spellings, asked(f"{where}.{fused}")) if fused else spellings, beside=beside)


def same(*names: Spelling) -> Rule:
    """Names of one module of which none belongs to a layout."""
    return Rule(tuple(map(_spelling, names)), own=True)


def below(native: str, diffusers: str, *rows: tuple[Spelling, ...]) -> tuple[Rule, ...]:
    """Rules for modules of a block: (name in the native block, name in the diffusers block, native names besides)."""
    return tuple(
        rule(_inside(native, first), _inside(diffusers, second), *(_inside(native, other) for other in others))
        for first, second, *others in rows
    )


def _spelling(spelling: Spelling) -> Parts:
    if isinstance(spelling, Parts):
        return spelling
    return parts(spelling) if isinstance(spelling, str) else parts(*spelling)


def _inside(block: str, spelling: Spelling) -> Parts:
    found = _spelling(spelling)
    names = tuple(f"{block}.{name}" if name else "" for name in found.names)
    return Parts(names, found.shares, found.swapped, found.asked)


# --- from the names of a base to all others -----------------------------------------------------

# A part of a base that a rule knows: the rule, which spelling, which part of it.
_Place = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Rules:
    """Rules with an index; of several that know a module, the first names it."""

    rules: tuple[Rule, ...]

    def find(self, module: str, modules: Mapping[str, Views]) -> tuple[_Place, tuple[str, ...]] | None:
        """Where a module of a base stands in the rules, and what its wildcards stand for."""
        candidates = [found for head in _heads(module) for found in self._index.get(head, ())]
        for place, pattern in sorted(candidates, key=lambda each: each[0]):
            found = pattern.fullmatch(module)
            if found and (place[1] != _DIFFUSERS or _is_beside(self.rules[place[0]].beside, modules)):
                return place, found.groups()
        return None

    @cached_property
    def _index(self) -> dict[str, list[tuple[_Place, re.Pattern[str]]]]:
        index: dict[str, list[tuple[_Place, re.Pattern[str]]]] = {}
        for number, each in enumerate(self.rules):
            for spelled, spelling in enumerate(each.spellings):
                for part, name in enumerate(spelling.names if not spelling.asked else ()):
                    head = name.partition("{")[0].rpartition(".")
                    where = name if "{" not in name else head[0] + head[1]
                    index.setdefault(where, []).append(((number, spelled, part), _pattern(name)))
        return index


def _is_beside(start: str, modules: Mapping[str, Views]) -> bool:
    return not start or any(module.startswith(start) for module in modules)


def _heads(module: str) -> Iterator[str]:
    """The starts under which the index may hold a template that fits."""
    yield ""
    for place, letter in enumerate(module):
        if letter == ".":
            yield module[: place + 1]
    yield module


def _pattern(name: str) -> re.Pattern[str]:
    start, rest = (name[:-2], "(.+)") if name.endswith("{}") else (name, "")
    return re.compile("([^.]+)".join(map(re.escape, start.split("{}"))) + rest)


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
        if found := rules.find(module, modules):
            (number, spelled, part), words = found
            groups.setdefault((number, spelled, words), {})[part] = module
        else:
            for names in layouts.values():
                names[module] = views
    aliases: list[tuple[str, Views]] = []
    for (number, spelled, words), members in groups.items():
        each = rules.rules[number]
        here = {part: modules[module] for part, module in members.items()}
        by_spelling = [dict(_named(each, spelled, to, here)) for to in range(len(each.spellings))]
        for names in by_spelling:
            aliases += ((filled(name, words), views) for name, views in names.items())
        own = {module: modules[module] for module in members.values()}
        for layout, names in zip(LAYOUTS, by_spelling, strict=False):
            layouts[layout] |= own if each.own or not names else {filled(n, words): v for n, v in names.items()}
    return Spelled(tuple(aliases), layouts)


def _named(each: Rule, spelled: int, to: int, here: Mapping[int, Views]) -> Iterable[tuple[str, Views]]:
    """The weight, of which the base has these parts in one spelling, in another spelling."""
    source, target = each.spellings[spelled], each.spellings[to]
    if (source.shares, source.swapped) == (target.shares, target.swapped):
        return [(target.names[part], views) for part, views in here.items()]
    if len(here) < len(source.names):
        return []
    whole = stacked([here[part] for part in sorted(here)])
    if whole is None:
        return []
    whole = target.turned(source.turned(whole))
    sizes = target.sizes(whole)
    pieces = cut(whole, sizes) if sizes else None
    return [(name, piece) for name, piece in zip(target.names, pieces or (), strict=False) if name]


def filled(name: str, words: tuple[str, ...]) -> str:
    """A template with these words for its wildcards."""
    for word in words:
        name = name.replace("{}", word, 1)
    return name
