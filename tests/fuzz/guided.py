"""The fuzz targets, with bytes that atheris chooses by the code that they reach.

    python guided.py [--times N] [TARGET ...]    N times the cases of the test suite; prints how many each target had
    python guided.py --repeat FILE TARGET        the case of bytes that made a target fail

Each target runs in a process of its own, and ends with the first case that fails. The bytes of that are kept in a file
whose name is printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorashrink"]):
    import structures  # noqa: F401  # adds its targets
    import texts  # noqa: F401  # adds its targets
from fuzzing import FOLDER, TARGETS

_LENGTH = 8192  # bytes of a case; strategies that run out of them give up


def fuzz(name: str, runs: int) -> None:
    """Run one target in this process, which ends with it."""
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

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    numbers = random.Random()
    for index in range(16):  # without long ones at the beginning most cases would have too few bytes
        (corpus / f"{index}").write_bytes(numbers.randbytes(_LENGTH))
    atheris.Setup([sys.argv[0], f"-max_len={_LENGTH}", "-len_control=0", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--repeat", type=Path)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeat:
        TARGETS[options.targets[0]].test().hypothesis.fuzz_one_input(options.repeat.read_bytes())
    elif options.alone:
        fuzz(options.targets[0], options.times * TARGETS[options.targets[0]].count)
    else:
        line = [sys.executable, __file__, "--alone", "--times", str(options.times)]
        # what such a process leaves behind is in our folder
        environment = {**os.environ, "TMPDIR": str(FOLDER)}
        names = options.targets or list(TARGETS)
        failed = [name for name in names if subprocess.run([*line, name], env=environment, check=False).returncode]
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
