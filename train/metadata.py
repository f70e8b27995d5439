"""What a trained file says about itself: sd-scripts' `ss_*` entries and the `modelspec.*` entries of ModelSpec.

The keys and the spelling of values are sd-scripts', which is what other programs read. Hashes of the file's contents
are added when it is written. ModelSpec: https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import mimetypes
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink._version import __version__
from lorashrink.errors import InputError
from lorashrink.files.disk import sha256_file
from lorashrink.train.options import Options
from lorashrink.train.output.saving import Length

if TYPE_CHECKING:
    from lorashrink.train.data.scanning import Data, Dataset, Picture, Subset

# `ss_` and the name of the option that is written as it is.
_AS_GIVEN = (
    "output_name", "learning_rate", "unet_lr", "gradient_checkpointing", "gradient_accumulation_steps", "lr_scheduler",
    "network_module", "network_dim", "network_alpha", "network_dropout", "mixed_precision", "v2", "clip_skip",
    "max_token_length", "cache_latents", "lowram", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "prior_loss_weight",
    "min_snr_gamma", "scale_weight_norms", "noise_offset_random_strength", "resize_interpolation",
)  # fmt: skip
# What sd-scripts writes for options that are not supported here, and for what does not vary.
_FIXED: Mapping[str, object] = {
    "ss_num_validation_images": 0,
    "ss_full_fp16": False,
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_scripts_commit_hash": "(unknown)",
    "ss_face_crop_aug_range": None,
    "ss_ip_noise_gamma": None,
    "ss_ip_noise_gamma_random_strength": False,
    "ss_loss_type": "l2",
    "ss_huber_schedule": "snr",
    "ss_huber_scale": 1.0,
    "ss_huber_c": 0.1,
    "ss_fp8_base": False,
    "ss_fp8_base_unet": False,
    "ss_validation_seed": None,
    "ss_validation_split": 0.0,
    "ss_max_validation_steps": None,
    "ss_validate_every_n_epochs": None,
    "ss_validate_every_n_steps": None,
}
# What --no_metadata leaves: without these, other programs cannot use the file.
_MINIMUM = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip
_OPTIONAL_SPEC = (
    "author", "description", "license", "tags", "usage_hint", "thumbnail", "merged_from", "trigger_phrase",
    "preprocessor", "is_negative_embedding",
)  # fmt: skip
# What the old hash reads: 64 KiB at 1 MiB.
_OLD_HASH_START, _OLD_HASH_LENGTH = 0x100000, 0x10000


@dataclass(frozen=True, slots=True)
class Source:
    """A base or VAE as the metadata names it; only files have hashes."""

    name: str
    old_hash: str | None = None  # 8 hexadecimal digits
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class SubsetFacts:
    """One folder of pictures, without where it lies."""

    folder: str
    class_words: str
    repeats: int
    pictures: int
    is_reg: bool
    settings: Mapping[str, object]  # how they are shown, under sd-scripts' names
    tags: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """Pictures that share batches."""

    batch_size: int
    resolution: tuple[int, int]
    enable_bucket: bool
    bucket_no_upscale: bool
    min_bucket_reso: int | None  # None without buckets
    max_bucket_reso: int | None
    bucket_info: Mapping[str, object] | None
    subsets: tuple[SubsetFacts, ...]

    def showings(self, is_reg: bool) -> int:
        """How many training or regularisation pictures an epoch shows, by the repeats of their folders."""
        return sum(each.repeats * each.pictures for each in self.subsets if each.is_reg == is_reg)

    def tags(self) -> dict[str, dict[str, int]]:
        """How often each tag occurs, by folder name."""
        merged: dict[str, Counter[str]] = {}
        for each in self.subsets:
            merged.setdefault(each.folder, Counter()).update(each.tags)
        return {folder: dict(counts) for folder, counts in merged.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the metadata says that the options do not know. Times are Unix times in seconds.

    The last three change from file to file: `dataclasses.replace`.
    """

    session_id: int  # the same in all files of a run
    started_at: float
    seed: int
    processes: int
    length: Length
    optimizer: str  # module.Class(arguments)
    network_args: Mapping[str, object]  # what the network was made with; `dropout` is among them
    datasets: tuple[DatasetFacts, ...]
    base: Source
    vae: Source | None = None
    steps: int = 0
    epoch: int = 0  # counted from 0 in files of steps, from 1 in others
    finished_at: float = 0.0


