"""PEFT's settings of an adapter: in `adapter_config.json`, or in the header of a file by diffusers >= 0.34.

Both tell the scale of layers that have no alpha tensor, and both must follow when ranks change. Source: PEFT's
`LoraConfig` (r, lora_alpha, rank_pattern, alpha_pattern, use_rslora).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lorashrink.errors import DamagedFile, InputError

METADATA_KEY = "lora_adapter_metadata"  # its keys begin with the component: "unet.r", "text_encoder.lora_alpha"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# component ("unet", ...; "" for a whole folder) -> its settings
Settings = Mapping[str, Mapping[str, Any]]


def is_folder(path: Path) -> bool:
    """Whether this is a folder as PEFT's `save_pretrained` makes them."""
    # unlike Path.is_file, no error for a name that is too long
    return all(os.path.isfile(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))


def from_metadata(metadata: Mapping[str, str]) -> Settings:
    """The settings in a file's header; {} if there are none that can be read."""
    try:
        entries = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in entries.items() if isinstance(entries, dict) else ():
        component, _, name = key.partition(".")
        settings.setdefault(component, {})[name] = value
    return settings


def from_folder(folder: Path) -> Settings:
    """The settings of a PEFT folder. Raises InputError or DamagedFile."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise DamagedFile(f"{path}: holds no settings. Save the adapter again.")
    return {"": config}


def scale(settings: Settings, layer: str, rank: int) -> float:
    """alpha/r of a layer, or alpha/√r with rsLoRA; 1 if the settings say nothing.

    Raises ValueError, TypeError or re.error if they are broken.
    """
    component, module = _module(settings, layer)
    config = settings.get(component, {})
    alpha = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def with_ranks(settings: Settings, ranks: Mapping[str, int], others: Collection[str]) -> Settings:
    """The settings for layers that now have these ranks, with all scale inside their factors.

    `others` are tensors that stayed as they are. If there are any, the defaults stay valid for them, and every
    rank becomes a pattern; else the largest rank is the default, for readers that know no patterns.
    """
    new = {component: dict(config) for component, config in settings.items()}
    for component, config in new.items():
        stored = {module: rank for at, module, rank in _located(settings, ranks) if at == component}
        if not stored:
            continue
        if others:
            rank, rooted = config.get("r"), bool(config.get("use_rslora"))
            alphas = {module: each**0.5 if rooted else each for module, each in stored.items()}
            default = config.get("lora_alpha")
        else:
            rank = default = max(stored.values())
            alphas = dict(stored)
            config |= {"r": rank, "lora_alpha": rank, "use_rslora": False}
        config["rank_pattern"] = {_pattern(module): each for module, each in sorted(stored.items()) if each != rank}
        config["alpha_pattern"] = {_pattern(module): each for module, each in sorted(alphas.items()) if each != default}
    return new


def to_metadata(settings: Settings) -> str:
    """The text of the header's entry."""
    entries = {f"{component}.{name}": value for component, each in settings.items() for name, value in each.items()}
    return json.dumps(entries, sort_keys=True)


def to_file(settings: Settings) -> bytes:
    """The contents of `adapter_config.json`."""
    return (json.dumps(settings[""], indent=2, sort_keys=True) + "\n").encode()


def _module(settings: Settings, layer: str) -> tuple[str, str]:
    """(component, module name as PEFT's patterns mean it)."""
    if "" in settings:
        return "", layer.removeprefix("base_model.model.")
    component, _, module = layer.partition(".")
    return component, module


def _located(settings: Settings, ranks: Mapping[str, int]) -> list[tuple[str, str, int]]:
    return [(*_module(settings, layer), rank) for layer, rank in ranks.items()]


def _pattern_value(patterns: object, module: str, default: Any) -> Any:
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    return default


def _pattern(module: str) -> str:
    """A regular expression for one module and, by its start, for none that only ends like it."""
    # transformers >= 5 has no such level in CLIPTextModel, and loaders take it off the names but not off patterns
    return "^(text_model.)?" + module.removeprefix("text_model.") if module.startswith("text_model.") else f"^{module}"
