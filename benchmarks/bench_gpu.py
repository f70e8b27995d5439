"""Everything that is to be known of a GPU, in one run: right results, rates, shrinking, training, pictures.

    python benchmarks/bench_gpu.py                             about six minutes
    python benchmarks/bench_gpu.py --parts engine files --wheels ~/wheels
    python benchmarks/bench_gpu.py --tiny                      tiny sizes, also without a GPU: shows that it runs

It runs from the checkout. What this Python lacks is taken from wheels in a folder: `pip download --no-deps diffusers
lycoris-lora platformdirs toml importlib-metadata zipp` makes one, with pytest, pluggy, iniconfig, hypothesis and
sortedcontainers for the tests. Each part is a process of its own with a share of the time, and prints JSON lines as
soon as it has them; one that fails says so in a line with "error", and the next goes on. Status 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import checkout

if TYPE_CHECKING:
    import torch
    from random_sdxl import Size

    from lorashrink.engine.delta import Delta
    from lorashrink.engine.spectrum import Spectrum

GIB = 2**30
_TOLERANCE = 1e-9  # relative, of singular values down to a thousandth of the layer's largest
_REPEATS = 3
_ALPHA = 32.0
_GRACE = 0.85  # of its time, after which a part begins nothing new


@dataclass(frozen=True)
class Run:
    """What a part needs to know."""

    part: str
    tiny: bool
    work: Path  # a folder that all parts share
    wheels: Path | None
    deadline: float  # of time.monotonic

    @property
    def device(self) -> str:
        """A GPU, or with --tiny what there is."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def seconds(self) -> float:
        """What remains of the time."""
        return self.deadline - time.monotonic()

    def say(self, **numbers: object) -> None:
        """One line; numbers are rounded to four digits."""
        line = {"part": self.part, **numbers}
        print(json.dumps(line, default=str), flush=True)

    def command(self, *arguments: object) -> list[str]:
        """A process that runs a module from the checkout."""
        wheels = ["--wheels", str(self.wheels)] if self.wheels else []
        return [sys.executable, str(Path(checkout.__file__)), *wheels, "-m", *map(str, arguments)]

    def in_time(self, what: str, items: Sequence[Any]) -> Iterator[Any]:
        """The items, as long as there is time; the rest are named."""
        for index, item in enumerate(items):
            if self.seconds < 0:
                self.say(left_out=[f"{what} {rest}" for rest in items[index:]])
                return
            yield item


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _best(function: Callable[[], object], seconds: float = 0.3) -> float:
    """Seconds of the fastest call, GPU included."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    function()
    wait()
    fastest, stop = math.inf, time.monotonic() + seconds
    while True:
        start = time.perf_counter()
        function()
        wait()
        fastest = min(fastest, time.perf_counter() - start)
        if time.monotonic() > stop:
            return fastest


# --- starting -----------------------------------------------------------------------------------


def start(run: Run) -> None:
    """Versions, and what the first use of the GPU costs a process."""
    import torch

    versions = {}
    for name in ("safetensors", "diffusers", "transformers", "accelerate", "peft", "lycoris-lora", "numpy", "pytest"):
        with contextlib.suppress(Exception):
            versions[name] = metadata.version(name)
    machine: dict[str, object] = {"gpus": torch.cuda.device_count()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": gpu.name,
            "sm": f"{gpu.major}.{gpu.minor}",
            "gib": _short(gpu.total_memory / GIB),
            "cuda": torch.version.cuda,
        }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    run.say(python=platform.python_version(), torch=torch.__version__, cores=cores, **machine, versions=versions)
    steps = {
        "import torch": "import torch",
        "context": "torch.zeros(1, device=DEVICE)",
        "start and test": "from lorashrink.engine.accelerators import start\n"
        "torch.device(DEVICE).type == 'cpu' or start(torch.device(DEVICE))",
        "again": "torch.device(DEVICE).type == 'cpu' or start(torch.device(DEVICE))",
    }
    script = "import time\nlaps = {}\n" + f"DEVICE = {run.device!r}\n"
    for name, code in steps.items():
        script += f"begin = time.perf_counter()\n{code}\nlaps[{name!r}] = round(time.perf_counter() - begin, 3)\n"
    script += "import json\nprint(json.dumps(laps))\n"
    for name in ("first process", "second process"):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=checkout.ROOT, check=False
        )
        run.say(**{name: json.loads(done.stdout) if done.returncode == 0 else done.stderr[-1000:]})


def tests(run: Run) -> None:
    """The tests that run on a GPU, those of the engine first."""
    from importlib.util import find_spec

    absent = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if absent:
        raise RuntimeError(f"the tests need {' and '.join(absent)}; put their wheels into the folder of --wheels")
    marked = ["-m", "cuda"] if run.device == "cuda" else []
    for files in run.in_time("tests", ["engine/test_on_devices.py", "engine bases insight calibration pictures train"]):
        paths = [str(checkout.ROOT / "tests" / name) for name in files.split()]
        paths += ["-k", "every_rank or unusual"] if run.tiny else []
        command = run.command("pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", *marked, *paths)
        begin = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=checkout.ROOT, timeout=max(5.0, run.seconds), check=False
            )
            lines = done.stdout.strip().splitlines()
            failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
            details = [line[:300] for line in lines if line.startswith("E  ")][:30]
            run.say(files=files, result=lines[-1:], failed=failed, details=details, status=done.returncode)
        run.say(files=files, seconds=_short(time.perf_counter() - begin))
        if run.tiny:
            return


# --- rates --------------------------------------------------------------------------------------


def rates(run: Run) -> None:
    """Copies, products and eigenvalues of the GPU alone, and of one core beside it."""
    import torch

    torch.set_num_threads(1)
    size = 1 << (22 if run.tiny else 28)
    host, source = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    device = torch.ones(size, dtype=torch.uint8, device=run.device)
    pinned = torch.ones(size, dtype=torch.uint8, pin_memory=run.device == "cuda")
    copies = {
        "host to host": lambda: host.copy_(source),
        "to the GPU": lambda: device.copy_(source),
        "to the GPU, pinned": lambda: device.copy_(pinned, non_blocking=True),
        "from the GPU": lambda: host.copy_(device),
        "from the GPU, pinned": lambda: pinned.copy_(device, non_blocking=True),
    }
    run.say(gb_per_second={name: _short(size / _best(copy) / 1e9) for name, copy in copies.items()})
    generator = torch.Generator().manual_seed(0)
    ranks = [8] if run.tiny else [16, 32, 33, 64, 128, 256]
    for rank in run.in_time("rank", ranks):
        wide = torch.randn(64, rank, 1280, generator=generator).double()
        core = wide @ wide.mT
        factors, line = wide.to(run.device), {"rank": rank}
        gram = _best(lambda factors=factors: factors @ factors.mT)
        line["gram_tflops"] = _short(2 * 64 * rank**2 * 1280 / gram / 1e12)
        alone = core[:4].clone()
        line["eigh_per_second_of_a_core"] = _short(len(alone) / _best(lambda alone=alone: torch.linalg.eigh(alone)))
        taken = 0.0
        for batch in (16, 64, 256, 1024):
            if run.seconds < 0 or batch * rank**2 > 1 << 25 or taken > 0.5:
                break
            stacked = core.repeat(max(1, batch // 64), 1, 1)[:batch].to(run.device)
            for name, solver in (("cholesky", torch.linalg.cholesky_ex), ("eigh", torch.linalg.eigh)):
                taken = _best(lambda solver=solver, stacked=stacked: solver(stacked), 0.1)
                line[f"{name}_per_second_of_{batch}"] = _short(batch / taken)
            if run.tiny:
                break
        run.say(**line)


# --- the engine ---------------------------------------------------------------------------------


def _flux_shapes() -> list[tuple[int, ...]]:
    """All linear layers of the blocks of FLUX.1."""
    double = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (18432, 3072)] * 2
    single = [(21504, 3072), (3072, 15360), (9216, 3072)]
    return [*double * 19, *single * 38]


def _layer_shapes(model: str, *, tiny: bool) -> list[tuple[int, ...]]:
    if model == "sdxl":
        from sdxl_data import shapes

        return list(shapes(small=tiny)[1].values())
    return [tuple(side // 32 for side in shape) for shape in _flux_shapes()] if tiny else _flux_shapes()


def engine(run: Run) -> None:
    """Decomposing and truncating in memory on the GPU, beside the CPU and a float64 truth."""
    import torch
    from sdxl_data import factors

    from lorashrink.engine.delta import Delta
    from lorashrink.engine.devices import worker_pool

    cases = [(model, rank) for rank in ([4] if run.tiny else [64, 32, 16, 128]) for model in ("sdxl", "flux")]
    messages = _messages()
    worst = 0.0
    for model, rank in run.in_time("case", cases):
        generator = torch.Generator().manual_seed(0)
        by_shape: dict[tuple[int, ...], Delta] = {}
        layers = []
        for number, shape in enumerate(_layer_shapes(model, tiny=run.tiny)):
            # Random numbers take longer than all else: layers of one shape share them, scaled.
            if shape not in by_shape:
                by_shape[shape] = Delta(*factors(shape, rank, 1.0, generator), _ALPHA / rank, shape)
            delta = by_shape[shape]
            layers.append(Delta(delta.up * (1 + number % 7), delta.down.clone(), delta.scale, shape))
        line: dict[str, object] = {"model": model, "rank": rank, "layers": len(layers)}
        with worker_pool() as pool:
            for device in dict.fromkeys((run.device, "cpu")):
                if run.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                laps = [_shrink(layers, device, pool) for _ in range(_REPEATS if device == run.device else 2)]
                fastest = min(laps, key=lambda lap: lap[0] + lap[1])
                line[f"{device} decompose"], line[f"{device} truncate"] = map(_short, fastest[:2])
                line[f"{device} first"] = _short(sum(laps[0][:2]))
                if device == run.device:
                    spectra = fastest[2]
                    if device == "cuda":
                        line["peak_gb"] = _short(torch.cuda.max_memory_allocated() / 1e9)
        line["messages"] = list(dict.fromkeys(messages))[:5]
        messages.clear()
        checked = list({layer.shape: index for index, layer in enumerate(layers)}.values())[:8]
        error = max(_error(layers[index], spectra[index]) for index in checked)
        run.say(**line, sigma_error=error)
        worst = max(worst, error)
    if not worst <= _TOLERANCE:
        raise RuntimeError(f"singular values differ by {worst:g} from float64, at most {_TOLERANCE:g} is right")


def _messages() -> list[str]:
    """A list to which the engine's messages are added: what the GPU got wrong or had no memory for."""
    import logging

    messages: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("lorashrink.engine")
    logger.addHandler(Listening())
    logger.setLevel(logging.INFO)
    return messages


