"""How fast and how small in memory shrinking is, beside other ways to do the same. See README.md.

python benchmarks/bench_resize.py --small          a quick look
python benchmarks/bench_resize.py --out FILE       full size, SDXL: 7.9 GB of data, deleted afterwards
python benchmarks/bench_resize.py --peer 'cmd {base} {lora} {out}'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import qr_svd
import torch
from launch import CommandFailed, Usage, usage_of
from rates import Rates, cores, measure
from sdxl_data import Data, copies, make_data, numbers_per_rank
from torch import Tensor

from lorashrink.adapters import Layer, open_adapter
from lorashrink.bases import open_base, views_id
from lorashrink.bases.norms import BaseNorms
from lorashrink.engine.delta import Delta
from lorashrink.engine.devices import worker_pool
from lorashrink.engine.spectrum import Item, decompose, spectrum, truncate
from lorashrink.files.header import read_header

THRESHOLD = -3.55
RECIPE = f"fro_ckpt=1,thr={THRESHOLD}"
BATCH = 8
SAMPLED_SHAPES = 6  # of which ΔW is decomposed in full
# Two ways to use threads for QR and SVD, with what `qr_svd.mapping` takes for them.
WAYS = {"(a), torch's own threads": 0, "(a), one thread per layer": cores()}
_HERE = Path(__file__).parent


# --- what all sections share --------------------------------------------------------------------


@dataclass(eq=False)
class Bench:
    """One run: its data, its options, and the text that was printed."""

    data: Data
    repeats: int
    peer: str | None
    lines: list[str] = field(default_factory=list)
    in_process: dict[int, InProcess] = field(default_factory=dict)  # by rank

    @property
    def rank(self) -> int:
        """The rank that commands are run with."""
        return min(self.data.loras)

    @property
    def lora(self) -> Path:
        """The file that commands are run with."""
        return self.data.loras[self.rank]

    @property
    def out(self) -> Path:
        """A folder for outputs, deleted at the end."""
        return self.data.folder / "out"

    @property
    def environment(self) -> dict[str, str]:
        """Of commands: a cache of their own."""
        return {"XDG_CACHE_HOME": str(self.data.folder / "cache")}

    @cached_property
    def norms(self) -> dict[str, float]:
        """‖W‖_F of the base weight of each layer; computing them is timed, and printed."""
        with open_base(self.data.base) as base, worker_pool() as pool:
            views = {name: base.find(name) for name in self.data.layers}
            start = time.perf_counter()
            norms = BaseNorms(base, cache=False).look_up(views.values(), ["fro"], pool=pool)
            taken = time.perf_counter() - start
        size = 2 * sum(map(math.prod, self.data.layers.values())) / 1e9
        self.say(f"norms of {size:.2f} GB of base weights, cold: {taken:.2f} s, {size / taken:.1f} GB/s")
        return {name: norms[views_id(layer_views)]["fro"] for name, layer_views in views.items()}

    @cached_property
    def import_torch(self) -> Usage:
        """What `import torch` alone uses: what no command in Python with torch can do without."""
        command = [sys.executable, "-c", "import os, torch; os._exit(0)"]
        return best([usage_of(command) for _ in range(max(2, self.repeats))])

    def say(self, text: str = "") -> None:
        """Print a line, and keep it."""
        print(text, flush=True)
        self.lines.append(text)

    def compare(self, title: str, ours: float, peer: float, rank: int, *, files: int = 1) -> None:
        """One result, the ratio first."""
        setting = f"{cores()} cores, torch {torch.__version__}, {len(self.data.layers)} layers r{rank}"
        several = f", {files} files" if files > 1 else ""
        self.say(f"{peer / ours:.1f}x  ours {ours:.2f} s  peer {peer:.2f} s  {setting}{several}  | {title}")

    def usage(self, name: str, used: Usage) -> None:
        """What one command used."""
        above = used.rss - self.import_torch.rss
        self.say(
            f"      {name:<26} wall {used.wall:.2f} s, CPU {used.cpu:.2f} s, peak memory {used.rss / 1e9:.2f} GB, "
            f"{above / 1e9:.2f} GB above Python with torch"
        )


@dataclass(frozen=True, slots=True)
class InProcess:
    """Seconds for one file, without start-up and writing."""

    decompose: float
    form: float
    peers: dict[int, float]  # by number of workers, as `qr_svd.mapping` takes it
    kept: dict[str, int]  # rank after, by layer

    @property
    def ours(self) -> float:
        """Both steps."""
        return self.decompose + self.form


def best(runs: Sequence[Usage]) -> Usage:
    """The run with the shortest wall time."""
    return min(runs, key=lambda used: used.wall)


def seconds(function: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# --- (a) in process -----------------------------------------------------------------------------


def bench_in_process(bench: Bench) -> None:
    """Read, decompose and truncate every layer, against QR and SVD in float32."""
    for rank, path in bench.data.loras.items():
        times = bench.in_process[rank] = time_in_process(bench, path)
        total = rank * len(times.kept)
        kept = sum(times.kept.values())
        bench.say(f"rank {rank}: {RECIPE} keeps {kept} of {total} dimensions ({100 * kept / total:.1f} %)")
        for title, workers in WAYS.items():
            bench.compare(f"in process, {title}", times.ours, times.peers[workers], rank)
        bench.say(f"      ours: decompose {times.decompose:.2f} s, form factors {times.form:.2f} s")


def time_in_process(bench: Bench, path: Path) -> InProcess:
    """Both sides in turn, minimum of repeats."""
    kept = kept_ranks(path, bench.norms)
    ours = (math.inf, math.inf)
    peers = dict.fromkeys(WAYS.values(), math.inf)
    for _ in range(bench.repeats):
        into_memory([path])
        ours = min(ours, shrink_in_process(path, kept), key=sum)
        for workers in peers:
            once = partial(qr_svd.truncate_file, path, kept, workers)
            peers[workers] = min(peers[workers], seconds(once))
    return InProcess(*ours, peers, kept)


def kept_ranks(path: Path, norms: Mapping[str, float]) -> dict[str, int]:
    """How many dimensions of each layer pass the recipe."""
    with open_adapter(path) as adapter, worker_pool() as pool:
        spectra = decompose(items(adapter.layers), pool)
        return {
            layer.name: int((future.result().sigma >= 10**THRESHOLD * norms[layer.name]).sum())
            for layer, future in zip(adapter.layers, spectra, strict=True)
        }


def shrink_in_process(path: Path, kept: Mapping[str, int]) -> tuple[float, float]:
    """(seconds to decompose, seconds to form factors); the results are dropped."""
    start = time.perf_counter()
    with open_adapter(path) as adapter, worker_pool() as pool:
        spectra = [future.result() for future in decompose(items(adapter.layers), pool)]
        middle = time.perf_counter()

        def form(index: int) -> None:
            layer = adapter.layers[index]
            truncate(layer.delta, spectra[index], range(kept[layer.name]))

        for _ in pool.map(form, range(len(spectra))):
            pass
        return middle - start, time.perf_counter() - middle


def items(layers: Sequence[Layer]) -> list[Item]:
    """The layers as the engine takes them."""
    return [Item(partial(_read, layer), layer.rank) for layer in layers]


def _read(layer: Layer) -> Delta:
    return layer.delta


# --- (b) full SVD, and accuracy -----------------------------------------------------------------


def bench_dense(bench: Bench) -> None:
    """The full SVD of ΔW on some layers, its time carried over to all, and the accuracy of both methods."""
    with open_adapter(bench.lora) as adapter:
        counts = Counter(matrix(layer) for layer in adapter.layers)
        largest = sorted(counts, key=lambda shape: counts[shape] * svd_cost(shape), reverse=True)[:SAMPLED_SHAPES]
        sample = {shape: next(layer for layer in adapter.layers if matrix(layer) == shape) for shape in largest}
        taken = {shape: svd_time(layer.delta) for shape, layer in sample.items()}
        peer = sum(count * svd_seconds(shape, taken) for shape, count in counts.items())
        bench.compare(f"in process, (b) full SVD of ΔW, from {len(sample)} layers", ours_alone(bench), peer, bench.rank)
        ours_off, peer_off = map(max, zip(*map(errors, sample.values()), strict=True))
    bench.say(
        f"      largest relative error of σ against float64 SVD of ΔW on {len(sample)} layers: "
        f"ours {ours_off:.1e}, (a) {peer_off:.1e}"
    )


def matrix(layer: Layer) -> tuple[int, int]:
    """[out, in·kh·kw] of a layer."""
    return layer.shape[0], math.prod(layer.shape[1:])


def svd_cost(shape: tuple[int, int]) -> int:
    """What the time of a full SVD grows with."""
    return max(shape) * min(shape) ** 2


def svd_seconds(shape: tuple[int, int], taken: Mapping[tuple[int, int], float]) -> float:
    """The measured time of a shape, or that of the measured shape nearest in cost, in proportion."""
    nearest = min(taken, key=lambda measured: (measured != shape, abs(math.log(svd_cost(measured) / svd_cost(shape)))))
    return taken[nearest] * svd_cost(shape) / svd_cost(nearest)


def svd_time(delta: Delta) -> float:
    """Seconds for the float32 SVD of the matrix itself, in the faster of the two ways to use threads.

    One thread per layer is timed as one call on one thread, divided by the cores. Short calls are repeated.
    """
    dense = delta.dense().flatten(1)
    together = shortest(partial(torch.linalg.svd, dense, full_matrices=False))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = shortest(partial(torch.linalg.svd, dense, full_matrices=False))
    torch.set_num_threads(before)
    return min(together, alone / cores())


def shortest(function: Callable[[], object]) -> float:
    """Wall seconds of a call; the shortest of some if one does not take long."""
    first = seconds(function)
    return first if first > 0.5 else min(first, *(seconds(function) for _ in range(4)))


def ours_alone(bench: Bench) -> float:
    """Our seconds for the smaller file in process, measured earlier or now."""
    if bench.rank in bench.in_process:
        return bench.in_process[bench.rank].ours
    kept = kept_ranks(bench.lora, bench.norms)
    return min(sum(shrink_in_process(bench.lora, kept)) for _ in range(bench.repeats))


def errors(layer: Layer) -> tuple[float, float]:
    """Largest relative error of the singular values of one layer, (ours, (a)), against dense float64."""
    delta = layer.delta
    true = torch.linalg.svdvals(delta.scale * (delta.up.double() @ delta.down.double()))[: delta.rank]
    ours = spectrum(delta).sigma
    peer = qr_svd.decomposition(delta.up, delta.down, delta.scale).sigma
    return relative_error(ours, true), relative_error(peer, true)


def relative_error(values: Tensor, true: Tensor) -> float:
    """max |v - t| / t over the singular values."""
    return float(((values.double()[: len(true)] - true).abs() / true).max())


# --- commands -----------------------------------------------------------------------------------


def bench_command(bench: Bench) -> None:
    """The whole command with cold and with warm norms, against (a) as a command and against --peer."""
    shutil.rmtree(bench.data.folder / "cache", ignore_errors=True)
    cold = run_ours(bench, [bench.lora])
    contestants = both_sides(bench, [bench.lora])
    if bench.peer:
        contestants["--peer"] = partial(run_peer, bench)
    used = race(contestants, bench.repeats)
    for name in list(contestants)[1:]:
        bench.compare(f"whole command, {name}", used["ours"].wall, used[name].wall, bench.rank)
    for name, usage in used.items():
        bench.usage(name, usage)
    bench.usage("ours, cold", cold)
    bench.say(f"      outputs: {', '.join(described(path) for path in sorted(bench.out.rglob('*.safetensors')))}")


def bench_batch(bench: Bench) -> None:
    """Several files in one command."""
    files = copies(bench.lora, bench.data.folder / "copies", BATCH)
    fill_cache(bench)
    used = race(both_sides(bench, files), bench.repeats - 1 or 1)
    for name in WAYS:
        bench.compare(f"whole command, {name}", used["ours"].wall, used[name].wall, bench.rank, files=BATCH)
    for name, usage in used.items():
        bench.usage(name, usage)


def both_sides(bench: Bench, adapters: Sequence[Path]) -> dict[str, Callable[[], Usage]]:
    """The commands to time for these files."""
    peers = {title: partial(run_qr_svd, bench, adapters, workers) for title, workers in WAYS.items()}
    return {"ours": partial(run_ours, bench, adapters), **peers}


def race(contestants: Mapping[str, Callable[[], Usage]], repeats: int) -> dict[str, Usage]:
    """All of them in turn, the best run of each."""
    runs: dict[str, list[Usage]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            runs[name].append(run())
    return {name: best(usages) for name, usages in runs.items()}


def into_memory(files: Sequence[Path]) -> None:
    """Read files, so that they are in the page cache when a timed command reads them."""
    buffer = bytearray(1 << 24)
    for path in files:
        with open(path, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def run_ours(bench: Bench, adapters: Sequence[Path]) -> Usage:
    """The product's command."""
    into_memory(adapters)
    options = ["-o", str(bench.out / "ours"), "-r", RECIPE, "--force"]
    command = [sys.executable, "-m", "lorashrink.cli", "resize", *options, str(bench.data.base), *map(str, adapters)]
    return usage_of(command, bench.environment)


