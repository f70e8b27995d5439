"""The engine on the CPU, and on a GPU where there is one, against dense float64 decompositions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fixtures import random_tensors, scaled, shapes, write_tensors
from torch import Tensor
from torch.testing import assert_close

from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import AnyDelta, Delta, Dense, Kronecker
from lorashrink.engine.gram import Grams
from lorashrink.engine.interaction import interaction
from lorashrink.engine.spectrum import Cut, Item, Spectrum, alignment, decompose, spectrum, truncate_together
from lorashrink.shrinking.run import resize

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_of(out: int, rank: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Delta:
    up, down = randn(out, rank, seed=seed).to(dtype), randn(rank, columns, seed=seed + 1).to(dtype)
    return Delta(up, down, -0.25, (out, columns))


def spectra_of(deltas: Sequence[AnyDelta], device: str) -> list[Spectrum]:
    items = [Item(lambda delta=delta: delta, delta.rank) for delta in deltas]
    with ThreadPoolExecutor(8) as pool:
        return [pending.result() for pending in decompose(items, pool, device=device)]


def check(deltas: Sequence[AnyDelta], device: str) -> None:
    """All singular values, and all dimensions together, against a dense SVD."""
    spectra = spectra_of(deltas, device)
    cuts = [Cut(delta, solved, range(solved.rank)) for delta, solved in zip(deltas, spectra, strict=True)]
    for cut, (up, down) in zip(cuts, truncate_together(cuts, device), strict=True):
        matrix = cut.delta.row_reader(CPU)(0, cut.delta.shape[0])
        s = torch.linalg.svdvals(matrix)
        count = min(len(s), len(cut.spectrum.sigma))
        # A Gram matrix squares the condition number: what is below 2^-23 of the largest value is noise.
        noise = 2.0**-22 * float(s[0])
        assert_close(cut.spectrum.sigma[:count], s[:count], rtol=1e-9, atol=noise if float(s[-1]) < noise else 0.0)
        assert_close(up.double() @ down.double(), matrix, rtol=1e-4, atol=1e-4 * max(float(s[0]), 1e-30))


@pytest.mark.parametrize("rank", [1, 31, 32, 33, 64, 128])
def test_layers_of_every_rank_have_their_dense_spectrum(engine_device: str, rank: int) -> None:
    sides = [(160, 200), (160, 200), (300, 150), (129, 131)]
    check([delta_of(out, rank, columns, 7 * index) for index, (out, columns) in enumerate(sides * 3)], engine_device)


def test_unusual_layers_share_a_chunk_and_spoil_nothing(engine_device: str) -> None:
    """Zeros, dependent and skewed columns, NaN and every dtype in a batch."""
    deltas = [delta_of(64, 8, 48, seed) for seed in range(0, 40, 2)]
    deltas[1].up[:] = 0
    deltas[2].down[5] = deltas[2].down[4]
    deltas[3].up[:, 2], deltas[3].down[2] = 0, 0
    deltas[4].down[:] *= 2.0 ** torch.arange(-40, 40, 10)[:, None]
    deltas[4].up[:] /= 2.0 ** torch.arange(-40, 40, 10)
    deltas[5].up[:] *= 10.0 ** -torch.arange(8)
    kinds = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
    deltas += [delta_of(64, 8, 48, 100 + seed, dtype) for seed, dtype in enumerate(kinds)]
    check(deltas, engine_device)
    broken = [delta_of(64, 8, 48, 200), delta_of(64, 8, 48, 202)]
    broken[0].up[3, 4], broken[1].down[1, 1] = math.nan, math.inf
    spectra = spectra_of([*broken, *deltas], engine_device)
    assert [solved.finite for solved in spectra] == [False, False, *[True] * len(deltas)]


def test_matrices_and_kronecker_products_have_their_dense_spectrum(engine_device: str) -> None:
    check(
        [
            Dense(randn(24, 20), -0.5, (24, 20)),
            Dense(randn(40, 90).float(), 0.5, (40, 90)),
            Kronecker(Dense(randn(3, 2), -0.5, (3, 2)), Dense(randn(4, 10), 1.0, (4, 10)), (12, 20)),
            Kronecker(Dense(randn(3, 4), -0.5, (3, 4)), Delta(randn(4, 2), randn(2, 5), 3.0, (4, 5)), (12, 20)),
        ],
        engine_device,
    )


def test_a_sketch_is_nearly_the_best_of_its_rank(engine_device: str) -> None:
    u, v = torch.linalg.qr(randn(400, 300)).Q, torch.linalg.qr(randn(300, 300, seed=1)).Q
    sigma = torch.logspace(0, -4, 300, dtype=torch.float64)
    matrix = Dense(u * sigma @ v.T, 1.0, (400, 300))
    with ThreadPoolExecutor(1) as pool:
        (pending,) = decompose([Item(lambda: matrix, 300, limit=16)], pool, device=engine_device)
    assert_close(pending.result().sigma, sigma[:16], rtol=1e-6, atol=0)


def test_statistics_decide_what_is_kept(engine_device: str) -> None:
    delta, samples = delta_of(30, 8, 40, 0, torch.float64), randn(40, 60, seed=5)
    c = samples @ samples.T / 60
    grams = Grams(delta.down @ c @ delta.down.T, delta.up.T @ delta.up)
    with ThreadPoolExecutor(1) as pool:
        (pending,) = decompose([Item(lambda: delta, 8, lambda _: grams)], pool, device=engine_device)
    values, vectors = torch.linalg.eigh(c)
    expected = torch.linalg.svdvals(delta.row_reader(CPU)(0, 30) @ vectors * values.clamp(min=0).sqrt())[:8]
    assert_close(pending.result().sigma, expected, rtol=1e-6, atol=0)


def test_alignment_is_u_w_v_of_every_pair(engine_device: str) -> None:
    delta, weight = delta_of(30, 5, 40, 0), randn(30, 40, seed=9)
    u, _, v = torch.linalg.svd(delta.row_reader(CPU)(0, 30), full_matrices=False)
    expected = torch.stack([u[:, i] @ weight @ v[i] for i in range(5)])
    (products,) = computed(
        lambda spectra, gpu: [alignment(delta, solved, weight, gpu) for solved in spectra],
        [spectrum(delta)],
        torch.device(engine_device),
    )
    assert_close(products, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [(4, 6, 3), (90, 100, 110)], ids=["decomposed", "iterated"])
def test_the_sum_of_adapters_has_the_norms_of_the_dense_sum(engine_device: str, ranks: tuple[int, ...]) -> None:
    deltas = [delta_of(400, rank, 350, seed, torch.float64) for seed, rank in enumerate(ranks)]
    weights = [1.0, -0.5, 0.7]
    ups, downs = torch.cat([delta.up for delta in deltas], 1), torch.cat([delta.down for delta in deltas])
    (result,) = computed(
        lambda _, gpu: [interaction(ups, downs, [-0.25] * sum(ranks), ranks, weights, gpu)],
        [None],
        torch.device(engine_device),
    )
    total = sum(weight * delta.row_reader(CPU)(0, 400) for weight, delta in zip(weights, deltas, strict=True))
    sigma = torch.linalg.svdvals(total)
    assert result.total == pytest.approx((float(sigma.norm()), float(sigma[0]), float(sigma[1])), rel=1e-7)


@pytest.fixture
def no_memory(device: str) -> Iterator[None]:
    """A GPU has hardly any memory for this process."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-5)
    yield
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("no_memory")
def test_layers_that_the_device_cannot_hold_are_computed(device: str) -> None:
    check([delta_of(2048, 16, 256, seed) for seed in range(3)], device)