def source(text: str) -> Source:
    """What the metadata says about a file (which is read in full, for its hashes), a folder or a name.

    Raises:
        InputError: the file cannot be read.
    """
    name = os.path.basename(os.path.abspath(text)) if os.path.exists(text) else text
    if not os.path.isfile(text):
        return Source(name)
    sha256 = sha256_file(Path(text))
    with open(text, "rb") as handle:
        handle.seek(_OLD_HASH_START)
        old = hashlib.sha256(handle.read(_OLD_HASH_LENGTH)).hexdigest()[:8]
    return Source(name, old, sha256)


def dataset_facts(data: Data) -> tuple[DatasetFacts, ...]:
    """What the metadata says about the pictures."""
    return tuple(map(_dataset, data.datasets))


def _dataset(dataset: Dataset) -> DatasetFacts:
    from lorashrink.train.data.buckets import bucket_info

    rules = dataset.buckets
    by_subset: dict[Subset, list[Picture]] = {}
    for each in dataset.pictures:
        by_subset.setdefault(each.subset, []).append(each)
    fits = ((each.fit, each.repeats) for each in dataset.pictures)
    return DatasetFacts(
        dataset.batch_size,
        rules.resolution,
        rules.enabled,
        rules.enabled and not rules.upscale,
        rules.minimum // rules.step * rules.step if rules.enabled else None,
        math.ceil(rules.maximum / rules.step) * rules.step if rules.enabled else None,
        bucket_info(fits) if rules.enabled else None,
        tuple(_subset(subset, pictures) for subset, pictures in by_subset.items()),
    )


def _subset(subset: Subset, pictures: Sequence[Picture]) -> SubsetFacts:
    from lorashrink.train.data.captions import tag_counts

    rules = subset.captions
    settings = {
        "color_aug": False,
        "flip_aug": subset.flip,
        "random_crop": False,
        "shuffle_caption": rules.shuffle,
        "keep_tokens": rules.keep_tokens,
        "keep_tokens_separator": rules.keep_tokens_separator,
        "secondary_separator": rules.secondary_separator,
        "enable_wildcard": False,
        "caption_prefix": rules.prefix,
        "caption_suffix": rules.suffix,
        "resize_interpolation": subset.interpolation,
    }
    tags = tag_counts(picture.caption for picture in pictures)
    return SubsetFacts(
        subset.folder.name, subset.class_words, subset.repeats, len(pictures), subset.is_reg, settings, tags
    )


def training_metadata(options: Options, facts: Facts) -> dict[str, str]:
    """The entries of one file. Equal arguments give equal entries.

    With --no_metadata, what other programs need to use the file, and what the user wrote for it.

    Raises:
        InputError: --metadata_thumbnail is a file that cannot be read.
    """
    entries = {
        **_settings(options, facts),
        **(_datasets(facts) if options.dataset_config else _folders(options, facts)),
        **({"ss_network_args": json.dumps(dict(facts.network_args))} if options.network_args else {}),
        **_source("sd_model", facts.base),
        **(_source("vae", facts.vae) if facts.vae else {}),
        "ss_training_finished_at": facts.finished_at,
        "ss_steps": facts.steps,
        "ss_epoch": facts.epoch,
    }
    if options.no_metadata:
        entries = {key: entries[key] for key in _MINIMUM if key in entries}
    return {key: _text(value) for key, value in {**entries, **_model_spec(options, facts.finished_at)}.items()}


def _text(value: object) -> str:
    """As text that can be stored: names of files may hold bytes that are no text."""
    return str(value).encode("utf-8", "replace").decode()


def _settings(options: Options, facts: Facts) -> dict[str, object]:
    warmup = options.lr_warmup_steps
    return {
        **{f"ss_{name}": getattr(options, name) for name in _AS_GIVEN},
        **_FIXED,
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_text_encoder_lr": options.text_encoder_lr[0] if options.text_encoder_lr else None,
        "ss_num_train_images": sum(each.showings(is_reg=False) for each in facts.datasets),
        "ss_num_reg_images": sum(each.showings(is_reg=True) for each in facts.datasets),
        "ss_num_batches_per_epoch": facts.length.batches_per_epoch,
        "ss_num_epochs": facts.length.epochs,
        "ss_max_train_steps": facts.length.steps,
        "ss_lr_warmup_steps": int(warmup) if warmup == int(warmup) else warmup,
        "ss_seed": facts.seed,
        "ss_optimizer": facts.optimizer,
        "ss_debiased_estimation": options.debiased_estimation_loss,
    }