def fill_cache(bench: Bench) -> None:
    """Let the command compute the norms of the base, if it has not yet."""
    if not (bench.data.folder / "cache").exists():
        run_ours(bench, [bench.lora])


def run_qr_svd(bench: Bench, adapters: Sequence[Path], workers: int) -> Usage:
    """Method (a) as a command."""
    norms = bench.data.folder / "norms.json"
    norms.write_text(json.dumps(bench.norms), encoding="utf-8")
    into_memory(adapters)
    options = ["--norms", str(norms), "--thr", str(THRESHOLD), "--workers", str(workers), "-o", str(bench.out / "a")]
    return usage_of([sys.executable, str(_HERE / "qr_svd.py"), *options, *map(str, adapters)])


def run_peer(bench: Bench) -> Usage:
    """The command given with --peer."""
    into_memory([bench.lora])
    target = bench.out / "peer" / bench.lora.name
    target.parent.mkdir(parents=True, exist_ok=True)
    values = {"base": bench.data.base, "lora": bench.lora, "out": target}
    return usage_of([part.format(**values) for part in shlex.split(str(bench.peer))])


def described(path: Path) -> str:
    """Who wrote a file, its size and the sum of its ranks."""
    tensors = read_header(path)[0]
    ranks = sum(info.shape[0] for name, info in tensors.items() if name.endswith("lora_down.weight"))
    return f"{path.parent.name} {path.stat().st_size / 1e6:.1f} MB of {ranks} dimensions"