# --- whole files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layers of a LoRA of SDXL and both its text encoders, with narrow sides."""
    tensors = random_tensors(scaled(shapes("sdxl_lora_kohya_te1_te2")))
    return write_tensors(tmp_path_factory.mktemp("sdxl") / "lora.safetensors", tensors)


def test_a_new_process_with_many_threads_shrinks_a_large_file(device: str, sdxl_lora: Path, tmp_path: Path) -> None:
    """The first calls of all libraries come from threads of one process."""
    command = [sys.executable, "-m", "lorashrink", "resize", str(sdxl_lora), "-r", "energy=0.9", "-o", str(tmp_path)]
    done = subprocess.run([*command, "--device", device, "--jobs", "8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (output,) = tmp_path.glob("*.safetensors")
    assert 0 < output.stat().st_size < sdxl_lora.stat().st_size


def test_recipes_keep_what_resize_lora_keeps(engine_device: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    """Also those that look at spectral norms and weights of the base."""
    expected = json.loads((adapter.parent / "expected.json").read_text())["recipes"]
    report = resize(adapter, base=base, recipes=list(expected), output=tmp_path, device=engine_device)
    for recipe, result in zip(expected.values(), report.results, strict=True):
        ranks = {layer.name: layer.rank_after for layer in result.layers}
        assert recipe["kept_rank"].items() <= ranks.items()


def test_a_file_has_equal_bytes_alone_and_beside_others(engine_device: str, sdxl_lora: Path, tmp_path: Path) -> None:
    """Whatever the number of threads."""
    folder = tmp_path / "in"
    write_tensors(folder / "other.safetensors", random_tensors(scaled(shapes("sdxl_lora_kohya_te1_te2")), seed=1))
    (folder / "lora.safetensors").write_bytes(sdxl_lora.read_bytes())
    resize(sdxl_lora, recipes="energy=0.9", output=tmp_path / "alone", device=engine_device, jobs=1)
    resize(folder, recipes="energy=0.9", output=tmp_path / "together", device=engine_device, jobs=8)
    (alone,) = (tmp_path / "alone").glob("*.safetensors")
    assert alone.read_bytes() == (tmp_path / "together" / alone.name).read_bytes()
