"""`resize` on a Ray cluster: each adapter is a task for any process of any machine.

Adapters are tasks, not actors: Ray repeats tasks of a lost machine elsewhere and gives tasks to machines that join. A
process keeps its base open from one task to the next. The driver keeps results, journal and progress.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from lorashrink.errors import Progress, UsageError, explained
from lorashrink.files.disk import write_bytes, write_together
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import Failure, Report
from lorashrink.shrinking.journal import Stamp, stamps
from lorashrink.shrinking.ledger import Done, Ledger, OnResult
from lorashrink.shrinking.options import ResizeKeywords, ResizeOptions
from lorashrink.shrinking.outputs import shown, source_files
from lorashrink.shrinking.pipeline import shrink_each
from lorashrink.shrinking.request import Job, prepare
from lorashrink.shrinking.reuse import existing_results
from lorashrink.shrinking.run import clear, report
from lorashrink.shrinking.session import Session, open_session

if TYPE_CHECKING:
    from types import ModuleType

_TRIES = 5  # of a task whose process or machine is lost, beyond the first

_CONNECT_SECONDS = 10.0

_QUEUE = 4  # tasks per CPU that are handed over at once, so that the cluster sees that there is more work

_QUEUE_WITH_FILES = 2  # the same where each holds a file in memory

# name -> contents
Files = Mapping[str, bytes]

# (source, what is known of its other outputs, stamps of a source that is sent)
_Waiting = tuple[Path, Done | None, tuple[Stamp, ...] | None]


def resize(
    adapters: str | Path | Sequence[str | Path],
    *,
    address: str = "local",
    transfer: bool = False,
    gpus_per_task: float = 0.0,
    each: OnResult | None = None,
    progress: Progress | None = None,
    **options: Unpack[ResizeKeywords],
) -> Report:
    """The same as `lorashrink.resize`, with the work done by a Ray cluster; `options` are the other arguments of that.

    address: "local" for processes of this machine, "auto" for the cluster that this machine is in, else "host:port" or
    "ray://host:port". transfer: files are sent to the machines and back, which otherwise must find all of them, and the
    base, under the same paths; of bases norm tables are sent. gpus_per_task: for each adapter. jobs: CPUs for each
    adapter, 1 if it is not given.

    Raises UsageError if Ray is not installed or the cluster cannot be reached, else as `lorashrink.resize`.
    """
    if options.get("stack"):
        raise UsageError("--stack does not work with --ray, because all LoRAs of a stack are shrunk together.")
    if not isinstance(options.get("base"), (str, Path, type(None))):
        raise UsageError(
            "base: a model in memory cannot be sent to a cluster. Give the path of a file, or a norm table."
        )
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed; it comes with: pip install 'lorashrink[ray]'") from None
    job = prepare(adapters, ResizeOptions(**options))
    device = job.options.device
    if device == "auto":  # a task that has a GPU uses it, however small its adapter is
        device = "cuda" if gpus_per_task else "cpu"
    task = replace(job, options=replace(job.options, device=device, jobs=job.options.jobs or 1))
    with (
        open_session(replace(job, options=replace(job.options, device="cpu", jobs=1))) as session,
        Ledger(job.targets, journal=job.journal, on_result=each, progress=progress) as ledger,
    ):
        clear(job)
        try:
            # Ray prints about lost processes, and what is printed belongs to the caller.
            with contextlib.redirect_stdout(sys.stderr), connected(ray, address):
                _Driver(ray, task, session, ledger, transfer, gpus_per_task).run()
        finally:
            clear(job)  # of processes that were lost
        return report(job, session, ledger)


@contextlib.contextmanager
def connected(ray: ModuleType, address: str) -> Iterator[None]:
    """A connection to the cluster, and a cluster on this machine if it is to be "local".

    A connection that is open already is used, and stays open.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"--ray {address}: no cluster can be used there ({reason}). `ray status` on its head says whether it runs."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for two minutes, and then ends the process."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        if address not in ("local", "auto"):
            raise UsageError(f"--ray {address}: give local, auto, HOST:PORT or ray://HOST:PORT.")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"--ray {address}: cannot be reached ({error}). Is the head of the cluster running, and its port open?"
        ) from error


# --- the driver ---------------------------------------------------------------------------------


