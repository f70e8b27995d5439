"""Metadata of a sum of adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorashrink.adapters import peft
from lorashrink.files.hashes import SPEC_HASH
from lorashrink.files.metadata_keys import SOURCES


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


# Entries about one file: its contents, its making, the names of its output.
_OF_ONE_FILE = re.compile(
    r"sshs_|lorashrink\.|resize_params$|modelspec\.(?:hash_sha256|date|title|merged_from|thumbnail)$"
    r"|ss_(?:network_(?:dim|alpha)|training_comment|output_name|session_id|training_(?:started|finished)_at)$"
    + f"|{peft.METADATA_KEY}$"
)

_PATH = re.compile(r"(?:[A-Za-z]:)?[\\/~]")


def summed(summands: Sequence[Summand]) -> dict[str, str]:
    """The metadata of a weighted sum: what it is made of, and the entries that are equal in all of its summands.

    Different entries are true of none: a sum was trained in no one way. Paths are left out.
    """
    first = summands[0].metadata
    new = {
        key: text
        for key, text in first.items()
        if all(summand.metadata.get(key) == text for summand in summands)
        and not _OF_ONE_FILE.match(key)
        and not _PATH.match(text)
    }
    if any(key.startswith("ss_") for key in first):
        modules = {summand.metadata.get("ss_network_module") for summand in summands}
        if len(modules) > 1 or modules == {None}:
            new |= {"ss_network_module": "networks.lora", "ss_network_args": "{}"}
        terms = " + ".join(f"{summand.name}:{summand.weight:g}" for summand in summands)
        # ranks are filled in when the file is written
        new |= {"ss_network_dim": "", "ss_network_alpha": "", "ss_training_comment": f"merged from {terms}"}
    if any(key.startswith("modelspec.") for key in first):
        titles = [summand.title for summand in summands]
        new |= {"modelspec.title": " + ".join(titles), "modelspec.merged_from": ", ".join(titles)}
    if SPEC_HASH in first:
        new[SPEC_HASH] = ""
    new[SOURCES] = json.dumps([{"name": s.name, "sha256": s.sha256, "weight": s.weight} for s in summands])
    return new
