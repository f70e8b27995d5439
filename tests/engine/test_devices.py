"""Worker threads, and the number of threads of torch and BLAS."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_info, threadpool_limits

from lorashrink.engine.devices import pick_device, worker_pool
from lorashrink.errors import UsageError
from lorashrink.shrinking.run import resize


@pytest.fixture
def three_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with threadpool_limits(3, user_api="blas"):
        yield 3
        assert blas_threads() == {3}
    torch.set_num_threads(before)


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_workers_and_their_owner_run_torch_on_one_thread(three_threads: int) -> None:
    with worker_pool(2) as pool:
        assert torch.get_num_threads() == 1
        assert pool.submit(torch.get_num_threads).result() == 1
        assert blas_threads() == {1}
    assert torch.get_num_threads() == three_threads


def test_overlapping_pools_of_two_threads_leave_the_thread_count(three_threads: int) -> None:
    """The second pool opens at a count of 1 and closes last."""
    first_open, second_open, first_closed = (threading.Event() for _ in range(3))

    def first() -> int:
        with worker_pool(1) as pool:
            pool.submit(int).result()
            first_open.set()
            assert second_open.wait(10)
        first_closed.set()
        return torch.get_num_threads()

    def second() -> int:
        assert first_open.wait(10)
        with worker_pool(1) as pool:
            second_open.set()
            assert first_closed.wait(10)
            assert pool.submit(torch.get_num_threads).result() == 1
        return torch.get_num_threads()

    with ThreadPoolExecutor(2) as callers:
        futures = [callers.submit(first), callers.submit(second)]
        assert [future.result() for future in futures] == [three_threads] * 2
    assert torch.get_num_threads() == three_threads
    assert threads_of_a_new_thread() == three_threads


def test_overlapping_resizes_of_two_threads_leave_the_thread_count(tmp_path: Path, three_threads: int) -> None:
    """The second one begins while the first runs, and ends after it."""
    adapter = tmp_path / "a.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{name}.lora_up.weight": torch.rand(8, 4), f"{name}.lora_down.weight": torch.rand(4, 8)}, adapter)
    first_runs, second_runs, first_ended = (threading.Event() for _ in range(3))

    def first() -> int:
        def pause(result: object) -> None:
            first_runs.set()
            assert second_runs.wait(30)

        resize(adapter, recipes="rank=2", output=tmp_path / "first", each=pause)
        first_ended.set()
        return torch.get_num_threads()

    def second() -> int:
        def pause(result: object) -> None:
            second_runs.set()
            assert first_ended.wait(30)

        assert first_runs.wait(30)
        resize(adapter, recipes="rank=2", output=tmp_path / "second", each=pause)
        return torch.get_num_threads()

    with ThreadPoolExecutor(2) as callers:
        assert [future.result() for future in (callers.submit(first), callers.submit(second))] == [three_threads] * 2
    assert threads_of_a_new_thread() == three_threads


def test_a_pool_within_a_pool_does_not_end_the_single_thread(three_threads: int) -> None:
    with worker_pool(1):
        with worker_pool(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        assert blas_threads() == {1}
    assert torch.get_num_threads() == three_threads


def test_an_error_in_a_pool_restores_the_thread_count(three_threads: int) -> None:
    with pytest.raises(KeyError), worker_pool(1):
        raise KeyError
    assert torch.get_num_threads() == three_threads


@pytest.mark.parametrize("jobs", [0, -1])
def test_fewer_than_one_job_is_refused(jobs: int) -> None:
    with pytest.raises(UsageError, match="jobs"), worker_pool(jobs):
        pass


@pytest.mark.parametrize("device", ["gpu", "xpu", "cuda:first", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_here_is_refused_by_name(device: str) -> None:
    with pytest.raises(UsageError, match="device"):
        pick_device(device)
