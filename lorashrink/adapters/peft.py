"""PEFT's settings of an adapter: in `adapter_config.json`, or in the header of a file by diffusers >= 0.34.

Both tell the scale of layers that have no alpha tensor, and both must follow when ranks change. Source: PEFT's
`LoraConfig` (r, lora_alpha, rank_pattern, alpha_pattern, use_rslora).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import regex

from lorashrink.adapters.peft_keys import only_in_peft
from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.store import is_file, read_text

METADATA_KEY = "lora_adapter_metadata"  # its keys begin with the component: "unet.r", "text_encoder.lora_alpha"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin")

# component ("unet", ...; "" for a whole folder) -> its settings
Settings = Mapping[str, Mapping[str, Any]]


def is_folder(path: Path) -> bool:
    """Whether this is a folder as PEFT's `save_pretrained` makes them. Raises InputError if the disk does not tell."""
    return is_file(path / CONFIG_FILE) and any(is_file(path / name) for name in WEIGHTS_FILES)


def weights_in(folder: Path) -> Path:
    """The file with the tensors of a PEFT folder."""
    return next(folder / name for name in WEIGHTS_FILES if is_file(folder / name))


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
        config = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path}: not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict):
        raise DamagedFile(f"{path}: holds no settings. Save the adapter again.")
    return {"": config}


# mlx-lm keeps the scale of `adapters.safetensors` in a file of PEFT's name, under this key.
_MLX = "lora_parameters"


def beside(path: Path) -> Settings:
    """The settings that mlx-lm wrote beside a file of its adapters; {} if there are none."""
    file = path.parent / CONFIG_FILE
    if not path.name.endswith("adapters.safetensors") or not is_file(file):
        return {}
    config = from_folder(path.parent)[""]
    if config.get("fine_tune_type") == "dora":
        raise InputError(f"{path}: is DoRA of mlx-lm, which is not read. Fuse it into its model with mlx_lm.fuse.")
    return {"": {_MLX: config[_MLX]}} if isinstance(config.get(_MLX), Mapping) else {}


def config(settings: Settings, layer: str) -> Mapping[str, Any]:
    """The settings that apply to a layer; {} if there are none."""
    return settings.get(_module(settings, layer)[0], {})


def scale(settings: Settings, layer: str, rank: int, patterns: Patterns) -> float:
    """alpha/r of a layer, or alpha/√r with rsLoRA; 1 if the settings say nothing.

    `rank` is the stored one; what PEFT divides by is another number in families whose tensors have another size.
    `patterns` are those of all layers of the file. Raises ValueError, TypeError, ZeroDivisionError, regex.error or
    TimeoutError if the settings are broken.
    """
    component, module = _module(settings, layer)
    config = settings.get(component, {})
    if _MLX in config:
        return float(config[_MLX].get("scale", 1.0))
    name = next(iter(_parameters(config, module)), module)
    alpha = patterns.value(config.get("alpha_pattern"), name, config.get("lora_alpha", config.get("alpha")))
    if alpha is None:
        return 1.0
    divisor: float = rank
    if config.get("peft_type") in ("LOHA", "LOKR"):
        divisor = float(patterns.value(config.get("rank_pattern"), module, config.get("r", rank)))
    elif config.get("peft_type") == "ADALORA":
        divisor = float(config.get("init_r", rank)) + 1e-5  # as its forward pass does; the trained count is not saved
    return float(alpha) / (divisor**0.5 if config.get("use_rslora") else divisor)


# What the configuration of any kind of adapter has in common with LoRA's.
_COMMON = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
)


# Settings of an initialisation, which loading may not repeat at another rank.
_OF_FIRST_NUMBERS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")


def as_lora(settings: Settings) -> Settings:
    """The settings of an adapter of another kind whose layers are all written as LoRA."""
    return {
        component: config
        if config.get("peft_type", "LORA") == "LORA" and _MLX not in config
        else {"peft_type": "LORA", "bias": "none", **_in_common(config)}
        for component, config in settings.items()
    }


