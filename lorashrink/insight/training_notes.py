"""What a file's metadata tells about its training, in words for people.

Keys: `ss_*` and `sshs_*` (sd-scripts), `modelspec.*` (https://github.com/Stability-AI/ModelSpec), `resize_params`
(resize_lora), `lora_adapter_metadata` (diffusers), `lorashrink.*` (ours). Whatever does not parse is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

_MOST_TAGS, _MOST_FOLDERS, _MOST_SIZES = 8, 4, 3

_LONGEST = 240  # characters of a text that somebody wrote

_ABSENT = ("", "None", "null", "(unknown)")

_BASES = {
    "sd_v1": "Stable Diffusion 1",
    "sd_v1_v": "Stable Diffusion 1, v-prediction",
    "sd_v2": "Stable Diffusion 2",
    "sd_v2_v": "Stable Diffusion 2, v-prediction",
    "sdxl_base_v0-9": "SDXL 0.9",
    "sdxl_base_v1-0": "SDXL 1.0",
    "sd3": "Stable Diffusion 3",
    "flux1": "FLUX.1",
}

_ADAPTATIONS = {"networks.lora": "LoRA", "lycoris.kohya": "LyCORIS"}

Metadata = Mapping[str, str]


def training_notes(metadata: Metadata) -> dict[str, str]:
    """Plain label -> text, in the order to read them in; what the metadata does not tell has no label."""
    told = {label: note(metadata) for label, note in _NOTES}
    return {label: _tidy(text) for label, text in told.items() if text}


# --- reading ------------------------------------------------------------------------------------


def _tidy(text: str) -> str:
    """One line without control characters: metadata may hold anything, and this is shown in terminals."""
    line = " ".join("".join(each if each.isprintable() or each.isspace() else "?" for each in text).split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _text(metadata: Metadata, *keys: str) -> str | None:
    """The first of these entries that says something."""
    return next((metadata[key] for key in keys if metadata.get(key, "").strip() not in _ABSENT), None)


def _as_number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _number(metadata: Metadata, *keys: str) -> float | None:
    return _as_number(_text(metadata, *keys))


def _said(number: float) -> str:
    return f"{number:.0f}" if number == int(number) and abs(number) < 1e15 else f"{number:.4g}"


def _plural(count: float, word: str) -> str:
    return f"{_said(count)} {word}{'s' * (count != 1)}"


def _parsed(metadata: Metadata, key: str) -> Any:
    try:
        return json.loads(metadata.get(key, "null"))
    except (ValueError, RecursionError):
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _entries(value: object) -> list[Mapping[str, Any]]:
    """Those entries of a list that are mappings."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _joined(parts: Sequence[str | None]) -> str | None:
    return ", ".join(part for part in parts if part) or None


def _noted(*keys: str) -> Callable[[Metadata], str | None]:
    return lambda metadata: _text(metadata, *keys)


# --- what is told -------------------------------------------------------------------------------


def _date(metadata: Metadata) -> str | None:
    if written := _text(metadata, "modelspec.date"):
        return written
    seconds = _number(metadata, "ss_training_finished_at", "ss_training_started_at")
    try:
        return None if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return None


def _duration(metadata: Metadata) -> str | None:
    start, end = (_number(metadata, f"ss_training_{when}_at") for when in ("started", "finished"))
    if start is None or end is None or end <= start:
        return None
    minutes = round((end - start) / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes or '< 1'} min"


def _base(metadata: Metadata) -> str | None:
    name, version = _text(metadata, "ss_sd_model_name"), _text(metadata, "ss_base_model_version")
    kind = _BASES.get(version, version) if version else _text(metadata, "modelspec.architecture")
    return f"{name} ({kind})" if name and kind else name or kind


def _base_hash(metadata: Metadata) -> str | None:
    new, old = _text(metadata, "ss_new_sd_model_hash"), _text(metadata, "ss_sd_model_hash")
    return _joined([f"SHA-256 {new}" if new else None, f"short {old}" if old else None])


def _network(metadata: Metadata) -> str | None:
    module = _text(metadata, "ss_network_module")
    algo = _mapping(_parsed(metadata, "ss_network_args")).get("algo")
    if not module:
        return None
    kind = _joined([_ADAPTATIONS.get(module), str(algo) if algo else None])
    return f"{kind} ({module})" if kind else module


def _size(metadata: Metadata) -> str | None:
    rank, alpha = (_text(metadata, f"ss_network_{each}") for each in ("dim", "alpha"))
    stated = _joined([f"rank {rank}" if rank else None, f"alpha {alpha}" if alpha else None])
    return stated or _peft_sizes(_mapping(_parsed(metadata, "lora_adapter_metadata")))


