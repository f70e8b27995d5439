"""What is encoded once: latents of pictures, in memory or in .npz files beside the pictures, and captions, in memory.

Names and keys of the files are sd-scripts', so that both programs read each other's. A hash in each file, of what it
was made from, shows when picture or VAE have changed. sd-scripts writes none: its files are used if their sizes fit.
Latents in files are unscaled float32.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import zipfile
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from lorashrink.errors import InputError, NonFinite, OutputError, UsageError
from lorashrink.files.disk import write_bytes
from lorashrink.train.data.batches import chunks, generator, numbers, raising, read_ahead, read_batch
from lorashrink.train.data.captions import draw_caption, varies
from lorashrink.train.data.scanning import Data, Picture, check_pixels
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Encoded, Model, encode_captions, encode_pixels

_log = logging.getLogger(__name__)

_Arrays = Mapping[str, npt.NDArray[Any]]

_SOURCE_KEY = "source_hash"


def posterior(seed: int, picture: Picture, flipped: bool) -> torch.Generator:
    """The random numbers with which a picture's latents are drawn from what the VAE says of it."""
    return generator(seed, "posterior", *picture.names, int(flipped))


@dataclass(frozen=True, slots=True, eq=False)
class LatentCache:
    """Latents of every picture. `memory` holds [1 or 2, 4, h, w] for each: as it is, and mirrored; None: in files."""

    memory: Mapping[Hashable, Tensor] | None
    stride: int  # pixels per latent along each side

    def get(self, picture: Picture, flipped: bool) -> Tensor:
        """Unscaled latents [4, h, w] float32; InputError if the file is missing, damaged or of another bucket."""
        if self.memory is not None:
            return self.memory[_identity(picture)][int(flipped)]
        arrays = _read(_latent_file(picture))
        if not _fits(arrays, picture, self.stride):
            raise InputError(f"{_latent_file(picture)}: was changed while it was used; start again")
        return torch.from_numpy(arrays["latents_flipped" if flipped else "latents"].astype(np.float32, copy=False))


def cache_latents(data: Data, vae: AutoencoderKL, options: Options, *, seed: int, rank: int, world: int) -> LatentCache:
    """Encode every picture whose latents are not there yet, on the device of the VAE.

    In memory each process encodes all pictures. On disk each encodes its share; let the processes wait for each other
    before the first `get`. Raises NonFinite (the VAE made NaN or infinity of a picture), InputError (a picture cannot
    be read, or two would have the same cache file) and OutputError.
    """
    stride, quiet = 2 ** (len(vae.config.block_out_channels) - 1), rank > 0
    pictures = list({_identity(picture): picture for picture in data.pictures}.values())
    if not options.cache_latents_to_disk:
        check_pixels(pictures)
        encoded = _encoded(pictures, vae, options, seed, quiet)
        return LatentCache({_identity(picture): latents for picture, latents in encoded}, stride)
    files: dict[Path, Picture] = {}
    for picture in pictures:
        path = _latent_file(picture)
        if (first := files.setdefault(path, picture)) is not picture:
            raise InputError(
                f"{path}: {first.path} and {picture.path} would need this cache file for different contents. Rename "
                "one, or keep the cache in memory (without _to_disk)"
            )
    digest = hashlib.blake2b(b"latents", digest_size=16)
    for weight in vae.parameters():  # a little of each tells one VAE from another
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    salt = digest.digest()
    missing, stale = [], 0
    for path, picture in list(files.items())[rank::world]:
        exists = os.path.exists(path)
        stored = _read(path)
        # sd-scripts writes no hash.
        same_source = _SOURCE_KEY not in stored or str(stored[_SOURCE_KEY]) == _source_hash(picture, salt)
        if not (same_source and _fits(stored, picture, stride)):
            missing.append(picture)
            stale += exists
    if stale:
        _log.warning("%d cache files of latents are damaged or do not fit, and are made anew", stale)
    check_pixels(missing)
    for picture, latents in _encoded(missing, vae, options, seed, quiet):
        arrays = {
            "latents": latents[0].numpy(),
            "original_size": np.array(picture.fit.original),
            "crop_ltrb": np.array(picture.fit.uncut),
            # Not in sd-scripts' files: equal buckets may be cut from pictures that were resized differently.
            "resized_size": np.array(picture.fit.resized),
            _SOURCE_KEY: np.array(_source_hash(picture, salt)),
        }
        if len(latents) > 1:
            arrays["latents_flipped"] = latents[1].numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        try:
            write_bytes(_latent_file(picture), buffer.getvalue())
        except OutputError as error:
            advice = "Or keep the cache in memory: leave out the options that end in _to_disk"
            raise OutputError(f"{error} {advice}") from error
    return LatentCache(None, stride)


