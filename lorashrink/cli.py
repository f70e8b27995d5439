"""The commands: parse, call one public function, print. No logic.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import io
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lorashrink._version import __version__
from lorashrink.errors import LorashrinkError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lorashrink.comparison import BlockDifference, Comparison, LayerDifference
    from lorashrink.results import ConversionReport, FileResult, Report
    from lorashrink.sweeping import Pictures, Point, Sweep
    from lorashrink.tables import AdapterTable, Inspection

app = typer.Typer(
    help="Look inside LoRA adapters and shrink them against their base checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a fifth of a second to import, and help should not wait for it
)

EXIT_SOME_FAILED, EXIT_NOTHING_DONE, EXIT_INTERRUPTED = 1, 2, 130

# --- options that several commands share --------------------------------------------------------

Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", "-r", help="What to keep, e.g. fro_ckpt=1,thr=-3.55; several give several files."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder, or file name if there is one output.")]
Dtype = Annotated[str, typer.Option("--dtype", "-t", help="same, fp16, bf16 or fp32 (also 16, 32).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Report what would be written, and write nothing.")]
Base = Annotated[Path | None, typer.Option("--base", help="Base checkpoint, diffusers folder or norm table.")]
Naming = Annotated[
    str | None, typer.Option("--naming", help="Names of the output: kohya, diffusers, comfy or peft; needs a base.")
]
Recursive = Annotated[bool, typer.Option("--recursive", help="Look for adapters in subfolders too.")]
Device = Annotated[str, typer.Option("--device", "-d", help="auto, cpu, cuda, cuda:N or mps.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Worker threads; default one per core.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table of layers to this file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; -vv lists every layer.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorashrink {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look inside LoRA adapters and shrink them against their base checkpoint."""


# --- commands -----------------------------------------------------------------------------------


@app.command()
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
    with _session(verbose, quiet, debug, as_json) as progress:
        from lorashrink import recipe as recipes

        _check_csv(as_csv, files, force)
        base, adapters = _split_base(files, base)
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
            _write_csv(
                as_csv, [{"output": each.output, **_plain(row)} for each in report.results for row in each.layers]
            )
    if as_json:
        _print_json(_plain(report))
    elif not quiet:
        _print_report(report, verbose, dry_run)
    _exit([each.error for each in report.failed], done=bool(report.results))


@app.command()
def inspect(
    files: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="Adapters: files, folders or globs.")],
    base: Base = None,
    header: Annotated[bool, typer.Option("--header", help="Read headers only: instant, without norms.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="List all singular values (with --json).")] = False,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Tell the size and error that some recipes would give.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw spectra, and norms with a base: NAME.png gives NAME_spectra.png, ..."),
    ] = None,
    recursive: Recursive = False,
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what is inside adapters: how they were trained, ranks, alphas and norms, and what is unusual.

    Example: lorashrink inspect model.safetensors lora.safetensors
    """
    with _session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.inspection import inspect as run

        spectra, heat = (plot and plot.with_name(f"{plot.stem}_{what}{plot.suffix}") for what in ("spectra", "norms"))
        for path in (as_csv, spectra, heat):
            _check_csv(path, files, force)
        base, adapters = _split_base(files, base)
        if plot:
            from lorashrink.plots import style

            style.check(plot)
            _check_drawable(adapters, header)
        inspection = run(
            adapters,
            base=base,
            header=header,
            spectrum=spectrum or plot is not None,
            recommend=recommend,
            recursive=recursive,
            device=device,
            jobs=jobs,
            progress=progress,
        )
        if as_csv:
            _write_csv(as_csv, [{"path": each.path, **_plain(row)} for each in inspection.files for row in each.layers])
        if spectra and heat:
            _draw_inspection(inspection, spectra, heat if base else None)
    if as_json:
        _print_json(_plain(inspection))
    elif not quiet:
        _print_inspection(inspection, verbose)
    _exit(list(inspection.failed.values()), done=bool(inspection.files))


@app.command()
def compare(
    files: Annotated[
        list[str], typer.Argument(metavar="[BASE] A B", help="Two adapters: files or PEFT folders; A is the reference.")
    ],
    base: Base = None,
    device: Device = "auto",
    jobs: Jobs = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the difference of each block into this .png or .svg.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="List every layer.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare what two adapters add to the base, whatever their names, families and ranks.

    Example: lorashrink compare lora.safetensors shrunk.safetensors
    """
    with _session(verbose, quiet, debug, as_json) as progress:
        for path in (as_csv, plot):
            _check_csv(path, files, force)
        if plot:
            from lorashrink.plots import style

            style.check(plot)
        base, adapters = _split_base(files, base)
        if len(adapters) != 2:
            raise UsageError(f"compare: takes two adapters, A and B, and was given {len(adapters)}.")
        from lorashrink.comparison import compare as run

        comparison = run(*adapters, base=base, device=device, jobs=jobs, progress=progress)
        if plot:
            from lorashrink.plots.difference import difference_per_block

            style.save(difference_per_block(comparison), plot)
        if as_csv:
            rows = (*comparison.layers, *comparison.only_a, *comparison.only_b)
            _write_csv(as_csv, [_plain(row) for row in rows])
    if as_json:
        _print_json(_plain(comparison))
    elif not quiet:
        _print_comparison(comparison, verbose)