def _peft_sizes(settings: Mapping[str, Any]) -> str | None:
    parts = [key.removesuffix(".r") for key in settings if key.endswith(".r")]
    return "; ".join(
        f"{part} rank {settings[f'{part}.r']}, alpha {settings.get(f'{part}.lora_alpha', 'of the rank')}"
        for part in parts
    )


def _arguments(metadata: Metadata) -> str | None:
    given = _mapping(_parsed(metadata, "ss_network_args"))
    return _joined([f"{key}={value}" for key, value in given.items() if value is not None])


def _progress(done: str, planned: str, word: str) -> Callable[[Metadata], str | None]:
    def note(metadata: Metadata) -> str | None:
        count, of = _number(metadata, done), _number(metadata, planned)
        if count is None:
            return None if of is None else f"{_plural(of, word)} planned"
        return _plural(count, word) if of in (None, count) else f"{_said(count)} of {_plural(of or 0, word)}"

    return note


def _batch(metadata: Metadata) -> str | None:
    size = _number(metadata, "ss_total_batch_size", "ss_batch_size_per_device")
    if size is None:
        sizes = [_as_number(each.get("batch_size_per_device")) for each in _datasets(metadata)]
        size = next((each for each in sizes if each is not None), None)
    steps = _number(metadata, "ss_gradient_accumulation_steps")
    accumulated = f"gradients of {_said(steps)} batches together" if steps and steps > 1 else None
    return _joined([None if size is None else _plural(size, "picture"), accumulated])


def _rates(metadata: Metadata) -> str | None:
    rates = {
        "": _number(metadata, "ss_learning_rate"),
        "UNet ": _number(metadata, "ss_unet_lr"),
        "text encoder ": _number(metadata, "ss_text_encoder_lr"),
    }
    return _joined([f"{part}{rate:.4g}" for part, rate in rates.items() if rate is not None])


def _optimizer(metadata: Metadata) -> str | None:
    """Without the module that the class lives in."""
    written = _text(metadata, "ss_optimizer")
    if not written:
        return None
    name, bracket, arguments = written.partition("(")
    given = arguments.removesuffix(")").replace(",", ", ")
    return name.rpartition(".")[2] + (f" ({given})" if bracket and given else "")


def _scheduler(metadata: Metadata) -> str | None:
    warmup = _number(metadata, "ss_lr_warmup_steps")
    return _joined([_text(metadata, "ss_lr_scheduler"), f"{_plural(warmup, 'step')} of warm-up" if warmup else None])


# What is only worth a word where it is used.
_OBJECTIVE = (
    ("ss_min_snr_gamma", "min-SNR gamma"),
    ("ss_noise_offset", "noise offset"),
    ("ss_multires_noise_iterations", "multires noise iterations"),
    ("ss_ip_noise_gamma", "input perturbation"),
    ("ss_network_dropout", "dropout"),
    ("ss_scale_weight_norms", "norms limited to"),
    ("ss_caption_dropout_rate", "caption dropout"),
    ("ss_clip_skip", "clip skip"),
)


def _objective(metadata: Metadata) -> str | None:
    numbers = ((word, _number(metadata, key)) for key, word in _OBJECTIVE)
    return _joined([f"{word} {_said(number)}" for word, number in numbers if number])


def _captions(metadata: Metadata) -> str | None:
    kept = _number(metadata, "ss_keep_tokens")
    return _joined(
        [
            "shuffled" if metadata.get("ss_shuffle_caption") == "True" else None,
            f"first {_plural(kept, 'token')} kept in place" if kept else None,
            "pictures mirrored at random" if metadata.get("ss_flip_aug") == "True" else None,
        ]
    )


def _datasets(metadata: Metadata) -> list[Mapping[str, Any]]:
    return _entries(_parsed(metadata, "ss_datasets"))


def _folders(metadata: Metadata) -> Iterator[tuple[str, float, float, bool]]:
    """(name, pictures, repeats, whether for regularisation) of each folder of pictures."""
    subsets = [each for dataset in _datasets(metadata) for each in _entries(dataset.get("subsets"))]
    for each in subsets:
        yield _folder(each.get("image_dir"), each, "num_repeats", bool(each.get("is_reg")))
    for key, is_reg in (("ss_dataset_dirs", False), ("ss_reg_dataset_dirs", True)):
        for name, counts in () if subsets else _mapping(_parsed(metadata, key)).items():
            yield _folder(name, _mapping(counts), "n_repeats", is_reg)


def _folder(name: object, counts: Mapping[str, Any], repeats: str, is_reg: bool) -> tuple[str, float, float, bool]:
    return str(name or "folder"), _as_number(counts.get("img_count")) or 0, _as_number(counts.get(repeats)) or 1, is_reg