def _shrink(layers: Sequence[Delta], device: str, pool: Any) -> tuple[float, float, list[Spectrum]]:
    """(seconds of decomposing, of forming half of the dimensions, spectra)."""
    from lorashrink.engine.spectrum import Cut, Item, decompose, truncate_together

    begin = time.perf_counter()
    items = [Item(partial(_same, layer), layer.rank) for layer in layers]
    spectra = [pending.result() for pending in decompose(items, pool, device=device)]
    decomposed = time.perf_counter()
    cuts = [Cut(layer, spectrum, range(layer.rank // 2)) for layer, spectrum in zip(layers, spectra, strict=True)]
    chunks = [cuts[low : low + 16] for low in range(0, len(cuts), 16)]
    for _ in pool.map(partial(truncate_together, device=device), chunks):
        pass
    return decomposed - begin, time.perf_counter() - decomposed, spectra


def _same(layer: Delta) -> Delta:
    return layer


def _error(layer: Delta, spectrum: Spectrum) -> float:
    """The largest relative difference to the singular values of float64 QR factors, above a thousandth of the first."""
    import torch

    up, down = (torch.linalg.qr(side.double(), mode="r").R for side in (layer.up, layer.down.mT))
    truth = torch.linalg.svdvals(up @ down.mT) * abs(layer.scale)
    counted = truth > 1e-3 * truth[0]
    error = float(((spectrum.sigma[: len(truth)] - truth)[counted].abs() / truth[counted]).max())
    return error if math.isfinite(error) else math.inf


# --- files --------------------------------------------------------------------------------------


def files(run: Run) -> None:
    """`resize` of files in the page cache by one, two and four processes at a time."""
    from sdxl_data import shapes, write_lora

    ranks = [4] if run.tiny else [64, 128]
    _, layers = shapes(small=run.tiny)
    for rank in run.in_time("rank", ranks):
        path = run.work / f"lora-r{rank}.safetensors"
        write_lora(path, rank, layers, {name: name for name in layers})
        size = path.stat().st_size
        for device, count in [(run.device, 1), (run.device, 1), ("cpu", 1), (run.device, 2), (run.device, 4)]:
            if run.seconds < 0:
                break
            outputs = [run.work / f"out-{number}" for number in range(count)]
            options = ["-r", "energy=0.9", "-d", device, "--force", "-q"]
            commands = [run.command("lorashrink", "resize", path, *options, "-o", output) for output in outputs]
            begin = time.perf_counter()
            children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
            failures = [text for child in children for text in [child.communicate()[1]] if child.returncode]
            taken = time.perf_counter() - begin
            run.say(
                rank=rank, device=device, processes=count, seconds=_short(taken),
                mb_per_second=_short(count * size / taken / 1e6), failures=[text[-500:] for text in failures],
            )  # fmt: skip


def norms(run: Run) -> None:
    """Spectral norms of the weights of SDXL in float32, beside one core."""
    import torch
    from sdxl_data import shapes

    from lorashrink.engine.accelerators import computed
    from lorashrink.engine.norms import spectral_norms

    base, _ = shapes(small=run.tiny)
    counts = Counter((shape[0], math.prod(shape[1:])) for shape in base.values() if len(shape) > 1)
    gpu_seconds = cpu_seconds = 0.0
    worst, weights = 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for shape, count in run.in_time("shape", sorted(counts.items(), key=lambda item: -math.prod(item[0]) * item[1])):
        together = max(1, min(count, (1 << 29) // (4 * math.prod(shape))))
        stacked = (torch.randn(shape, generator=generator) * 0.02).half().expand(together, *shape)

        def on_device(items: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
            return [spectral_norms(items[0].to(device)).cpu()]

        begin = time.perf_counter()
        (sigma,) = computed(on_device, [stacked], torch.device(run.device))
        gpu_seconds += (time.perf_counter() - begin) * count / together
        torch.set_num_threads(1)
        begin = time.perf_counter()
        (truth,) = computed(on_device, [stacked[:1]], torch.device("cpu"))
        cpu_seconds += (time.perf_counter() - begin) * count
        worst, weights = max(worst, float((sigma[0] - truth[0]).abs() / truth[0])), weights + count
    run.say(weights=weights, seconds=_short(gpu_seconds), seconds_of_one_core=_short(cpu_seconds), difference=worst)


# --- models -------------------------------------------------------------------------------------


def _size(run: Run) -> Size:
    from random_sdxl import SDXL, TINY

    return TINY if run.tiny else SDXL


def train(run: Run) -> None:
    """Training steps with their parts, and peak memory beside the estimate."""
    import gc

    import torch
    from random_sdxl import Steps, estimate, guide_options

    cases = [(1, True), (4, True), (1, False)]
    for batch, bypass in run.in_time("batch, bypass_mode", cases):
        options = guide_options("bf16", _size(run), batch, bypass)
        line: dict[str, object] = {"batch": batch, "bypass_mode": bypass, "precision": "bf16"}
        line["estimated_gib"] = _short(estimate(options, _size(run)) / GIB)
        begin = time.perf_counter()
        steps = Steps(options, _size(run))
        line["made_in"] = _short(time.perf_counter() - begin)
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        laps: list[dict[str, float]] = []
        for _ in range(2):
            steps.take()
        for _ in range(6):
            if laps and run.seconds < 0:
                break
            laps.append(steps.take())
        middle = sorted(laps, key=lambda lap: sum(lap.values()))[len(laps) // 2]
        line |= {"step": _short(sum(middle.values())), **{name: _short(value) for name, value in middle.items()}}
        line["limit_norms_launches"] = _launches(lambda steps=steps: steps.network.limit_norms(1.0))
        if run.device == "cuda":
            line["peak_gib"] = _short(torch.cuda.max_memory_allocated() / GIB)
        run.say(**line)
        del steps
        gc.collect()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def _launches(function: Callable[[], object]) -> int:
    """Operations that torch dispatches, views excepted: about the kernels that a GPU is asked for."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Counting() as counting:
        function()
    return counting.count


def _model(run: Run) -> tuple[Path, Path, Path]:
    """(model, adapter, prompts) of the calibration and the pictures, made once."""
    import torch
    from random_sdxl import write_adapter, write_pipeline

    model, adapter, prompts = (run.work / name for name in ("model", "adapter.safetensors", "prompts.txt"))
    if not prompts.exists():
        begin = time.perf_counter()
        write_pipeline(model, _size(run), torch.device(run.device))
        write_adapter(adapter, model, 4 if run.tiny else 32)
        side = _size(run).pixels
        prompts.write_text(f"a cat --w {side} --h {side} --s 10 --l 7 --d 1\n")
        run.say(model_made_in=_short(time.perf_counter() - begin))
        if run.device == "cuda":
            torch.cuda.empty_cache()
    return model, adapter, prompts


def calibrate(run: Run) -> None:
    """Statistics of a random SDXL, for an adapter and for a table."""
    from lorashrink.calibration.calibrate import calibrate

    model, adapter, prompts = _model(run)
    for name, adapters in run.in_time("what", [("adapter", [adapter]), ("table", [])]):
        done = calibrate(
            adapters, model=model, output=run.work / "statistics.safetensors", prompts=prompts, force=True,
            device=run.device, steps_used=2,
        )  # fmt: skip
        run.say(
            what=name,
            layers=done.layers,
            seconds=_short(done.seconds),
            seconds_per_pass=_short(done.seconds / done.passes),
            peak_gib=done.peak_bytes and _short(done.peak_bytes / GIB),
            file_mb=_short(done.bytes / 1e6),
        )


def pictures(run: Run) -> None:
    """Two pictures, without and with an adapter."""
    from lorashrink.errors import NonFinite
    from lorashrink.pictures.drawing import Studio, shots_of
    from lorashrink.pictures.prompts import read_prompts

    model, adapter, prompts = _model(run)
    shots = shots_of(read_prompts(prompts, side=_size(run).pixels), [0])
    with Studio(model, shots, folder=run.work / "pictures", device=run.device) as studio:
        for name, path in run.in_time("picture", [("loading and the model's own", None), ("with an adapter", adapter)]):
            begin, dtype = time.perf_counter(), studio.dtype
            try:
                studio.draw(path, name)
            except NonFinite:  # random numbers may overflow in half precision
                dtype = "float32"
                studio.draw(path, name, dtype=dtype)
            run.say(picture=name, seconds=_short(time.perf_counter() - begin), dtype=dtype)


def refine(run: Run) -> None:
    """Some steps of training a shrunk adapter."""
    import lorashrink as ls
    from lorashrink.calibration.refine import refine

    model, adapter, prompts = _model(run)
    small = run.work / "small.safetensors"
    ls.resize(adapter, recipes="rank=2", output=small, force=True, device=run.device)
    laps: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "refining":
            laps.append(time.perf_counter())

    begin = time.perf_counter()
    done = refine(
        small, like=adapter, model=model, output=run.work / "refined.safetensors", prompts=prompts,
        steps=4 if run.tiny else 10, batch=2, device=run.device, force=True, progress=progress,
    )  # fmt: skip
    step = (laps[-1] - laps[0]) / max(1, len(laps) - 1)
    run.say(
        layers=done.layers,
        steps=done.steps,
        seconds=_short(time.perf_counter() - begin),
        seconds_per_step=_short(step),
        loss_before=done.loss_before,
        loss_after=done.loss_after,
    )


# --- all ----------------------------------------------------------------------------------------

# Part -> its share of the time.
PARTS: dict[Callable[[Run], None], float] = {
    start: 20,
    tests: 60,
    rates: 25,
    engine: 60,
    files: 45,
    norms: 20,
    train: 45,
    calibrate: 45,
    pictures: 20,
    refine: 20,
}
_BY_NAME = {part.__name__: part for part in PARTS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, or say that there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=_BY_NAME, default=list(_BY_NAME))
    parser.add_argument("--seconds", type=float, default=345, help="for all parts together (default 345)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages that are not installed")
    parser.add_argument("--work", type=Path, help="folder for files, which stay there (default: a temporary one)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, also without a GPU")
    parser.add_argument("--part", choices=_BY_NAME, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        checkout.prepare(options.wheels)
        work = options.work.resolve()
        deadline = time.monotonic() + _GRACE * options.seconds
        _BY_NAME[options.part](Run(options.part, options.tiny, work, options.wheels, deadline))
        return 0
    if not _has_gpu():
        what = "the CPU stands in for it" if options.tiny else "nothing was measured; --tiny shows that all parts run"
        print(f"no GPU: torch finds no CUDA device on this machine, {what}", flush=True)
        if not options.tiny:
            return 0
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        return _run_all(options, work)


def _run_all(options: argparse.Namespace, work: Path) -> int:
    stop, failures = time.monotonic() + options.seconds, 0
    shares = [PARTS[_BY_NAME[name]] for name in options.parts]
    for index, name in enumerate(options.parts):
        # What earlier parts did not use goes to the later ones.
        seconds = max(5.0, (stop - time.monotonic()) * shares[index] / sum(shares[index:]))
        command = [sys.executable, __file__, "--part", name, "--seconds", str(seconds), "--work", str(work)]
        command += ["--wheels", str(options.wheels)] if options.wheels else []
        command += ["--tiny"] if options.tiny else []
        begin = time.perf_counter()
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, errors = child.communicate(timeout=seconds)
            error = errors.strip().splitlines()[-6:] if child.returncode else []
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.communicate()
            error = [f"stopped after {seconds:.0f} s"]
        line: dict[str, object] = {"part": name, "part_seconds": _short(time.perf_counter() - begin)}
        failures += bool(error)
        print(json.dumps(line | ({"error": error} if error else {})), flush=True)
    return int(failures > 0)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
