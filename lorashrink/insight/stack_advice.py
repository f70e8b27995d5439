"""What the numbers of several adapters together mean, in sentences for the person who wants to use them together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lorashrink.results.overlap import Advice, LayerOverlap, Pair, Stack, StackMember, short_names

# Cosines from which two adapters do nearly the same, or work against each other.
SAME, AGAINST = 0.9, -0.1

# Cosine, and overlap above that of random subspaces, up to which two adapters do not notice each other.
_APART, _ABOVE_CHANCE = 0.05, 0.1

_MOST = 5  # pairs, or weights, that are named


def kind_of(cosine: float | None, subspace: float | None, chance: float | None) -> str:
    """The kind of a `Pair`, from its cosine, its overlap, and that of random subspaces; None where one adds nothing."""
    if cosine is None or subspace is None or chance is None:
        return "apart"
    if abs(cosine) > SAME:
        return "same" if cosine > 0 else "opposite"
    if cosine < AGAINST:
        return "against"
    return "apart" if abs(cosine) < _APART and subspace < chance + _ABOVE_CHANCE else "some"


def advise(
    members: Sequence[StackMember], pairs: Sequence[Pair], whole: Stack, layers: Sequence[LayerOverlap]
) -> Iterable[Advice]:
    names = short_names([member.path for member in members])
    yield from _on_strength(names, whole, layers)
    yield from _on_layers(names, layers)
    yield from _on_pairs(names, members, pairs)
    for number, member in enumerate(members):
        if member.fro == 0:
            yield Advice("zero", (number,), f"{names[number]} changes nothing")
        if "dora" in member.algo:
            text = f"{names[number]} is a DoRA: what its magnitude does on top of its factors is not in these numbers"
            yield Advice("dora", (number,), text)
    if needy := [layer.name for layer in layers if layer.sum is None]:
        text = f"{len(needy)} of {len(layers)} layers are left out, for want of the base weight (first {needy[0]})"
        yield Advice("needs_base", (), text)


def _on_strength(names: Sequence[str], whole: Stack, layers: Sequence[LayerOverlap]) -> Iterable[Advice]:
    if whole.strongest is None or whole.limit is None or whole.factor is None:
        return
    unit = "of the base weight's σ" if whole.measure == "spectral_ratio" else "as σ"
    reached = f"the sum is strongest in {whole.strongest_layer}: {_said(whole, whole.strongest)} {unit}"
    if whole.limit == whole.alone and whole.alone_adapter is not None:
        bound = f"{_said(whole, whole.limit)}, which {names[whole.alone_adapter]} reaches alone in {whole.alone_layer}"
    else:
        bound = f"the limit of {_said(whole, whole.limit)}"
    if whole.factor >= 1:
        yield Advice("room", (), f"{reached}; that is within {bound}")
        return
    (layer,) = (layer for layer in layers if layer.name == whole.strongest_layer)
    shares = layer.sum.shares if layer.sum else ()
    most = max(range(len(shares)), key=lambda number: shares[number])
    weights = ", ".join(f"{name}:{_rounded_down(weight)}" for name, weight in zip(names, whole.weights, strict=True))
    as_weights = f": {weights}" if len(names) <= _MOST else ""
    yield Advice(
        "limit",
        (most,),
        f"{reached}, {1 / whole.factor:.3g} times {bound}; {names[most]} makes {100 * shares[most]:.0f} % of it. "
        f"All weights times {_rounded_down(whole.factor)} bring it back{as_weights}",
    )


def _said(whole: Stack, strength: float) -> str:
    return f"{100 * strength:.3g} %" if whole.measure == "spectral_ratio" else f"{strength:.3g}"


def _rounded_down(weight: float) -> str:
    """Three digits, none of them rounded up, since what is told must be below the limit."""
    if not weight:
        return "0"
    places = 2 - math.floor(math.log10(abs(weight)))
    return f"{math.copysign(math.floor(abs(weight) * 10**places) / 10**places, weight):.3g}"


def _on_layers(names: Sequence[str], layers: Sequence[LayerOverlap]) -> Iterable[Advice]:
    sums = [(layer, layer.sum) for layer in layers if layer.sum]
    amplified = [(whole.amplification or 0.0, layer.name) for layer, whole in sums if "amplified" in layer.flags]
    if amplified:
        most, name = max(amplified)
        text = f"{len(amplified)} of {len(layers)} layers are stronger in the sum than in any adapter alone, at most "
        yield Advice("amplified", (), f"{text}{most:.3g} times ({name})")
    spikes = [(whole.spectral, layer, whole) for layer, whole in sums if "spike" in layer.flags]
    if spikes:
        _, layer, whole = max(spikes, key=lambda each: each[0])
        most_of = max(range(len(names)), key=lambda number: whole.shares[number])
        yield Advice(
            "spike",
            (most_of,),
            f"in {len(spikes)} of {len(layers)} layers nearly all of the sum's effect is in one direction, which burns "
            f"first: {layer.name} has σ {whole.spectral:.3g} before {whole.second:.3g}, and {names[most_of]} makes "
            f"{100 * whole.shares[most_of]:.0f} % of it",
        )


def _on_pairs(names: Sequence[str], members: Sequence[StackMember], pairs: Sequence[Pair]) -> Iterable[Advice]:
    told = {"same": _same_text, "opposite": _against_text, "against": _against_text}
    for kind in ("same", "opposite", "against"):
        these = sorted((pair for pair in pairs if pair.kind == kind), key=lambda pair: -abs(pair.cosine or 0.0))
        for pair in these[:_MOST]:
            one, other = members[pair.a], members[pair.b]
            text = f"{names[pair.a]} and {names[pair.b]} {told[kind](names[pair.a], one, other, pair.cosine or 0.0)}"
            yield Advice(kind, (pair.a, pair.b), text)
        if len(these) > _MOST:
            yield Advice(kind, (), f"and {len(these) - _MOST} more pairs like these")
    apart = [pair for pair in pairs if pair.kind == "apart"]
    if apart:
        first = f"{names[apart[0].a]} and {names[apart[0].b]}"
        which = first if len(apart) == 1 else f"{len(apart)} of {len(pairs)} pairs"
        yield Advice("apart", (), f"{which} do not interact: their directions differ as those of unrelated adapters do")


def _same_text(name: str, one: StackMember, other: StackMember, cosine: float) -> str:
    alike = f"do nearly the same (cosine {cosine:.3g})"
    together = _together(one, other, cosine)
    if one.weight * other.weight <= 0 or not together:
        return f"{alike}, and with these weights take most of it back from each other"
    weight = one.weight + other.weight * cosine * other.fro / one.fro
    lost = abs(other.weight) * other.fro * math.sqrt(max(0.0, 1 - cosine**2)) / together
    return f"{alike}: {name}:{weight:.3g} alone does what both do, with {100 * lost:.2g} % error"


def _against_text(name: str, one: StackMember, other: StackMember, cosine: float) -> str:
    against = f"{'are opposites' if cosine < -SAME else 'work against each other'} (cosine {cosine:.3g})"
    if one.weight * other.weight <= 0:
        return f"{against}, but with weights of different signs they add up"
    kept = _together(one, other, cosine) / math.hypot(one.weight * one.fro, other.weight * other.fro)
    return f"{against}: together they keep {100 * kept:.0f} % of the norm that independent ones would have"


def _together(one: StackMember, other: StackMember, cosine: float) -> float:
    """‖w_1·ΔW_1 + w_2·ΔW_2‖_F."""
    a, b = one.weight * one.fro, other.weight * other.fro
    return math.sqrt(max(0.0, a * a + b * b + 2 * cosine * a * b))
