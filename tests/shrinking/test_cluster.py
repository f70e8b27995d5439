"""Shrinking on a Ray cluster of this machine: equal bytes, lost processes, shared and sent files."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster_runs import RECIPES  # imports Ray
from fixtures import write_styles
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.errors import UsageError
from lorashrink.shrinking import journal
from lorashrink.shrinking.cluster import resize as resize_on_cluster
from lorashrink.shrinking.run import resize

FILES = 16


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `cluster_runs.py` prints, with "folder": the folder of its outputs and of a run without a cluster."""
    folder = tmp_path_factory.mktemp("cluster")
    write_styles(folder / "in", FILES)
    (folder / "in" / "bad.safetensors").write_bytes(b"broken")
    resize(folder / "in", recipes=RECIPES, output=folder / "here")
    token = folder / "token"  # of this cluster alone; without one, Ray puts one into the user's home
    token.write_text(secrets.token_hex(32))
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(Path(__file__).parents[1] / "cluster_runs.py"), str(folder / "in"), str(folder)]
    environment = {**os.environ, **ray, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "folder": folder}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != journal.NAME}


@pytest.mark.parametrize("run", ["shared", "sent", "lost"])
def test_a_cluster_writes_the_same_bytes_and_nothing_else(outcomes: dict[str, Any], run: str) -> None:
    assert contents(outcomes["folder"] / run) == contents(outcomes["folder"] / "here")
    results, failed, *_ = outcomes[run]
    assert results == FILES * len(RECIPES)
    (error,) = failed
    assert error.startswith(f"{outcomes['folder'] / 'in' / 'bad.safetensors'}: not a safetensors file")


def test_lost_processes_neither_lose_nor_repeat_files(outcomes: dict[str, Any]) -> None:
    assert outcomes["lost"][2] == 2
    assert outcomes["each"]


def test_the_exit_status_tells_that_a_file_failed(outcomes: dict[str, Any]) -> None:
    assert outcomes["sent"][2] == 1


def test_a_rerun_on_the_cluster_makes_only_missing_files(outcomes: dict[str, Any]) -> None:
    missing, redone = outcomes["again"]
    assert redone == [missing]
    assert outcomes["states"].count(journal.DONE) == FILES * len(RECIPES)
    assert outcomes["states"].count(journal.FAILED) == len(RECIPES)


# --- wrong requests -------------------------------------------------------------------------------


def test_an_unreachable_cluster_is_an_error_at_once(adapter: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    for target in (address, f"ray://{address}", "nowhere"):
        with pytest.raises(UsageError, match=f"--ray {target}: "):
            resize_on_cluster(adapter, recipes="rank=1", output=tmp_path, address=target)
    assert not list(tmp_path.iterdir())


def test_without_a_cluster_on_this_machine_auto_is_an_error(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UsageError, match="--ray auto: no cluster can be used there"):
        resize_on_cluster(adapter, recipes="rank=1", output=tmp_path / "out", address="auto")


def test_without_ray_the_error_says_what_to_install(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["resize", "--ray", "local", "-r", "rank=1", "-o", str(tmp_path), str(adapter)])
    assert result.exit_code == 2
    assert "pip install 'lorashrink[ray]'" in result.stderr


@pytest.mark.parametrize("option", [["--ray-transfer"], ["--gpus-per-task", "1"]])
def test_options_of_a_cluster_need_one(adapter: Path, option: list[str]) -> None:
    result = CliRunner().invoke(app, ["resize", "-r", "rank=1", *option, str(adapter)])
    assert result.exit_code == 2
    assert "goes with --ray only" in result.stderr
