"""What a trained file says about itself: sd-scripts' `ss_*` entries and the `modelspec.*` entries of ModelSpec.

The keys and the spelling of values are sd-scripts', which is what other programs read. Hashes of the file's contents
are added when it is written. ModelSpec: https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import base64
import hashlib
import json
import mimetypes
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.errors import InputError
from lorashrink.files.disk import sha256_file
from lorashrink.train.data.buckets import Size
from lorashrink.train.data.captions import tag_counts
from lorashrink.train.data.scanning import Data, Dataset, Picture, Subset
from lorashrink.train.flags.checks import bucket_limits, parse_resolution
from lorashrink.train.flags.options import Options
from lorashrink.train.output.saving import Length

# `ss_` and the name of the option that is written as it is.
_AS_GIVEN = (
    "output_name", "learning_rate", "unet_lr", "gradient_checkpointing", "gradient_accumulation_steps", "lr_scheduler",
    "network_module", "network_dim", "network_alpha", "network_dropout", "mixed_precision", "clip_skip",
    "max_token_length", "cache_latents", "lowram", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "prior_loss_weight",
    "min_snr_gamma", "scale_weight_norms", "noise_offset_random_strength", "resize_interpolation",
)  # fmt: skip
# What sd-scripts writes for options that are not supported here, and for what does not vary.
_FIXED: Mapping[str, object] = {
    "ss_num_validation_images": 0, "ss_full_fp16": False, "ss_v2": False, "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_scripts_commit_hash": "(unknown)", "ss_face_crop_aug_range": None, "ss_ip_noise_gamma": None,
    "ss_ip_noise_gamma_random_strength": False, "ss_loss_type": "l2", "ss_huber_schedule": "snr", "ss_huber_scale": 1.0,
    "ss_huber_c": 0.1, "ss_fp8_base": False, "ss_fp8_base_unet": False, "ss_validation_seed": None,
    "ss_validation_split": 0.0, "ss_max_validation_steps": None, "ss_validate_every_n_epochs": None,
    "ss_validate_every_n_steps": None,
}  # fmt: skip
# What --no_metadata leaves: without these, other programs cannot use the file.
_MINIMUM = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip
# Arguments of a network that say which layers it has, and their ranks.
_OF_LAYERS = ("preset", "conv_dim", "conv_alpha")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the metadata says that the options do not know. Times are Unix times in seconds.

    The last three change from file to file: `dataclasses.replace`.
    """

    session_id: int  # the same in all files of a run
    started_at: float
    seed: int
    length: Length
    optimizer: str  # module.Class(arguments)
    network_args: Mapping[str, object]  # what the network was made with; `dropout` is among them
    pictures: Mapping[str, object]  # entries of `picture_entries`
    base: Source
    vae: Source | None = None
    dims: Mapping[str, object] | None = None  # `Network.dims`; None: the options name them
    steps: int = 0
    epoch: int = 0  # counted from 0 in files of steps, from 1 in others
    finished_at: float = 0.0


def source(text: str) -> Source:
    """What the metadata says about a file (which is read in full, for its hashes), a folder or a name."""
    name = os.path.basename(os.path.abspath(text)) if os.path.exists(text) else text
    if not os.path.isfile(text):
        return Source(name)
    sha256 = sha256_file(Path(text))
    with open(text, "rb") as handle:
        handle.seek(_OLD_HASH_START)
        old = hashlib.sha256(handle.read(_OLD_HASH_LENGTH)).hexdigest()[:8]
    return Source(name, old, sha256)


