"""From the options of `resize` to a checked job, before any work."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from lorashrink.adapters import UNKNOWN, Adapter, open_adapter, peft
from lorashrink.bases import Base
from lorashrink.errors import InputError, RecipeError, UsageError
from lorashrink.files.disk import absent_text
from lorashrink.files.header import read_header
from lorashrink.files.metadata_keys import RECIPE
from lorashrink.files.store import MIXTURES
from lorashrink.linking.inputs import Sum, check_exists, find_inputs, split_weight
from lorashrink.linking.loaders import open_for_8_bits
from lorashrink.linking.renaming import check_naming, renamed
from lorashrink.recipes.grammar import DEFAULT, DEFAULT_ALONE, Recipe, parse_recipes
from lorashrink.shrinking.grouping import read_table
from lorashrink.shrinking.ledger import Targets
from lorashrink.shrinking.options import ResizeOptions, output_dtype
from lorashrink.shrinking.outputs import (
    base_files,
    becomes_folder,
    check_outputs,
    check_space,
    folders_of_outputs,
    name_outputs,
)
from lorashrink.shrinking.targets import TARGETS, Target, with_items
from lorashrink.sums.summing import combined
from lorashrink.text import count_text

log = logging.getLogger(__name__)

# (source, its base) -> open adapter
Opener = Callable[[Path, Base | None], Adapter]

# Up to here a full disk is found out soon enough, by what is written and not by what might be.
_FEW_OUTPUTS = 16


def open_source(source: Path, base: Base | None) -> Adapter:
    """The adapter in a file or folder, as it is."""
    return open_adapter(source)


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A checked request. It can be sent to other processes."""

    targets: Targets = field(kw_only=False)
    options: ResizeOptions = field(kw_only=False)
    opener: Opener = open_source
    bases: Mapping[str, Path] = field(default_factory=dict)  # family -> base, in place of one base
    reader: str = ""  # a program that reads nothing but factors
    lenient: bool = False  # see `shrink`
    variant: str = ""  # whatever decides what is written, beside the options that every run has
    journal: Path | None = None  # folder
    most_share: float = math.inf  # outputs that are larger than this share of their input are reported, not written
    weights: Mapping[Path, float] = field(default_factory=dict)  # of each source of a stack; {} without --stack


def prepare(adapters: str | Path | Sequence[str | Path], options: ResizeOptions) -> Job:
    """Check all that can be checked of a call of `resize` before any work. Raises as that does."""
    _check_options(options)
    reader = TARGETS[options.target] if options.target else None
    recipes = requested_recipes(options, reader)
    bases = read_table(options.group_by_base) if options.group_by_base is not None else {}
    check_naming(options.naming, next(iter(bases.values()), options.base))
    if isinstance(adapters, (str, Path)):
        check_exists(adapters)
    entries = [adapters] if isinstance(adapters, (str, Path)) else adapters
    if not entries:
        raise UsageError("no adapters. Name files, folders or globs.")
    weights = stack_weights(entries, recipes, options) if options.stack else {}
    inputs = dict.fromkeys(weights) if options.stack else find_inputs(entries, recursive=options.recursive)
    inputs = _without_own_outputs(inputs, entries, options)
    sums = {source: terms for source, terms in inputs.items() if terms}
    if sums and bases:
        raise UsageError(f"{next(iter(sums))}: a sum has one base, and is not merged with --group-by-base.")
    files = {source: terms.files if terms else [source] for source, terms in inputs.items()}
    sources = [path for paths in files.values() for path in paths]
    if not any(map(os.path.exists, sources)):
        raise InputError(f"{sources[0]}: {absent_text(sources[0])}")
    targets = _targets(inputs, files, recipes, options)
    _check_targets(targets, sources, bases, options)
    if not bases:
        first = next(iter(files.values()))[0]
        check_needs(recipes, options.base, first)
        if not options.recipes and options.base is None:
            open_adapter(first).close()  # it may be the base that was meant, and its own error says more
    check_calibration(recipes, options.calibration)
    if options.space_check and not options.dry_run and sum(map(len, targets.values())) > _FEW_OUTPUTS:
        check_space(_most_bytes(targets, files, options))
    folder = None if options.output is None or str(options.output).endswith(".safetensors") else Path(options.output)
    return Job(
        targets,
        replace(options, form="lora") if reader else options,
        opener=partial(
            open_input,
            sums=sums,
            naming=options.naming,
            target=reader,
            strict=options.strict,
            dtype=output_dtype(options.dtype, recipes),
        ),
        bases=bases,
        reader=reader.title if reader else "",
        variant=(f",naming={options.naming}" if options.naming else "")
        + (f",target={options.target}" if options.target else ""),
        journal=folder if options.skip_existing and not options.dry_run else None,
        weights=weights,
    )


