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
    from lorashrink.bases import open_base
    from lorashrink.bases.norms import norms
    from lorashrink.calibration.calibrate import calibrate
    from lorashrink.calibration.refine import refine
    from lorashrink.demonstration import demo
    from lorashrink.insight.comparison import compare
    from lorashrink.insight.inspection import inspect
    from lorashrink.insight.overlapping import overlap
    from lorashrink.making.conversion import convert
    from lorashrink.making.extraction import extract
    from lorashrink.making.merging import merge
    from lorashrink.recipes.grammar import Recipe
    from lorashrink.reports.report import report
    from lorashrink.shrinking.run import resize
    from lorashrink.sweeping.sweep import sweep

# Imported when first used, because torch takes longer to import than most commands take to run.
_WHERE = {
    "Recipe": "recipes.grammar",
    "calibrate": "calibration.calibrate",
    "compare": "insight.comparison",
    "convert": "making.conversion",
    "demo": "demonstration",
    "extract": "making.extraction",
    "inspect": "insight.inspection",
    "merge": "making.merging",
    "norms": "bases.norms",
    "open_adapter": "adapters",
    "open_base": "bases",
    "overlap": "insight.overlapping",
    "refine": "calibration.refine",
    "report": "reports.report",
    "resize": "shrinking.run",
    "sweep": "sweeping.sweep",
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