def training_metadata(options: Options, facts: Facts) -> dict[str, str]:
    """The entries of one file; with --no_metadata only what other programs need, and what the user wrote for it."""
    warmup, network_args = options.lr_warmup_steps, _network_args(facts)
    entries = {
        **{f"ss_{name}": getattr(options, name) for name in _AS_GIVEN},
        **_FIXED,
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_text_encoder_lr": options.text_encoder_lr[0] if options.text_encoder_lr else None,
        "ss_num_batches_per_epoch": facts.length.batches_per_epoch,
        "ss_num_epochs": facts.length.epochs,
        "ss_max_train_steps": facts.length.steps,
        "ss_lr_warmup_steps": int(warmup) if warmup == int(warmup) else warmup,
        "ss_seed": facts.seed,
        "ss_optimizer": facts.optimizer,
        "ss_debiased_estimation": options.debiased_estimation_loss,
        **facts.pictures,
        **({"ss_network_args": json.dumps(network_args)} if options.network_args or facts.dims is not None else {}),
        **{f"ss_{name}": value for name, value in (facts.dims or {}).items() if name.startswith("network_")},
        **_source("sd_model", facts.base),
        **(_source("vae", facts.vae) if facts.vae else {}),
        "ss_training_finished_at": facts.finished_at,
        "ss_steps": facts.steps,
        "ss_epoch": facts.epoch,
    }
    if options.no_metadata:
        entries = {key: entries[key] for key in _MINIMUM if key in entries}
    entries |= {f"modelspec.{name}": value for name, value in _model_spec(options, facts.finished_at).items()}
    # File names may hold bytes that are not text.
    return {key: str(value).encode("utf-8", "replace").decode() for key, value in entries.items()}


def _network_args(facts: Facts) -> dict[str, object]:
    """What the network was made with. Where a file decided, its ranks, and no preset, for none chose the layers."""
    if facts.dims is None:
        return dict(facts.network_args)
    asked = {name: value for name, value in facts.network_args.items() if name not in _OF_LAYERS}
    # sd-scripts' arguments of a network are texts
    return asked | {name: str(value) for name, value in facts.dims.items() if name in _OF_LAYERS}


def _source(kind: str, source: Source) -> dict[str, object]:
    hashes = {f"ss_{kind}_hash": source.old_hash, f"ss_new_{kind}_hash": source.sha256}
    return {**{key: value for key, value in hashes.items() if value is not None}, f"ss_{kind}_name": source.name}


def _model_spec(options: Options, finished_at: float) -> dict[str, object]:
    optional = {name: getattr(options, f"metadata_{name}") for name in _OPTIONAL_SPEC}
    if optional["thumbnail"] is not None:
        optional["thumbnail"] = data_url(optional["thumbnail"])
    first, end = options.min_timestep, options.max_timestep
    if first is not None or end is not None:
        optional["timestep_range"] = f"{first or 0},{1000 if end is None else end}"
    title = options.metadata_title if options.metadata_title is not None else options.output_name
    width, height = parse_resolution(options.resolution or "1024")
    return {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-xl-v1-base/lora",
        "implementation": "https://github.com/Stability-AI/generative-models",
        "title": title or f"LoRA@{finished_at}",
        "resolution": f"{width}x{height}",
        "date": datetime.fromtimestamp(int(finished_at), UTC).isoformat(),
        "implementation_version": f"lorashrink/{__version__}",
        "prediction_type": "v" if options.v_parameterization else "epsilon",
        **{name: value for name, value in optional.items() if value is not None},
    }


def data_url(text: str) -> str:
    """A picture as text: `text` itself if it is that, else the file that it names."""
    if text.startswith("data:"):
        return text
    try:
        data = Path(text).read_bytes()
    except OSError as error:
        raise InputError(f"--metadata_thumbnail {text}: cannot be read ({error.strerror})") from None
    kind = mimetypes.guess_type(text)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# --- pictures -----------------------------------------------------------------------------------

_Subsets = Sequence[tuple[Subset, Sequence[Picture]]]


