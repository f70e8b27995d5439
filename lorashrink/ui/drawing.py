"""Pictures before and after: a model draws the same prompts with an adapter and with what a recipe keeps of it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorashrink.adapters import peft
from lorashrink.errors import UsageError
from lorashrink.pictures.pipelines import KINDS, check_model, check_packages, own_side
from lorashrink.pictures.prompts import OWN, Prompt, read_prompts
from lorashrink.ui.jobs import Job

_MOST_PROMPTS, _SUGGESTED = 16, 2

_TAG = re.compile(r"(\S.*?) \(\d+\)(?:, |$)")  # `a tag (12), ` in a note

# The least PSNR in dB of a picture, and what that means to an eye.
_VERDICTS: Mapping[float, str] = {
    42.0: "Looks the same.",
    33.0: "Hardly any difference.",
    27.0: "Small differences.",
    0.0: "Visibly different.",
}

FAMILIES = frozenset(kind.family for kind in KINDS.values())  # of models that draw


def cannot_draw() -> str:
    """Why no pictures can be drawn here; empty if they can."""
    try:
        check_packages()
    except UsageError as error:
        return str(error)
    return ""


def suggested_prompts(notes: Mapping[str, str]) -> list[str]:
    """Prompts that call an adapter, from what `inspect` notes of its training; none where it notes no words."""
    tags = _TAG.findall(notes.get("frequent tags", ""))
    trigger = notes.get("trigger words") or next(iter(tags), "")
    subjects = [tag for tag in tags if tag != trigger][:_SUGGESTED]
    return [f"{trigger}, {subject}" for subject in subjects] or [trigger] * bool(trigger)


def prompts_of(text: str, steps: int, model: Path) -> tuple[Prompt, ...]:
    """The prompts of some lines, in the form of sd-scripts; `steps` for those that name none. Raises UsageError."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UsageError("there is nothing to draw. Write what the pictures should show, one a line.")
    if len(lines) > _MOST_PROMPTS:
        raise UsageError(f"{len(lines)} prompts; at most {_MOST_PROMPTS} are drawn at once.")
    lines = [line if " --s " in f"{line} " else f"{line} --s {steps}" for line in lines]
    kind = KINDS[check_model(model, None)]
    with tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
        path = Path(folder, "prompts.txt")
        path.write_text("\n".join(lines), encoding="utf-8")
        return read_prompts(path, sampler=OWN, scale=kind.scale, side=own_side(model, None))


def draw(
    job: Job, adapter: Path, save: Callable[[Path], object], label: str, model: Path, prompts: Sequence[Prompt]
) -> None:
    """Draw every prompt before and after into `job.results`, with paths; pictures that exist are not drawn again.

    save: writes the smaller adapter under a name. label: names it in the files of pictures.
    """
    from lorashrink.pictures.drawing import Studio, read_picture, shots_of
    from lorashrink.pictures.likeness import psnr

    shots = shots_of(prompts, (0,))
    steps = 2 * len(shots)
    job.report("opening the model", 0, steps)

    def report(start: int, text: str, done: int, total: int) -> None:
        job.report(text, start + done, steps)

    with Studio(model, shots) as studio, tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
        studio.check(adapter)
        smaller = Path(folder, peft.WEIGHTS_FILE if peft.is_folder(adapter) else "smaller.safetensors")
        save(smaller)
        job.check()
        before = studio.draw(adapter, "whole", progress=partial(report, 0, "drawing with the original LoRA"))
        size = smaller.stat().st_size
        smaller = smaller.parent if peft.is_folder(adapter) else smaller
        after = studio.draw(smaller, label, progress=partial(report, len(shots), "drawing with the smaller one"))
        for shot, paths in zip(shots, zip(before, after, strict=True), strict=True):
            level = psnr(*map(read_picture, paths))
            verdict = next(text for least, text in _VERDICTS.items() if level >= least)
            result: dict[str, Any] = {"label": shot.prompt.prompt, "psnr": level, "verdict": verdict, "bytes": size}
            job.results.append({**result, "before": paths[0], "after": paths[1]})
        job.report("", steps, steps)
