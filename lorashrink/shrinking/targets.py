"""Programs that read less than the format allows: what an adapter must be for them, and what that takes away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lorashrink.adapters import Adapter, peft
from lorashrink.adapters.peft_keys import only_in_peft
from lorashrink.errors import UsageError
from lorashrink.text import count_text


@dataclass(frozen=True, slots=True)
class Target:
    """A program that reads nothing but factors.

    `items` are added to every recipe; `fit` takes away what the program does not read.
    """

    title: str
    items: tuple[str, ...]
    fit: Callable[[Adapter], Adapter]


def for_vllm(adapter: Adapter) -> Adapter:
    """One rank, no patterns, and nothing beside the factors (https://docs.vllm.ai, LoRA adapters)."""
    if not adapter.as_folder:
        raise UsageError(
            f"{adapter.path}: vLLM loads PEFT folders. Give one, or add --naming peft with the model as --base."
        )
    dora = [layer.name for layer in adapter.layers if "magnitude" in layer.keys]
    if dora:
        raise UsageError(
            f"{adapter.path}: DoRA in {count_text(len(dora), 'layer')}, first {dora[0]}: vLLM does not load it. "
            "Merge the adapter into its model instead."
        )
    dropped = {key: f"vLLM does not load it ({reason})" for key, reason in adapter.others.items()}
    layers = []
    for layer in adapter.layers:
        if layer.family.name == "experts":
            dropped |= dict.fromkeys(layer.keys.values(), "vLLM does not load it (target_parameters)")
            continue
        if "bias" in layer.keys:
            dropped[layer.keys["bias"]] = "vLLM does not load biases of adapters"
        layers.append(replace(layer, keys={role: key for role, key in layer.keys.items() if role != "bias"}))
    if adapter.layers and not layers:
        raise UsageError(
            f"{adapter.path}: holds factors of experts alone (target_parameters), and vLLM does not load them."
        )
    config = peft.with_saved({**adapter.settings.get("", {}), "bias": "none", "lora_bias": False}, ())
    config.pop("target_parameters", None)
    if kept := only_in_peft(config):
        raise UsageError(f"{adapter.path}: {next(iter(kept))} is set, which vLLM does not follow.")
    return replace(adapter, layers=tuple(layers), others={}, dropped=dropped, settings={"": config})


TARGETS: Mapping[str, Target] = {"vllm": Target("vLLM", ("uniform", "pow2"), for_vllm)}


def with_items(recipe: str, target: Target) -> str:
    """The recipe as the target needs it, whatever it says itself of these items."""
    items = [item for item in recipe.split(",") if item.partition("=")[0].strip() not in target.items]
    return ",".join([*items, *target.items])