def picture_entries(data: Data, options: Options, processes: int) -> dict[str, object]:
    """The entries about the pictures. They name folders without where these lie."""
    datasets = [(dataset, _by_subset(dataset)) for dataset in data.datasets]
    subsets = [pair for _, pairs in datasets for pair in pairs]
    tags = {folder: counts for _, pairs in reversed(datasets) for folder, counts in _tags(pairs).items()}
    entries: dict[str, object] = {
        "ss_num_train_images": _showings(subsets, is_reg=False),
        "ss_num_reg_images": _showings(subsets, is_reg=True),
        "ss_dataset_dirs": json.dumps(_folders(subsets, is_reg=False)),
        "ss_tag_frequency": json.dumps(tags),
    }
    if options.dataset_config:
        return entries | {"ss_datasets": json.dumps([_dataset(dataset, pairs) for dataset, pairs in datasets])}
    (dataset,) = data.datasets
    return entries | {
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * processes * options.gradient_accumulation_steps,
        "ss_resolution": parse_resolution(dataset.options.resolution),
        "ss_color_aug": False,
        "ss_flip_aug": options.flip_aug,
        "ss_random_crop": False,
        "ss_shuffle_caption": options.shuffle_caption,
        "ss_bucket_no_upscale": dataset.options.enable_bucket and dataset.options.bucket_no_upscale,
        "ss_keep_tokens": options.keep_tokens,
        **{f"ss_{name}": value for name, value in _bucket_limits(dataset).items()},
        "ss_reg_dataset_dirs": json.dumps(_folders(subsets, is_reg=True)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


def _by_subset(dataset: Dataset) -> _Subsets:
    pictures: defaultdict[Subset, list[Picture]] = defaultdict(list)
    for picture in dataset.pictures:
        pictures[picture.subset].append(picture)
    return list(pictures.items())


def _showings(subsets: _Subsets, *, is_reg: bool) -> int:
    """How many training or regularisation pictures an epoch shows, by the repeats of their folders."""
    return sum(subset.repeats * len(pictures) for subset, pictures in subsets if subset.is_reg == is_reg)


def _folders(subsets: _Subsets, *, is_reg: bool) -> dict[str, dict[str, int]]:
    """Repeats and number of pictures by folder name; equal names are numbered from the second on."""
    folders: dict[str, dict[str, int]] = {}
    seen: Counter[str] = Counter()
    for subset, pictures in subsets:
        if subset.is_reg == is_reg:
            name = subset.folder.name
            seen[name] += 1
            key = name if seen[name] == 1 else f"{name} ({seen[name]})"
            folders[key] = {"n_repeats": subset.repeats, "img_count": len(pictures)}
    return folders


def _tags(subsets: _Subsets) -> dict[str, dict[str, int]]:
    """How often each tag occurs, by folder name."""
    tags: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for subset, pictures in subsets:
        tags[subset.folder.name].update(tag_counts((picture.caption for picture in pictures), subset.options))
    return {folder: dict(counts) for folder, counts in tags.items()}


def _bucket_limits(dataset: Dataset) -> dict[str, object]:
    enabled = dataset.options.enable_bucket
    low, high = bucket_limits(dataset.options) if enabled else (None, None)
    return {"enable_bucket": enabled, "min_bucket_reso": low, "max_bucket_reso": high}


def _bucket_info(dataset: Dataset) -> dict[str, object] | None:
    """Showings per bucket, and the mean difference of the pictures' aspect to that of their buckets."""
    if not dataset.options.enable_bucket:
        return None
    counts: Counter[Size] = Counter()
    errors = []
    for picture in dataset.pictures:
        (width, height), (original_width, original_height) = picture.fit.bucket, picture.fit.original
        counts[width, height] += picture.repeats
        errors.append(abs(width / height - original_width / original_height))
    buckets = {index: {"resolution": list(size), "count": counts[size]} for index, size in enumerate(sorted(counts))}
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}


def _dataset(dataset: Dataset, subsets: _Subsets) -> dict[str, object]:
    return {
        "is_dreambooth": True,
        "batch_size_per_device": dataset.options.train_batch_size,
        "num_train_images": _showings(subsets, is_reg=False),
        "num_reg_images": _showings(subsets, is_reg=True),
        "resolution": parse_resolution(dataset.options.resolution),
        **_bucket_limits(dataset),
        "tag_frequency": _tags(subsets),
        "bucket_info": _bucket_info(dataset),
        "resize_interpolation": subsets[0][0].options.resize_interpolation,
        "subsets": [
            {
                "img_count": len(pictures),
                "num_repeats": subset.repeats,
                "color_aug": False,
                "flip_aug": subset.options.flip_aug,
                "random_crop": False,
                "shuffle_caption": subset.options.shuffle_caption,
                "keep_tokens": subset.options.keep_tokens,
                "keep_tokens_separator": subset.options.keep_tokens_separator,
                "secondary_separator": subset.options.secondary_separator,
                "enable_wildcard": False,
                "caption_prefix": subset.options.caption_prefix,
                "caption_suffix": subset.options.caption_suffix,
                "resize_interpolation": subset.options.resize_interpolation,
                "image_dir": subset.folder.name,
                "class_tokens": subset.class_words,
                "is_reg": subset.is_reg,
            }
            for subset, pictures in subsets
        ],
    }