@dataclass(eq=False)
class _Driver:
    """Hands out adapters, a few more than there are CPUs, and takes results back."""

    ray: ModuleType
    job: Job
    session: Session
    ledger: Ledger
    transfer: bool
    gpus: float

    def run(self) -> None:
        tables: dict[Path, bytes] = {}
        if self.transfer:  # norm tables are small enough to be sent
            bases = [Path(str(self.job.options.base))] if self.job.options.base is not None else self.job.bases.values()
            paths = [path for path in bases if path.suffix == ".json" and ".index." not in path.name]
            tables = {path: path.read_bytes() for path in paths}
        shared = self.ray.put((replace(self.job, targets={}), tables))
        run_id, cpus = uuid.uuid4().hex, self.job.options.jobs or 1
        per_cpu = _QUEUE_WITH_FILES if self.transfer else _QUEUE
        task = self.ray.remote(num_cpus=cpus, num_gpus=self.gpus, max_retries=_TRIES)(shrink_source)
        waiting: dict[Any, _Waiting] = {}
        try:
            for source, outputs, existing in self.to_do():
                available = int(self.ray.cluster_resources().get("CPU", 1))
                while len(waiting) >= max(1, available // cpus) * per_cpu:
                    self._take(waiting)
                files = source_files(source) if self.transfer else []
                before = stamps(files) if self.transfer else None
                try:
                    contents = {path.name: path.read_bytes() for path in files}
                except OSError as error:
                    reason = f"{source}: cannot be read ({error.strerror or error})."
                    self.ledger.add(Done(source, Failure(str(source), reason)))
                    continue
                self.ledger.start(source, outputs)
                waiting[task.remote(run_id, shared, source, outputs, contents)] = (source, existing, before)
            while waiting:
                self._take(waiting)
        finally:
            for reference in waiting:
                self.ray.cancel(reference, force=True)

    def to_do(self) -> Iterator[tuple[Path, Mapping[Path, Recipe], Done | None]]:
        """(source, outputs to make, results of its other ones); the ledger gets those with nothing to make."""
        for source, outputs in self.job.targets.items():
            try:
                skip = self.job.options.skip_existing
                existing = existing_results(source, outputs, self.session, self.ledger) if skip else None
            except Exception as error:
                self.ledger.fail(source, explained(source, error))
                continue
            skipped = {result.output for result in existing.results} if existing else set()
            rest = {path: recipe for path, recipe in outputs.items() if str(shown(path)) not in skipped}
            if rest:
                yield source, rest, existing
            elif existing:
                self.ledger.add(existing)

    def _take(self, waiting: dict[Any, _Waiting]) -> None:
        """Wait for one task, and write down what became of it."""
        (reference,), _ = self.ray.wait(list(waiting), num_returns=1)
        source, existing, before = waiting.pop(reference)
        try:
            done, outputs = self.ray.get(reference)
            for path, contents in outputs.items():
                # The file that an output is known by comes last.
                names = sorted(contents, key=lambda name: name == path.name)
                write_together({path.parent / name: contents[name] for name in names})
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            done = Done(source, Failure(str(source), f"{source}: the cluster could not do it ({reason})."))
        except Exception as error:
            done = Done(source, Failure(str(source), str(explained(source, error))))
        self.ledger.add(done.joined(existing, before))


# --- a process of the cluster -------------------------------------------------------------------

_open: dict[str, tuple[Session, ExitStack]] = {}


def shrink_source(
    run_id: str,
    shared: tuple[Job, Mapping[Path, bytes]],
    source: Path,
    outputs: Mapping[Path, Recipe],
    contents: Files,
) -> tuple[Done, dict[Path, Files]]:
    """(what became of one adapter, its outputs if they are to be sent back). A task may be done more than once."""
    session = session_of(run_id, shared)
    try:
        if not contents:
            return _carried_out(source, outputs, session), {}
        # with files in a folder of this machine, and their own names in the outcome
        with tempfile.TemporaryDirectory(prefix="lorashrink-") as name:
            folder = Path(name)
            local = folder / source.name
            for file_name, data in contents.items():
                write_bytes(local if len(contents) == 1 else local / file_name, data)
            copies = {folder / str(number) / path.parent.name / path.name: path for number, path in enumerate(outputs)}
            done = _carried_out(local, {copy: outputs[path] for copy, path in copies.items()}, session)
            written: dict[Path, Files] = {
                path: {file.name: file.read_bytes() for file in copy.parent.iterdir()}
                for copy, path in copies.items()
                if copy.exists()
            }
            return done.moved(source, copies), written
    except BaseException:
        _open.pop(run_id)[1].close()  # its threads may have been stopped
        raise


def session_of(run_id: str, shared: tuple[Job, Mapping[Path, bytes]]) -> Session:
    """The session that this process has open for a run."""
    if run_id not in _open:
        for _, stack in _open.values():
            stack.close()
        _open.clear()
        job, tables = shared
        job = replace(job, options=replace(job.options, skip_existing=False))
        with ExitStack() as stack:
            if tables:  # the job gets copies of these norm tables on this machine
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorashrink-")))
                copies = {path: folder / f"{number}.json" for number, path in enumerate(tables)}
                for path, copy in copies.items():
                    copy.write_bytes(tables[path])
                options, bases = job.options, {family: copies.get(path, path) for family, path in job.bases.items()}
                if options.base is not None:
                    base = Path(str(options.base))
                    options = replace(options, base=copies.get(base, base))
                job = replace(job, options=options, bases=bases)
            _open[run_id] = (stack.enter_context(open_session(job)), stack.pop_all())
    return _open[run_id][0]


class _Box(Ledger):
    """Keeps what the driver's ledger is to get."""

    done: Done

    def add(self, done: Done) -> None:
        self.done = done


def _carried_out(source: Path, outputs: Mapping[Path, Recipe], session: Session) -> Done:
    box = _Box({source: outputs})
    shrink_each({source: outputs}, session, box)
    return box.done
