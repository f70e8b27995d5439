"""Fixtures for all tests: a private cache folder, and the parity pair."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Deadlines measure the machine, and these machines are shared.
settings.register_profile("lorashrink", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("lorashrink")

# Small tensors gain nothing from threads, and on a shared machine threads wait for each other.
torch.set_num_threads(1)

PARITY = Path(__file__).parent / "data" / "parity"


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