# --- where the time goes ------------------------------------------------------------------------


def bench_limit(bench: Bench) -> None:
    """One command stage by stage, and beside what this machine could do at best."""
    fill_cache(bench)
    result = bench.data.folder / "stages.json"
    recipe = [str(result), str(bench.data.base), str(bench.lora), str(bench.out / "ours"), RECIPE]
    profiles = []
    for _ in range(bench.repeats):
        into_memory([bench.lora])
        usage_of([sys.executable, str(_HERE / "stages.py"), *recipe], bench.environment)
        profiles.append(json.loads(result.read_text(encoding="utf-8")))
    profile = min(profiles, key=lambda candidate: candidate["total"])
    bench.say(f"stages of one command, r{bench.rank}, {profile['total']:.2f} s:")
    for name, value in profile["stages"].items():
        bench.say(f"      {name:<22} {value:6.3f} s")
    bench.say("work of its threads, CPU seconds of all (some happens more than once):")
    for name, value in profile["cpu"].items():
        bench.say(f"      {name:<22} {value:6.3f} s")
    written = next((bench.out / "ours").glob(f"{bench.lora.stem}_*")).stat().st_size
    kept = round(sum(kept_ranks(bench.lora, bench.norms).values()) / len(bench.data.layers))
    say_limits(bench, profile, measure(bench.rank, kept, bench.lora), kept, written)


