"""What is trained on: pictures in folders, with their captions and buckets.

Scanning reads captions and the sizes of pictures only; pixels are read by `read_pixels` when they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from lorashrink.errors import InputError, UsageError, nearest
from lorashrink.train.data.buckets import BucketRules, Fit, Size, bucket_table, fit, prepare
from lorashrink.train.data.captions import CaptionRules, read_caption
from lorashrink.train.flags.checks import check_sizes, parse_resolution
from lorashrink.train.flags.options import UNSUPPORTED, Options, read_toml, unsupported

_log = logging.getLogger(__name__)

# What PIL and its plugins raise for files that are damaged, of another kind, or far too large.
_UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


def _endings() -> frozenset[str]:
    for plugin in ("pillow_avif", "pillow_jxl"):
        with contextlib.suppress(ImportError):
            importlib.import_module(plugin)
    known = Image.registered_extensions().keys()
    return frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"} | ({".avif", ".jxl"} & known))


# Found on import, because processes that are not forked must load the plugins too.
_ENDINGS = _endings()


@dataclass(frozen=True, slots=True)
class Subset:
    """One folder of pictures and how they are shown."""

    folder: Path
    repeats: int  # showings of each picture in an epoch
    class_words: str  # the caption of pictures that have none; may be empty
    is_reg: bool
    flip: bool
    captions: CaptionRules
    interpolation: str | None = None


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
    batch_size: int
    buckets: BucketRules
    table: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Data:
    """All that is trained on."""

    datasets: tuple[Dataset, ...]
    subsets: tuple[Subset, ...]
    skipped: tuple[tuple[Path, str], ...]  # unusable pictures, and why

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

    Pictures that cannot be read are left out, and named in one warning.

    Raises:
        InputError: a folder is missing, nothing is found, or a caption file is empty or no text.
        UsageError: the dataset file has an unknown or unsupported key, or options contradict each other.
    """
    described = _configured(options) if options.dataset_config else [(options, _folders(options))]
    datasets: list[Dataset] = []
    contents: list[_Contents] = []
    for settings, subsets in described:
        rules = _bucket_rules(settings)
        read = [_read(subset, rules) for subset in subsets]
        pictures = _evened([picture for folder in read for picture in folder.pictures])
        datasets.append(Dataset(pictures, settings.train_batch_size, rules, bucket_table(rules)))
        contents += read
    data = Data(
        tuple(dataset for dataset in datasets if dataset.pictures),
        tuple(folder.subset for folder in contents if folder.pictures),
        tuple(skipped for folder in contents for skipped in folder.skipped),
    )
    _warn(contents, data.skipped)
    if not data.datasets:
        raise InputError(_nothing_found(options))
    return data


@dataclass(slots=True)
class _Contents:
    """What one folder holds."""

    subset: Subset
    pictures: list[Picture] = field(default_factory=list)
    bare: list[Picture] = field(default_factory=list)  # those of them without a caption file
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    turned: int = 0  # pictures that a note in the file says to turn


def _read(subset: Subset, rules: BucketRules) -> _Contents:
    contents = _Contents(subset)
    table = bucket_table(rules)
    for path in _picture_files(subset.folder):
        try:
            with Image.open(path) as image:
                size = image.size
                # Without such an entry PIL would read the whole picture to look for one.
                contents.turned += "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            fitted = fit(size, rules, table)
        except (InputError, *_UNREADABLE) as error:
            contents.skipped.append((path, _reason(error)))
            continue
        caption = read_caption(path, subset.captions)
        picture = Picture(path, subset.class_words if caption is None else caption, subset, fitted, subset.repeats)
        contents.pictures.append(picture)
        if caption is None:
            contents.bare.append(picture)
    return contents


def _picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())


def _reason(error: Exception) -> str:
    return "no picture, or damaged" if isinstance(error, UnidentifiedImageError) else str(error)


def _warn(contents: Sequence[_Contents], skipped: Sequence[tuple[Path, str]]) -> None:
    """Tell in a line each what the user should know about the folders."""
    for folder in contents:
        if not folder.pictures:
            _log.warning("%s: no pictures found; the folder is ignored", folder.subset.folder)
    if skipped:
        names = "; ".join(f"{path}: {reason}" for path, reason in skipped)
        _log.warning("%d pictures cannot be used and are left out: %s", len(skipped), names)
    if turned := sum(folder.turned for folder in contents):
        _log.warning(
            "%d pictures are turned only by a note in the file (EXIF), which training does not read; save them upright",
            turned,
        )
    bare = [picture for folder in contents for picture in folder.bare]
    named = [picture for picture in bare if picture.subset.class_words]
    empty = [picture for picture in bare if not picture.subset.class_words]
    for pictures, instead in ((named, "the words of its folder are used"), (empty, "its caption is empty")):
        if pictures:
            first = pictures[0]
            _log.warning(
                "%d pictures have no caption file; for %s there is no %s, and %s",
                len(pictures),
                first.path,
                first.path.stem + first.subset.captions.extension,
                instead,
            )


