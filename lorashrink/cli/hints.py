"""What people type by habit or by mistake, and the line that they mean."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorashrink.errors import UsageError
from lorashrink.recipes.explained import KEYS

_RECIPE = "The recipe says how much to keep: -r {recipe}."

# Options of other tools, and ranks and sizes as options -> what to type. {value} is what follows the option.
OPTIONS: Mapping[str, str] = {
    "--rank": _RECIPE.format(recipe="rank={value}"),
    "--dim": _RECIPE.format(recipe="rank={value}"),
    "--size": _RECIPE.format(recipe="size={value}"),
    "--energy": _RECIPE.format(recipe="energy={value}"),
    "--threshold": _RECIPE.format(recipe="fro_ckpt=1,thr={value}"),
    "--new_rank": _RECIPE.format(recipe="rank={value}"),
    "--new_conv_rank": _RECIPE.format(recipe="rank=...,conv_rank={value}"),
    "--dynamic_method": _RECIPE.format(recipe="{value}=0.9"),
    "--dynamic_param": _RECIPE.format(recipe="sv_fro={value}"),
    "--save_to": "Name the result with -o {value}.",
    "--out": "Name the result with -o {value}.",
    "--save_precision": "The dtype is -t {value}.",
    "--precision": "The dtype is -t {value}.",
    "--model": "Name LoRAs without an option, and their base model with --base.",
    "--lora": "Name LoRAs without an option: {value}",
    "--ratios": "Write a weight behind its LoRA: style.safetensors:0.7",
    "--weights": "Write a weight behind its LoRA: style.safetensors:0.7",
}

_ITEM = rf"(?:{'|'.join(KEYS)})(?:=[^,:=]*)?"
_NUMBER = re.compile(r"-?\d*\.?\d+")

_Hint = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]

_WINDOWS: _Hint = (
    re.compile(r"([A-Za-z]):\\(.*)"),
    lambda match: (
        "is a path of Windows, which this system does not know. In WSL it is "
        f"{shlex.quote('/mnt/' + match[1].lower() + '/' + match[2].replace(chr(92), '/'))}."
    ),
)

# What an argument that is no file looks like -> what is wrong with it, and what to type.
_NAMES: Sequence[_Hint] = (
    (
        re.compile(r"""["'“”‘’«]+(.*?)["'“”‘’»]+"""),
        lambda match: f"the name contains quotes. Type it without them: {shlex.quote(match[1])}",
    ),
    (
        re.compile(rf"{_ITEM}(?:[,:]{_ITEM})*"),
        lambda match: f"is not a file. Did you mean -r {match[0]}?",
    ),
    *(() if os.name == "nt" else (_WINDOWS,)),
    (re.compile(r"(~/.*)"), lambda match: f"~ is not replaced inside quotes. Write {os.path.expanduser(match[1])}."),
    (re.compile(r"(https?://\S+)"), lambda match: "is an address. Nothing is downloaded; give a file on your disk."),
)


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for an argument that is no file and shows what it was meant for."""
    for number, name in enumerate(names):
        if os.path.exists(name) or (glob.has_magic(name) and glob.glob(name, recursive=True)):
            continue
        if _NUMBER.fullmatch(name):
            before = names[number - 1] if number else "style.safetensors"
            recipe = f", a rank as -r rank={name}" if name.isdigit() else ""
            raise UsageError(f"'{name}' is not a file. A weight is written as {before}:{name}{recipe}.")
        for pattern, text in _NAMES:
            if match := pattern.fullmatch(name):
                raise UsageError(f"{name}: {text(match)}")


def line(command: str, *words: str | Path) -> str:
    """A line to type: these arguments behind this command."""
    return shlex.join(["lorashrink", command, *map(str, words)])


def option_hint(option: str, words: Sequence[str]) -> str:
    """What to type in place of an option that does not exist, or nothing; `words` is the command line."""
    written = next((word for word in words if word.partition("=")[0] == option), option)
    following = [*words, ""][words.index(written) + 1] if written in words else ""
    value = written.partition("=")[2] or following
    return OPTIONS.get(f"--{option.lstrip('-').replace('-', '_')}", "").format(value=value or "...")
