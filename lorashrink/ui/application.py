"""The state of the page, and what happens when something is asked of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorashrink._version import __version__
from lorashrink.adapters import peft
from lorashrink.automatic.sidecars import copy_sidecar, sidecars
from lorashrink.errors import InputError, LorashrinkError, OutputError, UsageError, explained
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.outputs import source_files
from lorashrink.text import count_text
from lorashrink.ui import drawing
from lorashrink.ui.folders import Folders, open_roots
from lorashrink.ui.goals import DTYPES, Help, command_line, dtype_of, recipe_of
from lorashrink.ui.jobs import Cancelled, Job, Jobs
from lorashrink.ui.library import Entry, Library, Saving, identity_of
from lorashrink.ui.measuring import Measurer
from lorashrink.ui.outputs import Written, free_output
from lorashrink.ui.savings import Savings

_STOP_SECONDS = 10.0  # that a job gets to end
_MOST_RESULTS = 50  # of each job in the state, which is asked for often
_MOST_STEPS = 100  # of a picture


class Application:
    """Library, jobs and their threads. Use it as a context manager."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Raises UsageError if a folder cannot be read."""
        roots = open_roots(folders)
        self.run = secrets.token_hex(6)  # tells a page that the server was started again
        self.uploads = Path(os.path.realpath(tempfile.mkdtemp(prefix="lorashrink-ui-")))
        self.folders = Folders(roots, self.uploads)
        self.library = Library(self.folders)
        self.jobs = Jobs()
        self.measurer = Measurer()
        self._tables: dict[str, Path] = {}  # id -> a calibration table that was offered
        self.savings = Savings(self.library, lambda: self._in_front > 0 or any(not job.over for job in self.jobs.all()))
        self._lock = threading.Lock()
        self._in_front = 0  # requests that somebody waits for
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Application:
        for work in (_warm_up, self.library.read_headers, self.savings.run, self.jobs.run):
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *exc: object) -> None:
        self.library.stop()
        self.jobs.stop()
        self.savings.stop()
        for thread in self._threads:
            thread.join(_STOP_SECONDS)
        shutil.rmtree(self.uploads, ignore_errors=True)

    # --- in the background --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _waited_for(self) -> Iterator[None]:
        with self._lock:
            self._in_front += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_front -= 1

    # --- the library --------------------------------------------------------------------------------

    def state(self, since: int) -> dict[str, Any]:
        """What changed in the library after a revision, and all jobs."""
        return {
            "version": __version__,
            "run": self.run,
            "folders": [str(root) for root in self.folders.roots],
            "library": self.library.changes(since),
            "jobs": [job.document(_MOST_RESULTS) for job in self.jobs.all()],
        }

    def measure(self, identities: Sequence[str], *, everything: bool = False) -> None:
        """Find out in the background how small these adapters could be, or these and then all; drops earlier requests.

        Headers of theirs that are unread come first.
        """
        self.library.read_first(identities)
        self.savings.request(identities, everything=everything)

    def adapter(self, identity: str) -> dict[str, Any]:
        """What the header of an adapter tells, and the files that help to shrink it."""
        table = self.library.table(identity)
        entry = self.library.get(identity)
        models = self._for_family(table.family, "model")
        calibrations = self._for_family(table.family, "statistics")
        calibration = ""
        try:  # the table that `shrink` would take: beside the model, or in the user's cache
            path = self._best_help(entry.path, table.family).calibration
        except LorashrinkError:  # a damaged table is no reason to show nothing
            path = None
        if path is not None:
            calibration = identity_of(path)
            self._tables[calibration] = path
            if calibration not in [row["id"] for row in calibrations]:
                calibrations.append(
                    {"id": calibration, "name": path.name, "kind": "statistics", "bytes": path.stat().st_size}
                )
        return {
            **entry.row(),
            "path": str(entry.path),
            "naming": table.naming,
            "notes": dict(table.notes),
            "health": [asdict(finding) for finding in table.health],
            "loads": table.loads.lines,
            "blocks": [asdict(row) for row in table.blocks],
            "bases": [*self._for_family(table.family, "norms"), *models],
            "calibrations": calibrations,
            "calibration": calibration,
            "dtypes": DTYPES,
            "prompts": drawing.suggested_prompts(table.notes),
            "models": [
                model for model in models if table.family in drawing.FAMILIES and not model["name"].endswith(".gguf")
            ],
            "cannot_draw": drawing.cannot_draw(),
        }

    def _for_family(self, family: str | None, *kinds: str) -> list[dict[str, Any]]:
        """Entries of these kinds for a family of models, in the order of the kinds."""
        entries = [entry for entry in self.library.entries() if family and entry.family == family]
        return [
            {"id": entry.id, "name": entry.path.name, "kind": kind, "bytes": entry.bytes}
            for kind in kinds
            for entry in entries
            if entry.kind == kind
        ]

    def _best_help(self, source: Path, family: str | None) -> Help:
        """The model and the table that `shrink` would take for an adapter. Raises InputError or NotABase."""
        from lorashrink.automatic.methods import Methods  # it imports torch

        bases = self._for_family(family, "norms", "model")
        base = self.library.get(bases[0]["id"]).path if bases else None
        with Methods(base, None) as methods:
            method = methods.of(source)
        table = method.calibration if method.calibration and self._may_read(method.calibration) else None
        return Help(base if method.base else None, table)

    def _may_read(self, table: Path) -> bool:
        from lorashrink.automatic.methods import table_folder

        return table.parent == table_folder() or self.folders.holds(table)

    def help(self, request: Mapping[str, Any]) -> Help:
        """The files that a request names by the ids `base` and `calibration`."""
        base, calibration = (str(request.get(key) or "") for key in ("base", "calibration"))
        table = self._tables.get(calibration)
        if calibration and (table is None or not self._may_read(table)):
            table = self.library.get(calibration).path
        return Help(self.library.get(base).path if base else None, table)

    # --- one adapter --------------------------------------------------------------------------------

    def curve(self, identity: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Size against error of an adapter, and what each quality would give."""
        entry, help, dtype = self.library.get(identity), self.help(request), dtype_of(request)
        with self._waited_for():
            measured = self.measurer.curve(entry.path, help, dtype)
        high = measured["qualities"]["high"]
        if help == Help() and dtype == DTYPES[0] and high and not entry.saving:
            self.library.update(identity, saving=Saving(high["bytes"], high["error"]))
        return measured

    def at(self, identity: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a goal gives: recipe, size, error, ranks per block, and the command line that does the same."""
        entry, help, dtype = self.library.get(identity), self.help(request), dtype_of(request)
        recipe = recipe_of(request, help)
        output = free_output(entry.path, self.folders)
        with self._waited_for():
            point = self.measurer.at(entry.path, recipe, help, dtype)
        return {**point, "command": command_line(recipe, help, dtype, entry.path, output)}

    # --- shrinking ----------------------------------------------------------------------------------

    def shrink(self, request: Mapping[str, Any]) -> Job:
        """Begin to shrink the adapters `ids`, each to the same goal. Raises UsageError, RecipeError or InputError.

        Without `base` and `calibration` each gets those that `shrink` would take.
        """
        identities = request.get("ids")
        if not isinstance(identities, list) or not identities:
            raise UsageError("no adapter is chosen; tick at least one.")
        entries = [self.library.get(str(identity)) for identity in identities]
        named = self.help(request) if request.keys() & {"base", "calibration"} else None
        recipe_of(request, named or Help())  # what is no goal is refused before any work
        dtype, written = dtype_of(request), Written()

        def save(job: Job, entry: Entry) -> dict[str, Any]:
            help = named or self._best_help(entry.path, entry.family)
            recipe = recipe_of(request, help)
            prepared = self.measurer.prepared(entry.path, help, lambda text, done, total: job.check())
            output = free_output(entry.path, self.folders)
            file = output / peft.WEIGHTS_FILE if peft.is_folder(entry.path) else output
            written.expect(file)
            result = prepared.save(recipe, file, dtype=dtype)
            written.add(source_files(output))
            for sidecar, copy in sidecars(entry.path, file):
                if self.folders.holds(sidecar):
                    copy_sidecar(sidecar, copy, file)
                    written.add([copy])
            return shrunk_row(entry, output, result)

        def work(job: Job) -> None:
            try:
                for index, entry in enumerate(entries):
                    job.report(entry.path.name, index, len(entries))
                    try:
                        job.results.append(save(job, entry))
                    except Cancelled:
                        raise
                    except Exception as error:
                        job.failed.append({"input": str(entry.path), "error": str(explained(entry.path, error))})
                job.report("", len(entries), len(entries))
            finally:
                if written.files:
                    job.undo = written.delete
                self.library.scan()

        return self.jobs.add(Job("shrink", f"Shrink {count_text(len(entries), 'LoRA')}", work))

    # --- pictures -----------------------------------------------------------------------------------

    def draw(self, request: Mapping[str, Any]) -> Job:
        """Begin to draw with the adapter `id` before and after. Raises UsageError, RecipeError or InputError."""
        entry, model = (self.library.get(str(request.get(key, ""))) for key in ("id", "model"))
        help, dtype = self.help(request), dtype_of(request)
        recipe = recipe_of(request, help)
        steps = request.get("steps", 20)
        if not isinstance(steps, int) or not 1 <= steps <= _MOST_STEPS:
            raise UsageError(f"steps: a whole number from 1 to {_MOST_STEPS}, not {steps}.")
        prompts = drawing.prompts_of(str(request.get("prompts", "")), steps, model.path)

        def work(job: Job) -> None:
            def save(path: Path) -> None:
                self.measurer.prepared(entry.path, help).save(recipe, path, dtype=dtype)

            drawing.draw(job, entry.path, save, f"{recipe.file_items()}_{dtype}", model.path, prompts)

        job = Job("pictures", f"Pictures with {entry.path.stem}", work)
        job.facts = {"adapter": entry.id, "recipe": str(recipe)}
        return self.jobs.add(job)

    def picture(self, identity: str, name: str) -> Path:
        """A picture of a job: `0-before`, `0-after` and so on. Raises InputError."""
        number, _, side = name.partition("-")
        results = self.jobs.get(identity).results
        if not number.isdecimal() or int(number) >= len(results) or side not in ("before", "after"):
            raise InputError("there is no such picture.")
        return Path(results[int(number)][side])

    # --- jobs ---------------------------------------------------------------------------------------

    def cancel(self, identity: str) -> dict[str, Any]:
        """End a job after the step that is being done."""
        job = self.jobs.get(identity)
        job.cancelled = True
        return job.document()

    def undo(self, identity: str) -> dict[str, Any]:
        """Delete what a job wrote, and nothing else. Raises UsageError if there is nothing to undo."""
        job = self.jobs.get(identity)
        if job.undo is None or not job.over or job.undone:
            raise UsageError("there is nothing to undo.")
        job.undone = True
        deleted = job.undo()
        self.library.scan()
        return {"deleted": deleted, **job.document()}

    # --- files --------------------------------------------------------------------------------------

    async def upload(self, name: str, pieces: AsyncIterator[bytes]) -> str:
        """Keep a file that was dropped onto the page until the server stops; its id.

        Only safetensors are taken, which hold numbers and no code. Raises UsageError, InputError or OutputError.
        """
        clean = Path(name.replace("\\", "/")).name
        if not clean.endswith(".safetensors") or clean.startswith("."):
            raise UsageError(f"{name[:100]}: only .safetensors files can be dropped here.")
        folder = Path(tempfile.mkdtemp(dir=self.uploads))
        path, unfinished = folder / clean, folder / "unfinished"
        try:
            with open(unfinished, "xb") as handle:
                async for piece in pieces:
                    handle.write(piece)
            unfinished.rename(path)  # so that the list never has a part of a file
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise OutputError(f"{clean}: cannot be kept ({error.strerror or error}).") from error
            raise
        self.library.scan()
        return identity_of(path)


def shrunk_row(entry: Entry, output: Path, result: FileResult) -> dict[str, Any]:
    """What a page tells of a file that was written."""
    return {
        "id": entry.id,
        "name": entry.path.name,
        "output": str(output),
        "output_name": output.name,
        "output_id": identity_of(output),
        "recipe": result.recipe,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "error": result.relative_error,
        "predicted_db": result.predicted_db,
        "loads": result.loads.lines,
        "warnings": list(result.warnings),
    }


def _warm_up() -> None:
    """Import what takes seconds, so that nobody waits for it later."""
    with contextlib.suppress(ImportError):
        import lorashrink.automatic.methods
        import lorashrink.shrinking.prepared  # noqa: F401