def _check_options(options: ResizeOptions) -> None:
    """Raises UsageError for options that contradict each other."""
    if options.target not in (None, *TARGETS):
        raise UsageError(f"target: '{options.target}' is not one of {', '.join(TARGETS)}.")
    if options.verify and not options.skip_existing:
        raise UsageError("--verify works with --skip-existing only. Add it, or leave --verify out.")
    if options.base is not None and options.group_by_base is not None:
        raise UsageError("give one base, or a table of them with --group-by-base, and not both.")
    if options.stack and options.dtype in MIXTURES:
        raise UsageError(f"--stack: shares out bytes of one dtype; use -t fp8 or -t fp16 instead of {options.dtype}.")


def _targets(
    inputs: Mapping[Path, Sum | None],
    files: Mapping[Path, Sequence[Path]],
    recipes: Sequence[Recipe],
    options: ResizeOptions,
) -> Targets:
    """The outputs of each input, named and with their recipes."""
    locations = {source: terms.location if terms else source for source, terms in inputs.items()}
    folders = folders_of_outputs(locations.values(), options.output)
    return {
        source: name_outputs(
            location,
            [(recipe.file_items(), recipe) for recipe in recipes],
            folders[location],
            sources=len(inputs),
            folder=becomes_folder(files[source][0], options.naming),
        )
        for source, location in locations.items()
    }


def _check_targets(
    targets: Targets, sources: Sequence[Path], bases: Mapping[str, Path], options: ResizeOptions
) -> None:
    """Raises OutputError if an output would overwrite what is read, or what exists and may not be replaced."""
    calibration = [Path(options.calibration)] if options.calibration else []
    paths = (base for base in (options.base, *bases.values()) if isinstance(base, (str, Path)))
    check_outputs(
        targets,
        [*sources, *calibration, *(file for base in paths for file in base_files(base))],
        force=options.force or options.skip_existing or options.dry_run,
        hint="--force to replace it or --skip-existing to keep it",
    )


def _without_own_outputs(
    inputs: Mapping[Path, Sum | None], entries: Sequence[str | Path], options: ResizeOptions
) -> dict[Path, Sum | None]:
    """Where outputs lie beside their inputs, folders and globs do not stand for what earlier runs made there."""
    named = set(map(os.path.realpath, entries))
    rest = dict(inputs)
    for path, terms in inputs.items():
        is_named = terms or os.path.realpath(path) in named
        if not is_named and path.suffix == ".safetensors" and os.path.isfile(path):
            with contextlib.suppress(InputError):
                if RECIPE in read_header(path)[1]:
                    del rest[path]
    if options.output is not None or not rest or len(rest) == len(inputs):
        return dict(inputs)
    first = next(path for path in inputs if path not in rest)
    count = len(inputs) - len(rest)
    log.warning(
        "%s left out, first %s: made by lorashrink. Name it to shrink it again.", count_text(count, "file"), first
    )
    return rest


def requested_recipes(options: ResizeOptions, reader: Target | None) -> list[Recipe]:
    """The recipes, with the items that other options add to each of them."""
    has_base = options.base is not None or options.group_by_base is not None
    chosen = options.recipes or (DEFAULT if has_base else DEFAULT_ALONE)
    texts = [str(recipe) for recipe in ([chosen] if isinstance(chosen, (str, Recipe)) else chosen)]
    limits = {"clip": options.clip, "fro_limit": options.fro_limit}
    items = [f"{key}={value}" for key, value in limits.items() if value is not None]
    texts = [",".join([recipe, *items]) for text in texts for recipe in text.split(":")]
    return parse_recipes([with_items(text, reader) for text in texts] if reader else texts)


