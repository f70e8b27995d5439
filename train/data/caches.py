"""What is encoded once: latents of pictures, and captions, in memory or in .npz files beside the pictures.

Names and keys of the files are sd-scripts', so that both programs read each other's. A hash in each file, of what it
was made from, shows when picture, caption, VAE or text encoders have changed. sd-scripts writes none: its latents are
used if their sizes fit, and its captions are encoded anew. Latents in files are unscaled float32.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from lorashrink.train.data.batches import chunks, generator, numbers, raising, read_ahead
from lorashrink.train.data.buckets import to_pixels
from lorashrink.train.data.captions import draw_caption, varies
from lorashrink.train.data.scanning import Data, Picture, check_pixels, read_pixels
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Encoded, Model, encode, encode_pixels, tokenize, vae_stride

_log = logging.getLogger(__name__)

_Arrays = Mapping[str, npt.NDArray[Any]]

_NO_CACHE = "the cache file is missing or does not fit the picture; start again, without --skip_cache_check"


# --- latents -------------------------------------------------------------------------------------

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
            raise InputError(f"{_latent_file(picture)}: {_NO_CACHE}")
        return torch.from_numpy(arrays["latents_flipped" if flipped else "latents"].astype(np.float32, copy=False))


def cache_latents(data: Data, vae: AutoencoderKL, options: Options, *, seed: int, rank: int, world: int) -> LatentCache:
    """Encode every picture whose latents are not there yet, on the device of the VAE.

    In memory each process encodes all pictures. On disk each encodes its share; let the processes wait for each other
    before the first `get`. Raises NonFinite (the VAE made NaN or infinity of a picture), InputError (a picture cannot
    be read, or two would have the same cache file) and OutputError.
    """
    stride, quiet = vae_stride(vae), rank > 0
    pictures = list({_identity(picture): picture for picture in data.pictures}.values())
    if not options.cache_latents_to_disk:
        check_pixels(pictures)
        encoded = _encoded(pictures, vae, options, seed, quiet)
        return LatentCache({_identity(picture): latents for picture, latents in encoded}, stride)
    _check_distinct((_latent_file(picture), _identity(picture), picture) for picture in pictures)
    salt = _salt("latents", [vae])

    def is_there(picture: Picture) -> bool:
        arrays = _read(_latent_file(picture))
        same = _SOURCE_KEY not in arrays or str(arrays[_SOURCE_KEY]) == _source_hash(picture, salt)
        return same and _fits(arrays, picture, stride)

    share = {picture: _latent_file(picture) for picture in pictures[rank::world]}
    missing = _missing(share, is_there, options, "latents")
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
        flipped = {"latents_flipped": latents[1].numpy()} if len(latents) > 1 else {}
        _write(_latent_file(picture), arrays | flipped)
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
    read = read_ahead(_pixels, groups, options, in_workers=bool(groups))
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


def _pixels(pictures: Sequence[Picture]) -> Tensor:
    return torch.stack([to_pixels(read_pixels(picture), flipped=False) for picture in pictures])


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


# --- captions ------------------------------------------------------------------------------------

_TEXT_KEYS = ("hidden_state1", "hidden_state2", "pool2")
_HASH_KEY = "caption_hash"


@dataclass(frozen=True, slots=True, eq=False)
class TextCache:
    """Encoded captions. `memory` holds them by the hash of the caption; None: in files."""

    salt: bytes  # what hashes depend on besides captions
    memory: Mapping[str, Encoded] | None
    trusting: bool  # files without a hash are taken to fit

    def get(self, picture: Picture) -> Encoded:
        """The picture's caption, encoded, a batch of 1; InputError if the file is missing, damaged or of another."""
        if self.memory is not None:
            return self.memory[self.hash(_caption(picture))]
        if encoded := self.read(picture):
            return encoded
        raise InputError(f"{_text_file(picture)}: {_NO_CACHE}")

    def read(self, picture: Picture) -> Encoded | None:
        """The same from its file, or None where that does not fit."""
        arrays = _read(_text_file(picture))
        fits = str(arrays[_HASH_KEY]) == self.hash(_caption(picture)) if _HASH_KEY in arrays else self.trusting
        if not fits or not arrays.keys() >= {*_TEXT_KEYS}:
            return None
        return Encoded(*(torch.from_numpy(arrays[key])[None] for key in _TEXT_KEYS))

    def hash(self, caption: str) -> str:
        """A hash of the caption, the longest length and the encoders."""
        return hashlib.blake2b(caption.encode(), key=self.salt, digest_size=16).hexdigest()