def with_saved(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The settings without the whole modules and the tokens of which no tensor is among these keys; PEFT needs all."""
    new = dict(config)
    if modules := new.get("modules_to_save"):
        new["modules_to_save"] = [name for name in modules if any(f".{name}." in f".{key}" for key in keys)] or None
    if not any(".trainable_tokens_delta" in key for key in keys):
        new.pop("trainable_token_indices", None)
    return new


def _in_common(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in _COMMON if key in config} | only_in_peft(config)


def settings_for(scales: Mapping[str, tuple[int, float]], model: Mapping[str, Any]) -> Settings:
    """The settings of a folder of LoRA layers: module -> (rank, scale), and settings that name the model."""
    names = {module: _adapted(model, module) for module in scales}  # parameters of their own are no modules
    ranks = {names[module]: rank for module, (rank, _) in scales.items()}
    alphas = {names[module]: rank * scale for module, (rank, scale) in scales.items()}
    rank: Any
    alpha: Any
    rank, alpha = (
        max(dict.fromkeys(values), key=list(values).count, default=1)  # the most frequent one
        for values in (ranks.values(), alphas.values())
    )
    return {
        "": {
            **_in_common(model),
            "peft_type": "LORA",
            "bias": "none",
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "target_modules": sorted(module for module, name in names.items() if name == module),
            "rank_pattern": _patterns(ranks, rank),
            "alpha_pattern": _patterns(alphas, alpha),
        }
    }


def experts(settings: Settings, layer: str, rows: int, patterns: Patterns) -> int | str:
    """How many experts have their factors in a layer, whose A has so many rows; 0 if it is no such layer.

    A text is why the settings do not tell. Raises as `scale`.
    """
    component, module = _module(settings, layer)
    config = settings.get(component, {})
    names = _parameters(config, module)
    defaults = (("rank_pattern", config.get("r")), ("alpha_pattern", config.get("lora_alpha")))
    values = [{patterns.value(config.get(key), name, default) for name in names} for key, default in defaults]
    if not names:
        anywhere = [name for name in config.get("target_parameters") or () if "." not in name]
        module_rank = patterns.value(config.get("rank_pattern"), module, config.get("r"))
        lost = ".base_layer." in f".{module}." or (anywhere and rows != module_rank)
        return "factors of experts, and target_parameters does not name their module" if lost else 0
    if any(len(of_all) > 1 for of_all in values):
        return "target_parameters: factors of experts with several ranks or alphas, and nothing says which are whose"
    (rank,) = values[0]
    if not isinstance(rank, int) or rank < 1 or rows % rank:
        return f"target_parameters: {rows} rows of factors of experts, which are not of rank {rank}"
    return rows // rank


def _parameters(config: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of a module that PEFT adapts by their own names, which its patterns are matched with."""
    module = module.replace(".base_layer", "")
    named = config.get("target_parameters")
    split = [str(name).rpartition(".") for name in named] if isinstance(named, list) else []
    return sorted({f"{module}.{name}" for owner, _, name in split if owner and f".{module}".endswith(f".{owner}")})


def _adapted(config: Mapping[str, Any], module: str) -> str:
    """The module, or all of its parameters that are adapted, as a pattern means them."""
    names = _parameters(config, module)
    if len(names) < 2:
        return next(iter(names), module)
    owner = names[0].rpartition(".")[0]
    return f"{owner}.({'|'.join(name.rpartition('.')[2] for name in names)})"


def with_ranks(
    settings: Settings, ranks: Mapping[str, int], others: Collection[str], *, alpha: int | None = None
) -> Settings:
    """The settings for layers that now have these ranks, and this alpha; without one all scale is in their factors.

    `others` are tensors that stayed as they are. If there are any, the defaults and patterns stay valid for them, and
    every rank becomes a pattern before these; else the largest rank is the default, for readers that know no patterns.
    """
    new = {component: dict(config) for component, config in settings.items()}
    for component, config in new.items():
        modules = ((*_module(settings, layer), rank) for layer, rank in ranks.items())
        stored = {_adapted(config, module): rank for owner, module, rank in modules if owner == component}
        if not stored:
            continue
        if isinstance(config.get("init_lora_weights"), str):  # others are slow, not for every rank, or change the base
            config["init_lora_weights"] = True
            for key in _OF_FIRST_NUMBERS:
                config.pop(key, None)
        if others and "r" in config:
            roots = {module: rank**0.5 if config.get("use_rslora") else 1 for module, rank in stored.items()}
            alphas = {module: (alpha or rank) / roots[module] for module, rank in stored.items()}
            config["rank_pattern"] = _before(stored, config.get("rank_pattern"), config["r"])
            config["alpha_pattern"] = _before(alphas, config.get("alpha_pattern"), config.get("lora_alpha"))
        else:
            rank = max(stored.values())
            config |= {"r": rank, "lora_alpha": alpha or rank, "use_rslora": False}
            config["rank_pattern"] = _patterns(stored, rank)
            config["alpha_pattern"] = {} if alpha else config["rank_pattern"]
    return new


def _before(values: Mapping[str, float], patterns: object, default: float | None) -> dict[str, float]:
    """A table with these modules before the patterns of others; PEFT takes the first pattern that fits."""
    if not isinstance(patterns, Mapping) or not patterns:
        return _patterns(values, default)
    return {**_patterns(values, None), **patterns}


def _patterns(values: Mapping[str, float], default: float | None) -> dict[str, float]:
    """PEFT's table of the modules that do not have the default; the start keeps out names that only end alike."""
    table = {}
    for module, value in sorted(values.items()):
        if value != default:
            # transformers >= 5 has no such level in CLIPTextModel; loaders take it off the names but not off patterns
            name = module.removeprefix("text_model.")
            table[f"^{module}" if name == module else f"^(text_model.)?{name}"] = value
    return table


def to_metadata(settings: Settings) -> str:
    """The text of the header's entry."""
    entries = {f"{component}.{name}": value for component, config in settings.items() for name, value in config.items()}
    return json.dumps(dict(sorted(entries.items())))  # patterns keep their order, in which they are tried


def to_file(settings: Settings) -> bytes:
    """The contents of `adapter_config.json`."""
    config = dict(sorted(settings[""].items()))  # patterns keep their order, in which they are tried
    return (json.dumps(config, indent=2) + "\n").encode()


def _module(settings: Settings, layer: str) -> tuple[str, str]:
    """(component, module name as PEFT's patterns mean it)."""
    if "" in settings:
        return "", layer.replace("_orig_mod.", "").removeprefix("base_model.model.")  # of torch.compile
    component, _, module = layer.partition(".")
    return component, module


# Words and dots, with a start at most: what almost all patterns are.
_WORDS = re.compile(r"\^?[\w.]*?(\w+)")

# Of the processor, for all patterns and names of a file together. A thousand honest ones of each take about one.
_SECONDS = 5.0

# Characters of a pattern, and how often its numbers in braces repeat something, so that it is compiled in a moment.
_MOST = 10_000
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


class Patterns:
    """The patterns of one file, whose matching takes a limited time in all."""

    def __init__(self) -> None:
        self._seconds = _SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def value(self, patterns: object, module: str, default: Any) -> Any:
        """The value of the first pattern that fits the module's name, as PEFT looks it up.

        Raises ValueError, regex.error or TimeoutError if a pattern is too large, broken, or too slow.
        """
        for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
            if self._fits(pattern, module):
                return value
        return default

    def _fits(self, pattern: str, module: str) -> bool:
        # the last word decides at once for almost all; thousands of expressions are slow
        if (words := _WORDS.fullmatch(pattern)) and not module.endswith(words[1]):
            return False
        start = time.thread_time()
        try:
            if pattern not in self._compiled:
                counts = [max(1, *(int(number or 0) for number in pair)) for pair in _COUNTED.findall(pattern)]
                if len(pattern) > _MOST or math.prod(counts) > _MOST:
                    raise ValueError(f"the pattern {pattern[:40]}... is too large")
                self._compiled[pattern] = regex.compile(rf"(.*\.)?({pattern})$")
            # not `re`, which would try for years on patterns that are made for it
            return self._compiled[pattern].match(module, timeout=max(self._seconds, 1e-3)) is not None
        except RecursionError as error:
            raise ValueError(f"{pattern[:40]}... is nested too deeply") from error
        finally:
            self._seconds -= time.thread_time() - start
            if self._seconds <= 0:
                raise TimeoutError(f"the patterns take more than {_SECONDS:g} s")
