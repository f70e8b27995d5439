"""lorashrink: look inside LoRA adapters, shrink them against their base, prove what that did.

import lorashrink as ls

result = ls.resize("lora.safetensors", base="model.safetensors", recipes="fro_ckpt=1,thr=-3.55", output="out/")
table = ls.inspect("lora.safetensors", base="model.safetensors")
for layer in ls.open_adapter("lora.safetensors"):
    layer.delta.dense()      # [out, in, ...] float32
"""

from typing import TYPE_CHECKING, Any

from lorashrink._version import __version__ as __version__
from lorashrink.errors import LorashrinkError as LorashrinkError

if TYPE_CHECKING:
    from lorashrink.adapters import Tensors as Tensors
    from lorashrink.adapters import open_adapter as open_adapter
    from lorashrink.automatic.run import shrink as shrink
    from lorashrink.bases import open_base as open_base
    from lorashrink.bases.norms import norms as norms
    from lorashrink.calibration.calibrate import calibrate as calibrate
    from lorashrink.calibration.refine import refine as refine
    from lorashrink.demonstration import demo as demo
    from lorashrink.insight.comparison import compare as compare
    from lorashrink.insight.inspection import inspect as inspect
    from lorashrink.insight.overlapping import overlap as overlap
    from lorashrink.making.conversion import convert as convert
    from lorashrink.making.extraction import extract as extract
    from lorashrink.making.merging import merge as merge
    from lorashrink.measuring.run import evidence as evidence
    from lorashrink.packing.pack import pack as pack
    from lorashrink.packing.unpack import unpack as unpack
    from lorashrink.recipes.grammar import Recipe as Recipe
    from lorashrink.reports.report import report as report
    from lorashrink.shrinking.prepared import prepare as prepare
    from lorashrink.shrinking.run import resize as resize
    from lorashrink.sweeping.sweep import sweep as sweep

# Public name -> its module, imported when first used: torch takes longer to import than most commands take to run.
_MODULES = {
    "Recipe": "recipes.grammar",
    "calibrate": "calibration.calibrate",
    "compare": "insight.comparison",
    "convert": "making.conversion",
    "demo": "demonstration",
    "evidence": "measuring.run",
    "extract": "making.extraction",
    "inspect": "insight.inspection",
    "merge": "making.merging",
    "norms": "bases.norms",
    "Tensors": "adapters",
    "open_adapter": "adapters",
    "open_base": "bases",
    "overlap": "insight.overlapping",
    "prepare": "shrinking.prepared",
    "refine": "calibration.refine",
    "pack": "packing.pack",
    "report": "reports.report",
    "resize": "shrinking.run",
    "shrink": "automatic.run",
    "sweep": "sweeping.sweep",
    "unpack": "packing.unpack",
}

__all__ = ["LorashrinkError", "__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lorashrink' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"lorashrink.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
