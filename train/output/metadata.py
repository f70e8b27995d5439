"""What a trained file says about itself: sd-scripts' `ss_*` entries and the `modelspec.*` entries of ModelSpec.

The keys and the spelling of values are sd-scripts', which is what other programs read. Hashes of the file's contents
are added when it is written. ModelSpec: https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.files.disk import sha256_file
from lorashrink.files.hashes import legacy_hash
from lorashrink.train.data.captions import tag_counts
from lorashrink.train.data.scanning import Data, Dataset, Picture, Subset
from lorashrink.train.flags.checks import bucket_limits, parse_resolution
from lorashrink.train.flags.options import Options, key_values
from lorashrink.train.output.saving import Length

# `ss_` and the name of the option that is written as it is.
_AS_GIVEN = (
    "output_name", "learning_rate", "unet_lr", "gradient_checkpointing", "gradient_accumulation_steps", "lr_scheduler",
    "network_module", "network_dim", "network_alpha", "network_dropout", "mixed_precision", "clip_skip",
    "max_token_length", "cache_latents", "lowram", "noise_offset", "multires_noise_iterations",
    "multires_noise_discount", "adaptive_noise_scale", "zero_terminal_snr", "training_comment", "max_grad_norm",
    "caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "prior_loss_weight", "seed",
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
_OF_SUBSETS = (
    "flip_aug", "shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "caption_prefix",
    "caption_suffix", "resize_interpolation",
)  # fmt: skip


def run_entries(
    options: Options,
    data: Data,
    length: Length,
    processes: int,
    *,
    optimizer: str,
    dims: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What all files of a run say. Times are Unix times in seconds.

    optimizer: module.Class(arguments). dims: `Network.dims`, where a file decided which layers there are.
    """
    warmup = options.lr_warmup_steps
    network_args = {**key_values("--network_args", options.network_args), "dropout": options.network_dropout}
    if dims is not None:  # sd-scripts writes these as texts
        others = {name: value for name, value in network_args.items() if name not in _OF_LAYERS}
        network_args = others | {name: str(value) for name, value in dims.items() if name in _OF_LAYERS}
    sources: dict[str, object] = {}
    if options.save_model_as == "safetensors" and not options.no_metadata:  # else nothing is written of them
        sources |= _source("sd_model", options.pretrained_model_name_or_path or "")
        sources |= _source("vae", options.vae) if options.vae else {}
    return {
        **{f"ss_{name}": getattr(options, name) for name in _AS_GIVEN},
        **_FIXED,
        "ss_session_id": random.SystemRandom().getrandbits(32),
        "ss_training_started_at": time.time(),
        "ss_text_encoder_lr": options.text_encoder_lr[0] if options.text_encoder_lr else None,
        "ss_num_batches_per_epoch": length.batches_per_epoch,
        "ss_num_epochs": length.epochs,
        "ss_max_train_steps": length.steps,
        "ss_lr_warmup_steps": int(warmup) if warmup == int(warmup) else warmup,
        "ss_optimizer": optimizer,
        "ss_debiased_estimation": options.debiased_estimation_loss,
        **_picture_entries(data, options, processes),
        **({"ss_network_args": json.dumps(network_args)} if options.network_args or dims is not None else {}),
        **{f"ss_{name}": value for name, value in (dims or {}).items() if name.startswith("network_")},
        **sources,
    }


