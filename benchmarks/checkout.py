"""Run a module from this checkout, without installing it.

    python benchmarks/checkout.py [--wheels DIR] -m MODULE ARGS...

`lorashrink.train` and `lorashrink.plots` lie beside the package here. Packages that this Python lacks are unpacked from
wheels of a folder, where there is one for them, into a temporary folder; child processes see them, too.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def prepare(wheels: Path | None = None) -> list[str]:
    """Make the package and the benchmarks importable. Returns the names of the wheels that are used."""
    names, folders = [], [ROOT, ROOT / "benchmarks"]
    present = sorted(wheels.glob("*.whl")) if wheels else []
    missing = [path for path in present if not _installed(path.name.partition("-")[0])]
    if missing:
        unpacked = Path(tempfile.mkdtemp(prefix="lorashrink-wheels-"))
        atexit.register(shutil.rmtree, unpacked, ignore_errors=True)
        for path in missing:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unpacked)
            names.append(path.name)
        folders.append(unpacked)
    sys.path[:0] = map(str, folders)
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    import lorashrink

    if importlib.util.find_spec("lorashrink.train") is None:
        lorashrink.__path__.append(str(ROOT))
    return names


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main(arguments: Sequence[str]) -> None:
    """Run the module as `python -m` does."""
    wheels = None
    if arguments[:1] == ["--wheels"]:
        wheels, arguments = Path(arguments[1]), arguments[2:]
    if len(arguments) < 2 or arguments[0] != "-m":
        sys.exit(__doc__)
    sys.path.pop(0)  # the folder of this script, which `prepare` puts behind the checkout
    prepare(wheels)
    sys.argv = list(arguments[1:])
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