def say_limits(bench: Bench, profile: Mapping[str, Mapping[str, float]], rates: Rates, kept: int, written: int) -> None:
    """The table of limits: each part once, at the best rate of this machine on all cores, and as measured."""
    layers, sides, rank = len(bench.data.layers), numbers_per_rank(bench.data.layers), bench.rank
    read, gram, eigen, form = (
        bench.lora.stat().st_size,
        sides * rank**2,
        9 * rank**3 * layers,
        2 * sides * rank * kept,
    )
    stages, cpu = profile["stages"], {name: value / cores() for name, value in profile["cpu"].items()}
    bench.say(
        f"rates: float64 square {rates.gram / 1e9:.1f} and product {rates.core / 1e9:.1f} GFLOP/s, "
        f"float32 product {rates.form / 1e9:.1f} GFLOP/s, "
        f"eigh {rates.eigh:.0f} problems/s, copy {rates.copy / 1e9:.1f} GB/s, cached read {rates.read / 1e9:.1f} GB/s, "
        f"flushed write {rates.write / 1e9:.2f} GB/s"
    )
    start = stages["start Python"] + stages["import torch"]
    rows = [
        ("Python and torch", "", bench.import_torch.wall, start),
        ("read", f"{read / 1e6:.0f} MB", read / rates.read, cpu["read tensors"]),
        ("Gram matrices", f"{gram / 1e9:.1f} GFLOP", gram / rates.gram, cpu["Gram matrices"]),
        ("r×r algebra", f"{eigen / 1e9:.1f} GFLOP", eigen / rates.core, cpu["r×r algebra"]),
        ("form factors", f"{form / 1e9:.1f} GFLOP", form / rates.form, cpu["form factors"]),
        ("write", f"{written / 1e6:.0f} MB", written / rates.write, cpu["write tensors"] + stages["fsync, rename"]),
    ]
    rows.append(("whole command", "", sum(row[2] for row in rows), float(profile["total"])))
    bench.say(f"{'part':<18}{'amount':>14}{'limit':>10}{'measured':>10}{'of limit':>10}")
    for name, amount, limit, measured in rows:
        bench.say(f"{name:<18}{amount:>14}{limit:>8.3f} s{measured:>8.3f} s{100 * limit / measured:>8.0f} %")
    bench.say(f"      eigh alone on all cores, at its best: {layers / rates.eigh:.3f} s of the r×r algebra")


