"""What a collection costs beside the engine alone, and that memory does not grow with it. See README.md.

python benchmarks/bench_batch.py                   64 files of rank 32, widths divided by 8: 1.9 GB of data
python benchmarks/bench_batch.py --full --files 4 16   full widths: 7 GB for the base, 228 MB, outputs of 16 files
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from launch import Usage, usage_of
from rates import cores
from sdxl_data import Data, copies, make_data

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base, views_id
from lorashrink.bases.norms import BaseNorms
from lorashrink.engine.delta import AnyDelta
from lorashrink.engine.devices import worker_pool
from lorashrink.engine.spectrum import Item, decompose, truncate
from lorashrink.shrinking.journal import SETTLED_SECONDS

RANK = 32
THRESHOLD = -3.55
RECIPE = f"fro_ckpt=1,thr={THRESHOLD}"


def engine(data: Data, repeats: int) -> tuple[float, float]:
    """(wall, CPU) seconds to decompose one file's deltas and form the kept factors, all in memory; the best of some."""
    with (
        open_adapter(data.loras[RANK]) as adapter,
        open_base(data.base) as base,
        worker_pool() as pool,
    ):
        deltas = [layer.delta for layer in adapter.layers]
        views = [base.find(layer.name) for layer in adapter.layers]
        norms = BaseNorms(base).look_up(views, ["fro"], pool=pool)
        bounds = [10**THRESHOLD * norms[views_id(layer_views)]["fro"] for layer_views in views]
        runs = []
        for _ in range(repeats):
            start, used = time.perf_counter(), time.process_time()
            items = [Item(partial(_same, delta), RANK) for delta in deltas]
            spectra = [future.result() for future in decompose(items, pool)]
            kept = [range(int((own.sigma >= bound).sum())) for own, bound in zip(spectra, bounds, strict=True)]
            for _ in pool.map(truncate, deltas, spectra, kept):
                pass
            runs.append((time.perf_counter() - start, time.process_time() - used))
    return min(runs)


def _same(delta: AnyDelta) -> AnyDelta:
    return delta


def command(data: Data, files: Sequence[Path], out: Path) -> Usage:
    """One `resize` of these files, with a journal."""
    line = [sys.executable, "-m", "lorashrink.cli", "resize", "-q", "--skip-existing", "-r", RECIPE, "-o", str(out)]
    environment = {"XDG_CACHE_HOME": str(data.folder / "cache")}
    return usage_of([*line, str(data.base), *map(str, files)], environment)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="widths of SDXL")
    parser.add_argument("--files", type=int, nargs=2, default=(16, 64), metavar=("FEW", "MANY"))
    parser.add_argument("--data", type=Path, help="a folder for the data, which is kept")
    options = parser.parse_args(arguments)
    few, many = options.files
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        data = make_data(folder, [RANK], small=not options.full)
        size = data.loras[RANK].stat().st_size
        load = os.getloadavg()[0]
        print(f"{size / 1e6:.0f} MB and {len(data.layers)} layers of rank {RANK} per file, {cores()} cores, ", end="")
        print(f"torch {torch.__version__}, load of the last minute {load:.1f}")
        wall, cpu = engine(data, 3)
        base = usage_of([sys.executable, "-c", "import os, torch; os._exit(0)"])
        files = copies(data.loras[RANK], data.folder / "files", many)
        time.sleep(2 * SETTLED_SECONDS)
        outs = [data.folder / f"out-{count}" for count in options.files]
        for out in outs:
            shutil.rmtree(out, ignore_errors=True)
        with_few, with_all = command(data, files[:few], outs[0]), command(data, files, outs[1])
        again = command(data, files, outs[1])
        spent, work = (with_all.wall - with_few.wall) / (many - few), (with_all.cpu - with_few.cpu) / (many - few)
        print(f"{spent / wall:.2f}x  a file of a collection {spent:.3f} s  the engine alone, in memory {wall:.3f} s")
        print(
            f"{work / cpu:.2f}x  the same in CPU seconds: {work:.3f} s  {cpu:.3f} s; "
            f"{size / spent / 1e6:.0f} MB/s are read"
        )
        print(
            f"{with_all.rss / with_few.rss:.2f}x  peak memory of {many} files {with_all.rss / 1e9:.3f} GB  of {few} "
            f"files {with_few.rss / 1e9:.3f} GB  Python with torch {base.rss / 1e9:.3f} GB"
        )
        print(
            f"{with_all.wall / again.wall:.0f}x  {many} files {with_all.wall:.1f} s  "
            f"all of them there {again.wall:.1f} s"
        )
        print(f"load of the last minute {os.getloadavg()[0]:.1f} on {cores()} cores")
        for out in outs:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