def _nothing_found(options: Options) -> str:
    if options.dataset_config:
        return f"{options.dataset_config}: no pictures in the folders that it names ({', '.join(sorted(_ENDINGS))})"
    parent = Path(options.train_data_dir or "")
    loose = len(_picture_files(parent))
    lie = f"the {loose} pictures directly in it are not used" if loose else f"endings: {', '.join(sorted(_ENDINGS))}"
    return (
        f"{parent}: no pictures to train on ({lie}). Put them into a folder inside it whose name begins with how often "
        f"each is shown in an epoch: {parent / '10_words'}"
    )


def _evened(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """The pictures of a dataset, regularisation pictures repeated until they are shown as often as the others."""
    train = [picture for picture in pictures if not picture.subset.is_reg]
    reg = [picture for picture in pictures if picture.subset.is_reg]
    train_showings, reg_showings = (sum(picture.repeats for picture in part) for part in (train, reg))
    if reg_showings > train_showings:
        _log.warning(
            "there are %d regularisation pictures for %d training pictures (with repeats); only as many are used",
            reg_showings,
            train_showings,
        )
    more, rest = divmod(max(train_showings - reg_showings, 0), len(reg) or 1)
    remaining = train_showings
    for index, picture in enumerate(reg):
        repeats = min(remaining, picture.repeats + more + (index < rest))
        remaining -= repeats
        if repeats:
            train.append(replace(picture, repeats=repeats))
    return tuple(train)


def _folders(options: Options) -> list[Subset]:
    """The folders named N_words in --train_data_dir and --reg_data_dir."""
    if not options.train_data_dir:
        raise UsageError(
            "--train_data_dir is missing: the folder with the folders of pictures, or use --dataset_config"
        )
    subsets = list(_named_folders(Path(options.train_data_dir), options, is_reg=False))
    if options.reg_data_dir:
        subsets += _named_folders(Path(options.reg_data_dir), options, is_reg=True)
    return subsets


def _named_folders(parent: Path, options: Options, *, is_reg: bool) -> Iterator[Subset]:
    if not parent.is_dir():
        raise InputError(f"{parent}: no such folder (--{'reg' if is_reg else 'train'}_data_dir)")
    named = False
    for folder in sorted(path for path in parent.iterdir() if path.is_dir()):
        repeats, _, words = folder.name.partition("_")
        if repeats.isdecimal() and int(repeats) > 0:
            named = True
            yield _subset(options, folder, int(repeats), words, is_reg)
        else:
            _log.warning(
                "%s is ignored: its name must begin with how often to show its pictures, as in 10_words", folder
            )
    loose = len(_picture_files(parent))
    if named and loose:
        _log.warning("%d pictures directly in %s are not used; only those in its folders are", loose, parent)
    if is_reg and not named:
        raise InputError(f"{parent}: no folders named as in {parent / '1_words'}, of regularisation pictures")


def _subset(options: Options, folder: Path, repeats: int, class_words: str, is_reg: bool) -> Subset:
    rules = CaptionRules(
        extension=options.caption_extension,
        separator=options.caption_separator,
        shuffle=options.shuffle_caption,
        keep_tokens=options.keep_tokens,
        keep_tokens_separator=options.keep_tokens_separator,
        secondary_separator=options.secondary_separator,
        prefix=options.caption_prefix,
        suffix=options.caption_suffix,
        dropout_rate=options.caption_dropout_rate,
        dropout_every_n_epochs=options.caption_dropout_every_n_epochs,
        tag_dropout_rate=options.caption_tag_dropout_rate,
    )
    return Subset(folder, repeats, class_words, is_reg, options.flip_aug, rules, options.resize_interpolation)


def _bucket_rules(options: Options) -> BucketRules:
    if options.resolution is None:
        raise UsageError(
            "--resolution is missing, such as --resolution 1024,1024 (in a dataset file: resolution = 1024)"
        )
    if options.train_batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {options.train_batch_size}")
    check_sizes(options)
    return BucketRules(
        parse_resolution(options.resolution),
        options.enable_bucket,
        options.min_bucket_reso,
        options.max_bucket_reso,
        options.bucket_reso_steps,
        not options.bucket_no_upscale,
    )


# Dataset files. Keys are options under sd-scripts' names of them there; a section is the options with its keys
# replaced, so that what a section leaves out comes from the one around it and at last from the command line.
_OF_PICTURES = {"num_repeats": "dataset_repeats"} | {
    name: name
    for name in (
        "caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_extension", "caption_prefix",
        "caption_separator", "caption_suffix", "caption_tag_dropout_rate", "flip_aug", "keep_tokens",
        "keep_tokens_separator", "resize_interpolation", "secondary_separator", "shuffle_caption",
    )
}  # fmt: skip
_OPTION_OF = _OF_PICTURES | {
    "batch_size": "train_batch_size",
    "bucket_no_upscale": "bucket_no_upscale",
    "bucket_reso_steps": "bucket_reso_steps",
    "enable_bucket": "enable_bucket",
    "max_bucket_reso": "max_bucket_reso",
    "min_bucket_reso": "min_bucket_reso",
    "resolution": "resolution",
}
_ALONE: Mapping[str, type] = {"image_dir": str, "is_reg": bool, "class_tokens": str, "subsets": list}
_INHERITED = frozenset(_OPTION_OF) | {"class_tokens"}
_ALLOWED = {
    "[general]": _INHERITED,
    "[[datasets]]": _INHERITED | {"subsets"},
    "[[datasets.subsets]]": frozenset(_OF_PICTURES) | {"class_tokens", "image_dir", "is_reg"},
}


def _configured(options: Options) -> list[tuple[Options, list[Subset]]]:
    """The datasets of --dataset_config: each with its options and folders."""
    path = Path(options.dataset_config or "")
    if options.train_data_dir or options.reg_data_dir:
        _log.warning("--train_data_dir and --reg_data_dir are ignored, because %s names the folders", path)
    content = read_toml(path)
    for key in content.keys() - {"general", "datasets"}:
        raise UsageError(f"{path}: no such section: {key}; there are [general] and [[datasets]]")
    general = _section(path, "[general]", content.get("general", {}))
    datasets = []
    for table in _tables(path, "datasets", content.get("datasets", [])):
        keys = general | _section(path, "[[datasets]]", table)
        subsets = _configured_subsets(path, options, keys, keys.pop("subsets", []))
        datasets.append((_with_keys(options, keys), subsets))
    return datasets


def _configured_subsets(path: Path, options: Options, outer: Mapping[str, Any], tables: Any) -> list[Subset]:
    """The folders of one dataset, in whose section and those around it `outer` stands."""
    subsets: dict[str, Subset] = {}
    for table in _tables(path, "datasets.subsets", tables):
        keys = {**outer, **_section(path, "[[datasets.subsets]]", table)}
        if "image_dir" not in keys:
            raise UsageError(f"{path}: image_dir is missing in a [[datasets.subsets]]")
        folder, settings = keys["image_dir"], _with_keys(options, keys)
        repeats = settings.dataset_repeats
        if not Path(folder).is_dir():
            raise InputError(f"{path}: image_dir {folder} is no folder")
        if repeats < 1:
            _log.warning("%s is ignored: it is shown %d times (num_repeats)", folder, repeats)
        elif folder in subsets:
            _log.warning("%s: a second [[datasets.subsets]] with image_dir %s is ignored", path, folder)
        else:
            words, is_reg = keys.get("class_tokens", ""), keys.get("is_reg", False)
            subsets[folder] = _subset(settings, Path(folder), repeats, words, is_reg)
    return list(subsets.values())


def _with_keys(options: Options, keys: Mapping[str, Any]) -> Options:
    return replace(options, **{_OPTION_OF[key]: value for key, value in keys.items() if key in _OPTION_OF})


def _tables(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{path}: {name} must be written [[{name}]], with two brackets")
    return value


def _section(path: Path, name: str, table: Any) -> dict[str, Any]:
    """The keys of one section, checked, with the resolution as --resolution has it."""
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {name} must be a section of keys and values")
    checked: dict[str, Any] = {}
    for key, value in table.items():
        if key in UNSUPPORTED:
            if refused := unsupported(key, value):
                raise UsageError(f"{path}: not supported: {refused}")
        elif key not in _ALLOWED[name]:
            raise UsageError(f"{path}: no such key in {name}: {key}{_hint(key, name)}")
        else:
            checked[key] = _value(path, key, value)
    return checked


def _hint(key: str, section: str) -> str:
    homes = [name for name, allowed in _ALLOWED.items() if key in allowed]
    if homes:
        return f"; it belongs in {homes[-1]}"
    near = nearest(key, _ALLOWED[section])
    return f"; did you mean {near}?" if near else ""


def _value(path: Path, key: str, value: Any) -> Any:
    if key == "resolution":
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > 2 or not all(type(number) is int for number in numbers):
            raise UsageError(f"{path}: resolution must be a whole number or [width, height], not {value!r}")
        return ",".join(map(str, numbers))
    hint = _ALONE.get(key) or typing.get_type_hints(Options)[_OPTION_OF[key]]
    kinds = typing.get_args(hint) or (hint,)
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "sections"}
        raise UsageError(f"{path}: {key} must be {names[kinds[0]]}, not {value!r}")
    choices = Options.__dataclass_fields__[_OPTION_OF[key]].metadata["choices"] if key in _OPTION_OF else ()
    if choices and value not in choices:
        raise UsageError(f"{path}: {key} must be one of {', '.join(map(str, choices))}, not {value!r}")
    return value


def read_pixels(picture: Picture) -> npt.NDArray[np.uint8]:
    """The picture in the shape of its bucket: uint8 [height, width, 3].

    Raises:
        InputError: it cannot be read, or is not the picture that was scanned.
    """
    try:
        with Image.open(picture.path) as image:
            if image.size != picture.fit.original:
                raise InputError(f"{picture.path}: the picture was changed while it was used; start again")
            return prepare(image, picture.fit, picture.subset.interpolation)
    except _UNREADABLE as error:
        raise InputError(f"{picture.path}: cannot be read ({_reason(error)}); replace or remove it") from None