# --- the run ------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "process": bench_in_process,
    "dense": bench_dense,
    "command": bench_command,
    "batch": bench_batch,
    "limit": bench_limit,
}


def load() -> str:
    """How busy the machine is: other work makes torch's own threads wait for each other, and the peer slow."""
    return f"load of the last minute {os.getloadavg()[0]:.1f} on {cores()} cores"


@contextlib.contextmanager
def data_folder(kept: Path | None) -> Iterator[Path]:
    """The folder for the data: a temporary one that is deleted whatever happens, or one to keep."""
    signal.signal(signal.SIGTERM, _stop)
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="lorashrink-bench-") as temporary:
            yield Path(temporary)
        return
    kept.mkdir(parents=True, exist_ok=True)
    try:
        yield kept
    finally:
        for leftover in ("out", "copies", "cache"):
            shutil.rmtree(kept / leftover, ignore_errors=True)


def _stop(*_: object) -> NoReturn:
    raise SystemExit("stopped")  # so that the data is deleted


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time lorashrink beside other ways to shrink a LoRA.")
    parser.add_argument("--small", action="store_true", help="widths divided by 8, ranks 16 and 32: a quick look")
    parser.add_argument("--repeats", type=int, help="runs of each side, the fastest counts; 3, or 2 with --small")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts to run")
    parser.add_argument("--peer", help="another command to time, with {base}, {lora} and {out} in it")
    parser.add_argument("--data", type=Path, help="make the data in this folder, or use it from there, and keep it")
    parser.add_argument("--out", type=Path, help="write the printed text to this file too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the data, run the sections, and print."""
    options = parse(arguments)
    ranks, repeats = ((16, 32), 2) if options.small else ((64, 128), 3)
    with data_folder(options.data) as folder:
        took = time.perf_counter()
        bench = Bench(make_data(folder, ranks, small=options.small), options.repeats or repeats, options.peer)
        files = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.0f} MB" for path in folder.glob("*.safetensors"))
        bench.say(f"data: {files}; ready after {time.perf_counter() - took:.1f} s; {load()}")
        try:
            for name in options.only:
                bench.say(f"\n-- {name} --")
                SECTIONS[name](bench)
            bench.say(f"\n{load()}")
        except CommandFailed as error:
            raise SystemExit(f"a command failed: {error}") from error
        finally:
            if options.out:
                options.out.write_text("\n".join(bench.lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