def stack_weights(
    entries: Sequence[str | Path], recipes: Sequence[Recipe], options: ResizeOptions
) -> dict[Path, float]:
    """The adapters that share a budget, and their weights. Raises UsageError, RecipeError or InputError."""
    if options.group_by_base is not None:
        raise UsageError("--stack: adapters that are used together have one base; give it with --base.")
    for recipe in recipes:
        if recipe.select != "size":
            raise RecipeError(
                f"recipe '{recipe}': --stack shares out the bytes of size=, and this recipe has {recipe.select}=. "
                "Example: fro_ckpt,bytes,size=32"
            )
    weights: dict[Path, float] = {}
    for entry in entries:
        name, weight = split_weight(entry)
        for source, terms in find_inputs([name], recursive=options.recursive).items():
            if terms:
                raise UsageError(f"{entry}: is a sum, which is one adapter. With --stack name its parts: A:0.7 B:0.5.")
            if not weight:
                raise UsageError(f"{entry}: has no share in a stack at weight 0. Leave it out.")
            if os.path.realpath(source) in map(os.path.realpath, weights):
                raise UsageError(f"{source}: is in the stack twice. Give it once.")
            weights[source] = weight
    if len(weights) < 2:
        raise UsageError(f"--stack: {next(iter(weights))} is alone. Name two adapters or more, or leave --stack out.")
    return weights


def _most_bytes(targets: Targets, files: Mapping[Path, Sequence[Path]], options: ResizeOptions) -> dict[Path, int]:
    """How large each output that does not exist yet can become; in a stack, its part of the budget on average."""
    factor = 2 if options.dtype in ("fp32", "32") else 1
    most: dict[Path, int] = {}
    for source, outputs in targets.items():
        paths = [peft.weights_in(path) if peft.is_folder(path) else path for path in files[source]]
        size = factor * sum(path.stat().st_size for path in paths if os.path.isfile(path))
        for output, recipe in outputs.items():
            if not os.path.exists(output):
                budget = int(recipe.value * 2**20)
                share = budget // len(targets) if options.stack else min(size, budget)
                most[output] = share if recipe.select == "size" else size
    return most


def check_needs(recipes: Sequence[Recipe], base: object, source: Path) -> None:
    """Check that recipes which need a base have one.

    Raises:
        RecipeError: one has none.
        InputError: the first adapter cannot be read, and may be the base that was meant.
    """
    for recipe in recipes:
        if recipe.needs_base and base is None:
            # A base that is missing or damaged was taken for an adapter, and its own error says more.
            open_adapter(source).close()
            raise RecipeError(
                f"recipe '{recipe}' compares with the base model. Add --base MODEL, or use -r energy=0.99 without."
            )


def check_calibration(recipes: Sequence[Recipe], calibration: str | Path | None) -> None:
    """Raises RecipeError if a recipe needs statistics and `calibration` is None."""
    for recipe in recipes:
        if recipe.calibrated and calibration is None:
            raise RecipeError(
                f"recipe '{recipe}' needs a calibration table: --calibration TABLE. Make one with: "
                "lorashrink calibrate MODEL -o table.safetensors"
            )


def open_input(
    source: Path,
    base: Base | None,
    *,
    dtype: str,
    sums: Mapping[Path, Sum] = MappingProxyType({}),
    naming: str | None = None,
    target: Target | None = None,
    strict: bool = False,
) -> Adapter:
    """The adapter of a source, with the names, the form and the contents that these options of `resize` ask for."""

    def open_as(name: str | None) -> Adapter:
        if source in sums:
            return combined(sums[source], base, naming=name)
        adapter = open_adapter(source)
        try:
            return renamed(adapter, name, base).adapter if name and base else adapter
        except BaseException:
            adapter.close()
            raise

    adapter = open_for_8_bits(open_as, base, naming, dtype=dtype)
    try:
        unknown = [key for key, reason in adapter.others.items() if reason == UNKNOWN]
        if strict and unknown:
            raise InputError(
                f"{source}: no known family has {count_text(len(unknown), 'tensor')} of it, first {unknown[0]}. "
                "Without --strict they are copied."
            )
        return target.fit(adapter) if target else adapter
    except BaseException:
        adapter.close()
        raise
