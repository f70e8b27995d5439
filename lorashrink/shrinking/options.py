"""The options of `resize`, written down once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lorashrink.bases import Base
from lorashrink.recipes.grammar import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class ResizeOptions:
    """How adapters are shrunk. `resize` says what each option does; it can be sent to other processes."""

    # A checkpoint, diffusers folder or norm table; tensors of a model by their names; a base that is open already.
    base: str | Path | Mapping[str, Any] | Base | None = None
    recipes: str | Recipe | Sequence[str | Recipe] = ()  # none: `DEFAULT` with a base, `DEFAULT_ALONE` without
    output: str | Path | None = None  # folder, or file if there is one output; None: beside the input
    dtype: str = "same"  # "same", "fp8", "mixed", "auto", "fp16", "bf16" or "fp32"; also "16", "32"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:N" or "mps"
    jobs: int | None = None  # threads; None: one per core
    unmapped: str = "keep"  # "keep", "drop" or "error"
    form: str = "auto"  # "auto", "lora" or "same"
    naming: str | None = None  # "kohya", "diffusers", "comfy" or "peft"; None: the input's
    target: str | None = None  # a key of TARGETS
    group_by_base: str | Path | None = None  # .toml or .json file, family -> base
    calibration: str | Path | None = None  # statistics that `calibrate` wrote
    anchor: float | None = None  # of predictions of quality, in dB
    stack: bool = False
    clip: float | None = None  # times the spectral norm of the base weight
    fro_limit: float | None = None  # times the Frobenius norm of the base weight
    recursive: bool = False
    force: bool = False
    skip_existing: bool = False
    verify: bool = False  # of outputs that exist
    dry_run: bool = False
    strict: bool = False
    quantiles: bool = False
    space_check: bool = True


class ResizeKeywords(TypedDict, total=False):
    """The fields of `ResizeOptions` as keywords, for type checkers."""

    base: str | Path | Mapping[str, Any] | Base | None
    recipes: str | Recipe | Sequence[str | Recipe]
    output: str | Path | None
    dtype: str
    device: str
    jobs: int | None
    unmapped: str
    form: str
    naming: str | None
    target: str | None
    group_by_base: str | Path | None
    calibration: str | Path | None
    anchor: float | None
    stack: bool
    clip: float | None
    fro_limit: float | None
    recursive: bool
    force: bool
    skip_existing: bool
    verify: bool
    dry_run: bool
    strict: bool
    quantiles: bool
    space_check: bool


def output_dtype(dtype: str, recipes: Iterable[Recipe]) -> str:
    """The word for the dtype of what these recipes make; `quality=` takes "mixed" in place of "same"."""
    return "mixed" if dtype == "same" and any(recipe.select == "quality" for recipe in recipes) else dtype
