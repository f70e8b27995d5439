"""What an adapter is tried with: prompts from its own metadata, or the user's."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.adapters import open_adapter
from lorashrink.calibration.models import PROMPTS
from lorashrink.errors import UsageError
from lorashrink.pictures.prompts import OWN, Prompt, read_prompts

_STEPS = 20
_COUNT = 6  # prompts
_MOST_TAGS = 12  # of a prompt

# A tag in more of the pictures than this is what the adapter was taught.
_TRIGGER_SHARE = 0.6

# A word of its name is what it was taught if this share of all captions has it.
_NAME_SHARE = 0.1

_LARGEST_SIDECAR = 1 << 20  # bytes

# A text that ends like this was meant as the name of a file.
_FILES = (".txt", ".toml", ".json")


@dataclass(frozen=True, slots=True)
class Trial:
    """The prompts that an adapter is tried with, and which of them call it."""

    prompts: tuple[Prompt, ...]
    calling: tuple[bool, ...]
    words: str  # where the prompts come from


def trial_of(source: Path, asked_for: str | Path | None, *, side: int, scale: float) -> Trial:
    """The prompts for one adapter.

    asked_for: a file of prompts or the text of one; None means those of the adapter's metadata, or usual ones if there
    are none. side, scale: pixels and guidance of prompts that name none. Raises UsageError or InputError.
    """
    triggers, captions = _taught(source)
    if asked_for is not None:
        prompts = _given(asked_for, side, scale)
        named = [_calls(prompt.prompt, triggers) for prompt in prompts]
        # Where none of them names what was taught, all of them count.
        return Trial(prompts, tuple(named if any(named) else [True] * len(prompts)), "--prompts")
    words = "the adapter's metadata"
    calling = [caption for caption in captions if _calls(caption, triggers)]
    texts = _varied(calling) or [_with_triggers(caption, triggers) for caption in _varied(captions)]
    if not texts and triggers:
        texts = [f"{', '.join(triggers)}, {plain}" for plain in PROMPTS[:_COUNT]]
    if not texts:
        texts, words = (
            list(PROMPTS[:_COUNT]),
            "usual subjects, because its metadata names no words; --prompts is better",
        )
    prompts = tuple(
        Prompt(text, width=side, height=side, seed=number, steps=_STEPS, scale=scale, sampler=OWN)
        for number, text in enumerate(texts)
    )
    return Trial(prompts, (True,) * len(prompts), words)


def _given(asked_for: str | Path, side: int, scale: float) -> tuple[Prompt, ...]:
    if os.path.isfile(asked_for):
        return read_prompts(Path(asked_for), sampler=OWN, scale=scale, side=side)
    text = str(asked_for).strip()
    if not text or text.lower().endswith(_FILES):
        raise UsageError(f"--prompts {asked_for}: no such file. Give a file, or the text of a prompt.")
    return tuple(
        Prompt(text, width=side, height=side, seed=seed, steps=_STEPS, scale=scale, sampler=OWN)
        for seed in range(_COUNT)
    )


def _calls(text: str, triggers: Sequence[str]) -> bool:
    return any(trigger.lower() in text.lower() for trigger in triggers)


def _with_triggers(caption: str, triggers: Sequence[str]) -> str:
    missing = [trigger for trigger in triggers if trigger.lower() not in caption.lower()]
    return ", ".join([caption, *missing])


# --- what an adapter was taught -------------------------------------------------------------------


def _taught(source: Path) -> tuple[list[str], list[str]]:
    """The words that call an adapter, and captions of its training."""
    with open_adapter(source) as adapter:
        metadata = adapter.store.metadata
    counts = _tag_counts(metadata.get("ss_tag_frequency", ""))
    images = _image_count(metadata)
    named = [*_phrases(metadata.get("modelspec.trigger_phrase", "")), *_trained_words(source)]
    common = [tag for tag, count in counts.most_common(3) if images and count >= _TRIGGER_SHARE * images]
    triggers = list(dict.fromkeys(named or common or _name_words(metadata, counts)))
    rest = [tag for tag, _ in counts.most_common() if tag not in triggers]
    captions = [tag for tag in rest if len(tag.split()) > 3]  # sentences: each is a caption of its own
    if not captions and rest:
        # Tags: each prompt takes some of the common ones, in another selection.
        groups = [rest[start : _MOST_TAGS * 2 : _COUNT] for start in range(min(_COUNT, len(rest)))]
        captions = [", ".join(group) for group in groups]
    return triggers, captions


def _name_words(metadata: Mapping[str, str], counts: Counter[str]) -> list[str]:
    """Words of the adapter's own name that captions of its training use."""
    name = f"{metadata.get('ss_output_name', '')} {metadata.get('modelspec.title', '')}"
    words = dict.fromkeys(word for word in re.findall(r"[^\W\d_]{3,}", name.lower()))
    total = sum(counts.values())
    used = {word: sum(count for tag, count in counts.items() if word in tag.lower().split()) for word in words}
    return [word for word, count in used.items() if total and count >= _NAME_SHARE * total][:1]


def _varied(captions: Sequence[str]) -> list[str]:
    """Some of the captions, far from each other in their order, which goes from common to rare."""
    step = max(1, len(captions) // _COUNT)
    return list(captions[::step][:_COUNT])


def _tag_counts(text: str) -> Counter[str]:
    """Tag or caption -> in how many pictures it is."""
    counts: Counter[str] = Counter()
    for tags in _object(text).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            words = " ".join(str(tag).split())
            if words and isinstance(count, int):
                counts[words[:300]] += count
    return counts


def _image_count(metadata: Mapping[str, str]) -> int:
    number = metadata.get("ss_num_train_images", "")
    return int(number) if re.fullmatch(r"\d{1,9}", number) else 0


def _trained_words(source: Path) -> Iterator[str]:
    """Trigger words in the files that civitai's tools and LoRA managers keep beside an adapter."""
    for ending in (".civitai.info", ".metadata.json"):
        path = source.with_suffix(ending)
        if not path.is_file() or path.stat().st_size > _LARGEST_SIDECAR:
            continue
        entries = _object(path.read_text(encoding="utf-8", errors="replace"))
        words = entries.get("trainedWords") or _dict(entries.get("civitai")).get("trainedWords")
        if isinstance(words, list):
            yield from (word for entry in words[:3] for word in _phrases(str(entry)))


def _phrases(text: str) -> list[str]:
    return [" ".join(part.split())[:100] for part in text.split(",") if part.strip()][:3]


def _object(text: str) -> dict[str, Any]:
    try:
        return _dict(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