def _pictures(metadata: Metadata) -> str | None:
    folders = list(_folders(metadata))
    shown = _number(metadata, "ss_num_train_images")
    if not folders:
        return None if shown is None else f"{_said(shown)} shown per epoch"
    listed = [
        f"{name} {_said(count)} × {_said(repeats)}{' (regularisation)' * is_reg}"
        for name, count, repeats, is_reg in folders[:_MOST_FOLDERS]
    ]
    more = len(folders) - len(listed)
    total = sum(count for _, count, _, is_reg in folders if not is_reg)
    each_epoch = f", {_said(shown)} shown per epoch" if shown is not None else ""
    return f"{_said(total)}{each_epoch}: {', '.join(listed)}{f' and {more} more' if more else ''} (pictures × repeats)"


def _resolution(metadata: Metadata) -> str | None:
    written = [str(each["resolution"]) for each in _datasets(metadata) if each.get("resolution")]
    written = written or [text for text in [_text(metadata, "ss_resolution", "modelspec.resolution")] if text]
    return _joined(list(dict.fromkeys(_by("×", re.findall(r"\d+", each)[:2]) for each in written)))


def _by(sign: str, sides: Sequence[object]) -> str:
    return sign.join(map(str, sides if len(sides) != 1 else (*sides, *sides)))


def _buckets(metadata: Metadata) -> str | None:
    infos = [each.get("bucket_info") for each in _datasets(metadata)] or [_parsed(metadata, "ss_bucket_info")]
    counts: Counter[str] = Counter()
    for info in infos:
        for bucket in _mapping(_mapping(info).get("buckets")).values():
            size, count = _mapping(bucket).get("resolution"), _as_number(_mapping(bucket).get("count"))
            if isinstance(size, list) and size and count:
                counts[_by("×", size)] += int(count)
    if counts:
        common = ", ".join(f"{size} ({count})" for size, count in counts.most_common(_MOST_SIZES))
        return f"{_plural(len(counts), 'size')}; {'most often ' * (len(counts) > _MOST_SIZES)}{common}"
    enabled = metadata.get("ss_enable_bucket")
    smallest, largest = (_number(metadata, f"ss_{each}_bucket_reso") for each in ("min", "max"))
    if enabled == "True" and smallest is not None and largest is not None:
        return f"sides of {_said(smallest)} to {_said(largest)}"
    return "none" if enabled == "False" else None


def _tags(metadata: Metadata) -> str | None:
    counts: Counter[str] = Counter()
    sources = [_parsed(metadata, "ss_tag_frequency")]
    if not _mapping(sources[0]):
        sources = [each.get("tag_frequency") for each in _datasets(metadata)]
    for source in sources:
        for folder in _mapping(source).values():
            for tag, count in _mapping(folder).items():
                counts[tag.strip()] += int(_as_number(count) or 0)
    return _joined([f"{tag} ({count})" for tag, count in counts.most_common(_MOST_TAGS) if tag and count])


def _resized(metadata: Metadata) -> str | None:
    params = _mapping(_parsed(metadata, "resize_params"))
    recipe = _text(metadata, "lorashrink.recipe") or params.get("recipe_str")
    if not recipe and not params:
        return None
    version = _text(metadata, "lorashrink.version")
    energy = _number(metadata, "lorashrink.energy")
    kept = f"{100 * energy:.4g} % of the energy kept" if energy is not None else None
    scale = _as_number(params.get("rescale"))
    strength = f"strength × {_said(scale)}" if scale not in (None, 1.0) else None
    program = f"by lorashrink {version}" if version else "by resize_lora"
    return _joined([str(recipe) if recipe else "recipe unknown", kept, strength, program])


_NOTES: tuple[tuple[str, Callable[[Metadata], str | None]], ...] = (
    ("title", _noted("modelspec.title", "ss_output_name")),
    ("author", _noted("modelspec.author")),
    ("licence", _noted("modelspec.license")),
    ("description", _noted("modelspec.description")),
    ("trigger words", _noted("modelspec.trigger_phrase")),
    ("hint", _noted("modelspec.usage_hint")),
    ("date", _date),
    ("training time", _duration),
    ("base model", _base),
    ("base hash", _base_hash),
    ("VAE", _noted("ss_vae_name")),
    ("network", _network),
    ("rank and alpha", _size),
    ("network arguments", _arguments),
    ("steps", _progress("ss_steps", "ss_max_train_steps", "step")),
    ("epochs", _progress("ss_epoch", "ss_num_epochs", "epoch")),
    ("batch", _batch),
    ("learning rate", _rates),
    ("optimizer", _optimizer),
    ("schedule", _scheduler),
    ("objective", _objective),
    ("precision", _noted("ss_mixed_precision")),
    ("seed", _noted("ss_seed")),
    ("pictures", _pictures),
    ("resolution", _resolution),
    ("buckets", _buckets),
    ("captions", _captions),
    ("frequent tags", _tags),
    ("resized", _resized),
    ("comment", _noted("ss_training_comment")),
)
