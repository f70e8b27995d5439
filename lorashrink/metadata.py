"""The metadata of a shrunk file: what described the old tensors is brought up to date, all else is kept.

Keys: `ss_*` and `sshs_*` (sd-scripts), `modelspec.*` (https://github.com/Stability-AI/ModelSpec),
`resize_params` (resize_lora), `lora_adapter_metadata` (diffusers), `lorashrink.*` (ours).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorashrink.adapters import peft
from lorashrink.files import TensorInfo, header_bytes
from lorashrink.recipe import TERMS, Recipe

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"
SPEC_HASH = "modelspec.hash_sha256"
SOURCE, BASE, RECIPE, OPTIONS, VERSION = (
    f"lorashrink.{name}" for name in ("source_sha256", "base", "recipe", "options", "version")
)
ENERGY, ERROR = "lorashrink.energy", "lorashrink.relative_error"
SOURCES = "lorashrink.sources"
REFINED = "lorashrink.refined"
# What the old addnet hash reads: 64 KiB at 1 MiB.
_LEGACY_WINDOW = (0x100000, 0x10000)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a shrunk file comes from; equal origins give equal files."""

    source_sha256: str
    recipe: str
    base: str  # fingerprint of the base, "" if the recipe does not depend on it
    options: str  # whatever else decides what is written
    version: str

    def entries(self) -> dict[str, str]:
        """The metadata entries that record the origin."""
        return {
            SOURCE: self.source_sha256,
            RECIPE: self.recipe,
            BASE: self.base,
            OPTIONS: self.options,
            VERSION: self.version,
        }

    def made(self, metadata: Mapping[str, str]) -> bool:
        """Whether a file with this metadata has this origin."""
        return all(metadata.get(key) == value for key, value in self.entries().items())


def shrunk(
    old: Mapping[str, str],
    *,
    recipe: Recipe,
    threshold: float | None,
    origin: Origin,
    ranks: Mapping[str, int],
    old_rank: int,
    error: float,
    settings: peft.Settings,
    became_lora: bool = False,
    energy: float | None = None,
) -> dict[str, str]:
    """Metadata of the output. `ranks` maps the names of the layers that are written to their ranks.

    `error` is the relative error of the file, `energy` the share that was kept, if that does not follow from the error,
    which it does where no limit changes what is kept. `settings` are PEFT's for these ranks. Hashes of the contents are
    placeholders of the right length, see `with_hashes`. `became_lora`: layers of another family are LoRA now.
    """
    new = dict(old)
    widest = str(max(ranks.values(), default=0))
    if "ss_network_dim" in old or "ss_network_alpha" in old:
        # Whole numbers as text: words such as "Dynamic" break readers that parse them.
        new |= {"ss_network_dim": widest, "ss_network_alpha": widest}
    if became_lora and "ss_network_module" in old:
        new |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
    if any(key.startswith("ss_") for key in old):
        comment = f"resized from rank {old_rank} with lorashrink {recipe}"
        before = old.get("ss_training_comment", "")
        new["ss_training_comment"] = comment if before in ("", "None") else f"{comment}; {before}"
    if settings and peft.METADATA_KEY in old:
        new[peft.METADATA_KEY] = peft.to_metadata(settings)
    weights = {key: recipe.normalised.get(key, 0.0) for key in TERMS}
    params = {
        "recipe_str": str(recipe),
        "weights": weights,
        "target_size": recipe.value if recipe.select == "size" else None,
        "threshold": threshold,
        "rescale": recipe.rescale,
        "lorashrink_version": origin.version,
    }
    new["resize_params"] = json.dumps(params, allow_nan=False)
    new |= origin.entries()
    # Both, because "0.9" is an energy in one tool and its square root in another; always 8 characters.
    energy = max(0.0, 1 - error**2) if energy is None else energy
    new |= {ENERGY: f"{energy:.6f}", "lorashrink.norm_ratio": f"{energy**0.5:.6f}"}
    if recipe.caps:
        new[ERROR] = f"{error:.6f}"
    new = with_placeholders({**new, MODEL_HASH: "", LEGACY_HASH: ""})
    if title := old.get("modelspec.title"):
        new["modelspec.title"] = f"{title} ({recipe})"
    return new


@dataclass(frozen=True, slots=True)
class Summand:
    """One of the adapters in a weighted sum."""

    name: str  # of the file, without its folder
    sha256: str
    weight: float
    metadata: Mapping[str, str]

    @property
    def title(self) -> str:
        """What people call it."""
        return self.metadata.get("modelspec.title") or self.name.removesuffix(".safetensors")


# Of one file: its contents, its making, the names of its output.
_OF_ONE_FILE = re.compile(
    r"sshs_|lorashrink\.|resize_params$|modelspec\.(?:hash_sha256|date|title|merged_from|thumbnail)$"
    r"|ss_(?:network_(?:dim|alpha)|training_comment|output_name|session_id|training_(?:started|finished)_at)$"
    + f"|{peft.METADATA_KEY}$"
)
_PATH = re.compile(r"(?:[A-Za-z]:)?[\\/~]")


def summed(summands: Sequence[Summand]) -> dict[str, str]:
    """The metadata of a weighted sum: what it is made of, and what all of its parts say alike.

    What they say differently is true of none: a sum was trained in no one way. Paths are left out.
    """
    first = summands[0].metadata
    new = {
        key: text
        for key, text in first.items()
        if all(each.metadata.get(key) == text for each in summands)
        and not _OF_ONE_FILE.match(key)
        and not _PATH.match(text)
    }
    told = " + ".join(f"{each.name}:{each.weight:g}" for each in summands)
    if any(key.startswith("ss_") for key in first):
        modules = {each.metadata.get("ss_network_module") for each in summands}
        if len(modules) > 1 or modules == {None}:
            new |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
        # ranks are filled in when the file is written
        new |= {"ss_network_dim": "", "ss_network_alpha": "", "ss_training_comment": f"merged from {told}"}
    if any(key.startswith("modelspec.") for key in first):
        new["modelspec.title"] = " + ".join(each.title for each in summands)
        new["modelspec.merged_from"] = ", ".join(each.title for each in summands)
    if SPEC_HASH in first:
        new[SPEC_HASH] = ""
    parts = [{"name": each.name, "sha256": each.sha256, "weight": each.weight} for each in summands]
    new[SOURCES] = json.dumps(parts)
    return new


_PLACEHOLDERS = {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8, SPEC_HASH: "0x" + "0" * 64}


def with_placeholders(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with placeholders for those hashes of the contents that it has."""
    return {key: _PLACEHOLDERS.get(key, text) for key, text in metadata.items()}


def with_hashes(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], data: Callable[[], Iterable[bytes]]
) -> dict[str, str]:
    """`metadata` with the placeholders replaced. `data()` yields the bytes behind the header.

    sd-scripts hashes a re-save that keeps only the `ss_*` entries; the legacy hash reads at a fixed place of
    that file, so the length of its header matters.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = header_bytes(tensors, training)
    start, length = _LEGACY_WINDOW
    window, place = bytearray(header[start : start + length]), len(header)
    digest = hashlib.sha256()
    for chunk in data():
        digest.update(chunk)
        begin, end = max(start - place, 0), max(start + length - place, 0)
        window += chunk[begin:end]
        place += len(chunk)
    hashes = {
        MODEL_HASH: digest.hexdigest(),
        LEGACY_HASH: hashlib.sha256(window).hexdigest()[:8],
        SPEC_HASH: "0x" + digest.hexdigest(),
    }
    return {key: hashes.get(key, text) for key, text in metadata.items()}
