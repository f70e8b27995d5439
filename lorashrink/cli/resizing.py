"""`resize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.conditions import FailOn, Measured
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
from lorashrink.cli.printing import check_outputs, new_console, new_table, say
from lorashrink.cli.streams import Gathered
from lorashrink.errors import UsageError
from lorashrink.files.disk import write_bytes
from lorashrink.recipes.explained import KEYS
from lorashrink.text import count_text, share_text, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.cli.tables import TextTable
    from lorashrink.results.shrinking import FileResult, Report


# An output that is larger by less is so for its metadata.
_METADATA = 4096

# Reasons of one file that get a line each without -v.
_KINDS = 8


def _measured(report: Report) -> Iterator[tuple[str, Measured]]:
    for result in report.results:
        yield result.output, {"error": result.relative_error, "size": result.bytes_after}


@with_section("Recipe keys, with commas between them", KEYS)
@command(done=lambda report: bool(report.results), measure=_measured, quantities=("error", "size"))
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
        check_outputs([*files, base, calibration, group_by_base], force, as_csv=as_csv)
        recipes = recipe or []
        parse_recipes(recipes)  # before any file is read: a typo is answered at once
        base, adapters = split_base(files, base)
        run = _runner(ray, ray_transfer, gpus_per_task)
        options |= {"base": base, "recipes": recipes, "quantiles": terminal.verbose > 0}
        report = run(adapters, each=gathered.add, progress=terminal.progress, **options)
        if as_csv:
            write_bytes(as_csv, gathered.csv(report))
        if terminal.as_json:
            gathered.print_json(report)
        elif not terminal.quiet:
            if not recipes and base is None and group_by_base is None:
                say(f"no base: every layer keeps {DEFAULT_ALONE}. With --base MODEL files become smaller.", errors=True)
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
        _print_details(console, result, terminal.verbose)
    if not report.results:
        return
    console.print(_table(results, terminal.verbose))
    if more := len(report.results) - len(results):
        warnings = f", {gathered.warnings} warnings among them" if gathered and gathered.warnings else ""
        console.print(f"and {more} more{warnings}; -v lists them")
    _print_loads(console, results)
    _print_sums(console, report, terminal.dry_run)


def _table(results: Sequence[FileResult], verbose: int) -> TextTable:
    table = new_table(
        "file",
        "recipe",
        "before",
        "after",
        "saved",
        "error",
        "energy",
        "norm",
        "layers",
        "removed",
        "verbatim",
        extra=("recipe", "energy", "layers", "norm", "removed", "verbatim"),
        everything=verbose > 0,
    )
    for result in results:
        table.add_row(
            Path(result.output).name,
            result.recipe,
            size_text(result.bytes_before),
            size_text(result.bytes_after),
            f"{100 * (1 - result.bytes_after / result.bytes_before):.1f}%",
            share_text(result.relative_error),
            share_text(result.energy),
            share_text(result.norm_ratio),
            "there" if result.skipped else str(sum(bool(layer.rank_after) for layer in result.layers)),
            str(len(result.removed)),
            str(len(result.verbatim)),
        )
    return table


def _print_sums(console: Console, report: Report, dry_run: bool) -> None:
    before = sum(result.bytes_before for result in report.results)
    after = sum(result.bytes_after for result in report.results)
    folders = sorted({str(Path(result.output).parent) for result in report.results})
    verb = "would be written" if dry_run else "written"
    difference = f"{size_text(abs(before - after))} {'saved' if after <= before else 'more'}"
    skipped = sum(result.skipped for result in report.results)
    there = f", {skipped} already there" if skipped else ""
    console.print(
        f"{count_text(len(report.results) - skipped, 'file')} {verb} to {', '.join(folders)}{there}: "
        f"{size_text(before)} -> {size_text(after)}, {difference}"
    )
    for stack in report.stacks:
        threshold = "all is kept" if stack.threshold is None else f"one threshold, {stack.threshold:.3f}"
        size = f"{size_text(stack.bytes)} of {size_text(stack.budget)}"
        console.print(f"{stack.adapters} adapters under one budget: {size}, {threshold}")
    if report.space:
        console.print(f"needs {size_text(report.space.needed)}; {size_text(report.space.free)} are free")


def _left_out(result: FileResult, verbose: int) -> list[str]:
    """A line per reason for which something is not in the output, or is copied as it is; each name is below with -v."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for removed in result.removed:
        kinds.setdefault(("left out", removed.reason), []).append(removed.name)
    for copied in result.verbatim:
        kinds.setdefault(("copied as is", copied.reason), []).append(copied.key)
    lines = [
        f"{Path(result.output).name}: {len(names)} {what}, first {names[0]}: {reason}"
        for (what, reason), names in kinds.items()
    ]
    shown = lines if verbose else lines[:_KINDS]
    more = len(lines) - len(shown)
    return [*shown, f"and {more} more kinds; -v lists them"] if more else shown


def _print_loads(console: Console, results: Sequence[FileResult]) -> None:
    """Which programs load the outputs; of several outputs only where all have the same answer."""
    answers = {"\n".join(result.loads.lines) for result in results if not result.skipped}
    if len(answers) == 1 and (lines := answers.pop()):
        console.print(lines)


def _print_details(console: Console, result: FileResult, verbose: int) -> None:
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
    lines += _left_out(result, verbose)
    if verbose and result.quantiles:
        lines.append("score quantiles  " + "  ".join(f"{at}: {value:.3f}" for at, value in result.quantiles.items()))
    if verbose > 1:
        lines += [
            f"dim: {layer.rank_before:>3} -> {layer.rank_after:<3}  rle_lora {share_text(layer.rle_lora):>7}  "
            f"rle_ckpt {share_text(layer.rle_ckpt):>7}  {layer.name}"
            for layer in result.layers
        ]
    if verbose:
        lines += [
            f"limited {cap.name}: σ {cap.spectral_before:.4g} -> {cap.spectral_after:.4g}, "
            f"norm {cap.fro_before:.4g} -> {cap.fro_after:.4g}"
            for cap in result.capped
        ]
        lines += [f"removed {removed.name}: {removed.reason}" for removed in result.removed]
        lines += [f"verbatim {copied.key}: {copied.reason}" for copied in result.verbatim]
    for line in lines:
        console.print(line)
