"""Buckets: which shape a picture is trained at, and how it gets that shape.

A bucket is a shape whose area is about that of --resolution and whose sides are multiples of --bucket_reso_steps, so
that pictures of similar shape share batches and lose little at their edges. Sizes are (width, height) in pixels. The
rules and their rounding are sd-scripts', so that both put a picture into the same bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from lorashrink.errors import InputError
from lorashrink.train.flags.checks import bucket_limits, parse_resolution
from lorashrink.train.flags.options import Options

Size = tuple[int, int]

_ALIASES = {"linear": "bilinear", "cubic": "bicubic"}  # the other names of interpolations are PIL's


@dataclass(frozen=True, slots=True)
class Fit:
    """How one picture gets the shape of its bucket: resized to `resized`, whose middle is cut out."""

    original: Size
    resized: Size
    bucket: Size

    @property
    def crop(self) -> Size:
        """Where the cut begins in the resized picture: (left, top)."""
        return (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2

    def time_ids(self, flipped: bool) -> tuple[int, ...]:
        """SDXL's six size numbers: original height and width, top and left of the crop, bucket height and width.

        As in sd-scripts the crop is that of `uncut`. That of a mirrored picture is counted from the other side.
        """
        width, height = self.bucket
        left, top, right, _ = self.uncut
        if flipped:
            left = width - right
        return self.original[1], self.original[0], int(top), int(left), height, width

    @property
    def uncut(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the picture if it lay in the bucket without a cut, as in sd-scripts."""
        width, height = self.bucket
        aspect = _aspect(self.original)
        inner_width, inner_height = (height * aspect, height) if width / height > aspect else (width, width / aspect)
        left, top = (width - inner_width) // 2, (height - inner_height) // 2
        return left, top, left + inner_width, top + inner_height


def bucket_table(options: Options) -> tuple[Size, ...]:
    """All buckets that pictures may go to, sorted by width and height; none with --bucket_no_upscale."""
    resolution, step = parse_resolution(options.resolution), options.bucket_reso_steps
    if not options.enable_bucket:
        return (resolution,)
    if options.bucket_no_upscale:
        return ()
    area = math.prod(resolution)
    square = _down(math.isqrt(area), step)
    minimum, maximum = bucket_limits(options)
    pairs = [(width, min(maximum, _down(area // width, step))) for width in range(minimum, maximum + 1, step)]
    kept = [(width, height) for width, height in pairs if height >= minimum]
    return tuple(sorted({(square, square), *kept, *((height, width) for width, height in kept)}))


def fit(size: Size, options: Options, table: tuple[Size, ...]) -> Fit:
    """The bucket of a picture of this size from `bucket_table`, and the size that it is resized to first.

    Without a table, as with --bucket_no_upscale, the bucket follows the picture. Raises InputError if one of its sides
    is shorter than the step then.
    """
    aspect = _aspect(size)
    if table:
        bucket = size if size in table else min(table, key=lambda entry: abs(_aspect(entry) - aspect))
        scale = bucket[1] / size[1] if aspect > _aspect(bucket) else bucket[0] / size[0]
        return Fit(size, (_nearest(size[0] * scale), _nearest(size[1] * scale)), bucket)
    area, step, resized = math.prod(parse_resolution(options.resolution)), options.bucket_reso_steps, size
    if math.prod(size) > area:  # shrunk to the area, one side a multiple of the step
        ideal_width = math.sqrt(area * aspect)
        width, height = _down(_nearest(ideal_width), step), _down(_nearest(area / ideal_width), step)
        # What the other side would be in whole steps; the nearer aspect wins.
        height_by_width, width_by_height = _down(_nearest(width / aspect), step), _down(_nearest(height * aspect), step)
        if not min(width, height, height_by_width, width_by_height):
            resized = 0, 0
        elif abs(width / height_by_width - aspect) < abs(width_by_height / height - aspect):
            resized = width, _nearest(width / aspect)
        else:
            resized = _nearest(height * aspect), height
    bucket = _down(resized[0], step), _down(resized[1], step)
    if not min(bucket):
        raise InputError(
            f"a picture of {size[0]}x{size[1]} pixels has a side that is too short for a bucket in steps of "
            f"{step}; leave it out, or train without --bucket_no_upscale"
        )
    return Fit(size, resized, bucket)


def _aspect(size: Size) -> float:
    return size[0] / size[1]


def _nearest(number: float) -> int:
    return int(number + 0.5)


def _down(number: int, step: int) -> int:
    return number // step * step


def prepare(image: Image.Image, fit: Fit, interpolation: str | None) -> npt.NDArray[np.uint8]:
    """The picture in the shape of its bucket: uint8 [height, width, 3].

    interpolation: one of `options.INTERPOLATIONS`; None: area averages where no side grows, else Lanczos. Raises
    OSError if the picture's data is damaged.
    """
    if image.mode.startswith("I;16"):  # PIL would make all but the darkest grey white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    left, top = fit.crop
    width, height = fit.bucket
    if interpolation is None:
        shrinks = image.width >= fit.resized[0] and image.height >= fit.resized[1]
        interpolation = "area" if shrinks else "lanczos"
    if image.size == fit.resized:
        pixels = np.asarray(image)
    elif interpolation == "area":
        rows = _area_means(np.asarray(image), fit.resized[1])
        columns = _area_means(np.ascontiguousarray(rows.transpose(1, 0, 2)), fit.resized[0])
        pixels = np.rint(columns.transpose(1, 0, 2)).astype(np.uint8)
    else:
        resampling = Image.Resampling[_ALIASES.get(interpolation, interpolation).upper()]
        pixels = np.asarray(image.resize(fit.resized, resampling))
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _area_means(pixels: npt.NDArray[Any], new: int) -> npt.NDArray[np.float32]:
    """`new` rows of [rows, ...], each the mean of the rows it covers, as with OpenCV's INTER_AREA and not PIL's BOX."""
    old = len(pixels)
    flat = pixels.reshape(old, -1)
    means = np.empty((new, flat.shape[1]), np.float32)
    for row in range(new):
        # In units of 1/new of an old row all edges are whole numbers: this row covers start .. end of new * old.
        start, end = row * old, (row + 1) * old
        source = np.arange(start // new, -(-end // new))
        overlap = np.minimum(end, (source + 1) * new) - np.maximum(start, source * new)
        weights = (overlap / old).astype(np.float32)
        # Few rows at a time stay in the processor's cache.
        np.matmul(weights, flat[source[0] : source[-1] + 1].astype(np.float32), out=means[row])
    return means.reshape(new, *pixels.shape[1:])


def to_pixels(array: npt.NDArray[np.uint8], flipped: bool) -> Tensor:
    """What the VAE takes, of uint8 [height, width, 3]: float32 [3, height, width] in -1..1, mirrored if `flipped`."""
    turned = array[:, ::-1] if flipped else array
    return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1), dtype=np.float32)) / 127.5 - 1
