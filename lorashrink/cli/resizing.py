"""`resize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.conditions import FailOn
from lorashrink.cli.help import with_section
from lorashrink.cli.options import (
    Adapters,
    Base,
    Calibration,
    Csv,
    Device,
    DryRun,
    Dtype,
    Force,
    Jobs,
    Naming,
    Output,
    Recipes,
    Recursive,
    split_base,
)
from lorashrink.cli.printing import check_outputs, new_console, say
from lorashrink.cli.streams import Gathered
from lorashrink.cli.tables import table_of
from lorashrink.errors import UsageError
from lorashrink.files.disk import begin_sha256, write_bytes
from lorashrink.recipes.explained import KEYS
from lorashrink.text import count_text, share_text, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.results.shrinking import FileResult, Report


# An output that is larger by less is so for its metadata.
_METADATA = 4096

# Reasons for which tensors of one file are removed or copied, without -v.
_REASONS = 8


_FILES: Mapping[str, Callable[[FileResult], str]] = {
    "file": lambda result: Path(result.output).name,
    "recipe": lambda result: result.recipe,
    "before": lambda result: size_text(result.bytes_before),
    "after": lambda result: size_text(result.bytes_after),
    "saved": lambda result: f"{100 * (1 - result.bytes_after / result.bytes_before):.1f}%",
    "error": lambda result: share_text(result.relative_error),
    "energy": lambda result: share_text(result.energy),
    "norm": lambda result: share_text(result.norm_ratio),
    "layers": lambda result: "skipped" if result.skipped else str(sum(bool(row.rank_after) for row in result.layers)),
    "removed": lambda result: str(len(result.removed)),
    "copied": lambda result: str(len(result.verbatim)),
}
_LESS_OF_FILES = ("recipe", "energy", "layers", "norm", "removed", "copied")


@with_section("Recipe keys, with commas between them", KEYS)
@command(
    measure=lambda report: [
        (result.output, {"error": result.relative_error, "size": result.bytes_after}) for result in report.results
    ],
    quantities=("error", "size"),
)
def resize(
    terminal: Terminal,
    files: Adapters,
    recipe: Recipes = None,
    output: Output = None,
    base: Base = None,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    unmapped: Annotated[
        str, typer.Option("--unmapped", help="What to do with layers that the base lacks: keep, drop or error.")
    ] = "keep",
    form: Annotated[
        str,
        typer.Option("--as", help="How to write LoHa, LoKr and the like: auto (what is smaller), lora or same."),
    ] = "auto",
    naming: Naming = None,
    target: Annotated[str | None, typer.Option("--target", help="Write only what a program can load: vllm.")] = None,
    calibration: Calibration = None,
    anchor: Annotated[
        float | None,
        typer.Option("--anchor", help="Constant of the prediction for quality=, in dB, after a drawing corrected it."),
    ] = None,
    stack: Annotated[
        bool,
        typer.Option("--stack", help="LoRAs that are used together share one size=. A:0.7 gives A a lower weight."),
    ] = False,
    clip: Annotated[
        float | None,
        typer.Option(
            "--clip",
            metavar="X",
            help="Limit strong directions: no singular value above X times the base layer's largest (needs a base).",
        ),
    ] = None,
    fro_limit: Annotated[
        float | None,
        typer.Option(
            "--fro-limit",
            metavar="X",
            help="Scale down layers whose norm is above X times the base layer's norm (needs a base).",
        ),
    ] = None,
    recursive: Recursive = False,
    force: Force = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Do not repeat what an earlier, equal run has written.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="With --skip-existing: check old results and replace damaged ones.")
    ] = False,
    dry_run: DryRun = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse files with tensors of unknown kinds.")] = False,
    group_by_base: Annotated[
        Path | None,
        typer.Option("--group-by-base", help="File of base models for mixed LoRAs: sdxl = 'model.safetensors', ..."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Compute on a Ray cluster: local, auto or HOST:PORT.")
    ] = None,
    ray_transfer: Annotated[
        bool, typer.Option("--ray-transfer", help="Send the files, for clusters that share no folder with you.")
    ] = False,
    gpus_per_task: Annotated[
        float, typer.Option("--gpus-per-task", min=0, help="GPUs for each adapter on a Ray cluster.")
    ] = 0,
    space_check: Annotated[
        bool,
        typer.Option("--space-check/--no-space-check", help="Stop at once if the disk might be too full."),
    ] = True,
    fail_on: FailOn = None,
    as_csv: Csv = None,
) -> object:
    """Shrink LoRAs by a recipe.

    Each layer keeps the ranks that the recipe selects; the default recipe is fro_ckpt=1,thr=-3.55, or
    energy=0.99 without a base.

    Example: lorashrink resize -o out -r fro_ckpt=1,thr=-3.55 model.safetensors lora.safetensors
    """
    from lorashrink.recipes.grammar import DEFAULT_ALONE, parse_recipes
    from lorashrink.shrinking.options import ResizeKeywords

    # Parameters that bear the name of an option are passed on; `locals()` comes before any of them changes.
    options = {name: value for name, value in locals().items() if name in ResizeKeywords.__annotations__}
    with Gathered(as_json=terminal.as_json, as_csv=as_csv is not None, everything=terminal.verbose > 0) as gathered:
        check_outputs([*files, base, calibration, group_by_base], force, as_csv=as_csv, adapters=output)
        recipes = recipe or []
        parse_recipes(recipes)  # before any file is read: a typo is answered at once
        base, adapters = split_base("resize", files, base)
        if len(adapters) == 1 and not (ray or skip_existing):
            begin_sha256(Path(adapters[0]))  # beside the import of torch, which takes as long
        run = _runner(ray, ray_transfer, gpus_per_task)
        options |= {"base": base, "recipes": recipes, "quantiles": terminal.verbose > 0}
        report = run(adapters, each=gathered.add, progress=terminal.progress, **options)
        if as_csv:
            write_bytes(as_csv, gathered.csv(report))
        if terminal.as_json:
            gathered.print_json(report)
        elif not terminal.quiet:
            if not recipes and base is None and group_by_base is None:
                say(f"no base: every layer keeps {DEFAULT_ALONE}. For a smaller file: lorashrink shrink", errors=True)
            print_report(report, terminal, gathered)
    return report


def _runner(ray: str | None, transfer: bool, gpus_per_task: float) -> Callable[..., Report]:
    """`resize` on this machine, or on a cluster."""
    if ray is None:
        if transfer or gpus_per_task:
            raise UsageError(f"{'--ray-transfer' if transfer else '--gpus-per-task'}: goes with --ray only.")
        from lorashrink.shrinking.run import resize as run

        return run
    from lorashrink.shrinking.cluster import resize as run_on_cluster

    return partial(run_on_cluster, address=ray, transfer=transfer, gpus_per_task=gpus_per_task)


def print_report(report: Report, terminal: Terminal, gathered: Gathered | None = None) -> None:
    """The table of files, and their sum; of many files those that were `gathered` alone."""
    console = new_console()
    results = list(report.results)
    if gathered:
        order = {result.output: position for position, result in enumerate(results)}
        results = sorted(gathered.listed, key=lambda result: order[result.output])
    for result in results:
        print_details(console, result, terminal.verbose)
    if not report.results:
        return
    console.print(table_of(results, _FILES, extra=_LESS_OF_FILES, everything=terminal.verbose > 0))
    if more := len(report.results) - len(results):
        warnings = f", {gathered.warnings} warnings among them" if gathered and gathered.warnings else ""
        console.print(f"and {more} more{warnings}; -v lists them")
    # Which programs load the outputs, if it is the same for all of them.
    answers = {tuple(result.loads.lines) for result in results if not result.skipped}
    for line in answers.pop() if len(answers) == 1 else ():
        console.print(line)
    print_sums(console, report, terminal.dry_run)


def print_sums(console: Console, report: Report, dry_run: bool) -> None:
    """Files, sizes and folders of all results together."""
    before = sum(result.bytes_before for result in report.results)
    after = sum(result.bytes_after for result in report.results)
    folders = sorted({str(Path(result.output).parent) for result in report.results})
    verb = "would be written" if dry_run else "written"
    difference = f"{size_text(abs(before - after))} {'saved' if after <= before else 'more'}"
    skipped = sum(result.skipped for result in report.results)
    earlier = f", {skipped} already there" if skipped else ""
    console.print(
        f"{count_text(len(report.results) - skipped, 'file')} {verb} to {', '.join(folders)}{earlier}: "
        f"{size_text(before)} -> {size_text(after)}, {difference}"
    )
    for stack in report.stacks:
        threshold = "all is kept" if stack.threshold is None else f"one threshold, {stack.threshold:.3f}"
        size = f"{size_text(stack.bytes)} of {size_text(stack.budget)}"
        console.print(f"{stack.adapters} adapters under one budget: {size}, {threshold}")
    if report.space:
        console.print(f"needs {size_text(report.space.needed)}; {size_text(report.space.free)} are free")


def print_details(console: Console, result: FileResult, verbose: int) -> None:
    """What is worth a line about one output."""
    name = Path(result.output).name
    for warning in result.warnings:
        say(f"{result.output}: {warning}", errors=True)
    lines = []
    grown = result.bytes_after - result.bytes_before
    if 0 < grown < _METADATA and not any(warning.startswith("is larger") for warning in result.warnings):
        lines.append(f"{name}: nothing to gain; {grown} bytes larger than its input, for metadata about the recipe")
    if result.predicted_db is not None:
        lines.append(
            f"{name}: about {result.predicted_db:.0f} dB to the pictures of the original adapter, as predicted"
        )
    if result.forms:
        sizes = ", ".join(f"--as {form} {size_text(size)}" for form, size in result.forms.items())
        lines.append(f"{name} {size_text(result.bytes_after)}; {sizes}")
    if result.capped:
        most = max(result.capped, key=lambda layer: layer.spectral_before / max(layer.spectral_after, 1e-30))
        lines.append(
            f"{name}: {count_text(len(result.capped), 'layer')} limited, most {most.name}: "
            f"σ {most.spectral_before:.4g} -> {most.spectral_after:.4g}"
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for removed in result.removed:
        reasons.setdefault(("removed", removed.reason), []).append(removed.name)
    for copied in result.verbatim:
        reasons.setdefault(("copied", copied.reason), []).append(copied.key)
    listed = list(reasons.items())[: None if verbose else _REASONS]
    lines += [f"{name}: {len(names)} {what}, first {names[0]}: {reason}" for (what, reason), names in listed]
    if more := len(reasons) - len(listed):
        lines.append(f"and {more} more reasons; -v lists them")
    if verbose:
        lines += _all_details(result, verbose)
    for line in lines:
        console.print(line)


def _all_details(result: FileResult, verbose: int) -> list[str]:
    """What -v adds, and what -vv adds to that."""
    lines = []
    if result.quantiles:
        lines.append("score quantiles  " + "  ".join(f"{at}: {value:.3f}" for at, value in result.quantiles.items()))
    if verbose > 1:
        lines += [
            f"dim: {layer.rank_before:>3} -> {layer.rank_after:<3}  rle_lora {share_text(layer.rle_lora):>7}  "
            f"rle_ckpt {share_text(layer.rle_ckpt):>7}  {layer.name}"
            for layer in result.layers
        ]
    lines += [
        f"limited {cap.name}: σ {cap.spectral_before:.4g} -> {cap.spectral_after:.4g}, "
        f"norm {cap.fro_before:.4g} -> {cap.fro_after:.4g}"
        for cap in result.capped
    ]
    lines += [f"removed {removed.name}: {removed.reason}" for removed in result.removed]
    lines += [f"copied {copied.key}: {copied.reason}" for copied in result.verbatim]
    return lines
