"""From the options of `resize` to a checked job, before any work."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lorashrink.adapters import UNKNOWN, Adapter, open_adapter, peft
from lorashrink.bases import Base
from lorashrink.errors import InputError, RecipeError, UsageError
from lorashrink.linking.inputs import Sum, find_inputs, split_weight
from lorashrink.linking.renaming import check_naming, renamed
from lorashrink.recipes.grammar import DEFAULT, Recipe, parse_recipes
from lorashrink.shrinking.grouping import read_table
from lorashrink.shrinking.ledger import Targets
from lorashrink.shrinking.outputs import base_files, check_outputs, check_space, name_outputs
from lorashrink.shrinking.targets import TARGETS, Target, with_items
from lorashrink.sums.summing import combined

Opener = Callable[[Path, Base | None], Adapter]

# Up to here a full disk is found out soon enough, by what is written and not by what might be.
_FEW_OUTPUTS = 16


@dataclass(frozen=True, eq=False)
class How:
    """What is done with each file. It can be sent to other processes."""

    opener: Opener
    base: str | Path | None = None
    bases: Mapping[str, Path] = field(default_factory=dict)  # family -> base, in place of one base
    calibration: str | Path | None = None  # statistics for calibrated recipes
    dtype: str = "same"
    device: str = "auto"
    unmapped: str = "keep"
    form: str = "auto"
    reader: str = ""
    skip_existing: bool = False
    dry_run: bool = False
    quantiles: bool = False
    lenient: bool = False
    options: str = ""


@dataclass(frozen=True, eq=False)
class Job:
    """A checked request."""

    targets: Targets
    how: How
    journal: Path | None = None  # folder
    weights: Mapping[Path, float] = field(default_factory=dict)  # of each source of a stack; {} if it is none


def prepare(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    recipes: str | Sequence[str] = DEFAULT,
    output: str | Path | None = None,
    dtype: str = "same",
    device: str = "auto",
    unmapped: str = "keep",
    form: str = "auto",
    naming: str | None = None,
    target: str | None = None,
    group_by_base: str | Path | None = None,
    calibration: str | Path | None = None,
    stack: bool = False,
    clip: float | None = None,
    fro_limit: float | None = None,
    recursive: bool = False,
    force: bool = False,
    skip_existing: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    quantiles: bool = False,
    space_check: bool = True,
) -> Job:
    """Check all that can be checked of a call of `resize` before any work. Raises as that does."""
    if target not in (None, *TARGETS):
        raise UsageError(f"target: '{target}' is not one of {', '.join(TARGETS)}.")
    if base is not None and group_by_base is not None:
        raise UsageError("give one base, or a table of them with --group-by-base, and not both.")
    reader = TARGETS[target] if target else None
    texts = [text for each in ([recipes] if isinstance(recipes, str) else recipes) for text in each.split(":")]
    given_limits = {"clip": clip, "fro_limit": fro_limit}
    limits = [f"{key}={value}" for key, value in given_limits.items() if value is not None]
    texts = [",".join([text, *limits]) for text in texts]
    wanted = parse_recipes([with_items(text, reader) for text in texts] if reader else texts)
    bases = read_table(group_by_base) if group_by_base is not None else {}
    check_naming(naming, next(iter(bases.values()), base))
    given = [adapters] if isinstance(adapters, (str, Path)) else adapters
    if stack:
        weights = _stack(given, wanted, recursive=recursive, group_by_base=group_by_base)
        found: dict[Path, Sum | None] = dict.fromkeys(weights)
    else:
        weights, found = {}, find_inputs(given, recursive=recursive)
    sums = {source: terms for source, terms in found.items() if terms}
    if sums and bases:
        raise UsageError(f"{next(iter(sums))}: a sum has one base, and is not merged with --group-by-base.")
    sources = list(found)
    targets = {
        source: name_outputs(
            sums[source].location if source in sums else source,
            [(recipe.file_items(), recipe) for recipe in wanted],
            output,
            sources=len(sources),
            folder=peft.is_folder(_first(source, sums)) if naming is None else naming == "peft",
        )
        for source in sources
    }
    hint = "--force to replace it or --skip-existing to keep it"
    inputs = [
        *(path for source in sources for path in (sums[source].files if source in sums else [source])),
        *([Path(calibration)] if calibration else ()),
        *base_files(base),
        *(path for each in bases.values() for path in base_files(each)),
    ]
    check_outputs(targets, inputs, force=force or skip_existing or dry_run, hint=hint)
    if not bases:
        check_needs(wanted, base, _first(sources[0], sums))
    check_calibration(wanted, calibration)
    if space_check and not dry_run and sum(map(len, targets.values())) > _FEW_OUTPUTS:
        check_space(_most_bytes(targets, sums, dtype, shared=stack))
    folder = Path(output) if output is not None and not str(output).endswith(".safetensors") else None
    how = How(
        opener=partial(_open, sums=sums, naming=naming, target=reader, strict=strict),
        base=base,
        bases=bases,
        calibration=calibration,
        dtype=dtype,
        device=device,
        unmapped=unmapped,
        form="lora" if reader else form,
        reader=reader.title if reader else "",
        skip_existing=skip_existing,
        dry_run=dry_run,
        quantiles=quantiles,
        options=(f",naming={naming}" if naming else "") + (f",target={target}" if target else ""),
    )
    return Job(targets, how, folder if skip_existing and not dry_run else None, weights)


def _stack(
    given: Sequence[str | Path],
    recipes: Sequence[Recipe],
    *,
    recursive: bool,
    group_by_base: str | Path | None,
) -> dict[Path, float]:
    """The adapters that share a budget, and their weights. Raises UsageError, RecipeError or InputError."""
    if group_by_base is not None:
        raise UsageError("--stack: adapters that are used together have one base; give it with --base.")
    for recipe in recipes:
        if recipe.select != "size":
            raise RecipeError(
                f"recipe '{recipe}': --stack shares out the bytes of size=, and this recipe has {recipe.select}=. "
                "Example: fro_ckpt,bytes,size=32"
            )
    weights: dict[Path, float] = {}
    for entry in given:
        name, weight = split_weight(entry)
        for source, terms in find_inputs([name], recursive=recursive).items():
            if terms:
                raise UsageError(f"{entry}: is a sum, which is one adapter. With --stack name its parts: A:0.7 B:0.5.")
            if not weight:
                raise UsageError(f"{entry}: has no share in a stack at weight 0. Leave it out.")
            if any(os.path.realpath(source) == os.path.realpath(known) for known in weights):
                raise UsageError(f"{source}: is in the stack twice. Give it once.")
            weights[source] = weight
    if len(weights) < 2:
        raise UsageError(f"--stack: {next(iter(weights))} is alone. Name two adapters or more, or leave --stack out.")
    return weights


def _first(source: Path, sums: Mapping[Path, Sum]) -> Path:
    """The adapter itself, or the first one of a sum."""
    return sums[source].files[0] if source in sums else source


def _most_bytes(targets: Targets, sums: Mapping[Path, Sum], dtype: str, *, shared: bool) -> dict[Path, int]:
    """How large each output that is not there yet can become; of a budget that is `shared`, its part on average."""
    factor = 2 if dtype in ("fp32", "32") else 1
    most: dict[Path, int] = {}
    for source, outputs in targets.items():
        terms = sums[source].files if source in sums else [source]
        paths = [peft.weights_in(each) if peft.is_folder(each) else each for each in terms]
        size = factor * sum(path.stat().st_size for path in paths if os.path.isfile(path))
        for output, recipe in outputs.items():
            if not os.path.exists(output):
                budget = int(recipe.value * 2**20)
                part = budget // len(targets) if shared else min(size, budget)
                most[output] = part if recipe.select == "size" else size
    return most


def check_needs(recipes: Sequence[Recipe], base: str | Path | None, source: Path) -> None:
    """That recipes which need a base have one.

    Raises:
        RecipeError: one has none.
        InputError: the first adapter cannot be read, and may be the base that was meant.
    """
    for recipe in recipes:
        if recipe.needs_base and base is None:
            # A base that is missing or damaged was taken for an adapter, and its own error says more.
            open_adapter(source).close()
            raise RecipeError(f"recipe '{recipe}' needs the base checkpoint; give it first or with --base.")


def check_calibration(recipes: Sequence[Recipe], calibration: str | Path | None) -> None:
    """Raises RecipeError if a recipe needs statistics and there are none."""
    for recipe in recipes:
        if recipe.calibrated and calibration is None:
            raise RecipeError(
                f"recipe '{recipe}' needs statistics of the model; give them with --calibration, or make some with: "
                "lorashrink calibrate"
            )


def _open(
    source: Path,
    base: Base | None,
    *,
    sums: Mapping[Path, Sum],
    naming: str | None,
    target: Target | None,
    strict: bool,
) -> Adapter:
    adapter = combined(sums[source], base, naming=naming) if source in sums else open_adapter(source)
    try:
        unknown = [key for key, reason in adapter.others.items() if reason == UNKNOWN]
        if strict and unknown:
            raise InputError(
                f"{source}: {len(unknown)} tensors belong to no known family, first {unknown[0]}. "
                "Without --strict they are copied as they are."
            )
        if naming and base and source not in sums:
            adapter = renamed(adapter, naming, base).adapter
        return target.fit(adapter) if target else adapter
    except BaseException:
        adapter.close()
        raise
