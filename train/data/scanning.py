"""What is trained on: pictures in folders, with their captions and buckets.

Scanning reads captions and the sizes of pictures only; pixels are read by `read_pixels` when they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from lorashrink.errors import InputError, UsageError, nearest
from lorashrink.text import count_text, names_text
from lorashrink.train.data.buckets import Fit, Size, bucket_table, fit, prepare
from lorashrink.train.data.captions import read_caption
from lorashrink.train.flags.checks import check_sizes, check_values
from lorashrink.train.flags.options import UNSUPPORTED, Options, read_toml, read_values

_log = logging.getLogger(__name__)

# What PIL and its plugins raise for files that are damaged, of another kind, or far too large.
_UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


# Found on import, because processes that are not forked must load the plugins too.
for _plugin in ("pillow_avif", "pillow_jxl"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_plugin)
_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"} | ({".avif", ".jxl"} & Image.registered_extensions().keys())
_NEVER_READ = {".heic", ".heif", ".avif", ".jxl", *Image.registered_extensions()} - _ENDINGS


@dataclass(frozen=True, slots=True)
class Subset:
    """One folder of pictures and how they are shown."""

    folder: Path
    repeats: int  # showings of each picture in an epoch
    class_words: str  # the caption of pictures that have none; may be empty
    is_reg: bool
    options: Options  # those of its captions and pixels are its own


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture."""

    path: Path
    caption: str
    subset: Subset
    fit: Fit
    repeats: int  # showings in an epoch, after regularisation pictures were evened out

    @property
    def names(self) -> tuple[str, str]:
        """What random numbers for it depend on: the names of folder and file, so that both may move."""
        return self.path.parent.name, self.path.name


@dataclass(frozen=True, slots=True)
class Dataset:
    """Pictures that are put into batches together."""

    pictures: tuple[Picture, ...]
    options: Options  # those of batches and buckets are its own

    @property
    def showings(self) -> Counter[Size]:
        """How many pictures an epoch shows of each bucket."""
        counts: Counter[Size] = Counter()
        for picture in self.pictures:
            counts[picture.fit.bucket] += picture.repeats
        return counts


@dataclass(frozen=True, slots=True)
class Data:
    """All that is trained on."""

    datasets: tuple[Dataset, ...]
    subsets: tuple[Subset, ...]

    @property
    def pictures(self) -> list[Picture]:
        """The pictures of all datasets."""
        return [picture for dataset in self.datasets for picture in dataset.pictures]

    def pictures_of(self, draws: Iterable[Draw]) -> list[Picture]:
        """What is shown in these showings."""
        return [self.datasets[draw.dataset].pictures[draw.picture] for draw in draws]


@dataclass(frozen=True, slots=True)
class Draw:
    """One showing of one picture; the numbers index `Data.datasets` and `Dataset.pictures`."""

    dataset: int
    picture: int
    repeat: int
    epoch: int  # from 1


def scan(options: Options) -> Data:
    """Find the pictures that the options name, with their captions, sizes and buckets, sorted by folder and name.

    Pictures that cannot be read are left out, and named in one warning. Raises InputError (a folder is missing, nothing
    is found, a caption file is empty or no text) and UsageError (an unknown key in the dataset file, or options that
    contradict each other).
    """
    datasets: list[Dataset] = []
    used: list[Subset] = []
    notes: _Notes = {}
    for settings, subsets in _configured(options) if options.dataset_config else _named(options):
        table = bucket_table(settings)
        pictures: list[Picture] = []
        for subset in subsets:
            if read := list(_read(subset, settings, table, notes)):
                pictures += read
                used.append(subset)
            else:
                _log.warning("%s: no pictures found; the folder is ignored", subset.folder)
        if evened := _evened(pictures):
            datasets.append(Dataset(evened, settings))
    folders = {subset.folder for subset in used}  # of which one may lie in another
    notes[_NESTED] = {path: "" for path in notes.get(_NESTED, ()) if path.parent not in folders}
    for (noun, words), files in notes.items():
        if files:
            names = names_text(
                [f"{path}{reason}" for path, reason in files.items()], most=None if words == _UNUSABLE[1] else 3
            )
            _log.warning("%s %s: %s", count_text(len(files), noun), words, names)
    if not datasets:
        where = options.dataset_config or options.train_data_dir
        raise InputError(
            f"{where}: no pictures to train on ({', '.join(sorted(_ENDINGS))}). "
            "They lie in the folders that a dataset file names, or in folders inside --train_data_dir with names that "
            "begin with how often each is shown in an epoch, such as 10_words"
        )
    return Data(tuple(datasets), tuple(used))


