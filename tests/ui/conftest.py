"""Fixtures of tests that start `lorashrink ui`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import Server


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A function that starts a server with a folder and options; all of them end with the test."""
    servers = []

    def run(folder: Path, *options: str, port: int = 0) -> Server:
        servers.append(Server([folder], *options, cache=tmp_path / "cache", port=port))
        return servers[-1]

    yield run
    for server in servers:
        assert server.stop()[0] == 0
