"""How near pictures come to those of the original adapter, predicted from what shrinking loses.

PSNR ≈ anchor − 8.4·log10(distortion), distortion = dropped + 10^−2.1 · rounding, both in the unit of calibrated σ²:
`dropped` is Σσ² of the dimensions that are not kept, `rounding` the same measure of what rounding changes. Rounding
noise has no direction and harms pictures far less than dropped dimensions, which act together. Fitted to pictures of
three adapters of the example model, docs/evidence.md.
"""

from __future__ import annotations

import math

# dB. It belongs to a model, its sampler and guidance; an adapter that has not been drawn is within about 3 dB of it.
ANCHOR = 15.7

# What rounding weighs beside dropped dimensions: in the prediction, and a little more carefully in choices. Without
# calibration dropped dimensions harm less for their σ², because much of it does not show in pictures. All of a file in
# fp8 has 47 to 51 dB, however little is dropped, and dropping alone reaches that with an error of 3 to 4 %.
_ROUNDING = math.pow(10, -2.1)
_IN_CHOICES = {True: 0.01, False: 0.5}

_SLOPE = 8.4  # dB per factor of ten


def anchor_of(anchor: float | None) -> float:
    """The anchor to use where it may have been corrected."""
    return ANCHOR if anchor is None else anchor


def distortion(dropped: float, rounding: float) -> float:
    """What shrinking does to pictures, from both kinds of loss in the unit of calibrated σ²."""
    return dropped + _ROUNDING * rounding


def rounding_weight(calibrated: bool) -> float:
    """What rounding weighs beside dropped dimensions where a dtype is chosen."""
    return _IN_CHOICES[calibrated]


def predicted_db(lost: float, anchor: float = ANCHOR) -> float | None:
    """PSNR in dB for a `distortion`; None if nothing is lost."""
    return anchor - _SLOPE * math.log10(lost) if lost > 0 else None


def allowed_distortion(quality: float, anchor: float = ANCHOR) -> float:
    """The `distortion` for which this PSNR in dB is predicted."""
    return math.pow(10, (anchor - quality) / _SLOPE)


def corrected_anchor(lost: float, psnr: float) -> float:
    """The anchor that predicts the PSNR in dB that pictures showed at a `distortion` above 0.

    One drawing near 35 dB makes predictions for the same adapter and model right within 0.7 to 2.5 dB.
    """
    return psnr + _SLOPE * math.log10(lost)