# What a warning says of how many pictures or caption files -> these files, with what follows the name of each.
_Notes = dict[tuple[str, str], dict[Path, str]]

_UNUSABLE = "picture", "left out"
_TURNED = "picture", "turned only by a note in the file (EXIF), which is not read; save upright"
_SEEN_THROUGH = "picture", "with transparency, which is not read: the colours stored below it are trained on; fill it"
_MOVING = "picture", "animated; only the first frame is used"
_DEEP = "picture", "in 16-bit grey, read with 8 bits"
_NESTED = "picture", "not used, in a folder inside a folder of pictures; move up, or name the inner folder"
_OTHER_ENDING = "picture", "not used, with an ending that is not read; save as .png"
_BARE = "picture", "without a caption file; the words of the folder are used, even if empty"
_BLANK = "caption file", "with a blank first line; an empty caption is trained on"
_SEVERAL_LINES = "caption file", "with more than one line; only the first is used"
_LONELY = "caption file", "not used, because no picture has its name"


def _read(subset: Subset, options: Options, table: tuple[Size, ...], notes: _Notes) -> Iterator[Picture]:
    """The pictures of a folder; `notes` takes what the user should know about its files."""

    def note(kind: tuple[str, str], path: Path, applies: object = True, *, reason: str = "") -> None:
        if applies:
            notes.setdefault(kind, {})[path] = reason  # a file of two datasets is named once

    extension = subset.options.caption_extension
    pictures = _picture_files(subset.folder)
    used = {name for path in pictures for name in (path.name, path.stem + extension)}
    for path in sorted(path for path in subset.folder.rglob("*") if path.is_file()):
        ending = path.suffix.lower()
        if path.parent != subset.folder:
            note(_NESTED, path, ending in _ENDINGS | _NEVER_READ)
        elif ending in _NEVER_READ:
            note(_OTHER_ENDING, path)
        else:
            note(_LONELY, path, path.name.endswith(extension) and path.name not in used)
    for path in pictures:
        try:
            with Image.open(path) as image:  # which does not read its pixels yet
                fitted = fit(image.size, options, table)
                if image.mode in ("I", "F"):
                    raise OSError("its numbers have no known range; save it with 8 bits per colour")
                # Without such an entry PIL would read all of the picture to look for one.
                turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                note(_TURNED, path, turned)
                note(_SEEN_THROUGH, path, image.has_transparency_data)
                note(_MOVING, path, getattr(image, "is_animated", False))
                note(_DEEP, path, image.mode.startswith("I;16"))
        except (InputError, *_UNREADABLE) as error:
            note(_UNUSABLE, path, reason=f": {_reason(error)}")
            continue
        lines = read_caption(path, subset.options)
        captions = path.with_name(path.stem + extension)
        note(_BARE, captions, lines is None)
        note(_BLANK, captions, lines is not None and not lines[0])
        note(_SEVERAL_LINES, captions, lines is not None and len(lines) > 1)
        yield Picture(path, subset.class_words if lines is None else lines[0], subset, fitted, subset.repeats)


def _picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())


def _reason(error: Exception) -> str:
    return "no picture, or damaged" if isinstance(error, UnidentifiedImageError) else str(error)


