"""A LoRA on a loaded pipeline for as long as it is needed, through PEFT's layers."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import Adapter, open_adapter
from lorashrink.bases import Base
from lorashrink.errors import InputError
from lorashrink.linking.renaming import renamed
from lorashrink.pictures.pipelines import first_sentence

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


@contextmanager
def adapted(pipeline: Any, adapter: Path | None, base: Base) -> Iterator[None]:
    """The adapter on the model for as long as this lasts; with None the model stays as it is.

    base: the same model. Afterwards, and after any error, the model is what it was, bit by bit. Raises InputError if
    the adapter cannot be put on it.
    """
    with ExitStack() as stack:
        if adapter is not None:
            states: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)  # part of the pipeline -> PEFT's names
            with open_adapter(adapter) as opened:
                store = in_diffusers_names(opened, base).store
                for key in store.tensors:
                    part, _, name = key.partition(".")
                    if ".lora_" in key and part in pipeline.components:
                        if not hasattr(getattr(pipeline, part), "text_model"):
                            name = name.removeprefix("text_model.")  # a level that transformers 5 has dropped
                        states[part][name] = store.read(key)
            try:
                for part, state in states.items():
                    if getattr(pipeline, part) is None:
                        raise ValueError(f"the model comes without its {part}")
                    stack.enter_context(_injected(getattr(pipeline, part), state))
            except (ValueError, KeyError, RuntimeError) as error:
                raise InputError(f"{adapter}: PEFT cannot put it on the model ({first_sentence(error)}).") from error
        yield


def check_adapter(adapter: Path, base: Base) -> None:
    """Check that the model of this base can draw with the adapter; a warning names tensors that pictures leave out.

    Raises:
        InputError: it is for another family of models, or has layers that diffusers does not know.
    """
    with open_adapter(adapter) as opened:
        renamed_adapter = in_diffusers_names(opened, base)
        parts = tuple(f"{base.family.folder(part)}." for part in {part for part, _ in base.weights})
        keys = renamed_adapter.store.tensors
        unused = [key for key in keys if not (".lora_" in key and key.startswith(parts))]
    if len(unused) == len(keys):
        raise InputError(f"{adapter}: changes no weight of {base.path}.")
    if unused:
        _log.warning("%s: pictures are drawn without %d of its tensors, such as %s", adapter, len(unused), unused[0])


def in_diffusers_names(adapter: Adapter, base: Base) -> Adapter:
    """The adapter under diffusers' own names, which diffusers reads without guessing.

    Raises:
        FamilyMismatch, ShapeError: it does not belong to the model.
        InputError: some of its layers are not LoRA, or it has none.
    """
    if not adapter.layers:
        raise InputError(
            f"{adapter.path}: has no layers of LoRA, only {len(adapter.others)} other tensors, which all recipes keep."
        )
    for layer in adapter.layers:
        if layer.family.name != "lora":
            raise InputError(
                f"{adapter.path}: {layer.name} is {layer.algo}, and pictures are drawn with LoRA only. "
                "Make one of it with `lorashrink resize --as lora -r energy=1`."
            )
    return renamed(adapter, "diffusers", base).adapter


@contextmanager
def _injected(model: Any, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """PEFT's layers around those of the model for as long as this lasts. Raises ValueError if a tensor has no place.

    diffusers' own loader guesses by names: ranks that differ in layers it does not list, and DoRA in kohya's names, are
    too much for it.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: dict[int, list[str]] = defaultdict(list)  # rank -> modules
    for key, tensor in state.items():
        if ".lora_A." in key:
            names[len(tensor)].append(re.escape(key.partition(".lora_A.")[0]))
    # One pattern for each rank, because PEFT tries all of them on every layer. Scales are inside the factors, so that
    # alpha is the rank.
    patterns = {f"^(?:{'|'.join(modules)})$": rank for rank, modules in names.items()}
    config = LoraConfig(
        # A list would be taken for endings of names, such as the `proj_out` that each block of FLUX has too.
        target_modules="|".join(name for modules in names.values() for name in modules),
        rank_pattern=patterns,
        alpha_pattern=patterns,
        use_dora=any(".lora_magnitude_vector" in key for key in state),
        lora_bias=any(".lora_B.bias" in key for key in state),
    )
    try:
        inject_adapter_in_model(config, model)
        result: Any = set_peft_model_state_dict(model, state)
        missing = [key for key in result.missing_keys if ".lora_" in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"no place for {(missing + result.unexpected_keys)[0]}")
        yield
    finally:  # the model's own layers are as they were, inside PEFT's
        wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, module in wrapped:
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
