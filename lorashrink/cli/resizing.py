"""`resize` and its kin, which write adapters: `extract`, `convert`, `norms`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.application import exit_with, session, split_base
from lorashrink.cli.options import (
    Base,
    Csv,
    Debug,
    Device,
    DryRun,
    Dtype,
    Force,
    Jobs,
    Json,
    Naming,
    Output,
    Quiet,
    Recipes,
    Recursive,
    Verbose,
)
from lorashrink.cli.printing import (
    check_result,
    new_console,
    new_table,
    plain,
    print_json,
    share_text,
    size_text,
    write_csv,
)

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.results import ConversionReport, FileResult, Report


def resize(
    files: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="Adapters: files, folders or globs.")],
    recipe: Recipes = None,
    output: Output = None,
    base: Base = None,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    unmapped: Annotated[
        str, typer.Option("--unmapped", help="Layers that the base does not have: keep, drop or error.")
    ] = "keep",
    form: Annotated[
        str,
        typer.Option("--as", help="Layers that are not LoRA: auto (smaller form), lora (all that can be), same."),
    ] = "auto",
    naming: Naming = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Write for a program that reads less than the format allows: vllm.")
    ] = None,
    recursive: Recursive = False,
    force: Force = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Keep outputs of an earlier, equal run.")
    ] = False,
    dry_run: DryRun = False,
    strict: Annotated[bool, typer.Option("--strict", help="Tensors of no known family are an error.")] = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Shrink adapters: keep the dimensions that a recipe names, drop the rest.

    Example: lorashrink resize -o out -r fro_ckpt=1,thr=-3.55 model.safetensors lora.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink import recipe as recipes

        check_result(as_csv, files, force)
        base, adapters = split_base(files, base)
        texts = recipe or [recipes.DEFAULT]
        recipes.parse_recipes(texts)  # before torch is imported: a typo is answered at once
        from lorashrink.batch import resize as run

        report = run(
            adapters,
            base=base,
            recipes=texts,
            output=output,
            dtype=dtype,
            device=device,
            jobs=jobs,
            unmapped=unmapped,
            form=form,
            naming=naming,
            target=target,
            recursive=recursive,
            force=force,
            skip_existing=skip_existing,
            dry_run=dry_run,
            strict=strict,
            quantiles=verbose > 0,
            progress=progress,
        )
        if as_csv:
            write_csv(as_csv, [{"output": each.output, **plain(row)} for each in report.results for row in each.layers])
    if as_json:
        print_json(plain(report))
    elif not quiet:
        _print_report(report, verbose, dry_run)
    exit_with([each.error for each in report.failed], done=bool(report.results))


def extract(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned checkpoint or folder.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The checkpoint that it was tuned from.")],
    recipe: Recipes = None,
    output: Output = None,
    naming: Annotated[str, typer.Option("--naming", help="Names of the output: kohya, diffusers or comfy.")] = "kohya",
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Differences of biases and normalisation layers too.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="fp16, bf16 or fp32 (also 16, 32).")] = "fp16",
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make an adapter of what fine-tuning changed in a checkpoint.

    Example: lorashrink extract tuned.safetensors model.safetensors -r rank=64 -o new.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink import recipe as recipes

        texts = recipe or [recipes.DEFAULT]
        recipes.parse_recipes(texts)
        from lorashrink.extraction import extract as run

        report = run(
            tuned,
            base,
            recipes=texts,
            output=output,
            naming=naming,
            vectors=vectors,
            dtype=dtype,
            device=device,
            jobs=jobs,
            force=force,
            dry_run=dry_run,
            quantiles=verbose > 0,
            progress=progress,
        )
    if as_json:
        print_json(plain(report))
    elif not quiet:
        _print_report(report, verbose, dry_run)


def convert(
    files: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="Adapters: files, folders or globs.")],
    base: Base = None,
    naming: Naming = None,
    dtype: Dtype = "same",
    output: Output = None,
    recursive: Recursive = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write adapters in another naming, container or dtype, without shrinking them.

    Example: lorashrink convert --naming diffusers model.safetensors lora.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.conversion import convert as run

        base, adapters = split_base(files, base)
        report = run(
            adapters,
            base=base,
            naming=naming,
            dtype=dtype,
            output=output,
            recursive=recursive,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(plain(report))
    elif not quiet:
        _print_conversion(report, verbose)
    exit_with([each.error for each in report.failed], done=bool(report.results))


def norms(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint or diffusers folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write, a .json file.")],
    force: Force = False,
    jobs: Jobs = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a small table that stands in for a base wherever only norms are needed.

    Example: lorashrink norms model.safetensors -o model-norms.json
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.base_norms import norms as run

        table = run(base, output, force=force, jobs=jobs, progress=progress)
    if as_json:
        print_json(plain(table))
    elif not quiet:
        typer.echo(
            f"{table.path}: norms of {table.weights} weights of {table.base} ({table.family}), {size_text(table.bytes)}"
        )


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo-out"),
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the main job on a small example that is part of the package.

    Example: lorashrink demo -o demo-out
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.demonstration import demo as run

        outcome = run(output, progress=progress)
    if as_json:
        print_json(plain(outcome))
    elif not quiet:
        typer.echo(f"$ {outcome.command}")
        _print_report(outcome.report, verbose, dry_run=False)
        typer.echo(f"rank of each block before and after: {outcome.picture}")


def _print_report(report: Report, verbose: int, dry_run: bool) -> None:
    console = new_console()
    table = new_table(
        "file", "recipe", "before", "after", "saved", "error", "energy", "norm", "layers", "removed", "verbatim"
    )
    for each in report.results:
        _print_details(console, each, verbose)
        table.add_row(
            Path(each.output).name,
            each.recipe,
            size_text(each.bytes_before),
            size_text(each.bytes_after),
            f"{100 * (1 - each.bytes_after / each.bytes_before):.1f}%",
            share_text(each.relative_error),
            share_text(each.energy),
            share_text(each.norm_ratio),
            "there" if each.skipped else str(sum(bool(layer.rank_after) for layer in each.layers)),
            str(len(each.removed)),
            str(len(each.verbatim)),
        )
    if not report.results:
        return
    console.print(table)
    before, after = (sum(getattr(each, f"bytes_{when}") for each in report.results) for when in ("before", "after"))
    places = sorted({str(Path(each.output).parent) for each in report.results})
    done = "would be written" if dry_run else "written"
    difference = f"{size_text(abs(before - after))} {'saved' if after <= before else 'more'}"
    console.print(
        f"{len(report.results)} file{'s' * (len(report.results) != 1)} {done} to {', '.join(places)}: "
        f"{size_text(before)} -> {size_text(after)}, {difference}"
    )


def _print_conversion(report: ConversionReport, verbose: int) -> None:
    for each in report.results:
        kept = f", {len(each.kept)} tensors under their old names" if each.kept else ""
        exact = "bit by bit" if each.exact else "rounded"
        typer.echo(f"{each.output}: {each.layers} layers, {size_text(each.bytes_after)}, {exact}{kept}")
        for tensor in each.kept if verbose else ():
            typer.echo(f"kept {tensor.key}: {tensor.reason}")


def _print_details(console: Console, each: FileResult, verbose: int) -> None:
    for warning in each.warnings:
        typer.echo(f"{each.output}: {warning}", err=True)
    if each.forms:
        sizes = ", ".join(f"--as {form} {size_text(size)}" for form, size in each.forms.items())
        console.print(f"{Path(each.output).name} {size_text(each.bytes_after)}; {sizes}", markup=False)
    if verbose and each.quantiles:
        console.print(
            "score quantiles  " + "  ".join(f"{place}: {value:.3f}" for place, value in each.quantiles.items())
        )
    if verbose > 1:
        for layer in each.layers:
            console.print(
                f"dim: {layer.rank_before:>3} -> {layer.rank_after:<3}  rle_lora {share_text(layer.rle_lora):>7}  "
                f"rle_ckpt {share_text(layer.rle_ckpt):>7}  {layer.name}",
                markup=False,
            )
    if verbose:
        for removed in each.removed:
            console.print(f"removed {removed.name}: {removed.reason}", markup=False)
        for kept in each.verbatim:
            console.print(f"verbatim {kept.key}: {kept.reason}", markup=False)
