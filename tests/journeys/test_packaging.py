"""The two wheels: what is in them, and how large they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
# Folders of the repository's root -> where they are in the wheel.
FOLDERS = {folder: name.replace(".", "/") for name, folder in SETTINGS["package-dir"].items() if "/" not in folder}
CACHES = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


def build(project: Path, folder: Path) -> Path:
    """Build a wheel as pip does, without a network."""
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    outcome = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return folder / outcome.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, made from a copy of the sources."""
    copy, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for folder in ("lorashrink", *FOLDERS, "example"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=CACHES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return {"lorashrink": build(copy, built), "lorashrink_example": build(copy / "example", built)}


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def sources(folder: Path, name: str) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {
        f"{name}/{path.as_posix()}" for path in files if "__pycache__" not in path.parts and path.name != "README.md"
    }


def test_wheel_has_every_file_of_its_packages(wheels: dict[str, Path]) -> None:
    parts = {"lorashrink": "lorashrink"} | FOLDERS
    expected = set().union(*(sources(ROOT / folder, name) for folder, name in parts.items()))
    assert contents(wheels["lorashrink"]) == expected


def test_wheel_is_at_most_two_megabytes(wheels: dict[str, Path]) -> None:
    assert wheels["lorashrink"].stat().st_size <= 2_000_000


def test_example_wheel_has_the_model_and_its_licences(wheels: dict[str, Path]) -> None:
    folder = ROOT / "example" / "lorashrink_example"
    assert contents(wheels["lorashrink_example"]) == sources(folder, "lorashrink_example")
    with zipfile.ZipFile(wheels["lorashrink_example"]) as archive:
        licences = [Path(name).name for name in archive.namelist() if "/licenses/" in name]
    assert sorted(licences) == ["LICENSE", "NOTICE"]