def _evened(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """The pictures of a dataset, regularisation pictures repeated until they are shown as often as the others."""
    train = [picture for picture in pictures if not picture.subset.is_reg]
    reg = [picture for picture in pictures if picture.subset.is_reg]
    remaining, reg_showings = (sum(picture.repeats for picture in part) for part in (train, reg))
    if reg_showings > remaining:
        counts = count_text(reg_showings, "regularisation picture"), count_text(remaining, "training picture")
        _log.warning("%s for %s (with repeats); only as many are used", *counts)
    more, rest = divmod(max(remaining - reg_showings, 0), len(reg) or 1)
    for index, picture in enumerate(reg):
        repeats = min(remaining, picture.repeats + more + (index < rest))
        remaining -= repeats
        if repeats:
            train.append(replace(picture, repeats=repeats))
    return tuple(train)


def _named(options: Options) -> Iterator[tuple[Options, list[Subset]]]:
    """The one dataset of the folders named N_words in --train_data_dir and --reg_data_dir."""
    subsets: list[Subset] = []
    for name, is_reg in ((options.train_data_dir, False), (options.reg_data_dir, True)):
        if name is None:
            continue
        parent, count = Path(name), len(subsets)
        if not parent.is_dir():
            raise InputError(f"{parent}: no such folder (--{'reg' if is_reg else 'train'}_data_dir)")
        for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
            repeats, _, words = folder.name.partition("_")
            if repeats.isdecimal() and int(repeats) > 0:
                subsets.append(Subset(folder, int(repeats), words, is_reg, options))
            else:
                note = "%s is ignored: its name must begin with how often to show its pictures, as in 10_words"
                _log.warning(note, folder)
        if loose := len(_picture_files(parent)):
            _log.warning(
                "%s directly in %s, not used; only those in its folders are", count_text(loose, "picture"), parent
            )
        if is_reg and len(subsets) == count:
            raise InputError(f"{parent}: no folders named as in {parent / '1_words'}, of regularisation pictures")
    yield options, subsets


# --- dataset files ------------------------------------------------------------------------------

# Keys are options, some under another name; a section is the options with its keys replaced, so that what it leaves out
# comes from the section around it and at last from the command line.
_OPTION_OF = {"num_repeats": "dataset_repeats", "batch_size": "train_batch_size"}
_OF_PICTURES = {
    "caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_extension", "caption_prefix",
    "caption_separator", "caption_suffix", "caption_tag_dropout_rate", "class_tokens", "flip_aug", "keep_tokens",
    "keep_tokens_separator", "num_repeats", "resize_interpolation", "secondary_separator", "shuffle_caption",
}  # fmt: skip
_OF_BATCHES = {
    "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso", "min_bucket_reso",
    "resolution",
}  # fmt: skip
_ALLOWED = {
    "[general]": _OF_PICTURES | _OF_BATCHES,
    "[[datasets]]": _OF_PICTURES | _OF_BATCHES | {"subsets"},
    "[[datasets.subsets]]": _OF_PICTURES | {"image_dir", "is_reg"},
}
# Keys that are no options.
_ALONE: Mapping[str, tuple[type, str]] = {
    "class_tokens": (str, "text"),
    "image_dir": (str, "text"),
    "is_reg": (bool, "true or false"),
    "subsets": (list, "written [[datasets.subsets]], with two brackets"),
}


def _configured(options: Options) -> list[tuple[Options, list[Subset]]]:
    """The datasets of --dataset_config: each with its options and folders."""
    path = Path(options.dataset_config or "")
    if options.train_data_dir or options.reg_data_dir:
        _log.warning("--train_data_dir and --reg_data_dir are ignored, because %s names the folders", path)
    content = read_toml(path)
    try:
        if problems := list(_problems(content)):
            raise UsageError("; ".join(problems))
        datasets = []
        for table in content.get("datasets", []):
            keys = content.get("general", {}) | table
            settings, warnings = _with_keys(options, keys)
            for warning in warnings:
                _log.warning(warning)
            subsets: dict[str, Subset] = {}
            for inner in keys.get("subsets", []):
                all_keys = keys | inner
                (own, _), folder = _with_keys(options, all_keys), all_keys.get("image_dir")
                if folder is None:
                    raise UsageError("image_dir is missing in a [[datasets.subsets]]")
                if not Path(folder).is_dir():
                    raise InputError(f"image_dir {folder} is no folder")
                if own.dataset_repeats < 1:
                    _log.warning("%s is ignored: it is shown %d times (num_repeats)", folder, own.dataset_repeats)
                elif folder in subsets:
                    _log.warning("a second [[datasets.subsets]] with image_dir %s is ignored", folder)
                else:
                    words, is_reg = all_keys.get("class_tokens", ""), all_keys.get("is_reg", False)
                    subsets[folder] = Subset(Path(folder), own.dataset_repeats, words, is_reg, own)
            datasets.append((settings, list(subsets.values())))
        return datasets
    except (InputError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None


def _with_keys(options: Options, keys: Mapping[str, Any]) -> tuple[Options, list[str]]:
    """The options with those that keys of a dataset file stand for replaced, and warnings about sizes.

    Errors and warnings name keys where they would name options whose values come from keys.
    """
    values = {_OPTION_OF.get(key, key): value for key, value in keys.items() if key not in _ALONE}
    if isinstance(values.get("resolution"), list):
        values["resolution"] = ",".join(map(str, values["resolution"]))

    def in_keys(message: object) -> str:
        text = str(message)
        for key in keys:
            text = re.sub(rf"--{_OPTION_OF.get(key, key)}\b", key, text)
        return text

    try:
        settings = replace(options, **read_values(values))
        check_values(settings)
        return settings, list(map(in_keys, check_sizes(settings)))
    except UsageError as error:
        raise UsageError(in_keys(error)) from None


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the sections and keys of a dataset file, in their order, but for values of options."""
    for key in sorted(content.keys() - {"general", "datasets"}):
        yield f"no such section: {key} (there are [general] and [[datasets]])"
    sections, tables = [("[general]", content.get("general", {}))], content.get("datasets", [])
    if not isinstance(tables, list):
        yield "datasets must be written [[datasets]], with two brackets"
        return
    for table in tables:
        subsets = table.get("subsets") if isinstance(table, dict) else None
        inner = subsets if isinstance(subsets, list) else []
        sections += [("[[datasets]]", table), *(("[[datasets.subsets]]", subset) for subset in inner)]
    for name, section in sections:
        if not isinstance(section, dict):
            yield f"{name} must be a section of keys and values"
            continue
        for key, value in section.items():
            if key not in _ALLOWED[name] and key not in UNSUPPORTED:
                homes = [section for section, allowed in _ALLOWED.items() if key in allowed]
                near = nearest(key, _ALLOWED[name])
                hint = f" (it belongs in {homes[-1]})" if homes else f" (did you mean {near}?)" if near else ""
                yield f"no such key in {name}: {key}{hint}"
            elif key in _ALONE and type(value) is not _ALONE[key][0]:
                yield f"{key} must be {_ALONE[key][1]}, not {value!r}"


# --- pixels -------------------------------------------------------------------------------------


def read_pixels(picture: Picture) -> npt.NDArray[np.uint8]:
    """The picture in the shape of its bucket: uint8 [height, width, 3].

    Raises InputError if it cannot be read, or is not the picture that was scanned.
    """
    try:
        with Image.open(picture.path) as image:
            if image.size != picture.fit.original:
                raise InputError(f"{picture.path}: the picture was changed while it was used; start again")
            return prepare(image, picture.fit, picture.subset.options.resize_interpolation)
    except _UNREADABLE as error:
        raise InputError(f"{picture.path}: cannot be read ({_reason(error)}); replace or remove it") from None


def check_pixels(pictures: Iterable[Picture]) -> None:
    """Read the pixels of these pictures and keep none; one InputError names all that are damaged."""

    def damage(path: Path) -> str:
        try:
            with Image.open(path) as image:
                image.load()
        except _UNREADABLE as error:
            return f"{path}: {_reason(error)}"
        return ""

    paths = list(dict.fromkeys(picture.path for picture in pictures))
    with ThreadPoolExecutor() as threads:
        damaged = list(filter(None, threads.map(damage, paths)))
    if damaged:
        share = f"{len(damaged)} of {count_text(len(paths), 'picture')}"
        raise InputError(f"{share} damaged; replace or remove: {'; '.join(damaged)}")
