"""Where the time of one resize command goes: `python stages.py RESULT.json BASE LORA OUT RECIPE`.

Runs the command's work in this fresh process, with clocks around the functions that make up its stages, and writes
{"stages": {name: seconds}, "cpu": {name: CPU seconds over all threads}, "total": seconds} as JSON.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

_WRITE, _COMMIT = "form, write, check", "fsync, rename"
# Functions that run one after another, by the stage they belong to; a missing one is left out of the table.
STAGES = {
    "open base": ["lorashrink.shrinking.prepared:open_base"],
    "open adapter, match": ["lorashrink.shrinking.request:open_adapter", "lorashrink.shrinking.work:match"],
    "read the file": ["lorashrink.files.store:TensorStore.load"],
    "norms look-up": ["lorashrink.shrinking.session:BaseNorms"],
    "select, plan": ["lorashrink.shrinking.work:plan"],
    _WRITE: ["lorashrink.shrinking.pipeline:write"],
    _COMMIT: ["lorashrink.shrinking.write:SafetensorsWriter.commit"],
    "report": ["lorashrink.shrinking.pipeline:file_result"],
}
_LOOK_UP = "lorashrink.bases.norms:BaseNorms.look_up"
# Functions of the worker threads; some contain others.
WORK = {
    "hash of the source": "lorashrink.shrinking.reuse:contents_sha256",
    "hash of the output": "lorashrink.files.writing:Hashes.update",
    "check the output": "lorashrink.shrinking.write:_Checks.check",
    "read tensors": "lorashrink.files.store:TensorStore._read_at",
    "Gram matrices": "lorashrink.engine.spectrum:grams",
    "r×r algebra": "lorashrink.engine.spectrum:solve",
    "form factors": "lorashrink.shrinking.write:truncate_together",
    "write tensors": "lorashrink.files.writing:SafetensorsWriter._write_file",
}


class Clocks:
    """Sums of seconds by name; safe to use from many threads."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def timed(self, name: str, function: Callable[..., Any], *, cpu: bool = False) -> Callable[..., Any]:
        """The function, with its wall time (or the CPU time of its thread) added to the sums."""
        clock, sums = (time.thread_time, self.cpu) if cpu else (time.perf_counter, self.wall)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    sums[name] += clock() - start

        return wrapper

    def decompose(self, function: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """The same for `decompose`, which returns pending spectra: until the last of their chunks is done."""

        def wrapper(*args: Any, **kwargs: Any) -> list[Any]:
            start = time.perf_counter()
            pending = function(*args, **kwargs)

            def finished(_: Future[Any]) -> None:
                self.wall["decompose"] = max(self.wall["decompose"], time.perf_counter() - start)

            for chunk in {spectrum.chunk for spectrum in pending}:
                chunk.add_done_callback(finished)
            return pending

        return wrapper


def replace(address: str, wrap: Callable[[Any], Any]) -> None:
    """Put `wrap(f)` in place of the function f at "module:name.name"; nothing happens if there is none."""
    module, _, path = address.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part, None)
    if hasattr(owner, name):
        setattr(owner, name, wrap(getattr(owner, name)))


def install(clocks: Clocks) -> None:
    """Put the clocks around the functions of the product."""
    replace("lorashrink.shrinking.work:decompose", clocks.decompose)
    replace(_LOOK_UP, functools.partial(clocks.timed, "norms look-up"))
    for name, places in STAGES.items():
        for address in places:
            replace(address, functools.partial(clocks.timed, name))
    for name, address in WORK.items():
        replace(address, functools.partial(clocks.timed, name, cpu=True))


def main(arguments: Sequence[str]) -> None:
    """Run one resize and write the table of its stages."""
    result, base, lora, out, recipe = arguments
    gc.set_threshold(100_000)  # as the command does
    clocks = Clocks()
    started = float(os.environ["BENCH_STARTED"])
    clocks.wall["start Python"] = time.time() - started
    clocks.timed("import torch", importlib.import_module)("torch")
    clocks.timed("import lorashrink", importlib.import_module)("lorashrink.shrinking.run")
    install(clocks)
    from lorashrink.shrinking.run import resize

    resize(lora, base=base, recipes=recipe, output=out, force=True)
    clocks.wall[_WRITE] -= clocks.wall[_COMMIT]  # which is its end
    total = time.time() - started
    clocks.wall["rest"] = total - sum(clocks.wall.values())
    text = json.dumps({"stages": clocks.wall, "cpu": clocks.cpu, "total": total})
    Path(result).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
