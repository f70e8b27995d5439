"""The fuzz targets, with bytes that atheris chooses by the code that they reach.

    python guided.py [--times N] [TARGET ...]    N times the cases of the test suite; prints how many each target had
    python guided.py --repeat FILE TARGET        the case of bytes that made a target fail

Each target runs in a process of its own, a fork of this one, and ends with the first case that fails. The bytes of that
are kept in a file whose name is printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorashrink"]):
    import structures  # noqa: F401  # adds its targets
    import texts  # noqa: F401  # adds its targets
from fuzzing import FOLDER, TARGETS

_LENGTH = 8192  # bytes of a case; strategies that run out of them give up


def fuzz(name: str, runs: int) -> bool:
    """Run one target in a fork of this process; whether no case failed."""
    process = os.fork()  # importing torch and instrumenting the modules anew takes longer than most targets
    if process:
        return os.waitpid(process, 0)[1] == 0
    target = TARGETS[name]
    run_bytes = target.test().hypothesis.fuzz_one_input
    calls = 0
    logging.disable()  # what each case warns of

    def one(data: bytes) -> None:
        nonlocal calls
        calls += 1
        run_bytes(data)
        if calls == runs:
            print(f"{name}: {target.done} cases", flush=True)
            os._exit(0)  # libFuzzer ends without Python's own end, too

    corpus = FOLDER / f"corpus-{name}"
    corpus.mkdir()
    numbers = random.Random()
    for index in range(16):  # without long ones at the beginning most cases would have too few bytes
        (corpus / f"{index}").write_bytes(numbers.randbytes(_LENGTH))
    atheris.Setup([sys.argv[0], f"-max_len={_LENGTH}", "-len_control=0", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--repeat", type=Path)
    options = parser.parse_args()
    if options.repeat:
        TARGETS[options.targets[0]].test().hypothesis.fuzz_one_input(options.repeat.read_bytes())
    else:
        names = options.targets or list(TARGETS)
        failed = [name for name in names if not fuzz(name, options.times * TARGETS[name].count)]
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
