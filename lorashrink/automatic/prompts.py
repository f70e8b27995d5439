"""What an adapter is tried with: prompts from its own metadata, or the user's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorashrink.automatic.taught import taught
from lorashrink.calibration.models import PROMPTS
from lorashrink.errors import UsageError
from lorashrink.pictures.prompts import OWN, Prompt, read_prompts

_STEPS = 20
_COUNT = 6  # prompts

# A text that ends like this was meant as the name of a file.
_FILES = (".txt", ".toml", ".json")


@dataclass(frozen=True, slots=True)
class Trial:
    """The prompts that an adapter is tried with, and which of them call it."""

    prompts: tuple[Prompt, ...]
    calling: tuple[bool, ...]
    words: str  # where the prompts come from
    triggers: tuple[str, ...] = ()  # the words that call it


def trial_of(source: Path, requested: str | Path | None, *, side: int, scale: float) -> Trial:
    """The prompts for one adapter.

    requested: a file of prompts or the text of one; None means those of the adapter's metadata, or usual ones if there
    are none. side, scale: pixels and guidance of prompts that name none. Raises UsageError or InputError.
    """
    triggers, captions = taught(source, _COUNT)
    if requested is not None:
        prompts = _requested_prompts(requested, side, scale)
        named = [_calls(prompt.prompt, triggers) for prompt in prompts]
        # Where none of them names what was taught, all of them count.
        calls = tuple(named if any(named) else [True] * len(prompts))
        return Trial(prompts, calls, "--prompts", tuple(triggers))
    words = "the adapter's metadata"
    calling = [caption for caption in captions if _calls(caption, triggers)]
    texts = _varied(calling) or [", ".join([caption, *triggers]) for caption in _varied(captions)]
    if not texts and triggers:
        texts = [f"{', '.join(triggers)}, {plain}" for plain in PROMPTS[:_COUNT]]
    if not texts:
        texts = list(PROMPTS[:_COUNT])
        words = "usual subjects, because its metadata names no words; --prompts is better"
    prompts = tuple(
        Prompt(text, width=side, height=side, seed=number, steps=_STEPS, scale=scale, sampler=OWN)
        for number, text in enumerate(texts)
    )
    return Trial(prompts, (True,) * len(prompts), words, tuple(triggers))


def _requested_prompts(requested: str | Path, side: int, scale: float) -> tuple[Prompt, ...]:
    if os.path.isfile(requested):
        return read_prompts(Path(requested), sampler=OWN, scale=scale, side=side)
    text = str(requested).strip()
    if not text or text.lower().endswith(_FILES):
        raise UsageError(f"--prompts {requested}: no such file. Give a file, or the text of a prompt.")
    return tuple(
        Prompt(text, width=side, height=side, seed=seed, steps=_STEPS, scale=scale, sampler=OWN)
        for seed in range(_COUNT)
    )


def _calls(text: str, triggers: Sequence[str]) -> bool:
    return any(trigger.lower() in text.lower() for trigger in triggers)


def _varied(captions: Sequence[str]) -> list[str]:
    """Some of the captions, far from each other in their order, which goes from common to rare."""
    step = max(1, len(captions) // _COUNT)
    return list(captions[::step][:_COUNT])
