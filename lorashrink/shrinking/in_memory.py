"""`resize` of an adapter in memory: its tensors go in and come out, and a model gets them in place of the old ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lorashrink._version import __version__
from lorashrink.adapters import Tensors
from lorashrink.errors import Progress, UsageError
from lorashrink.results.shrinking import Report
from lorashrink.shrinking.ledger import OnResult
from lorashrink.shrinking.options import ResizeOptions
from lorashrink.shrinking.prepared import prepare
from lorashrink.shrinking.request import requested_recipes

if TYPE_CHECKING:
    from torch import Tensor

# Options of `resize` that mean something without files.
_PREPARE = ("base", "calibration", "form", "unmapped", "device", "jobs")
_OTHERS = ("recipes", "dtype", "clip", "fro_limit")


def resize_in_memory(
    held: Tensors, options: Mapping[str, Any], *, on_result: OnResult | None = None, progress: Progress | None = None
) -> Report:
    """Shrink an adapter in memory by each recipe. Raises as `resize`; a failure is raised as well."""
    refuse_options(held, options.keys() - {*_PREPARE, *_OTHERS})
    checked = ResizeOptions(**options)
    recipes = requested_recipes(checked, None)
    if held.model is not None and len(recipes) != 1:
        raise UsageError(f"{held}: a model takes one shrunk adapter, and {len(recipes)} recipes were given.")
    prepared = prepare(held, progress=progress, **{key: options[key] for key in _PREPARE if key in options})
    results = []
    for recipe in recipes:
        result = prepared.shrink(recipe, dtype=checked.dtype)
        if held.model is not None and result.state_dict is not None:
            put_back(held, result.state_dict, result.settings)
        if on_result is not None:
            on_result(result)
        results.append(result)
    base = prepared.base
    return Report(__version__, base.info if base else None, tuple(results), ())


def refuse_options(held: Tensors, names: Collection[str]) -> None:
    """Raises UsageError if options are given that are about files."""
    if names:
        raise UsageError(
            f"{held}: {', '.join(sorted(names))} goes with files only. Save the adapter first, or leave it out."
        )


def put_back(held: Tensors, state: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a PeftModel or pipeline the shrunk adapter in place of the one that it was taken from.

    In a pipeline it has the strengths that the old adapter had.
    """
    model, name = held.model, held.adapter_name
    if hasattr(model, "load_lora_weights"):
        weights = {component: _weight(module, name) for component, module in model.components.items()}
        model.delete_adapters(name)
        model.load_lora_weights(dict(state), adapter_name=name)
        components = {key.partition(".")[0] for key in state}
        model.set_adapters(name, {component: weights[component] for component in components})
        return
    from peft import LoraConfig, set_peft_model_state_dict

    old = model.peft_config[name]
    kind = type(old) if isinstance(old, LoraConfig) else LoraConfig
    accepted = kind().to_dict().keys()
    fields = {key: value for key, value in settings[""].items() if key in accepted}
    # The whole names of what is left: an ending may name layers that the recipe removed.
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in state if ".lora_" in key}
    config = kind(**{**fields, "target_modules": sorted(modules)})
    model.delete_adapter(name)
    model.add_adapter(name, config)
    set_peft_model_state_dict(model, dict(state), adapter_name=name)
    model.set_adapter(name)


def _weight(module: Any, name: str) -> float | None:
    """The strength at which an adapter is active in a component; None if it has none of its layers."""
    config = getattr(module, "peft_config", {}).get(name)
    if config is None:
        return None
    for layer in module.modules():
        if name in getattr(layer, "scaling", {}):
            rank, alpha = layer.r[name], layer.lora_alpha[name]
            return float(layer.scaling[name] / (alpha / (rank**0.5 if config.use_rslora else rank)))
    return 1.0
