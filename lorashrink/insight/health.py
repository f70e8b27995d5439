"""What is unusual about an adapter file, in sentences for the person who trained or downloaded it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median_high

from lorashrink.results.inspection import Finding, LayerRow
from lorashrink.text import count_text, span_text

# σ_1 this many times σ_2: one direction that burns when adapters are stacked.
SPIKE = 10.0

# Kernels of this many times the other layers' rank, with this share of the bytes, are where the file can shrink.
CONV_RANK, CONV_SHARE = 4.0, 0.5

# Adapters of these families have the rank that was set in training.
_PLAIN = ("lora", "dora", "loha")

_CLOSE = 1e-2  # an alpha in half precision is this close to the one in the metadata

# Flag of a layer -> what it is about, and what that means.
_FLAGGED: Mapping[str, tuple[str, str]] = {
    "nan": ("NaN or infinity", "pictures turn black; use an earlier save of the training"),
    "padded_rank": ("rank without content", "energy=1 makes the file smaller and changes nothing"),
    "spike": (
        "nearly all of the effect in one direction",
        "at high strength, or with other LoRAs, expect artefacts from it first",
    ),
    "negative_alpha": ("a negative alpha", "it pushes the other way, and some programs drop it"),
    "zero_alpha": ("alpha 0", "that means strength 0, but sd-scripts reads it as full strength"),
    "odd_alpha": ("an odd alpha", "above every rank, or no whole number, which some programs make of it"),
    "needs_base": ("no numbers without the base weight", "name the base to see them"),
}


def check_health(
    layers: Sequence[LayerRow], metadata: Mapping[str, str], *, family: str | None, naming: str
) -> tuple[Finding, ...]:
    """What to know before using or shrinking these layers; of headers alone, what headers tell."""
    if not layers:
        return (Finding("no_layers", 0, "no layer adds anything to a weight of the base: there is nothing to shrink"),)
    findings: list[Finding | None] = [zero_layers(layers, family)]
    for flag, (what, meaning) in _FLAGGED.items():
        names = [row.name for row in layers if flag in row.flags]
        if names:
            text = f"{what} in {len(names)} of {len(layers)} layers (first {names[0]}): {meaning}"
            findings.append(Finding(flag, len(names), text))
    findings += [large_convolutions(layers), stale_metadata(layers, metadata)]
    if compiled := [row.name for row in layers if "_orig_mod" in row.name]:
        where = f"in the names of {count_text(len(compiled), 'layer')} (first {compiled[0]})"
        meaning = "no program finds such layers in its model; take it out of the names"
        findings.append(Finding("compiled", len(compiled), f"_orig_mod of torch.compile {where}: {meaning}"))
    if naming == "kohya":
        findings.append(mixed_alphas(layers))
    return tuple(finding for finding in findings if finding)


def zero_layers(layers: Sequence[LayerRow], family: str | None) -> Finding | None:
    """Layers that change nothing, except where that is normal."""
    zero = [row for row in layers if "zero" in row.flags]
    if not zero:
        return None
    if len(zero) == len(layers):
        return Finding("zero", len(zero), "every layer is zero: this adapter changes nothing")
    # The UNet of SDXL reads the hidden state before the last layer of text encoder 1, so that layer never learns.
    last = (
        max((row.block for row in layers if row.block.startswith("TE1.")), default=None) if family == "sdxl" else None
    )
    unread = last if all("zero" in row.flags for row in layers if row.block == last) else None
    rest = [row for row in zero if row.block != unread]
    normal = f"all of {unread} is zero, as in every SDXL adapter: the model reads the layer before it"
    if not rest:
        return Finding("zero", len(zero), normal)
    text = f"{len(rest)} of {len(layers)} layers are zero and change nothing (first {rest[0].name})"
    return Finding("zero", len(zero), f"{text}; {normal}" if len(rest) < len(zero) else text)


def large_convolutions(layers: Sequence[LayerRow]) -> Finding | None:
    """Convolutions of a far higher rank than the other layers, which hold most of the bytes."""
    kernels = [row for row in layers if row.kind == "conv" and row.rank]
    linear = [row.rank for row in layers if row.kind != "conv" and row.rank]
    if not kernels or not linear:
        return None
    rank, usual = median_high(row.rank for row in kernels), median_high(linear)
    share = sum(row.bytes for row in kernels) / (sum(row.bytes for row in layers) or 1)
    if rank <= CONV_RANK * usual or share <= CONV_SHARE:
        return None
    return Finding(
        "conv_rank",
        len(kernels),
        f"convolutions have rank {rank}, other layers {usual}, and hold {100 * share:.0f} % of the bytes: "
        "lorashrink shrink saves much here",
    )


def stale_metadata(layers: Sequence[LayerRow], metadata: Mapping[str, str]) -> Finding | None:
    """Ranks and alphas in the metadata that no layer has."""
    plain = [row for row in layers if row.algo.removesuffix("+dora") in _PLAIN and row.rank]
    stored: dict[str, list[float]] = {
        "ss_network_dim": [float(row.rank) for row in plain],
        "ss_network_alpha": [row.alpha for row in plain if row.alpha is not None],
    }
    texts = []
    for key, numbers in stored.items():
        stated = metadata.get(key, "None")
        if not numbers or stated in ("", "None"):  # as in files without a value
            continue
        try:
            number = float(stated)
        except ValueError:
            number = math.nan
        if not any(math.isclose(number, stored_number, rel_tol=_CLOSE) for stored_number in numbers):
            texts.append(f"{key} says {stated[:20]!r}, the tensors {span_text(numbers)}")
    if not texts:
        return None
    return Finding("stale_metadata", 0, f"{'; '.join(texts)}: the file was changed without its metadata")


def mixed_alphas(layers: Sequence[LayerRow]) -> Finding | None:
    """Layers whose alpha is not the usual one."""
    alphas = Counter(row.alpha for row in layers if row.alpha is not None)
    if len(alphas) < 2:
        return None
    (common, count), *_ = alphas.most_common(1)
    others = alphas.total() - count
    return Finding(
        "mixed_alpha",
        others,
        f"{others} of {len(layers)} layers have another alpha than {common:g}, which diffusers gives to all of them: "
        "it would draw at other strengths; resize with energy=1 writes one alpha",
    )
