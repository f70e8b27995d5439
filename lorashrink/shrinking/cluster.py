"""`resize` on a Ray cluster: each adapter is a task for any process of any machine.

Tasks, and not actors: those of a machine that is lost are done again elsewhere, and machines that join get work. A
process keeps its base open from one task to the next. Results, the journal and progress are the driver's.
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
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import peft
from lorashrink.errors import InputError, LorashrinkError, Progress, UsageError
from lorashrink.files.disk import write_bytes
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import Failure, Report
from lorashrink.shrinking.journal import Stamp, stamps
from lorashrink.shrinking.ledger import Done, Ledger, Targets
from lorashrink.shrinking.outputs import shown
from lorashrink.shrinking.pipeline import run
from lorashrink.shrinking.request import How, Job, prepare
from lorashrink.shrinking.reuse import already_there
from lorashrink.shrinking.run import clear, report
from lorashrink.shrinking.session import Each, Session, open_session

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
    jobs: int | None = None,
    each: Each | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """The same as `lorashrink.resize`, with the work done by a Ray cluster; `options` are the other arguments of that.

    address: "local" for processes of this machine, "auto" for the cluster that this machine is in, else "host:port" or
    "ray://host:port". transfer: files are sent to the machines and back, which otherwise must find all of them, and the
    base, under the same paths; of bases norm tables are sent. gpus_per_task: for each adapter. jobs: CPUs for each
    adapter, 1 if it is not given.

    Raises UsageError if Ray is not installed or the cluster cannot be reached, else as `lorashrink.resize`.
    """
    if options.get("stack"):
        raise UsageError("--stack: is not for --ray, because what becomes of each adapter depends on all others.")
    ray = _ray()
    job = prepare(adapters, **options)
    how = replace(job.how, device="cpu" if job.how.device == "auto" and not gpus_per_task else job.how.device)
    with (
        open_session(replace(job.how, device="cpu"), jobs=1) as session,
        Ledger(job.targets, journal=job.journal, each=each, progress=progress) as ledger,
    ):
        clear(job)
        try:
            # Ray prints about lost processes, and what is printed belongs to the caller.
            with contextlib.redirect_stdout(sys.stderr), _connected(ray, address):
                _Driver(ray, job, how, session, ledger, transfer, jobs or 1, gpus_per_task).run()
        finally:
            clear(job)  # of processes that were lost
        return report(job, session, ledger)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed; it comes with: pip install 'lorashrink[ray]'") from None
    module: ModuleType = ray
    return module


@contextlib.contextmanager
def _connected(ray: ModuleType, address: str) -> Iterator[None]:
    """A connection to the cluster, and a cluster on this machine if it is to be "local". One that is there stays."""
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
            raise UsageError(f"--ray {address}: is none of local, auto, HOST:PORT and ray://HOST:PORT.")
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
    how: How
    session: Session
    ledger: Ledger
    transfer: bool
    cpus: int
    gpus: float

    def run(self) -> None:
        tables = _tables(self.how) if self.transfer else {}
        key = uuid.uuid4().hex
        how = self.ray.put((self.how, tables))
        task = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_TRIES)(_shrink)
        waiting: dict[Any, _Waiting] = {}
        try:
            for source, outputs, there in self._wanted():
                while len(waiting) >= self._room():
                    self._take(waiting)
                before = stamps(_files_of(source)) if self.transfer else None
                try:
                    sent = _contents(source) if self.transfer else None
                except LorashrinkError as error:
                    self.ledger.add(Done(source, Failure(str(source), str(error))))
                    continue
                self.ledger.start(source, outputs)
                waiting[task.remote(key, how, self.cpus, source, outputs, sent)] = (source, there, before)
            while waiting:
                self._take(waiting)
        finally:
            for reference in waiting:
                self.ray.cancel(reference, force=True)

    def _room(self) -> int:
        cpus = int(self.ray.cluster_resources().get("CPU", 1))
        return max(1, cpus // self.cpus) * (_QUEUE_WITH_FILES if self.transfer else _QUEUE)

    def _wanted(self) -> Iterator[tuple[Path, Mapping[Path, Recipe], Done | None]]:
        """(source, outputs to make, what is known of its other ones); the ledger gets those with nothing to make."""
        for source, outputs in self.job.targets.items():
            try:
                skip = self.how.skip_existing
                there = already_there(source, outputs, self.session, self.ledger) if skip else None
            except LorashrinkError as error:
                self.ledger.add(Done(source, Failure(str(source), str(error))))
                continue
            known = {result.output for result in there.results} if there else set()
            rest = {path: recipe for path, recipe in outputs.items() if str(shown(path)) not in known}
            if rest:
                yield source, rest, there
            elif there:
                self.ledger.add(there)

    def _take(self, waiting: dict[Any, _Waiting]) -> None:
        """Wait for one task, and write down what became of it."""
        (reference,), _ = self.ray.wait(list(waiting), num_returns=1)
        source, there, before = waiting.pop(reference)
        try:
            done, made = self.ray.get(reference)
            for path, contents in made.items():
                _write(path, contents)
        except LorashrinkError as error:
            done = Done(source, Failure(str(source), str(error)))
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            done = Done(source, Failure(str(source), f"{source}: the cluster could not do it ({reason})."))
        self.ledger.add(done.joined(there, before))


def _tables(how: How) -> dict[Path, bytes]:
    """The norm tables among the bases, which are small enough to be sent."""
    paths = [Path(how.base)] if how.base is not None else list(how.bases.values())
    return {path: path.read_bytes() for path in paths if path.suffix == ".json" and ".index." not in path.name}


def _files_of(source: Path) -> list[Path]:
    return [peft.weights_in(source), source / peft.CONFIG_FILE] if peft.is_folder(source) else [source]


def _contents(source: Path) -> dict[str, bytes]:
    try:
        return {path.name: path.read_bytes() for path in _files_of(source)}
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error}).") from error


def _write(path: Path, contents: Files) -> None:
    """The files of one output, the one that it is known by last."""
    for name in sorted(contents, key=lambda name: name == path.name):
        write_bytes(path.parent / name, contents[name])


# --- a process of the cluster -------------------------------------------------------------------

_open: dict[str, tuple[Session, ExitStack]] = {}


def _shrink(
    key: str,
    shared: tuple[How, Mapping[Path, bytes]],
    jobs: int,
    source: Path,
    outputs: Mapping[Path, Recipe],
    sent: Files | None,
) -> tuple[Done, dict[Path, Files]]:
    """(what became of one adapter, its outputs if they are to be sent back). A task may be done more than once."""
    session = _session(key, shared, jobs)
    try:
        if sent is None:
            return _carried_out(source, outputs, session), {}
        with tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
            return _shrink_copy(Path(folder), source, outputs, sent, session)
    except BaseException:
        _open.pop(key)[1].close()  # its threads may have been stopped
        raise


def _session(key: str, shared: tuple[How, Mapping[Path, bytes]], jobs: int) -> Session:
    """The session that this process has open for a run."""
    if key not in _open:
        for _, stack in _open.values():
            stack.close()
        _open.clear()
        how, tables = shared
        with ExitStack() as stack:
            if tables:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lorashrink-")))
                how = _with_tables(how, tables, folder)
            _open[key] = (
                stack.enter_context(open_session(replace(how, skip_existing=False), jobs=jobs)),
                stack.pop_all(),
            )
    return _open[key][0]


def _with_tables(how: How, tables: Mapping[Path, bytes], folder: Path) -> How:
    places = {}
    for number, (path, data) in enumerate(tables.items()):
        places[path] = folder / f"{number}.json"
        places[path].write_bytes(data)
    base = None if how.base is None else places.get(Path(how.base), Path(how.base))
    return replace(how, base=base, bases={family: places.get(path, path) for family, path in how.bases.items()})


class _Box(Ledger):
    """Keeps what the driver's ledger is to get."""

    done: Done | None = None

    def add(self, done: Done) -> None:
        self.done = done


def _carried_out(source: Path, outputs: Mapping[Path, Recipe], session: Session) -> Done:
    targets: Targets = {source: outputs}
    box = _Box(targets)
    run(targets, session, box)
    assert box.done, "a run tells what becomes of each source"
    return box.done


def _shrink_copy(
    folder: Path, source: Path, outputs: Mapping[Path, Recipe], sent: Files, session: Session
) -> tuple[Done, dict[Path, Files]]:
    """The same with files in a folder of this machine, told by their own names."""
    here = folder / source.name
    for name, data in sent.items():
        write_bytes(here if len(sent) == 1 else here / name, data)
    places = {folder / str(number) / path.parent.name / path.name: path for number, path in enumerate(outputs)}
    done = _carried_out(here, {place: outputs[path] for place, path in places.items()}, session)
    made: dict[Path, Files] = {
        path: {each.name: each.read_bytes() for each in place.parent.iterdir()}
        for place, path in places.items()
        if place.exists()
    }
    return done.moved(source, places), made
