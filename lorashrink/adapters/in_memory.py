"""Adapters that are in memory: a mapping of tensors, a PeftModel, or a diffusers pipeline with a loaded adapter.

A model is recognised by what it has, so that neither PEFT nor diffusers is imported before the user did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import peft
from lorashrink.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tensors:
    """An adapter as named tensors, as a file would hold them.

    metadata: the strings of the file's header. name: what messages call it. settings: PEFT's, where the tensors alone
    do not tell the scale. model: the PeftModel or pipeline that it was taken from.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    name: str = "adapter in memory"
    settings: peft.Settings = field(default_factory=dict, repr=False)
    model: Any = field(default=None, repr=False)
    adapter_name: str = ""  # in that model

    def __str__(self) -> str:
        return self.name


def in_memory(source: object) -> Tensors | None:
    """The adapter that an object holds; None if it is no adapter in memory but a path, or several of them.

    Raises UsageError if a model has no adapter, or several that are active.
    """
    if isinstance(source, Tensors):
        return source
    if isinstance(source, Mapping):
        return Tensors(source)
    model: Any = source
    if hasattr(model, "components") and hasattr(model, "load_lora_weights"):
        from peft import get_peft_model_state_dict

        name = _active(model.get_active_adapters(), "pipeline")
        tensors: dict[str, Tensor] = {}
        settings: dict[str, dict[str, Any]] = {}
        for component, module in model.components.items():
            config = getattr(module, "peft_config", {}).get(name)
            if config is not None:
                state = get_peft_model_state_dict(module, adapter_name=name)
                tensors |= {f"{component}.{key}": tensor for key, tensor in state.items()}
                settings[component] = _plain(config)
        metadata = {"format": "pt", peft.METADATA_KEY: peft.to_metadata(settings)}
        return Tensors(tensors, metadata, f"adapter {name} of the pipeline", settings, model, name)
    if hasattr(model, "peft_config") and hasattr(model, "active_adapters"):
        from peft import get_peft_model_state_dict

        name = _active(model.active_adapters, "PeftModel")
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        settings = {"": _plain(model.peft_config[name])}
        return Tensors(tensors, {}, f"adapter {name} of the PeftModel", settings, model, name)
    return None


def _active(names: object, kind: str) -> str:
    active = list(names) if isinstance(names, (list, tuple)) else []
    if len(active) != 1:
        which = f"{len(active)} active adapters ({', '.join(map(str, active))})" if active else "no active adapter"
        raise UsageError(f"this {kind} has {which}, and one is shrunk at a time. Activate it with set_adapters.")
    return str(active[0])


def _plain(config: Any) -> dict[str, Any]:
    """PEFT's settings as JSON could hold them."""
    settings = asdict(config)
    for key, value in settings.items():
        if isinstance(value, Enum):
            settings[key] = value.value
        elif isinstance(value, (set, frozenset)):
            settings[key] = sorted(value)
    return settings