def cache_texts(data: Data, model: Model, options: Options, *, rank: int, world: int) -> TextCache:
    """Encode every caption that is not there yet, on the device of the text encoders; see `cache_latents`.

    Raises UsageError also if captions change from one showing to the next.
    """
    for subset in data.subsets:
        if varies(subset.options):
            raise UsageError(
                f"{subset.folder}: --cache_text_encoder_outputs needs captions that stay the same; leave out "
                "shuffle_caption, and dropout of captions and tags"
            )
    cache = TextCache(_salt(str(options.max_token_length), model.encoders), None, options.skip_cache_check)
    pictures, quiet = data.pictures, rank > 0
    if not options.cache_text_encoder_outputs_to_disk:
        captions = list(dict.fromkeys(map(_caption, pictures)))
        pairs = zip(captions, _encoded_captions(captions, model, options, quiet), strict=True)
        return replace(cache, memory={cache.hash(caption): encoded for caption, encoded in pairs})
    _check_distinct((_text_file(picture), _caption(picture), picture) for picture in pictures)
    by_file = list({_text_file(picture): picture for picture in pictures}.values())
    share = {picture: _text_file(picture) for picture in by_file[rank::world]}
    missing = _missing(share, lambda picture: cache.read(picture) is not None, options, "captions")
    captions = list(map(_caption, missing))
    for picture, encoded in zip(missing, _encoded_captions(captions, model, options, quiet), strict=True):
        arrays = {key: part[0].numpy() for key, part in zip(_TEXT_KEYS, encoded, strict=True)}
        _write(_text_file(picture), arrays | {_HASH_KEY: np.array(cache.hash(_caption(picture)))})
    return cache


def _caption(picture: Picture) -> str:
    """The caption of a picture whose caption never changes."""
    return draw_caption(picture.caption, picture.subset.options, numbers(0, "caption"), epoch=1)


def _text_file(picture: Picture) -> Path:
    return picture.path.with_name(f"{picture.path.stem}_te_outputs.npz")


def _encoded_captions(captions: Sequence[str], model: Model, options: Options, quiet: bool) -> Iterator[Encoded]:
    """The encoding of each caption, a batch of 1 on the CPU."""
    groups = chunks(captions, options.text_encoder_batch_size or 1)
    for group in tqdm(groups, "captions", leave=False, disable=quiet or None):
        tokens = [tokenize(tokenizer, group, options.max_token_length) for tokenizer in model.tokenizers]
        with torch.no_grad():
            encoded = encode(model.encoders, *tokens)
        dtype = encoded.hidden1.dtype
        encoded = encoded.to("cpu", torch.float32 if dtype == torch.bfloat16 else dtype)  # numpy has no bfloat16
        for index in range(len(group)):
            yield Encoded(*(part[index : index + 1].clone() for part in encoded))


# --- files ---------------------------------------------------------------------------------------


def _salt(settings: str, modules: Iterable[torch.nn.Module]) -> bytes:
    """A hash of settings, and of a little of every weight of what encodes: other bases have others."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for module in modules:
        for weight in module.parameters():
            digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.digest()


def _check_distinct(files: Iterable[tuple[Path, Hashable, Picture]]) -> None:
    """Refuse files that would have to hold two things, of which each run would overwrite one."""
    contents: dict[Path, tuple[Hashable, Picture]] = {}
    for path, content, picture in files:
        first_content, first = contents.setdefault(path, (content, picture))
        if first_content != content:
            raise InputError(
                f"{path}: {first.path} and {picture.path} would need this cache file for different contents. Rename "
                "one, or keep the cache in memory (without _to_disk)"
            )


def _missing(
    files: Mapping[Picture, Path], is_there: Callable[[Picture], bool], options: Options, what: str
) -> list[Picture]:
    """Those that must be encoded; with --skip_cache_check every file is taken to fit."""
    exists = {picture: os.path.exists(path) for picture, path in files.items()}
    missing = [
        picture for picture in files if not (exists[picture] and (options.skip_cache_check or is_there(picture)))
    ]
    if stale := sum(exists[picture] for picture in missing):
        _log.warning("%d cache files of %s are damaged or do not fit, and are made anew", stale, what)
    return missing


def _read(path: Path) -> _Arrays:
    """The arrays of a .npz file; none where there is no such file, or it is damaged."""
    try:
        # np.load would not close a damaged file that it opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return {}  # RuntimeError: damage that looks like a password, or like a later version of the format


def _write(path: Path, arrays: _Arrays) -> None:
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    try:
        write_bytes(path, data.getvalue())
    except OutputError as error:
        raise OutputError(f"{error} Or keep the cache in memory: leave out the options that end in _to_disk") from error
