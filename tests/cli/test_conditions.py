"""`--fail-on`: conditions as text, and exit statuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.cli.conditions import Condition
from lorashrink.errors import UsageError


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stderr


@pytest.mark.parametrize(
    ("text", "measured", "is_fault"),
    [
        ("error>5%", {"error": 0.051}, True),
        ("error>5%", {"error": 0.05}, False),
        ("error >= 0.05", {"error": 0.05}, True),
        ("psnr<40", {"psnr": 39.9}, True),
        ("psnr<40dB", {"psnr": 40.0}, False),
        ("psnr<40", {"psnr": None}, True),
        ("size>50MB", {"size": 50_000_001}, True),
        ("size>50MB", {"size": 50_000_000}, False),
        ("size>1", {"size": 2**20 + 1}, True),
    ],
)
def test_conditions_compare_in_their_units(text: str, measured: dict, is_fault: bool) -> None:
    assert bool(Condition.parse(text).fault(measured)) == is_fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "error",
        "error>",
        "error=5",
        "speed>3",
        "error>5MB",
        "psnr<40%",
        "size>3 TB",
        "__import__('os')",
        "error>1.2.3",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--fail-on"):
        Condition.parse(text)


def test_resize_fails_with_3_if_a_result_meets_the_condition(adapter: Path, tmp_path: Path) -> None:
    line = ("resize", "-r", "rank=1", "-o", tmp_path, "--force", adapter)
    run(*line, "--fail-on", "error>99%", "--fail-on", "size>50MB")
    assert re.search(r"error>1% is true: [\d.]+ %", run(*line, "--fail-on", "error>1%", status=3))
    assert "measures error and size" in run(*line, "--fail-on", "psnr<40", status=2)


def test_a_failed_input_wins_over_a_condition(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    run("shrink", "-o", tmp_path / "out", tmp_path / "broken.safetensors", adapter, "--fail-on", "error>0%", status=1)


def test_shrink_compare_and_sweep_have_conditions(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lora.safetensors"
    shutil.copy(adapter, copy)
    assert "cannot be checked" in run("shrink", copy, "--fail-on", "psnr<40", status=3)
    run("shrink", copy, "--fail-on", "size>1GB")
    run("compare", copy, tmp_path / "shrunk" / copy.name, "--fail-on", "error>0.001%", status=3)
    run("compare", copy, copy, "--fail-on", "error>0.001%")
    run("sweep", copy, "-r", "rank=1", "--fail-on", "error>1%", status=3)
