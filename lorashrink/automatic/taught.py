"""What an adapter was taught: words and captions, from its metadata and from files beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorashrink.adapters import open_adapter
from lorashrink.text import json_in

_MOST_TAGS = 12  # of a prompt

# A tag in more of the pictures than this is what the adapter was taught.
_TRIGGER_SHARE = 0.6

# A word of its name is what it was taught if this share of all captions has it.
_NAME_SHARE = 0.1

_LARGEST_SIDECAR = 1 << 20  # bytes


def taught(source: Path, count: int) -> tuple[list[str], list[str]]:
    """The words that call an adapter, and captions of its training: any sentences, or `count` groups of tags."""
    with open_adapter(source) as adapter:
        metadata = adapter.store.metadata
    counts = tag_counts(metadata.get("ss_tag_frequency", ""))
    shown = metadata.get("ss_num_train_images", "")
    total = int(shown) if re.fullmatch(r"\d{1,9}", shown) else 0
    named = [*_phrases(metadata.get("modelspec.trigger_phrase", "")), *trained_words(source)]
    common = [tag for tag, images in counts.most_common(3) if total and images >= _TRIGGER_SHARE * total]
    triggers = list(dict.fromkeys(named or common or name_words(metadata, counts)))
    rest = [tag for tag, _ in counts.most_common() if tag not in triggers]
    captions = [tag for tag in rest if len(tag.split()) > 3]  # sentences: each is a caption of its own
    if not captions and rest:
        # Tags: each prompt takes some of the common ones, in another selection.
        groups = [rest[start : _MOST_TAGS * 2 : count] for start in range(min(count, len(rest)))]
        captions = [", ".join(group) for group in groups]
    return triggers, captions


def name_words(metadata: Mapping[str, str], counts: Counter[str]) -> list[str]:
    """Words of the adapter's own name that captions of its training use."""
    name = f"{metadata.get('ss_output_name', '')} {metadata.get('modelspec.title', '')}"
    words = dict.fromkeys(word for word in re.findall(r"[^\W\d_]{3,}", name.lower()))
    total = sum(counts.values())
    used = {word: sum(count for tag, count in counts.items() if word in tag.lower().split()) for word in words}
    return [word for word, count in used.items() if total and count >= _NAME_SHARE * total][:1]


def tag_counts(text: str) -> Counter[str]:
    """Tag or caption -> in how many pictures it is."""
    counts: Counter[str] = Counter()
    for tags in _dict(json_in(text)).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            words = " ".join(str(tag).split())
            if words and isinstance(count, int):
                counts[words[:300]] += count
    return counts


def trained_words(source: Path) -> Iterator[str]:
    """Trigger words in the files that civitai's tools and LoRA managers keep beside an adapter."""
    for ending in (".civitai.info", ".metadata.json"):
        path = source.with_suffix(ending)
        if not path.is_file() or path.stat().st_size > _LARGEST_SIDECAR:
            continue
        entries = _dict(json_in(path.read_text(encoding="utf-8", errors="replace")))
        words = entries.get("trainedWords") or _dict(entries.get("civitai")).get("trainedWords")
        if isinstance(words, list):
            yield from (word for entry in words[:3] for word in _phrases(str(entry)))


def _phrases(text: str) -> list[str]:
    return [" ".join(part.split())[:100] for part in text.split(",") if part.strip()][:3]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
