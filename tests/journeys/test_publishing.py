"""What a release needs: workflows that name what exists, equal versions, notes, and a container that runs."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorashrink
import lorashrink_example

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def load(path: Path) -> dict[Any, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def lines_run(workflow: Path) -> list[str]:
    return [step["run"] for job in load(workflow)["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_names_only_files_and_targets_that_exist(workflow: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert lines_run(workflow)
    for line in lines_run(workflow):
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in re.findall(r"\bmake (\w+)", line))
        assert all((ROOT / name).exists() for name in re.findall(r"(?:^|\s)((?:tests|\.ci)/[\w./]+)", line)), line


def test_workflows_cover_three_systems() -> None:
    jobs = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    systems = {job["runs-on"] for job in jobs.values()} | {
        name for job in jobs.values() for name in job.get("strategy", {}).get("matrix", {}).get("os", ())
    }
    assert {"ubuntu-latest", "macos-latest", "windows-latest"} <= systems


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_issue_template_is_a_form(template: Path) -> None:
    form = load(template)
    assert {"name", "description", "body"} <= form.keys()
    assert all(field["type"] in {"textarea", "input"} and field["attributes"]["label"] for field in form["body"])


def test_citation_has_the_version_of_the_package() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == lorashrink.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    assert citation["license"] == "Apache-2.0"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".ci" / "release_notes.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_release_notes_are_the_section_of_the_version(script: Any) -> None:
    text = "# Changelog\n\n## Unreleased\n\n- c\n\n## 0.2.0 - 2027-01-01\n\n### Added\n\n- b\n\n## 0.2.0.1\n\n- a\n"
    assert script.notes(text, "0.2.0") == "### Added\n\n- b\n"
    assert script.notes(text, "0.2.0.1") == "- a\n"
    with pytest.raises(ValueError, match=r"nothing of version 0\.3\.0"):
        script.notes(text, "0.3.0")


def test_release_of_another_version_is_refused() -> None:
    script = ROOT / ".ci" / "release_notes.py"
    outcome = subprocess.run([sys.executable, script, "99.0"], capture_output=True, text=True)
    assert outcome.returncode == 1
    assert "not 99.0" in outcome.stderr


def docker_runs() -> bool:
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True).returncode == 0


def test_dockerfile_copies_only_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    names = [name for line in re.findall(r"^COPY (.+) /source\S*$", text, re.MULTILINE) for name in line.split()]
    assert len(names) >= 8
    assert all((ROOT / name).exists() for name in names)
    assert {f"!{name}" for name in names} <= set((ROOT / ".dockerignore").read_text().splitlines())
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert {folder.partition("/")[0] for folder in settings["package-dir"].values()} <= set(names)


@pytest.mark.skipif(not docker_runs(), reason="no Docker daemon runs here")
def test_container_shrinks_a_file(tmp_path: Path) -> None:
    shutil.copy(lorashrink_example.path("adapter.safetensors"), tmp_path / "lora.safetensors")
    tmp_path.chmod(0o777)
    subprocess.run(["docker", "build", "--tag", "lorashrink-test", str(ROOT)], check=True)
    mount = ["docker", "run", "--rm", "--network", "none", "-v", f"{tmp_path}:/work", "lorashrink-test"]
    subprocess.run([*mount, "resize", "-r", "rank=2", "-o", "small.safetensors", "lora.safetensors"], check=True)
    assert (tmp_path / "small.safetensors").exists()
