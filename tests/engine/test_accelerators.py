"""What only GPUs do, on a CPU that stands in for one: memory that runs out, wrong results, libraries that load late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stand_in
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from lorashrink.engine import accelerators, devices, eigen, gram
from lorashrink.engine import spectrum as engine
from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import AnyDelta, Delta, Dense, Experts, Kronecker
from lorashrink.engine.devices import pick_device
from lorashrink.engine.eigen import eigh, eigvalsh, solver_device
from lorashrink.engine.gram import Grams
from lorashrink.engine.spectrum import Cut, Item, decompose, truncate_together
from lorashrink.errors import UsageError
from lorashrink.shrinking.run import resize

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def gpu() -> Iterator[None]:
    """ "cuda" is a GPU that computes as the CPU does, in threads of its own, and mixes no tensors of both."""
    with stand_in.installed():
        yield


def on_gpu() -> bool:
    """Whether this thread is one of the GPU's."""
    return threading.current_thread().name.startswith("lorashrink-gpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_of(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Delta:
    return Delta(randn(72, rank, seed=seed).to(dtype), randn(rank, 80, seed=seed + 1).to(dtype), 0.5, (72, 80))


def check(deltas: Sequence[AnyDelta], *, jobs: int = 4) -> None:
    """Spectra and truncations of the GPU against a dense decomposition."""
    items = [Item(lambda delta=delta: delta, delta.rank) for delta in deltas]
    with ThreadPoolExecutor(jobs) as pool:
        spectra = [pending.result() for pending in decompose(items, pool, device="cuda")]
    cuts = [
        Cut(delta, spectrum, range(min(1 + index % 4, delta.rank)))
        for index, (delta, spectrum) in enumerate(zip(deltas, spectra, strict=True))
    ]
    for cut, (up, down) in zip(cuts, truncate_together(cuts, "cuda"), strict=True):
        u, s, v = torch.linalg.svd(cut.delta.row_reader(CPU)(0, cut.delta.shape[0]), full_matrices=False)
        count, kept = min(len(s), len(cut.spectrum.sigma)), len(cut.kept)
        assert_close(cut.spectrum.sigma[:count], s[:count], rtol=1e-9, atol=1e-9 * float(s[0]))
        assert_close(up.double() @ down.double(), u[:, :kept] * s[:kept] @ v[:kept], rtol=1e-4, atol=1e-4)


FORMS = [
    Dense(randn(24, 20), -0.5, (24, 20)),
    Kronecker(Dense(randn(3, 2), -0.5, (3, 2)), Dense(randn(4, 10), 1.0, (4, 10)), (12, 20)),
]


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture
def too_small(monkeypatch: pytest.MonkeyPatch, gpu: None) -> Callable[[int], list[int]]:
    """A function that makes the GPU too small for more than so many layers; it returns a log of attempts."""

    def install(most: int) -> list[int]:
        attempts: list[int] = []

        def limited(real: Callable[..., object]) -> Callable[..., object]:
            def call(layers: Sequence[object], *rest: object, **more: object) -> object:
                if on_gpu():
                    attempts.append(len(layers))
                    if len(layers) > most:
                        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return real(layers, *rest, **more)

            return call

        for name in ("grams", "_truncated_together", "_of_other_forms"):
            monkeypatch.setattr(engine, name, limited(getattr(engine, name)))
        return attempts

    return install


def test_a_batch_too_large_for_the_gpu_is_halved(too_small: Callable[[int], list[int]]) -> None:
    attempts = too_small(3)
    check([delta_of(6, seed) for seed in range(20)])
    assert max(attempts) > 3
    assert any(0 < attempt <= 3 for attempt in attempts)


def test_a_layer_too_large_for_the_gpu_goes_to_the_cpu(too_small: Callable[[int], list[int]]) -> None:
    attempts = too_small(0)
    check([*(delta_of(6, seed) for seed in range(5)), *FORMS])
    assert 1 in attempts


@pytest.mark.parametrize(
    "message",
    [
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ],
)
def test_a_library_without_memory_counts_as_too_small(gpu: None, message: str) -> None:
    def task(items: Sequence[int], device: torch.device) -> list[bool]:
        if on_gpu():
            raise RuntimeError(message)
        return [False for _ in items]

    assert computed(task, [1, 2, 3], CUDA) == [False] * 3


def test_tensors_of_two_devices_do_not_mix(gpu: None) -> None:
    """So that the tests here find what a GPU would refuse."""

    def task(items: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        return [items[0].to(device) + items[1]]

    with pytest.raises(RuntimeError, match="same device"):
        computed(task, [torch.ones(3), torch.ones(3)], CUDA)


def test_an_error_that_is_not_of_memory_is_raised(gpu: None) -> None:
    def task(items: Sequence[int], device: torch.device) -> list[int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory"):
        computed(task, [1, 2], CUDA)


def test_factors_on_the_gpu_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr(gram, "_DEVICE_BYTES", 3 * 72 * 6 * 16)
    sizes: list[int] = []
    stacked = gram.stacked

    def recorded(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
        sizes.append(len(tensors))
        return stacked(tensors, device)

    monkeypatch.setattr(gram, "stacked", recorded)
    check([delta_of(6, seed) for seed in range(10)])
    assert max(sizes) == 3


# --- eigenvalues --------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one after another"])
@pytest.mark.parametrize("rank", [1, 31, 32, 33, 64])
def test_every_rank_is_solved_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, gpu: None, rank: int, batched: bool
) -> None:
    monkeypatch.setattr(eigen, "_BATCHED", batched)
    solved_on_gpu: list[bool] = []
    solve = engine.solve

    def recorded(*stacked: Tensor) -> tuple[Tensor, ...]:
        solved_on_gpu.append(on_gpu())
        return solve(*stacked)

    monkeypatch.setattr(engine, "solve", recorded)
    check([delta_of(rank, seed) for seed in range(5)])
    assert set(solved_on_gpu) == {batched or rank <= 32}
    assert solver_device(CPU, rank) == CPU


def symmetric(count: int, rank: int) -> Tensor:
    factors = randn(count, rank, 2 * rank)
    return factors @ factors.mT


@pytest.fixture
def untrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as a device whose results are checked; matrices that come one by one are right."""
    monkeypatch.setattr(eigen, "_trusted", lambda stacked: len(stacked) == 1)


@pytest.mark.parametrize("fault", ["values", "a repeated vector", "nan"])
def test_a_wrong_result_of_a_batch_is_repaired(monkeypatch: pytest.MonkeyPatch, untrusted: None, fault: str) -> None:
    right = torch.linalg.eigh

    def wrong(stacked: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = right(stacked)
        if len(stacked) > 1:
            match fault:
                case "values":
                    values[2, 3] *= 1 + 1e-6
                case "a repeated vector":
                    values[2, 3], vectors[2, :, 3] = values[2, 4].clone(), vectors[2, :, 4].clone()
                case "nan":
                    vectors[2, 0, 0] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    matrices = symmetric(5, 8)
    values, vectors = eigh(matrices)
    assert_close(values, torch.linalg.eigvalsh(matrices), rtol=1e-10, atol=0)
    assert_close(vectors * values[:, None, :] @ vectors.mT, matrices, rtol=1e-10, atol=1e-10)


def test_wrong_eigenvalues_alone_are_repaired(monkeypatch: pytest.MonkeyPatch, untrusted: None) -> None:
    right, matrices = torch.linalg.eigvalsh, symmetric(5, 8)
    truth = right(matrices)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda stacked: right(stacked) * (1 + 1e-7 * (len(stacked) > 1)))
    assert_close(eigvalsh(matrices), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError("linalg.eigh: (Batch element 3): The algorithm failed to converge"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnXsyevBatched(...)`"),
    ],
    ids=["no convergence", "an error of the library"],
)
def test_a_batch_that_fails_is_solved_one_by_one(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    right = torch.linalg.eigh

    def failing(stacked: Tensor) -> tuple[Tensor, Tensor]:
        if len(stacked) > 1:
            raise error
        return right(stacked)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrices = symmetric(4, 6)
    values, vectors = eigh(matrices)
    assert_close(vectors * values[:, None, :] @ vectors.mT, matrices, rtol=1e-10, atol=1e-10)


def test_right_results_are_taken_as_they_are(untrusted: None) -> None:
    """Zero, rank-deficient and badly scaled matrices, lower triangles only."""
    matrices = symmetric(6, 12)
    matrices[0] = 0
    matrices[1] *= 1e-200
    matrices[2] *= 1e200
    matrices[3, 6:], matrices[3, :, 6:] = 0, 0
    expected = torch.linalg.eigh(matrices)
    garbage = matrices.tril() + torch.full_like(matrices, torch.nan).triu(1).nan_to_num(7.0)
    assert not eigen.wrong_vectors(garbage, *expected).any()
    assert not eigen.wrong_values(garbage, expected.eigenvalues)[[0, 3, 4, 5]].any()


# --- starting -----------------------------------------------------------------------------------


def test_threads_meet_libraries_that_are_loaded_already(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    """torch loads CUDA libraries at the first call; threads must not collide."""
    loading, loaded = threading.Lock(), threading.Event()

    def lazy(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if not loaded.is_set():
                if not loading.acquire(blocking=False):
                    raise RuntimeError("lazy wrapper should be called at most once")
                time.sleep(0.2)
                loaded.set()
            return real(*args, **kwargs)

        return call

    for name in ("cholesky_ex", "eigh", "eigvalsh", "qr", "solve_triangular"):
        monkeypatch.setattr(torch.linalg, name, lazy(getattr(torch.linalg, name)))
    monkeypatch.setattr(engine, "_DEVICE_LAYERS", 2)
    check([delta_of(4, seed) for seed in range(40)], jobs=8)


def test_a_gpu_that_torch_cannot_use_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    with pytest.raises(UsageError, match=r"device: .* \(CUDA error: no kernel image .* device\)\. Use --device cpu"):
        pick_device("cuda")


def test_auto_leaves_a_gpu_that_computes_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpu: None
) -> None:
    right = torch.linalg.solve_triangular
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *args, **kwargs: 1.01 * right(*args, **kwargs))
    assert pick_device("auto") == "cpu"
    assert "computes wrong numbers" in caplog.text


def test_auto_is_the_cpu_for_work_that_ends_before_a_gpu_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: None
) -> None:
    monkeypatch.setattr(devices, "_SMALL_BYTES", 1000)
    monkeypatch.setattr(devices, "_LARGE_BYTES", 10**5)
    monkeypatch.setattr(devices, "usable_cores", lambda: 2)
    small, folder = tmp_path / "small", tmp_path / "folder"
    small.write_bytes(bytes(900))
    folder.mkdir()
    (folder / "large").write_bytes(bytes(1900))
    assert pick_device("auto", [small]) == "cpu"
    assert pick_device("auto", [small, folder]) == "cuda:0"
    assert pick_device("auto", [folder] * 60) == "cuda"
    assert pick_device("auto") == "cuda:0"
    assert pick_device("cuda", [small]) == "cuda:0"


def test_gpus_of_one_kind_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one is a worker, and all that are equal to it."""

    class Card:
        def __init__(self, name: str) -> None:
            self.name, self.major, self.minor = name, 8, 0

    cards = [Card("A"), Card("B"), Card("A")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    assert accelerators._gpus(CUDA) == [torch.device("cuda", 2), torch.device("cuda", 0)]
    assert accelerators._gpus(torch.device("cuda:1")) == [torch.device("cuda:1")]


# --- whole files --------------------------------------------------------------------------------


def adapter_file(path: Path, seed: int, layers: int = 12) -> Path:
    tensors = {}
    for index in range(layers):
        name = f"lora_unet_down_blocks_1_attentions_0_transformer_blocks_{index}_attn1_to_q"
        rank = 4 if index % 3 else 8
        tensors[f"{name}.lora_up.weight"] = randn(32, rank, seed=seed + index).half()
        tensors[f"{name}.lora_down.weight"] = randn(rank, 48, seed=seed + index + 100).half()
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    return path


def test_a_file_has_equal_bytes_alone_and_in_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: None
) -> None:
    """Every product of a GPU comes from one file, whatever else is shrunk."""
    batches: list[tuple[int, ...]] = []
    grams = engine.grams

    def recorded(deltas: Sequence[Delta], device: torch.device) -> Grams:
        batches.append(tuple(sorted(float(delta.up.sum()) for delta in deltas)))
        return grams(deltas, device)

    monkeypatch.setattr(engine, "grams", recorded)
    folder = tmp_path / "in"
    folder.mkdir()
    sources = [adapter_file(folder / f"{name}.safetensors", seed) for name, seed in (("a", 1), ("b", 500))]
    resize(sources[0], recipes="energy=0.9", output=tmp_path / "alone", device="cuda", jobs=3)
    alone = set(batches)
    batches.clear()
    resize(folder, recipes="energy=0.9", output=tmp_path / "together", device="cuda", jobs=3)
    assert alone <= set(batches)
    (first,) = (tmp_path / "alone").glob("a*")
    assert first.read_bytes() == (tmp_path / "together" / first.name).read_bytes()


@pytest.mark.parametrize("form", ["factors", "matrix", "experts"])
def test_products_on_a_gpu_are_exact_where_tf32_is_allowed(gpu: None, form: str) -> None:
    """The stand-in's float32 products are in TF32, which would be wrong in the fourth digit."""
    ups, downs = randn(3, 30, 12).float(), randn(3, 12, 80, seed=1).float()
    parts = [Delta(up, down, 0.5, (30, 80)) for up, down in zip(ups, downs, strict=True)]
    delta: AnyDelta = Experts(ups, downs, 0.5, (90, 80))
    if form != "experts":
        parts = parts[:1]
        delta = parts[0] if form == "factors" else Dense(parts[0].dense(), 1.0, (30, 80))
    with ThreadPoolExecutor(1) as pool:
        (pending,) = decompose([Item(lambda: delta, delta.rank)], pool, device="cuda")
        solved = pending.result()
    ((up, down),) = truncate_together([Cut(delta, solved, range(solved.rank))], "cuda")
    for part, left, right in zip(parts, up.chunk(len(parts), 1), down.chunk(len(parts)), strict=True):
        truth = part.dense().double()
        assert float((left.double() @ right.double() - truth).norm() / truth.norm()) < 1e-6