def _folders(options: Options, facts: Facts) -> dict[str, object]:
    """What describes the pictures of --train_data_dir."""
    (dataset,) = facts.datasets
    return {
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * facts.processes * options.gradient_accumulation_steps,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": options.color_aug,
        "ss_flip_aug": options.flip_aug,
        "ss_random_crop": options.random_crop,
        "ss_shuffle_caption": options.shuffle_caption,
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_keep_tokens": options.keep_tokens,
        "ss_dataset_dirs": json.dumps(_counts(each for each in dataset.subsets if not each.is_reg)),
        "ss_reg_dataset_dirs": json.dumps(_counts(each for each in dataset.subsets if each.is_reg)),
        "ss_tag_frequency": json.dumps(dataset.tags()),
        "ss_bucket_info": json.dumps(dataset.bucket_info),
    }


def _datasets(facts: Facts) -> dict[str, object]:
    """What describes the pictures of --dataset_config."""
    tags: dict[str, Mapping[str, int]] = {}
    for dataset in facts.datasets:
        tags |= {folder: counts for folder, counts in dataset.tags().items() if folder not in tags}
    trained = (each for dataset in facts.datasets for each in dataset.subsets if not each.is_reg)
    return {
        "ss_datasets": json.dumps([_described(dataset) for dataset in facts.datasets]),
        "ss_tag_frequency": json.dumps(tags),
        "ss_dataset_dirs": json.dumps(_counts(trained)),
    }


def _counts(subsets: Iterable[SubsetFacts]) -> dict[str, dict[str, int]]:
    """Repeats and number of pictures by folder name; equal names are numbered from the second on."""
    counted: dict[str, dict[str, int]] = {}
    seen: Counter[str] = Counter()
    for each in subsets:
        seen[each.folder] += 1
        name = each.folder if seen[each.folder] == 1 else f"{each.folder} ({seen[each.folder]})"
        counted[name] = {"n_repeats": each.repeats, "img_count": each.pictures}
    return counted


def _described(dataset: DatasetFacts) -> dict[str, object]:
    return {
        "is_dreambooth": True,
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": dataset.showings(is_reg=False),
        "num_reg_images": dataset.showings(is_reg=True),
        "resolution": dataset.resolution,
        "enable_bucket": dataset.enable_bucket,
        "min_bucket_reso": dataset.min_bucket_reso,
        "max_bucket_reso": dataset.max_bucket_reso,
        "tag_frequency": dataset.tags(),
        "bucket_info": dataset.bucket_info,
        "resize_interpolation": dataset.subsets[0].settings.get("resize_interpolation"),
        "subsets": [
            {
                "img_count": each.pictures,
                "num_repeats": each.repeats,
                **each.settings,
                "image_dir": each.folder,
                "class_tokens": each.class_words,
                "is_reg": each.is_reg,
            }
            for each in dataset.subsets
        ],
    }


def _source(kind: str, source: Source) -> dict[str, object]:
    hashes = {f"ss_{kind}_hash": source.old_hash, f"ss_new_{kind}_hash": source.sha256}
    return {**{key: value for key, value in hashes.items() if value is not None}, f"ss_{kind}_name": source.name}


def _model_spec(options: Options, finished_at: float) -> dict[str, object]:
    given = {name: getattr(options, f"metadata_{name}") for name in _OPTIONAL_SPEC}
    if given["thumbnail"] is not None:
        given["thumbnail"] = data_url(given["thumbnail"])
    if options.min_timestep is not None or options.max_timestep is not None:
        first, end = options.min_timestep, options.max_timestep
        given["timestep_range"] = f"{0 if first is None else first},{1000 if end is None else end}"
    title = options.metadata_title if options.metadata_title is not None else options.output_name
    sides = (options.resolution or "1024").split(",")
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title or f"LoRA@{finished_at}",
        "resolution": f"{int(sides[0])}x{int(sides[-1])}",
        "date": datetime.fromtimestamp(int(finished_at), UTC).isoformat(),
        "implementation_version": f"lorashrink/{__version__}",
        "prediction_type": "v" if options.v_parameterization else "epsilon",
        **{name: value for name, value in given.items() if value is not None},
    }
    return {f"modelspec.{name}": value for name, value in entries.items()}


def data_url(text: str) -> str:
    """A picture as text: `text` itself if it is that, else the file that it names.

    Raises:
        InputError: the file cannot be read.
    """
    if text.startswith("data:"):
        return text
    try:
        data = Path(text).read_bytes()
    except OSError as error:
        raise InputError(f"--metadata_thumbnail {text}: cannot be read ({error.strerror})") from None
    kind = mimetypes.guess_type(text)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
