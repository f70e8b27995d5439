"""The demo: what it prints, what it leaves behind, and that its commands do the same by hand."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorashrink import demonstration
from lorashrink.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    outcome = CliRunner().invoke(app, ["demo", "-o", str(folder)])
    assert outcome.exit_code == 0, outcome.output
    return folder, outcome.stdout


def test_demo_prints_its_steps_and_leaves_its_files(demo_run: tuple[Path, str]) -> None:
    folder, text = demo_run
    assert [line.split()[:3] for line in text.splitlines() if line.startswith("$ ")] == [
        ["$", "lorashrink", "inspect"],
        ["$", "lorashrink", "shrink"],
        ["$", "lorashrink", "report"],
    ]
    assert "conv_rank: " in text
    assert "recommended: -r " in text
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "shrunk",
        "report.html",
        "ranks.png",
        "sizes.png",
        "sheet.png",
        "pictures",
    }
    assert all(str(folder / name) in text for name in names)
    assert (folder / "shrunk" / "style.safetensors").is_file()
    assert re.search(r"style +3.7 MB +\S+ kB +\d+% +\d+\.\d dB", text)


def test_demo_commands_reproduce_its_files(demo_run: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = demo_run
    commands = [shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")]
    page, shrunk = (folder / name for name in ("report.html", "shrunk/style.safetensors"))
    before = page.read_bytes(), shrunk.read_bytes()
    for command in commands:
        outcome = CliRunner().invoke(app, [*command[1:], *(["--force"] if command[1] != "inspect" else [])])
        assert outcome.exit_code == 0, outcome.output
    assert (page.read_bytes(), shrunk.read_bytes()) == before


def test_demo_without_picture_packages_measures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "PACKAGES", ("no_such_package",))
    outcome = CliRunner().invoke(app, ["demo", "-o", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert "pip install 'lorashrink[pictures]'" in outcome.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "shrunk",
        "report.html",
        "ranks.png",
        "sizes.png",
    }


def test_demo_without_its_example_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lorashrink_example", None)
    outcome = CliRunner().invoke(app, ["demo", "-o", str(tmp_path / "out")])
    assert outcome.exit_code == 2
    assert "pip install lorashrink-example" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_demo_json_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "PACKAGES", ("no_such_package",))
    document = json.loads(CliRunner().invoke(app, ["demo", "--json", "-o", str(tmp_path)]).stdout)
    text = (ROOT / "docs" / "programs.md").read_text()
    assert all(f'"{name}"' in text for name in document)
