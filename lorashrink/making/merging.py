"""The weighted sum of several adapters as one adapter, shrunk by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorashrink.errors import InputError, Progress, UsageError
from lorashrink.linking.inputs import to_sum
from lorashrink.linking.loaders import open_for_8_bits
from lorashrink.linking.renaming import check_naming
from lorashrink.recipes.grammar import parse_recipes
from lorashrink.results.shrinking import Report
from lorashrink.shrinking.options import ResizeOptions, output_dtype
from lorashrink.shrinking.outputs import base_files, becomes_folder, check_outputs, name_outputs, source_files
from lorashrink.shrinking.request import check_needs
from lorashrink.shrinking.run import shrink
from lorashrink.sums.summing import combined, variant_of

# Keeps all that is no rounding.
EVERYTHING = "energy=1"


def merge(
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    recipes: str | Sequence[str] = EVERYTHING,
    base: str | Path | None = None,
    naming: str | None = None,
    as_base_delta: bool = False,
    dtype: str = "same",
    device: str = "auto",
    jobs: int | None = None,
    unmapped: str = "keep",
    calibration: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    quantiles: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the weighted sum of adapters, once by each recipe; default is all of it.

    adapters: `path` or `path:weight`, several of them also as one text with commas; the weight is 1 where none is
    given. Each recipe gives the best approximation of the exact sum that its ranks allow. The output has the names and
    the container of the first adapter, or with a base those of `naming`. as_base_delta: DoRA is merged as what it adds
    to the weights of the base, Σ wᵢ·(m·(W + ΔWᵢ)/‖W + ΔWᵢ‖ − W). dtype: as in `resize`; "same" is the widest of the
    adapters'.

    Raises UsageError, RecipeError, OutputError, InputError, FamilyMismatch and ShapeError.
    """
    texts = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    if not texts:
        raise UsageError("merge: name the adapters, such as A.safetensors:0.7 B.safetensors:0.5.")
    parsed = parse_recipes(recipes)
    check_naming(naming, base)
    if as_base_delta and base is None:
        raise UsageError("--as-base-delta: needs the weights of the base; give the checkpoint first or with --base.")
    terms = to_sum(texts)
    outputs = name_outputs(
        terms.location,
        [(recipe.file_items(), recipe) for recipe in parsed],
        output,
        folder=becomes_folder(terms.files[0], naming),
    )
    inputs = [file for path in terms.files for file in source_files(path)]
    check_outputs({terms.path: outputs}, [*inputs, *base_files(base)], force=force or dry_run)
    check_needs(parsed, base, terms.files[0])
    report = shrink(
        {terms.path: outputs},
        ResizeOptions(
            base=base,
            dtype=dtype,
            device=device,
            jobs=jobs,
            unmapped=unmapped,
            calibration=calibration,
            dry_run=dry_run,
            quantiles=quantiles,
        ),
        opener=lambda _, opened: open_for_8_bits(
            lambda name: combined(terms, opened, naming=name, as_base_delta=as_base_delta),
            opened,
            naming,
            dtype=output_dtype(dtype, parsed),
        ),
        variant=variant_of(naming, as_base_delta=as_base_delta),
        progress=progress,
    )
    if report.failed:  # one sum: its error is the outcome
        raise InputError(report.failed[0].error)
    return report
