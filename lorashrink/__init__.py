"""lorashrink: look inside LoRA adapters, shrink them against their base, prove what that did.

import lorashrink as ls

result = ls.resize("lora.safetensors", base="model.safetensors", recipes="fro_ckpt=1,thr=-3.55", output="out/")
table = ls.inspect("lora.safetensors", base="model.safetensors")
for layer in ls.open_adapter("lora.safetensors"):
    layer.delta.dense()      # [out, in, ...] float32
"""

from typing import TYPE_CHECKING, Any

from lorashrink._version import __version__
from lorashrink.errors import LorashrinkError

if TYPE_CHECKING:
    from lorashrink.adapters import open_adapter
    from lorashrink.base_norms import norms
    from lorashrink.bases import open_base
    from lorashrink.batch import resize
    from lorashrink.calibrating import calibrate
    from lorashrink.comparison import compare
    from lorashrink.conversion import convert
    from lorashrink.demonstration import demo
    from lorashrink.extraction import extract
    from lorashrink.inspection import inspect
    from lorashrink.merging import merge
    from lorashrink.overlapping import overlap
    from lorashrink.recipe import Recipe
    from lorashrink.refining import refine
    from lorashrink.reporting import report
    from lorashrink.sweeping import sweep

# Imported when first used, because torch takes longer to import than most commands take to run.
_WHERE = {
    "Recipe": "recipe",
    "calibrate": "calibrating",
    "compare": "comparison",
    "convert": "conversion",
    "demo": "demonstration",
    "extract": "extraction",
    "inspect": "inspection",
    "merge": "merging",
    "norms": "base_norms",
    "open_adapter": "adapters",
    "open_base": "bases",
    "overlap": "overlapping",
    "refine": "refining",
    "report": "reporting",
    "resize": "batch",
    "sweep": "sweeping",
}

__all__ = [
    "LorashrinkError",
    "Recipe",
    "__version__",
    "calibrate",
    "compare",
    "convert",
    "demo",
    "extract",
    "inspect",
    "merge",
    "norms",
    "open_adapter",
    "open_base",
    "overlap",
    "refine",
    "report",
    "resize",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lorashrink' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"lorashrink.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
