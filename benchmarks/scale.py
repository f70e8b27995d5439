"""What a million adapters would take: a simulation of readers, cores and writers, from rates measured on one machine.

python benchmarks/scale.py prints the tables of docs/scale.md. The parameters are below; change them to those of your
machines. Each machine is a line of stages: files are read, decomposed and formed, hashed and checked, and written.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

# --- the collection -----------------------------------------------------------------------------
FILES = 1_000_000
MEAN_BYTES = 200e6
SPREAD = 0.6  # of the logarithm of a file's size
KEPT = 0.5  # bytes written per byte read; the recipe decides

# --- measured: bench_batch.py --full, rank 32, 228 MB per file, on cores that other work shared --
FILE_BYTES = 228e6
ENGINE_SECONDS = 0.65  # of a core: decompose, and form the kept factors
OTHER_SECONDS = 1.04  # of a core: read, hash the source and the output, write, read back, compare
WORKER_BYTES = 0.44e9  # memory of a process with one file in work
BASE_SECONDS = 14.0  # of a core, once for each base: norms of 6.9 GB

# --- assumed ------------------------------------------------------------------------------------
GPU_SPEED = 40.0  # cores that one GPU replaces for the engine, with its copies; not measured
IN_FLIGHT = 3  # files between reading and writing, for each core
SAMPLE = 4000  # files that are simulated on each kind of machine; the rest is in proportion


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal machines that share one storage. Bandwidths in bytes per second, both ways at once."""

    name: str
    machines: int
    cores: int  # of each
    network: float  # of each
    storage: float  # of all together
    gpus: int = 0  # of each


CLUSTERS = (
    Cluster("1 machine, 2 cores, its own SSD", 1, 2, 1e9, 1e9),
    Cluster("1 machine, 16 cores, 10 Gbit/s", 1, 16, 1.25e9, 1.25e9),
    Cluster("10 machines, 16 cores, 10 Gbit/s", 10, 16, 1.25e9, 12.5e9),
    Cluster("10 machines, 16 cores, storage 2 GB/s", 10, 16, 1.25e9, 2e9),
    Cluster("64 machines, 16 cores, 10 Gbit/s", 64, 16, 1.25e9, 80e9),
    Cluster("10 machines, 16 cores, 1 GPU, 10 Gbit/s", 10, 16, 1.25e9, 12.5e9, gpus=1),
)


@dataclass(frozen=True, slots=True)
class Stage:
    """Servers that each work on one file."""

    name: str
    servers: int
    bytes_per_second: float  # of each


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation gave."""

    hours: float  # for the whole collection
    busy: dict[str, float]  # share of the time, by stage

    @property
    def bottleneck(self) -> str:
        """The stage that the others wait for."""
        return max(self.busy, key=lambda name: self.busy[name])


def stages(cluster: Cluster) -> list[Stage]:
    """The stages of one machine."""
    bandwidth = min(cluster.network, cluster.storage / cluster.machines)
    read, write = Stage("read", 1, bandwidth), Stage("write", 1, bandwidth / KEPT)
    if cluster.gpus:
        engine = Stage("GPU", cluster.gpus, GPU_SPEED * FILE_BYTES / ENGINE_SECONDS)
        return [read, engine, Stage("cores", cluster.cores, FILE_BYTES / OTHER_SECONDS), write]
    # The engine and the checks of a file take their turns on the same cores.
    return [read, Stage("cores", cluster.cores, FILE_BYTES / (ENGINE_SECONDS + OTHER_SECONDS)), write]


def simulate(line: Sequence[Stage], sizes: Sequence[float], in_flight: int) -> tuple[float, dict[str, float]]:
    """(seconds until the last file is written, seconds of work by stage and server).

    A file is read once fewer than `in_flight` are between reading and writing.
    """
    free = [[0.0] * stage.servers for stage in line]  # when each server is, a heap
    work = {stage.name: 0.0 for stage in line}
    ended: list[float] = []
    for number, size in enumerate(sizes):
        time = ended[number - in_flight] if number >= in_flight else 0.0
        for stage, servers in zip(line, free, strict=True):
            taken = size / stage.bytes_per_second
            time = max(time, heapq.heappop(servers)) + taken
            heapq.heappush(servers, time)
            work[stage.name] += taken / stage.servers
        ended.append(max(time, ended[-1]) if ended else time)
    return ended[-1], work


def outcome(cluster: Cluster) -> Outcome:
    """The whole collection on a cluster, from a sample on one of its machines."""
    numbers = random.Random(0)
    drawn = [numbers.lognormvariate(0.0, SPREAD) for _ in range(SAMPLE)]
    sizes = [size * MEAN_BYTES * SAMPLE / sum(drawn) for size in drawn]
    seconds, work = simulate(stages(cluster), sizes, IN_FLIGHT * cluster.cores)
    total = seconds * FILES / SAMPLE / cluster.machines + BASE_SECONDS / cluster.cores
    return Outcome(total / 3600, {name: busy / seconds for name, busy in work.items()})


def report() -> str:
    """Both tables."""
    engine, rest = (seconds * MEAN_BYTES / FILE_BYTES * FILES / 3600 for seconds in (ENGINE_SECONDS, OTHER_SECONDS))
    lines = [
        f"{FILES:,} files of {MEAN_BYTES / 1e6:.0f} MB: {FILES * MEAN_BYTES / 1e12:.0f} TB read, once from the "
        f"storage and twice more from memory; {FILES * MEAN_BYTES * KEPT / 1e12:.0f} TB written and read back",
        f"core hours: {engine + rest:.0f}, of which the engine {engine:.0f}; "
        f"with GPUs {rest:.0f} core hours and {engine / GPU_SPEED:.0f} GPU hours",
        "",
        f"{'cluster':<42}{'hours':>7}{'MB/s':>8}{'memory each':>13}   waits for",
    ]
    for cluster in CLUSTERS:
        result = outcome(cluster)
        rate = FILES * MEAN_BYTES / result.hours / 3600 / 1e6
        memory = f"{cluster.cores * WORKER_BYTES / 1e9:.0f} GB"
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in result.busy.items())
        lines.append(f"{cluster.name:<42}{result.hours:>7.1f}{rate:>8.0f}{memory:>13}   {result.bottleneck} ({shares})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
