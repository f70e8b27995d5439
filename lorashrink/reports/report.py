"""`report`: measure an adapter at several sizes and write a page about it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.bases.views import BaseInfo
from lorashrink.errors import InputError, Progress, UsageError
from lorashrink.files.disk import check_apart, check_output, sha256_file, write_bytes
from lorashrink.insight.inspection import inspect
from lorashrink.linking.inputs import find_adapters
from lorashrink.pictures.prompts import prompt_file
from lorashrink.reports.card import ENDING as CARD
from lorashrink.reports.card import card_pictures, write_card
from lorashrink.reports.findings import Findings
from lorashrink.reports.page import page
from lorashrink.results.inspection import Inspection
from lorashrink.results.shrinking import FileResult
from lorashrink.results.sweep import Sweep
from lorashrink.shrinking.outputs import base_files
from lorashrink.shrinking.run import resize
from lorashrink.sweeping.sweep import sweep

_ENDINGS = (".html", ".htm")


@dataclass(frozen=True, slots=True)
class ReportFile:
    """A written page, and the results that it shows."""

    path: str
    bytes: int
    inspection: Inspection  # with singular values
    sweep: Sweep | None  # None: there is nothing in the adapter to shrink


def report(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    recipes: str | Sequence[str] = (),
    sizes: Sequence[float] = (),
    dtype: str = "same",
    calibration: str | Path | None = None,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    pictures: str | Path | None = None,
    settings: str | Path | None = None,
    clip: str | Path | None = None,
    text: str | Path | None = None,
    output: str | Path | None = None,
    paths: bool = False,
    force: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ReportFile:
    """Write one HTML page about one adapter, which holds all that it shows and loads nothing from anywhere.

    It tells what `inspect` and `sweep` do with the same arguments, and layer by layer what the recommended recipe would
    keep (the smallest where none is recommended). An adapter with nothing to shrink in it gets a page without sizes.

    output: a name that ends in .html; default is beside the adapter. A name that ends in .md gives a short page in
    Markdown for a model site, with its pictures in files beside it.
    paths: show whole paths of files, not names alone. Default False.

    Raises UsageError, RecipeError or InputError as `sweep` does, and OutputError before any work.
    """
    sources = find_adapters([adapter])
    if len(sources) != 1:
        raise UsageError(f"{adapter}: {len(sources)} adapters; a report is about one.")
    source = sources[0]
    path = source.with_name(f"{source.stem}_report.html") if output is None else Path(output)
    as_card = path.suffix.lower() == CARD
    if path.suffix.lower() not in (*_ENDINGS, CARD):
        raise UsageError(f"{path}: a report is a page; give it a name that ends in .html or .md.")
    read = (prompt_file(prompts) if prompts is not None else None, Path(text) if text is not None else None)
    inputs = [source, *base_files(base), *filter(None, read)]
    files = [path, *(card_pictures(path) if as_card else ())]
    check_apart([("-o", written) for written in files], [("--images-out", Path(pictures) if pictures else None)])
    for written in files:
        check_output(written, force=force, inputs=inputs)
    shared: dict[str, Any] = {"base": base, "calibration": calibration, "dtype": dtype, "device": device, "jobs": jobs}
    tried: dict[str, Any] = {
        "sizes": sizes,
        "images": images,
        "settings": settings,
        "prompts": prompts,
        "seeds": seeds,
        "pictures": pictures,
        "clip": clip,
        "text": text,
    }
    result, refusal = None, None
    try:
        result = sweep(source, recipes=recipes, progress=progress, **tried, **shared)
    except InputError as error:
        refusal = error
    inspection = inspect(source, base=base, spectrum=True, device=device, jobs=jobs, progress=progress)
    for failure in inspection.failed:
        raise refusal or InputError(failure.error)
    (table,) = inspection.files
    # Whoever has an adapter without effect, or with NaN, gets a page that says so.
    if refusal and table.fro and not any("nan" in row.flags for row in table.layers):
        raise refusal
    if not table.layers:
        result = None  # whose recipes all copy what there is
    shrunk = _dry_run(source, result, path.parent, shared) if result else None
    base_info, hashes = _identities(source, base)
    findings = Findings(
        table=table,
        base=base_info,
        sweep=result,
        unswept="" if result else str(refusal or table.health[0].text),
        shrunk=shrunk,
        hashes=hashes,
        commands=command_lines(source, path, recipes, {**shared, **tried}, shrunk, paths=paths),
    )
    data = write_card(path, findings) if as_card else page(findings, progress, paths=paths)
    write_bytes(path, data)
    return ReportFile(str(path), len(data), inspection, result)


def _dry_run(source: Path, result: Sweep, folder: Path, shared: Mapping[str, Any]) -> FileResult:
    """What the suggested recipe would do to each layer, as if it were written into `folder`."""
    recipe = result.suggestion.recipe if result.suggestion else result.points[0].recipe
    report = resize(source, recipes=recipe, output=folder, dry_run=True, **shared)
    for failure in report.failed:
        raise InputError(failure.error)
    return report.results[0]


def _identities(source: Path, base: str | Path | None) -> tuple[BaseInfo | None, dict[str, str]]:
    """What the base is, and file -> hash: of the adapter's whole contents, and of headers and samples of the base."""
    with open_adapter(source) as adapter:
        hashes = {str(path): f"SHA-256 {sha256_file(path)}" for path in adapter.store.files}
    if base is None:
        return None, hashes
    with open_base(base) as opened:
        return opened.info, {**hashes, str(base): f"SHA-256 of headers and samples {opened.fingerprint}"}


# Argument of `sweep` -> the option for it.
_OPTIONS = {
    "base": "--base",
    "calibration": "--calibration",
    "dtype": "-t",
    "sizes": "--sizes",
    "images": "--images",
    "settings": "--images-config",
    "prompts": "--prompts",
    "seeds": "--seeds",
    "pictures": "--images-out",
    "clip": "--clip",
    "text": "--text",
}


def command_lines(
    source: Path,
    output: Path,
    recipes: str | Sequence[str],
    arguments: Mapping[str, Any],
    shrunk: FileResult | None,
    *,
    paths: bool,
) -> dict[str, str]:
    """Purpose -> command line, as a shell takes it; without `paths` for someone who is in the folder of the files."""
    recipes = [recipes] if isinstance(recipes, str) else recipes
    options: dict[str, object] = {option: arguments[name] for name, option in _OPTIONS.items()}
    if not paths:
        source, output = Path(source.name), Path(output.name)
        options = {option: None if value is None else Path(str(value)).name for option, value in options.items()}
    options["--sizes"] = ",".join(map(str, arguments["sizes"])) or None
    options["-t"] = None if arguments["dtype"] == "same" else arguments["dtype"]
    options["--seeds"] = ",".join(map(str, arguments["seeds"])) if arguments["images"] else None
    lines = {"This page": _line("report", source, recipes, {**options, "-o": output})}
    if shrunk:
        needed = {name: options[name] for name in ("--base", "--calibration", "-t")}
        lines["The smaller adapter"] = _line("resize", source, [shrunk.recipe], needed)
        lines["The sizes as JSON"] = _line("sweep --json", source, recipes, options)
    lines["What is inside as JSON"] = _line("inspect --json --spectrum", source, (), {"--base": options["--base"]})
    return lines


def _line(command: str, source: Path, recipes: Sequence[str], options: Mapping[str, object]) -> str:
    words = [word for recipe in recipes for word in ("-r", recipe)]
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["lorashrink", *command.split(), *words, str(source)])
