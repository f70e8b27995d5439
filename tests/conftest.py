"""Fixtures for all tests: a private cache folder, and the parity pair."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import browsing
import pytest
import stand_in
import torch
from hypothesis import settings
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Deadlines measure the machine, and these machines are shared.
settings.register_profile("lorashrink", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("lorashrink")

# Small tensors gain nothing from threads, and on a shared machine threads wait for each other.
torch.set_num_threads(1)
threadpool_limits(1, user_api="blas")

# Files in memory, and the bytes that must be free for them.
MEMORY, ROOM = Path("/dev/shm"), 8 << 30

PARITY = Path(__file__).parent / "data" / "parity"

GPU = torch.cuda.is_available()
if GPU:
    torch.cuda.init()  # before tests hide it from the processes that they start


def pytest_configure(config: pytest.Config) -> None:
    """Put temporary files into memory where there is room: every output is flushed, and a disk takes its time."""
    if config.option.basetemp is None and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for the tests of a file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browsing.CHROMIUM, args=list(browsing.ARGUMENTS))
        yield opened
        opened.close()


CUDA = [pytest.param("cuda", marks=pytest.mark.cuda)] if GPU else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the GPU if this machine has one."""
    name: str = request.param
    return name


@pytest.fixture(params=["cpu", "stand-in", *CUDA])
def engine_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, and a CPU that stands in for a GPU in the engine's threads."""
    if request.param == "stand-in":
        with stand_in.installed():
            yield "cuda"
    else:
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests see a GPU only if they are marked for it: the others hold for the CPU, bit for bit."""
    if not GPU or item.get_closest_marker("cuda"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own cache, or colours its output."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")


@pytest.fixture
def base() -> Path:
    return PARITY / "base.safetensors"


@pytest.fixture
def adapter() -> Path:
    return PARITY / "lora.safetensors"