def _identity(picture: Picture) -> Hashable:
    """Equal for pictures with the same latents."""
    options = picture.subset.options
    return picture.path, picture.fit, options.flip_aug, options.resize_interpolation


def _latent_file(picture: Picture) -> Path:
    width, height = picture.fit.original
    return picture.path.with_name(f"{picture.path.stem}_{width:04d}x{height:04d}_sdxl.npz")


def _source_hash(picture: Picture, salt: bytes) -> str:
    """A hash of what latents are made from: the picture's file, how it is resized, and the VAE."""
    how = str(picture.subset.options.resize_interpolation).encode()
    digest = hashlib.blake2b(how, key=salt, digest_size=16)
    try:
        with picture.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
    except OSError as error:
        raise InputError(f"{picture.path}: cannot be read ({error.strerror or error}); replace or remove it") from None


def _encoded(
    pictures: Sequence[Picture], vae: AutoencoderKL, options: Options, seed: int, quiet: bool
) -> Iterator[tuple[Picture, Tensor]]:
    """Each picture with its latents [1 or 2, 4, h, w] float32, in the order of buckets; on terminals with a bar."""

    def shape(picture: Picture) -> tuple[Any, ...]:
        return picture.fit.bucket, picture.subset.options.flip_aug

    same_shapes = itertools.groupby(sorted(pictures, key=shape), key=shape)
    groups = [group for _, same in same_shapes for group in chunks(list(same), options.vae_batch_size)]
    read = read_ahead(read_batch, groups, options, in_workers=bool(groups))
    bar = tqdm(zip(groups, raising(read), strict=True), "latents", len(groups), leave=False, disable=quiet or None)
    for group, pixels in bar:
        sides = [
            encode_pixels(vae, pixels.flip(-1) if flipped else pixels, [posterior(seed, p, flipped) for p in group])
            for flipped in ((False, True) if group[0].subset.options.flip_aug else (False,))
        ]
        for picture, latents in zip(group, torch.stack(sides, dim=1), strict=True):
            if not latents.isfinite().all():
                damaged = options.no_half_vae or options.mixed_precision == "no"
                advice = "the VAE may be damaged, give another one with --vae" if damaged else "add --no_half_vae"
                raise NonFinite(f"{picture.path}: the VAE makes NaN of this picture; {advice}")
            yield picture, latents.contiguous()


def _fits(arrays: _Arrays, picture: Picture, stride: int) -> bool:
    """Whether these are finite latents of the picture's sizes and crop, mirrored ones too where they are needed."""
    width, height = picture.fit.bucket
    shape = (4, height // stride, width // stride)
    sides = ("latents", "latents_flipped") if picture.subset.options.flip_aug else ("latents",)
    needed = {"original_size", "crop_ltrb", *sides}
    if not needed <= arrays.keys() or any(arrays[key].dtype.kind not in "iuf" for key in needed):
        return False
    crop, resized = arrays["crop_ltrb"], arrays.get("resized_size")
    return (
        all(arrays[side].shape == shape and bool(np.isfinite(arrays[side]).all()) for side in sides)
        and np.array_equal(arrays["original_size"], picture.fit.original)
        and crop.shape == (4,)
        and bool(np.all(np.abs(crop - picture.fit.uncut) < 1))
        and (resized is None or np.array_equal(resized, picture.fit.resized))
    )


def _read(path: Path) -> _Arrays:
    """The arrays of a .npz file; none where there is no such file, or it is damaged."""
    try:
        # np.load would not close a damaged file that it opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return {}  # RuntimeError: damage that looks like a password, or like a later version of the format


def cache_texts(data: Data, model: Model, options: Options, *, quiet: bool = False) -> dict[str, Encoded]:
    """Every caption encoded, each a batch of 1, on the device of the text encoders; with a bar, unless `quiet`.

    Raises UsageError if captions change from one showing to the next.
    """
    for subset in data.subsets:
        if varies(subset.options):
            raise UsageError(
                f"{subset.folder}: --cache_text_encoder_outputs needs captions that stay the same; leave out "
                "shuffle_caption, and dropout of captions and tags"
            )
    memory: dict[str, Encoded] = {}
    captions = {
        draw_caption(picture.caption, picture.subset.options, numbers(0, "caption"), epoch=1): None
        for picture in data.pictures
    }  # in their order
    groups = chunks(list(captions), options.text_encoder_batch_size or 1)
    for group in tqdm(groups, "captions", leave=False, disable=quiet or None):
        with torch.no_grad():
            encoded = encode_captions(model, group, options.max_token_length)
        encoded = encoded.to("cpu", encoded.hidden1.dtype)
        for index, caption in enumerate(group):
            memory[caption] = Encoded(*(part[index : index + 1].clone() for part in encoded))
    return memory
