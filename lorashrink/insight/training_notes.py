"""What a file's metadata tells about its training, in words for people.

Keys: `ss_*` and `sshs_*` (sd-scripts), `modelspec.*` (https://github.com/Stability-AI/ModelSpec), `resize_params`
(resize_lora), `lora_adapter_metadata` (diffusers), `lorashrink.*` (ours). Whatever does not parse is left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from lorashrink.text import json_in, names_text, printable

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

# Entries of the objective, which are only worth a word where they are used.
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


def training_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    """Plain label -> text, in the order to read them in; what the metadata does not tell has no label."""
    training = _Training(metadata)
    text = training.text
    notes = {
        "title": text("modelspec.title", "ss_output_name"),
        "author": text("modelspec.author"),
        "licence": text("modelspec.license"),
        "description": text("modelspec.description"),
        "trigger words": text("modelspec.trigger_phrase"),
        "hint": text("modelspec.usage_hint"),
        "date": training.date(),
        "training time": training.duration(),
        "base model": training.base_model(),
        "base hash": training.base_hash(),
        "VAE": text("ss_vae_name"),
        "network": training.network(),
        "rank and alpha": training.rank_and_alpha(),
        "network arguments": training.network_arguments(),
        "steps": training.progress("ss_steps", "ss_max_train_steps", "step"),
        "epochs": training.progress("ss_epoch", "ss_num_epochs", "epoch"),
        "batch": training.batch(),
        "learning rate": training.learning_rates(),
        "optimizer": training.optimizer(),
        "schedule": training.schedule(),
        "objective": training.objective(),
        "precision": text("ss_mixed_precision"),
        "seed": text("ss_seed"),
        "pictures": training.pictures(),
        "resolution": training.resolution(),
        "buckets": training.buckets(),
        "captions": training.captions(),
        "frequent tags": training.frequent_tags(),
        "resized": training.resized(),
        "comment": text("ss_training_comment"),
    }
    lines = {}
    for label, note in notes.items():
        if note:  # metadata may hold anything, and this is shown in terminals
            line = printable(" ".join(note.split()))
            lines[label] = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return lines


class _Folder(NamedTuple):
    """A folder of pictures for training."""

    name: str
    pictures: float
    repeats: float
    is_reg: bool  # whether for regularisation

    @classmethod
    def of(cls, name: object, counts: Mapping[str, Any], repeats: str, is_reg: bool) -> _Folder:
        pictures, shown = _as_number(counts.get("img_count")), _as_number(counts.get(repeats))
        return cls(str(name or "folder"), pictures or 0, shown or 1, is_reg)


@dataclass(frozen=True)
class _Training:
    """The entries of a file's metadata about its training; each method is one note, None where nothing tells it."""

    entries: Mapping[str, str]

    def text(self, *keys: str) -> str | None:
        """The first of these entries that says something."""
        return next((self.entries[key] for key in keys if self.entries.get(key, "").strip() not in _ABSENT), None)

    def number(self, *keys: str) -> float | None:
        """The first of these entries that says something, None if that is no number."""
        return _as_number(self.text(*keys))

    def parsed(self, key: str) -> Any:
        """What an entry holds as JSON; None if it does not parse."""
        return json_in(self.entries.get(key, "null"))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An entry that is a JSON object; {} if it is none."""
        return _mapping(self.parsed(key))

    def datasets(self) -> list[Mapping[str, Any]]:
        """The datasets that a dataset file described."""
        return _mappings(self.parsed("ss_datasets"))

    def date(self) -> str | None:
        if written := self.text("modelspec.date"):
            return written
        seconds = self.number("ss_training_finished_at", "ss_training_started_at")
        try:
            return None if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
        except (ValueError, OverflowError, OSError):
            return None

    def duration(self) -> str | None:
        start, end = (self.number(f"ss_training_{when}_at") for when in ("started", "finished"))
        if start is None or end is None or end <= start:
            return None
        minutes = round((end - start) / 60)
        return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes or '< 1'} min"

    def base_model(self) -> str | None:
        name, version = self.text("ss_sd_model_name"), self.text("ss_base_model_version")
        kind = _BASES.get(version, version) if version else self.text("modelspec.architecture")
        return f"{name} ({kind})" if name and kind else name or kind

    def base_hash(self) -> str | None:
        new, old = self.text("ss_new_sd_model_hash"), self.text("ss_sd_model_hash")
        return _joined([f"SHA-256 {new}" if new else None, f"short {old}" if old else None])

    def network(self) -> str | None:
        module = self.text("ss_network_module")
        algo = self.mapping("ss_network_args").get("algo")
        if not module:
            return None
        kind = _joined([_ADAPTATIONS.get(module), str(algo) if algo else None])
        return f"{kind} ({module})" if kind else module

    def rank_and_alpha(self) -> str | None:
        rank, alpha = self.text("ss_network_dim"), self.text("ss_network_alpha")
        if rank or alpha:
            return _joined([f"rank {rank}" if rank else None, f"alpha {alpha}" if alpha else None])
        settings = self.mapping("lora_adapter_metadata")
        parts = [key.removesuffix(".r") for key in settings if key.endswith(".r")]
        return "; ".join(
            f"{part} rank {settings[f'{part}.r']}, alpha {settings.get(f'{part}.lora_alpha', 'of the rank')}"
            for part in parts
        )

    def network_arguments(self) -> str | None:
        arguments = self.mapping("ss_network_args")
        return _joined(f"{key}={value}" for key, value in arguments.items() if value is not None)

    def progress(self, done: str, planned: str, word: str) -> str | None:
        """Steps or epochs: how many are done, and of how many."""
        count, total = self.number(done), self.number(planned)
        if count is None:
            return None if total is None else f"{_plural(total, word)} planned"
        return (
            _plural(count, word) if total in (None, count) else f"{_number_text(count)} of {_plural(total or 0, word)}"
        )

    def batch(self) -> str | None:
        size = self.number("ss_total_batch_size", "ss_batch_size_per_device")
        if size is None:
            sizes = (_as_number(dataset.get("batch_size_per_device")) for dataset in self.datasets())
            size = next((number for number in sizes if number is not None), None)
        steps = self.number("ss_gradient_accumulation_steps")
        accumulated = f"gradients of {_number_text(steps)} batches together" if steps and steps > 1 else None
        return _joined([None if size is None else _plural(size, "picture"), accumulated])

    def learning_rates(self) -> str | None:
        keys = {"": "ss_learning_rate", "UNet ": "ss_unet_lr", "text encoder ": "ss_text_encoder_lr"}
        rates = {part: self.number(key) for part, key in keys.items()}
        return _joined(f"{part}{rate:.4g}" for part, rate in rates.items() if rate is not None)

    def optimizer(self) -> str | None:
        """Without the module that the class lives in."""
        written = self.text("ss_optimizer")
        if not written:
            return None
        name, bracket, rest = written.partition("(")
        arguments = rest.removesuffix(")").replace(",", ", ")
        return name.rpartition(".")[2] + (f" ({arguments})" if bracket and arguments else "")

    def schedule(self) -> str | None:
        warmup = self.number("ss_lr_warmup_steps")
        return _joined([self.text("ss_lr_scheduler"), f"{_plural(warmup, 'step')} of warm-up" if warmup else None])

    def objective(self) -> str | None:
        numbers = ((word, self.number(key)) for key, word in _OBJECTIVE)
        return _joined(f"{word} {_number_text(number)}" for word, number in numbers if number)

    def captions(self) -> str | None:
        tokens = self.number("ss_keep_tokens")
        return _joined(
            [
                "shuffled" if self.entries.get("ss_shuffle_caption") == "True" else None,
                f"first {_plural(tokens, 'token')} kept in place" if tokens else None,
                "pictures mirrored at random" if self.entries.get("ss_flip_aug") == "True" else None,
            ]
        )

    def pictures(self) -> str | None:
        folders = list(self.folders())
        shown = self.number("ss_num_train_images")
        if not folders:
            return None if shown is None else f"{_number_text(shown)} shown per epoch"
        listed = [
            f"{name} {_number_text(count)} × {_number_text(repeats)}{' (regularisation)' * is_reg}"
            for name, count, repeats, is_reg in folders
        ]
        total = _number_text(sum(folder.pictures for folder in folders if not folder.is_reg))
        per_epoch = f", {_number_text(shown)} shown per epoch" if shown is not None else ""
        return f"{total}{per_epoch}: {names_text(listed, _MOST_FOLDERS)} (pictures × repeats)"

    def folders(self) -> Iterator[_Folder]:
        """The folders of pictures: of a dataset file, or else of the options."""
        subsets = [subset for dataset in self.datasets() for subset in _mappings(dataset.get("subsets"))]
        for subset in subsets:
            yield _Folder.of(subset.get("image_dir"), subset, "num_repeats", bool(subset.get("is_reg")))
        for key, is_reg in (("ss_dataset_dirs", False), ("ss_reg_dataset_dirs", True)):
            for name, counts in () if subsets else self.mapping(key).items():
                yield _Folder.of(name, _mapping(counts), "n_repeats", is_reg)

    def resolution(self) -> str | None:
        written = [str(dataset["resolution"]) for dataset in self.datasets() if dataset.get("resolution")]
        written = written or [text for text in [self.text("ss_resolution", "modelspec.resolution")] if text]
        return _joined(dict.fromkeys(_by(re.findall(r"\d+", text)[:2]) for text in written))

    def buckets(self) -> str | None:
        infos = [dataset.get("bucket_info") for dataset in self.datasets()] or [self.parsed("ss_bucket_info")]
        counts: Counter[str] = Counter()
        for info in infos:
            for bucket in _mapping(_mapping(info).get("buckets")).values():
                size, count = _mapping(bucket).get("resolution"), _as_number(_mapping(bucket).get("count"))
                if isinstance(size, list) and size and count:
                    counts[_by(size)] += int(count)
        if counts:
            common = ", ".join(f"{size} ({count})" for size, count in counts.most_common(_MOST_SIZES))
            return f"{_plural(len(counts), 'size')}; {'most often ' * (len(counts) > _MOST_SIZES)}{common}"
        enabled = self.entries.get("ss_enable_bucket")
        smallest, largest = (self.number(f"ss_{end}_bucket_reso") for end in ("min", "max"))
        if enabled == "True" and smallest is not None and largest is not None:
            return f"sides of {_number_text(smallest)} to {_number_text(largest)}"
        return "none" if enabled == "False" else None

    def frequent_tags(self) -> str | None:
        folders = self.mapping("ss_tag_frequency")
        sources = [folders] if folders else [_mapping(dataset.get("tag_frequency")) for dataset in self.datasets()]
        counts: Counter[str] = Counter()
        for source in sources:
            for folder in source.values():
                for tag, count in _mapping(folder).items():
                    counts[tag.strip()] += int(_as_number(count) or 0)
        return _joined(f"{tag} ({count})" for tag, count in counts.most_common(_MOST_TAGS) if tag and count)

    def resized(self) -> str | None:
        params = self.mapping("resize_params")
        recipe = self.text("lorashrink.recipe") or params.get("recipe_str")
        if not recipe and not params:
            return None
        version, energy = self.text("lorashrink.version"), self.number("lorashrink.energy")
        scale = _as_number(params.get("rescale"))
        return _joined(
            [
                str(recipe) if recipe else "recipe unknown",
                f"{100 * energy:.4g} % of the energy kept" if energy is not None else None,
                f"strength × {_number_text(scale)}" if scale not in (None, 1.0) else None,
                f"by lorashrink {version}" if version else "by resize_lora",
            ]
        )


# --- values and texts ---------------------------------------------------------------------------


def _as_number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> list[Mapping[str, Any]]:
    """The entries of a list that are mappings."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _number_text(number: float) -> str:
    return f"{number:.0f}" if number == int(number) and abs(number) < 1e15 else f"{number:.4g}"


def _plural(count: float, word: str) -> str:
    return f"{_number_text(count)} {word}{'s' * (count != 1)}"


def _joined(parts: Iterable[str | None]) -> str | None:
    return ", ".join(part for part in parts if part) or None


def _by(sides: Sequence[object]) -> str:
    """Width × height; one number is both."""
    return "×".join(map(str, sides if len(sides) != 1 else (*sides, *sides)))
