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
    members: Sequence[StackMember], pairs: Sequence[Pair], stack: Stack, layers: Sequence[LayerOverlap]
) -> Iterable[Advice]:
    """What to know about a stack before using it."""
    names = short_names([member.path for member in members])
    yield from strength_advice(names, stack, layers)
    yield from layer_advice(names, layers)
    yield from pair_advice(names, members, pairs)
    for number, member in enumerate(members):
        if member.fro == 0:
            yield Advice("zero", (number,), f"{names[number]} changes nothing")
        if "dora" in member.algo:
            text = f"{names[number]} is a DoRA: what its magnitude does on top of its factors is not in these numbers"
            yield Advice("dora", (number,), text)
    if needy := [layer.name for layer in layers if layer.sum is None]:
        text = f"{len(needy)} of {len(layers)} layers are left out, for want of the base weight (first {needy[0]})"
        yield Advice("needs_base", (), text)


def strength_advice(names: Sequence[str], stack: Stack, layers: Sequence[LayerOverlap]) -> Iterable[Advice]:
    """Where the sum is strongest, and which weights bring it to the limit."""
    if stack.strongest is None or stack.limit is None or stack.factor is None:
        return
    unit = "of the base weight's σ" if stack.measure == "spectral_ratio" else "as σ"
    strongest, limit = _strength_text(stack, stack.strongest), _strength_text(stack, stack.limit)
    reached = f"the sum is strongest in {stack.strongest_layer}: {strongest} {unit}"
    if stack.limit == stack.alone and stack.alone_adapter is not None:
        bound = f"{limit}, which {names[stack.alone_adapter]} reaches alone in {stack.alone_layer}"
    else:
        bound = f"the limit of {limit}"
    if stack.factor >= 1:
        yield Advice("room", (), f"{reached}; that is within {bound}")
        return
    (layer,) = (layer for layer in layers if layer.name == stack.strongest_layer)
    shares = layer.sum.shares if layer.sum else ()
    most = max(range(len(shares)), key=lambda number: shares[number])
    weights = ", ".join(f"{name}:{rounded_down(weight)}" for name, weight in zip(names, stack.weights, strict=True))
    as_weights = f": {weights}" if len(names) <= _MOST else ""
    yield Advice(
        "limit",
        (most,),
        f"{reached}, {1 / stack.factor:.3g} times {bound}; {names[most]} makes {100 * shares[most]:.0f} % of it. "
        f"All weights times {rounded_down(stack.factor)} bring it back{as_weights}",
    )


def _strength_text(stack: Stack, strength: float) -> str:
    return f"{100 * strength:.3g} %" if stack.measure == "spectral_ratio" else f"{strength:.3g}"


def rounded_down(weight: float) -> str:
    """Three digits, none of them rounded up, since a weight that is advised must stay below the limit."""
    if not weight:
        return "0"
    size = abs(weight) * (1 + 1e-12)  # or rounding errors would make 0.659 of 0.66
    places = 2 - math.floor(math.log10(size))
    return f"{math.copysign(math.floor(size * 10**places) / 10**places, weight):.3g}"


def layer_advice(names: Sequence[str], layers: Sequence[LayerOverlap]) -> Iterable[Advice]:
    """Layers that are stronger together, or have nearly all of their effect in one direction."""
    sums = [(layer, layer.sum) for layer in layers if layer.sum]
    amplified = [(total.amplification or 0.0, layer.name) for layer, total in sums if "amplified" in layer.flags]
    if amplified:
        most, name = max(amplified)
        text = f"{len(amplified)} of {len(layers)} layers are stronger in the sum than in any adapter alone, at most "
        yield Advice("amplified", (), f"{text}{most:.3g} times ({name})")
    spikes = [(layer, total) for layer, total in sums if "spike" in layer.flags]
    if spikes:
        layer, total = max(spikes, key=lambda spike: spike[1].spectral)
        most_of = max(range(len(names)), key=lambda number: total.shares[number])
        yield Advice(
            "spike",
            (most_of,),
            f"in {len(spikes)} of {len(layers)} layers nearly all of the sum's effect is in one direction, which burns "
            f"first: {layer.name} has σ {total.spectral:.3g} before {total.second:.3g}, and {names[most_of]} makes "
            f"{100 * total.shares[most_of]:.0f} % of it",
        )


def pair_advice(names: Sequence[str], members: Sequence[StackMember], pairs: Sequence[Pair]) -> Iterable[Advice]:
    """Pairs that do the same, work against each other, or do not interact."""
    for kind in ("same", "opposite", "against"):
        alike = sorted((pair for pair in pairs if pair.kind == kind), key=lambda pair: -abs(pair.cosine or 0.0))
        for pair in alike[:_MOST]:
            a, b, cosine = members[pair.a], members[pair.b], pair.cosine or 0.0
            text = _same_text(names[pair.a], a, b, cosine) if kind == "same" else _against_text(a, b, cosine)
            yield Advice(kind, (pair.a, pair.b), f"{names[pair.a]} and {names[pair.b]} {text}")
        if len(alike) > _MOST:
            yield Advice(kind, (), f"and {len(alike) - _MOST} more pairs like these")
    apart = [pair for pair in pairs if pair.kind == "apart"]
    if apart:
        first = f"{names[apart[0].a]} and {names[apart[0].b]}"
        which = first if len(apart) == 1 else f"{len(apart)} of {len(pairs)} pairs"
        yield Advice("apart", (), f"{which} do not interact: their directions differ as those of unrelated adapters do")


def _same_text(name: str, a: StackMember, b: StackMember, cosine: float) -> str:
    alike = f"do nearly the same (cosine {cosine:.3g})"
    together = _together(a, b, cosine)
    if a.weight * b.weight <= 0 or not together:
        return f"{alike}, and with these weights take most of it back from each other"
    weight = a.weight + b.weight * cosine * b.fro / a.fro
    lost = abs(b.weight) * b.fro * math.sqrt(max(0.0, 1 - cosine**2)) / together
    return f"{alike}: {name}:{weight:.3g} alone does what both do, with {100 * lost:.2g} % error"


def _against_text(a: StackMember, b: StackMember, cosine: float) -> str:
    against = f"{'are opposites' if cosine < -SAME else 'work against each other'} (cosine {cosine:.3g})"
    if a.weight * b.weight <= 0:
        return f"{against}, but with weights of different signs they add up"
    kept = _together(a, b, cosine) / math.hypot(a.weight * a.fro, b.weight * b.fro)
    return f"{against}: together they keep {100 * kept:.0f} % of the norm that independent ones would have"


def _together(a: StackMember, b: StackMember, cosine: float) -> float:
    """‖w_a·ΔW_a + w_b·ΔW_b‖_F."""
    size_a, size_b = a.weight * a.fro, b.weight * b.fro
    return math.sqrt(max(0.0, size_a * size_a + size_b * size_b + 2 * cosine * size_a * size_b))