@app.command()
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
    with _session(verbose, quiet, debug, as_json) as progress:
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
        _print_json(_plain(report))
    elif not quiet:
        _print_report(report, verbose, dry_run)


@app.command()
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
    with _session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.conversion import convert as run

        base, adapters = _split_base(files, base)
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
        _print_json(_plain(report))
    elif not quiet:
        _print_conversion(report, verbose)
    _exit([each.error for each in report.failed], done=bool(report.results))


@app.command()
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
    with _session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.base_norms import norms as run

        table = run(base, output, force=force, jobs=jobs, progress=progress)
    if as_json:
        _print_json(_plain(table))
    elif not quiet:
        typer.echo(
            f"{table.path}: norms of {table.weights} weights of {table.base} ({table.family}), {_size(table.bytes)}"
        )


@app.command()
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
    with _session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.demonstration import demo as run

        outcome = run(output, progress=progress)
    if as_json:
        _print_json(_plain(outcome))
    elif not quiet:
        typer.echo(f"$ {outcome.command}")
        _print_report(outcome.report, verbose, dry_run=False)
        typer.echo(f"rank of each block before and after: {outcome.picture}")


@app.command()
def sweep(
    adapter: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="One adapter: a file or PEFT folder.")],
    recipe: Recipes = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Sizes to try, in MiB: 4,8,16,32.")] = None,
    base: Base = None,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Model folder (SDXL, SD 1 or 2) to draw pictures with each recipe.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="What to draw: .txt, .toml or .json as for training.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of each prompt, on top of its own: 0,1,2.")] = "0",
    images_out: Annotated[
        Path | None, typer.Option("--images-out", help="Folder of the pictures; those there are not drawn again.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw size against error, or against pictures, into a .png or .svg.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Try many recipes on one adapter: size against error, and which to begin with. Writes no adapter.

    Example: lorashrink sweep -r fro_ckpt=1,thr=-4.5..-2.5/9 -r rank=4 model.safetensors lora.safetensors
    Example: lorashrink sweep --images sdxl/ --prompts prompts.txt --plot curve.png model.safetensors lora.safetensors
    """
    with _session(verbose, quiet, debug, as_json) as progress:
        sheet = plot.with_name(f"{plot.stem}_sheet.png") if plot and images else None
        figure = plot.with_name(f"{plot.stem}_pictures{plot.suffix}") if plot and images else None
        for path in (as_csv, plot, figure, sheet):
            _check_csv(path, adapter, force)
        if plot:
            from lorashrink.plots import style

            style.check(plot)
        base, adapters = _split_base(adapter, base)
        if len(adapters) > 1:
            raise UsageError(f"{adapters[1]}: a sweep takes one adapter.")
        from lorashrink.sweeping import sweep as run

        result = run(
            adapters[0],
            base=base,
            recipes=recipe or (),
            sizes=_numbers("--sizes", sizes),
            dtype=dtype,
            device=device,
            jobs=jobs,
            images=images,
            prompts=prompts,
            seeds=[_whole("--seeds", seed) for seed in _numbers("--seeds", seeds)],
            pictures=images_out,
            progress=progress,
        )
        if plot:
            from lorashrink.plots.quality import size_and_error

            style.save(size_and_error(result), plot)
        if figure and sheet:
            from lorashrink.plots.comparison_sheet import pictures_by_size
            from lorashrink.plots.quality import size_and_pictures

            style.save(size_and_pictures(result), figure)
            style.save_picture(pictures_by_size(result), sheet)
    if as_csv:
        _write_csv(as_csv, [_with_pictures(point) for point in result.points])
    if as_json:
        _print_json({"version": __version__, **_plain(result)})
    elif not quiet:
        _print_sweep(result)


# The trainer has a parser of its own, because its flags are those of another program.
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train an SDXL LyCORIS adapter, with the flags of sd-scripts' sdxl_train_network.py.

    Example: lorashrink train --config_file settings.toml
    """
    from lorashrink.train.command import main as run

    raise typer.Exit(run(context.args))


def _split_base(files: Sequence[str], base: Path | None) -> tuple[Path | None, list[str]]:
    """The base and the adapters: the first file is the base if it looks like one and no base is given."""
    from lorashrink.inputs import looks_like_base

    adapters = list(files)
    if base is None and looks_like_base(adapters[0]):
        base = Path(adapters.pop(0))
    if not adapters:
        raise UsageError(f"{base}: is a base checkpoint; name the adapters behind it.")
    return base, adapters


# --- around every command -----------------------------------------------------------------------


@contextlib.contextmanager
def _session(verbose: int, quiet: bool, debug: bool, as_json: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress on stderr, and the only place where errors become exit statuses."""
    logging.basicConfig(level=logging.DEBUG if debug or verbose > 1 else logging.WARNING, format="%(message)s")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with _progress(quiet) as progress:
            yield progress
    except LorashrinkError as error:
        if debug:
            raise
        if as_json:
            _print_json({"version": __version__, "error": str(error)})
        _fail(str(error), EXIT_NOTHING_DONE)
    except KeyboardInterrupt:
        _fail("interrupted; no unfinished file was left", EXIT_INTERRUPTED)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"lorashrink: {message}", err=True)
    raise typer.Exit(status)


def _exit(errors: Sequence[str], *, done: bool) -> None:
    for error in errors:
        typer.echo(f"lorashrink: {error}", err=True)
    if errors:
        raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_NOTHING_DONE)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function that draws one bar per text on stderr; None if nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeLeft())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}
        lock = threading.Lock()

        def report(text: str, done: int, total: int) -> None:
            with lock:  # called from several threads
                if text not in tasks:
                    tasks[text] = bars.add_task(text, total=total)
                bars.update(tasks[text], completed=done)
                if done >= total:
                    bars.remove_task(tasks.pop(text))

        yield report


# --- printing -----------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON knows them; numbers that JSON does not know as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, allow_nan=False))


def _check_csv(path: Path | None, inputs: Sequence[str], force: bool) -> None:
    from lorashrink.files import check_output

    if path is not None:
        try:
            check_output(path, force=force, inputs=list(map(Path, inputs)))
        except LorashrinkError as error:
            raise UsageError(f"--csv {error}") from error


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from lorashrink.files import write_bytes

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    for row in rows:
        cells = {key: json.dumps(cell) if isinstance(cell, (list, dict)) else cell for key, cell in row.items()}
        writer.writerow(cells)
    write_bytes(path, text.getvalue().encode())


def _console() -> Console:
    from rich.console import Console

    # A pipe has no width; lines that are cut there would be cut in the reader's file.
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for name in columns:
        left = name in ("layer", "block", "file", "recipe", "algo", "flags", "kind")
        table.add_column(
            name, justify="left" if left else "right", overflow="fold" if left else "ellipsis", no_wrap=not left
        )
    return table


def _size(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _print_report(report: Report, verbose: int, dry_run: bool) -> None:
    console = _console()
    table = _table(
        "file", "recipe", "before", "after", "saved", "error", "energy", "norm", "layers", "removed", "verbatim"
    )
    for each in report.results:
        _print_details(console, each, verbose)
        table.add_row(
            Path(each.output).name,
            each.recipe,
            _size(each.bytes_before),
            _size(each.bytes_after),
            f"{100 * (1 - each.bytes_after / each.bytes_before):.1f}%",
            _share(each.relative_error),
            _share(each.energy),
            _share(each.norm_ratio),
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
    console.print(
        f"{len(report.results)} file{'s' * (len(report.results) != 1)} {done} to {', '.join(places)}: "
        f"{_size(before)} -> {_size(after)}, {_size(abs(before - after))} {'saved' if after <= before else 'more'}"
    )


def _print_conversion(report: ConversionReport, verbose: int) -> None:
    for each in report.results:
        kept = f", {len(each.kept)} tensors under their old names" if each.kept else ""
        exact = "bit by bit" if each.exact else "rounded"
        typer.echo(f"{each.output}: {each.layers} layers, {_size(each.bytes_after)}, {exact}{kept}")
        for tensor in each.kept if verbose else ():
            typer.echo(f"kept {tensor.key}: {tensor.reason}")


def _print_details(console: Console, each: FileResult, verbose: int) -> None:
    for warning in each.warnings:
        typer.echo(f"{each.output}: {warning}", err=True)
    if each.forms:
        sizes = ", ".join(f"--as {form} {_size(size)}" for form, size in each.forms.items())
        console.print(f"{Path(each.output).name} {_size(each.bytes_after)}; {sizes}", markup=False)
    if verbose and each.quantiles:
        console.print(
            "score quantiles  " + "  ".join(f"{place}: {value:.3f}" for place, value in each.quantiles.items())
        )
    if verbose > 1:
        for layer in each.layers:
            console.print(
                f"dim: {layer.rank_before:>3} -> {layer.rank_after:<3}  rle_lora {_share(layer.rle_lora):>7}  "
                f"rle_ckpt {_share(layer.rle_ckpt):>7}  {layer.name}",
                markup=False,
            )
    if verbose:
        for removed in each.removed:
            console.print(f"removed {removed.name}: {removed.reason}", markup=False)
        for kept in each.verbatim:
            console.print(f"verbatim {kept.key}: {kept.reason}", markup=False)


def _numbers(option: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"{option} {text}: numbers with commas between them, such as 4,8,16.") from None


def _whole(option: str, number: float) -> int:
    if not 0 <= number < 2**53 or number != int(number):
        raise UsageError(f"{option} {number:g}: a seed is a whole number of at least 0.")
    return int(number)


def _with_pictures(point: Point) -> dict[str, Any]:
    """A row of numbers: those of its pictures without the pictures."""
    row: dict[str, Any] = _plain(point)
    pictures = row.pop("pictures") or {}
    return row | {name: number for name, number in pictures.items() if name != "files"}


def _print_sweep(result: Sweep) -> None:
    console = _console()
    drawn = result.drawn
    columns = ("PSNR", "SSIM") if drawn else ()
    table = _table("recipe", "size", "of before", "error", "energy", "mean rank", *columns, "best")
    for point in result.points:
        table.add_row(
            point.recipe,
            _size(point.bytes),
            _share(point.bytes / result.bytes),
            _share(point.relative_error),
            _number(point.energy),
            _number(point.mean_rank, ".1f"),
            *_likeness(point.pictures),
            "*" if point.best else "",
        )
    console.print(table)
    console.print("* no other recipe is both smaller and closer", markup=False)
    if drawn:
        count = len(drawn.files)
        other = "float16" if drawn.dtype == "float32" else "float32"
        for what, pictures in (("without the adapter", drawn.none), (f"the whole adapter in {other}", drawn.floor)):
            if pictures:
                console.print("{}: {}, SSIM {}".format(what, *_likeness(pictures)), markup=False)
        console.print(f"{count} picture{'s' * (count != 1)} each, in {Path(drawn.files[0]).parent}", markup=False)
    if result.suggestion:
        console.print(f"begin with -r {result.suggestion.recipe}: {result.suggestion.reason}", markup=False)


def _likeness(pictures: Pictures | None) -> tuple[str, ...]:
    return (f"{pictures.psnr:.1f} dB", f"{pictures.ssim:.4f}") if pictures else ()


def _print_comparison(comparison: Comparison, verbose: int) -> None:
    console = _console()
    a, b, total = comparison.a, comparison.b, comparison.total
    everything = [*comparison.layers, *comparison.only_a, *comparison.only_b]
    columns = ("norm of A", "norm of B", "error", "energy", "cosine")
    if verbose:
        layers = _table("layer", *columns, "rank", "flags")
        for row in everything:
            ranks = f"{row.rank_a or '-'} -> {row.rank_b or '-'}"
            layers.add_row(row.name, *_difference(row), ranks, " ".join(row.flags))
        console.print(layers)
    blocks = _table("block", *columns)
    for block in comparison.blocks:
        blocks.add_row(block.block, *_difference(block))
    console.print(blocks)
    for which, rows in (("A", comparison.only_a), ("B", comparison.only_b)):
        if rows:
            console.print(f"{len(rows)} only in {which}: {_some([row.name for row in rows], verbose)}", markup=False)
    for flag, meaning in _LEFT_OUT.items():
        if flagged := [row.name for row in everything if flag in row.flags]:
            console.print(f"{meaning}: {_some(flagged, verbose)}", markup=False)
    if comparison.others or comparison.others_equal:
        keys = [str(other.a or other.b) for other in comparison.others]
        console.print(
            f"tensors beside the layers: {comparison.others_equal} equal, {len(keys)} not"
            + (f": {_some(keys, verbose)}" if keys else ""),
            markup=False,
        )
    for entry in comparison.metadata:
        console.print(f"metadata {entry.key}: {_shortened(entry.a)} -> {_shortened(entry.b)}", markup=False)
    for letter, side in (("A", a), ("B", b)):
        ranks = " to ".join(map(str, dict.fromkeys(side.ranks))) or "none"
        facts = f"{_size(side.bytes)}, {side.layers} layers of rank {ranks}, {side.algo}, {side.dtype}"
        console.print(f"{letter} {side.path}: {facts}", markup=False)
    console.print(_verdict(total, b.bytes / a.bytes), markup=False)


_LEFT_OUT = {
    "needs_base": "left out, for want of the base weight",
    "nan_a": "left out, because A holds NaN or infinity",
    "nan_b": "left out, because B holds NaN or infinity",
}


def _verdict(total: BlockDifference, bytes_kept: float) -> str:
    """The whole comparison in one sentence."""
    size = f"{100 * bytes_kept:.3g} % of its bytes"
    if total.relative_difference is None:
        return f"A adds nothing that B could be measured against; B has {size}"
    if total.difference == 0:
        return f"B adds exactly what A adds, with {size}"
    error = _percent(total.relative_difference)
    facts = f"cosine {_number(total.cosine, '.6g')}, norm {_number(total.fro_a)} -> {_number(total.fro_b)}"
    if total.cosine is None or total.cosine < 0.5:
        return f"B is not A: the difference is {error} of A, with {size} ({facts})"
    return f"B is A with {error} error, {size} ({facts})"


def _difference(row: BlockDifference | LayerDifference) -> tuple[str, ...]:
    error = "-" if row.relative_difference is None else _percent(row.relative_difference)
    return _number(row.fro_a), _number(row.fro_b), error, _share(row.energy_kept), _number(row.cosine)


def _percent(share: float) -> str:
    """Three digits, but for what is too small to matter."""
    return "< 0.0001 %" if 0 < share < 1e-6 else f"{100 * share:.3g} %"


def _some(names: Sequence[str], verbose: int) -> str:
    """Which, or the first ones and how many there are."""
    shown = names if verbose else names[:3]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(shown) < len(names) else "")


def _shortened(text: str | None) -> str:
    if not text:
        return "(none)" if text is None else "(empty)"
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _check_drawable(adapters: Sequence[str], header: bool) -> None:
    if header:
        raise UsageError("--plot: headers alone tell nothing to draw; leave --header out.")
    if len(adapters) > 1:
        raise UsageError(f"--plot: draws one adapter, and {len(adapters)} are given.")


def _draw_inspection(inspection: Inspection, spectra: Path, heat: Path | None) -> None:
    from lorashrink.plots import style
    from lorashrink.plots.heat import norms_by_kind
    from lorashrink.plots.spectra import spectra_per_block

    if len(inspection.files) > 1:
        raise UsageError(f"--plot: draws one adapter, and {len(inspection.files)} were found.")
    for each in inspection.files:
        style.save(spectra_per_block(each), spectra)
        if heat:
            style.save(norms_by_kind(each), heat)


def _print_inspection(inspection: Inspection, verbose: int) -> None:
    console = _console()
    if len(inspection.files) == 1 or verbose:
        for each in inspection.files:
            _print_adapter(console, each)
    if len(inspection.files) > 1:
        _print_side_by_side(console, inspection.files)


def _print_side_by_side(console: Console, files: Sequence[AdapterTable]) -> None:
    table = _table("file", "size", "family", "algo", "layers", "rank", "alpha", "fro", "fro/base", "flags")
    for each in files:
        table.add_row(
            Path(each.path).name,
            _size(each.bytes),
            each.family or "-",
            each.algo,
            str(len(each.layers)),
            _span([row.rank for row in each.layers]),
            _span([row.alpha for row in each.layers if row.alpha is not None]),
            _number(each.fro),
            _share(each.fro_ratio),
            " ".join(finding.flag for finding in each.health),
        )
    console.print(table)


def _span(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _print_recommendations(console: Console, each: AdapterTable) -> None:
    if not each.recommendations:
        console.print("no recipe to recommend: none of the usual ones can be applied to this file", markup=False)
        return
    table = _table("recipe", "size", "of before", "error", "energy")
    for row in each.recommendations:
        table.add_row(
            row.recipe, _size(row.bytes), _share(row.bytes / each.bytes), _share(row.relative_error), _share(row.energy)
        )
    console.print(table)


def _print_adapter(console: Console, each: AdapterTable) -> None:
    width = max(map(len, each.notes), default=0)
    for label, text in each.notes.items():
        console.print(f"{label:<{width}}  {text}", markup=False)
    layers = _table(
        "layer",
        "block",
        "kind",
        "algo",
        "shape",
        "rank",
        "alpha",
        "dtype",
        "fro",
        "spectral",
        "eff. rank",
        "fro/base",
        "flags",
    )
    for row in each.layers:
        layers.add_row(
            row.name,
            row.block,
            row.kind,
            row.algo,
            "×".join(map(str, row.shape)),
            str(row.rank),
            _number(row.alpha, "g"),
            row.dtype,
            _number(row.fro),
            _number(row.spectral),
            _number(row.effective_rank, ".1f"),
            _share(row.fro_ratio),
            " ".join(row.flags),
        )
    console.print(layers)
    blocks = _table("block", "layers", "parameters", "bytes", "fro", "fro/base")
    for block in each.blocks:
        blocks.add_row(
            block.block,
            str(block.layers),
            f"{block.parameters:,}",
            _size(block.bytes),
            _number(block.fro),
            _share(block.fro_ratio),
        )
    console.print(blocks)
    if each.recommendations is not None:
        _print_recommendations(console, each)
    for finding in each.health:
        console.print(f"{finding.flag}: {finding.text}", markup=False)
    ranks = f"layers of rank {_span([row.rank for row in each.layers])}" if each.layers else "layers"
    console.print(
        f"{each.path}: {_size(each.bytes)}, {each.family or 'unknown family'}, {each.algo} in {each.naming} names, "
        f"{each.dtype or 'no dtype'}, {len(each.layers)} {ranks}, {len(each.others)} other tensors",
        markup=False,
    )


def main() -> None:
    """Entry point of the `lorashrink` command."""
    # Importing torch makes objects by the hundred thousand, and headers by the ten thousand; none of them is garbage.
    gc.set_threshold(100_000)
    status: object = 0
    try:
        app()
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    # Every file is closed by now; taking torch apart would only take up to half a second.
    os._exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
