"""The metadata of a shrunk file: what described the old tensors is brought up to date, all else is kept.

Keys: `ss_*` and `sshs_*` (sd-scripts), `modelspec.*` (https://github.com/Stability-AI/ModelSpec),
`resize_params` (resize_lora), `lora_adapter_metadata` (diffusers), `lorashrink.*` (ours).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorashrink.adapters import peft
from lorashrink.files.hashes import LEGACY_HASH, MODEL_HASH, with_placeholders
from lorashrink.files.metadata_keys import BASE, ENERGY, ERROR, NORM_RATIO, OPTIONS, RECIPE, SOURCE, VERSION
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.terms import TERMS
from lorashrink.text import json_in

# Arguments of sd-scripts' networks and LyCORIS that set ranks and alphas of the training.
_RANKS = re.compile(r"(conv_|block_|conv_block_)(dims?|alphas?)")


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


def updated(
    old: Mapping[str, str],
    *,
    how: str,
    ranks: Mapping[str, int],
    old_rank: int,
    settings: peft.Settings,
    became_lora: bool = False,
    alpha: int | None = None,
) -> dict[str, str]:
    """What other programs wrote, brought up to date. `ranks` maps the names of the layers that are written to theirs.

    `how`: what made the layers smaller, for the comment. `settings` are PEFT's for these ranks. `became_lora`: layers
    of another family are LoRA now. `alpha`: of all layers, by default the largest rank.
    """
    new = dict(old)
    widest = str(max(ranks.values(), default=0))
    # Without layers that are written anew the old numbers are still true.
    if ranks and ("ss_network_dim" in old or "ss_network_alpha" in old):
        # Whole numbers as text: words such as "Dynamic" break readers that parse them.
        new |= {"ss_network_dim": widest, "ss_network_alpha": widest if alpha is None else str(alpha)}
        if "ss_network_args" in old:
            arguments = json_in(old["ss_network_args"])
            if isinstance(arguments, dict) and any(map(_RANKS.fullmatch, arguments)):  # those of the training
                others = {key: value for key, value in arguments.items() if not _RANKS.fullmatch(key)}
                new["ss_network_args"] = json.dumps(others)
    if became_lora and "ss_network_module" in old:
        new |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
    if any(key.startswith("ss_") for key in old):
        comment = f"resized from rank {old_rank} with lorashrink {how}"
        before = old.get("ss_training_comment", "")
        new["ss_training_comment"] = comment if before in ("", "None") else f"{comment}; {before}"
    if settings and peft.METADATA_KEY in old:
        new[peft.METADATA_KEY] = peft.to_metadata(settings)
    return new


def shrunk(
    new: Mapping[str, str],
    *,
    recipe: Recipe,
    threshold: float | None,
    origin: Origin,
    error: float,
    energy: float | None = None,
) -> dict[str, str]:
    """Metadata of an output, from what `updated` gives.

    `error` is the relative error of the file, `energy` the share that was kept, if that does not follow from the error,
    which it does where no limit changes what is kept. Hashes of the contents are placeholders of the right length, see
    `with_hashes`.
    """
    weights = {key: recipe.normalised.get(key, 0.0) for key in TERMS}
    params = {
        "recipe_str": str(recipe),
        "weights": weights,
        "target_size": recipe.value if recipe.select == "size" else None,
        "threshold": threshold,
        "rescale": recipe.rescale,
        "lorashrink_version": origin.version,
    }
    entries = {"resize_params": json.dumps(params, allow_nan=False), **origin.entries()}
    # Both, because "0.9" is an energy in one tool and its square root in another; always 8 characters.
    energy = max(0.0, 1 - error**2) if energy is None else energy
    entries |= {ENERGY: f"{energy:.6f}", NORM_RATIO: f"{energy**0.5:.6f}"}
    if recipe.caps:
        entries[ERROR] = f"{error:.6f}"
    return with_placeholders({**new, **entries, MODEL_HASH: "", LEGACY_HASH: ""})


def packed(new: Mapping[str, str], *, origin: Origin, how: str) -> dict[str, str]:
    """Metadata of the file that a packed one unpacks to, as `shrunk`, but with nothing that only a recipe has."""
    entries = {**origin.entries(), OPTIONS: f"{how},{origin.options}"}
    del entries[RECIPE]
    return with_placeholders({**new, **entries, MODEL_HASH: "", LEGACY_HASH: ""})