def file_metadata(
    options: Options, run: Mapping[str, object], *, steps: int, epoch: int, finished_at: float
) -> dict[str, str]:
    """The entries of one file; with --no_metadata only what other programs need, and what the user wrote for it.

    run: `run_entries`. epoch: counted from 0 in files of steps, from 1 in others.
    """
    entries = {**run, "ss_training_finished_at": finished_at, "ss_steps": steps, "ss_epoch": epoch}
    if options.no_metadata:
        entries = {key: entries[key] for key in _MINIMUM if key in entries}
    optional = {name: getattr(options, f"metadata_{name}") for name in _OPTIONAL_SPEC}
    first, end = options.min_timestep, options.max_timestep
    if first is not None or end is not None:
        optional["timestep_range"] = f"{first or 0},{1000 if end is None else end}"
    title = options.metadata_title if options.metadata_title is not None else options.output_name
    width, height = parse_resolution(options.resolution or "1024")
    spec = {
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
    entries |= {f"modelspec.{name}": value for name, value in spec.items()}
    # File names may hold bytes that are not text.
    return {key: str(value).encode("utf-8", "replace").decode() for key, value in entries.items()}


def _source(kind: str, text: str) -> dict[str, object]:
    """The entries of a base or VAE: of a file (which is read in full, for its hashes), a folder or a name."""
    name = os.path.basename(os.path.abspath(text)) if os.path.exists(text) else text
    if not os.path.isfile(text):
        return {f"ss_{kind}_name": name}
    old, new = legacy_hash(Path(text)), sha256_file(Path(text))
    return {f"ss_{kind}_hash": old, f"ss_new_{kind}_hash": new, f"ss_{kind}_name": name}


_Subsets = Sequence[tuple[Subset, Sequence[Picture]]]


def _picture_entries(data: Data, options: Options, processes: int) -> dict[str, object]:
    """The entries about the pictures. They name folders without where these lie."""
    datasets: list[tuple[Dataset, _Subsets]] = [
        (dataset, [(subset, list(own)) for subset, own in groupby(dataset.pictures, lambda picture: picture.subset)])
        for dataset in data.datasets
    ]
    subsets = [pair for _, pairs in datasets for pair in pairs]
    tags = {folder: counts for _, pairs in reversed(datasets) for folder, counts in _tags(pairs).items()}
    entries: dict[str, object] = {
        "ss_num_train_images": _showings(subsets, is_reg=False),
        "ss_num_reg_images": _showings(subsets, is_reg=True),
        "ss_dataset_dirs": json.dumps(_folders(subsets, is_reg=False)),
        "ss_tag_frequency": json.dumps(tags),
    }
    if options.dataset_config:
        described = [
            {
                "is_dreambooth": True,
                "batch_size_per_device": dataset.options.train_batch_size,
                "num_train_images": _showings(pairs, is_reg=False),
                "num_reg_images": _showings(pairs, is_reg=True),
                "resolution": parse_resolution(dataset.options.resolution),
                **_bucket_limits(dataset),
                "tag_frequency": _tags(pairs),
                "bucket_info": _bucket_info(dataset),
                "resize_interpolation": pairs[0][0].options.resize_interpolation,
                "subsets": [
                    {
                        "img_count": len(pictures),
                        "num_repeats": subset.repeats,
                        **{name: getattr(subset.options, name) for name in _OF_SUBSETS},
                        **dict.fromkeys(("color_aug", "random_crop", "enable_wildcard"), False),
                        "image_dir": subset.folder.name,
                        "class_tokens": subset.class_words,
                        "is_reg": subset.is_reg,
                    }
                    for subset, pictures in pairs
                ],
            }
            for dataset, pairs in datasets
        ]
        return entries | {"ss_datasets": json.dumps(described)}
    (dataset,) = data.datasets
    return entries | {
        "ss_batch_size_per_device": options.train_batch_size,
        "ss_total_batch_size": options.train_batch_size * processes * options.gradient_accumulation_steps,
        "ss_resolution": parse_resolution(dataset.options.resolution),
        "ss_color_aug": False,
        "ss_random_crop": False,
        "ss_bucket_no_upscale": dataset.options.enable_bucket and dataset.options.bucket_no_upscale,
        **{f"ss_{name}": getattr(options, name) for name in ("flip_aug", "shuffle_caption", "keep_tokens")},
        **{f"ss_{name}": value for name, value in _bucket_limits(dataset).items()},
        "ss_reg_dataset_dirs": json.dumps(_folders(subsets, is_reg=True)),
        "ss_bucket_info": json.dumps(_bucket_info(dataset)),
    }


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
    sizes = sorted(dataset.showings.items())
    buckets = {index: {"resolution": list(size), "count": count} for index, (size, count) in enumerate(sizes)}
    fits = [picture.fit for picture in dataset.pictures]
    errors = [abs(fit.bucket[0] / fit.bucket[1] - fit.original[0] / fit.original[1]) for fit in fits]
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}
