"""Prompt files: what pictures are drawn from, in the forms that sd-scripts reads."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.errors import InputError, UsageError

_log = logging.getLogger(__name__)

SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip

SCALE = 7.5

SIDE = 512  # pixels; sd-scripts' size of pictures, whatever the model

_FILE_NAME = re.compile(r"\S+\.[A-Za-z]{2,5}|.+\.(?:txt|toml|json)", re.IGNORECASE)

OWN = "own"  # the sampler that a model comes with; prompt files cannot name it, since they leave it out


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one picture is drawn from; the defaults are sd-scripts'."""

    prompt: str = ""
    negative: str = ""
    width: int = SIDE  # pixels, a multiple of 8
    height: int = SIDE
    seed: int | None = None  # None: another one each time
    steps: int = 30
    scale: float = SCALE  # classifier-free guidance; at 1 and below the negative prompt does nothing
    sampler: str = "ddim"  # one of `SAMPLERS`, or `OWN`


def prompt_file(prompts: str | Path) -> Path | None:
    """The file that is meant; None for a text that is a prompt itself.

    A text is a file if one of this name exists, or if it ends like one and has no spaces.
    """
    is_text = isinstance(prompts, str) and not os.path.exists(prompts) and not _FILE_NAME.fullmatch(prompts)
    return None if is_text else Path(prompts)


def read_prompts(
    prompts: str | Path, *, sampler: str = "ddim", scale: float = SCALE, side: int = SIDE
) -> tuple[Prompt, ...]:
    """The prompts of a file, or of a text in the form of a .txt file; the rest is ignored with a warning.

    .txt: a prompt in each line, followed by ` --n negative prompt --w width --h height --d seed --s steps --l scale
    --ss sampler`, any of them; lines that begin with # do not count. .json: a list of such lines or of objects. .toml:
    the same objects as [[prompt.subset]] below what they share in [prompt]. sampler, scale, side: those of prompts that
    name none; side is both width and height.

    Raises:
        UsageError: no such file, another ending, no prompts.
        InputError: not UTF-8, or not the format that its ending names.
    """
    path = prompt_file(prompts)
    if path is None:
        entries = _entries(str(prompts), ".txt")
    else:
        ending = path.suffix.lower()
        if ending not in _ENDINGS:
            raise UsageError(f"{path}: the name of a file of prompts ends in {', '.join(_ENDINGS)}")
        try:
            entries = _entries(path.read_text(encoding="utf-8-sig"), ending)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: no valid {ending[1:]} file of prompts in UTF-8 ({error})") from None
    if not entries:
        raise UsageError(
            f"{path or '--prompts'}: no prompts in it. Write a prompt, or one in each line of a .txt file."
        )
    own = {"sampler": sampler, "scale": scale, "width": side, "height": side}
    return tuple(
        _prompt(entry, f"{path or 'prompts'}: sample {number:02d}", own) for number, entry in enumerate(entries)
    )


_ENDINGS = (".txt", ".toml", ".json")


def _entries(text: str, ending: str) -> list[str | dict[str, Any]]:
    """The lines or objects of a file with one of `_ENDINGS`. Raises ValueError."""
    if ending == ".txt":
        return [line.strip() for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if ending == ".toml":
        match tomllib.loads(text):
            case {"prompt": {"subset": [*subsets], **shared}} if all(isinstance(subset, dict) for subset in subsets):
                return [shared | subset for subset in subsets]
        raise ValueError("[[prompt.subset]] is missing")
    match json.loads(text):
        case [*entries] if all(isinstance(entry, str | dict) for entry in entries):
            return entries
    raise ValueError("it must be a list of lines or objects")


def _prompt(entry: str | Mapping[str, Any], where: str, own: Mapping[str, Any]) -> Prompt:
    """The prompt of a line with switches, or of an object."""
    if isinstance(entry, str):
        text, *switches = entry.split(" --")
        values: dict[str, Any] = {"prompt": text}
        for switch in switches:
            name, _, value = switch.strip().partition(" ")
            values[_SWITCHES.get(name.lower(), f"--{name}")] = value.strip()
    else:
        values = dict(entry)
    fields = dict(own)
    for key, value in values.items():
        if value is None:
            continue
        try:
            field, read = _KEYS[key]
            fields[field] = read(value)
        except (KeyError, ValueError, TypeError, OverflowError):
            _log.warning("%s: ignored, because it means nothing here: %s %s", where, key, value)
    return Prompt(**fields)


def _checked(read: Callable[[Any], Any], valid: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A reader of values that raises ValueError for those that are not valid."""

    def checked(value: Any) -> Any:
        if not valid(read(value)):
            raise ValueError(value)
        return read(value)

    return checked


def _side(pixels: int) -> int:
    """The width or height that is drawn; a number beyond any memory is a mistake."""
    if pixels > _LARGEST_SIDE:
        raise ValueError(pixels)
    return max(64, pixels // 8 * 8)


def _text(text: str) -> str:
    text.encode()  # raises UnicodeEncodeError for half a character, which no model can read
    return text


_LARGEST_SIDE = 1 << 14  # pixels

# sd-scripts' name in .toml and .json -> the field, and how its value is read.
_KEYS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "prompt": ("prompt", lambda value: _text(str(value))),
    "negative_prompt": ("negative", lambda value: _text(str(value))),
    "width": ("width", lambda value: _side(int(value))),
    "height": ("height", lambda value: _side(int(value))),
    # Seeds that torch takes; a negative number is no seed in sd-scripts either.
    "seed": ("seed", _checked(int, lambda seed: 0 <= seed < 2**64)),
    "sample_steps": ("steps", lambda value: max(1, min(1000, int(value)))),
    "scale": ("scale", _checked(float, math.isfinite)),
    "sample_sampler": ("sampler", _checked(str, SAMPLERS.__contains__)),
}

_SWITCHES: Mapping[str, str] = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
}
