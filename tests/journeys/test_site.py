"""The documentation: generated pages are fresh, the site builds, and real JSON documents fit their schemas."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import site_pages
from browsing import needs_chromium
from playwright.sync_api import Browser
from typer.testing import CliRunner

import lorashrink
import lorashrink_example
from lorashrink import demonstration
from lorashrink.cli import app

ROOT = Path(__file__).parents[2]
PAGES = site_pages.pages()
SCHEMAS = site_pages.schemas(open_ended=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_generated_page_is_fresh(path: Path) -> None:
    assert path.exists(), "run `make docs`"
    assert path.read_text(encoding="utf-8") == PAGES[path], "run `make docs`"


def test_every_command_has_a_section_with_words_before_its_help() -> None:
    page = (site_pages.DOCS / "commands.md").read_text(encoding="utf-8")
    for name in site_pages.COMMANDS:
        words = re.search(rf"^## {name}\n(.*?)<!-- help of {name} -->", page, re.MULTILINE | re.DOTALL)
        assert words, name
        assert len(words[1].split()) > 10, name


@pytest.mark.parametrize("name", ["index.md", "guide.md"])
def test_translated_page_has_the_same_commands_and_flags(name: str) -> None:
    english, japanese = ((site_pages.DOCS / folder / name).read_text(encoding="utf-8") for folder in (".", "ja"))
    blocks = [re.findall(r"```.*?```", text, re.DOTALL) for text in (english, japanese)]
    assert blocks[0]
    assert blocks[0] == blocks[1]
    headings = [re.findall(r"^#+ ?[\d.]*", text, re.MULTILINE) for text in (english, japanese)]
    assert headings[0] == headings[1]
    flags = [set(re.findall(r"`(--[\w-]+)", text)) for text in (english, japanese)]
    assert flags[0] == flags[1]


def test_python_page_has_every_public_name() -> None:
    page = (site_pages.DOCS / "python.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) >= set(lorashrink._MODULES)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link or anchor is an error, which --quiet would hide."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert outcome.returncode == 0, outcome.stderr
    return folder


def test_site_loads_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*', page.read_text("utf-8")
        )
        assert not [tag for tag in loaded if re.search(r'(?:src|href)="(?:https?:)?//', tag)], page


def test_site_has_a_search_index_of_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    indexed = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {page.relative_to(site).as_posix() for page in site.rglob("*.html")} - {"404.html"} <= indexed


@needs_chromium
@pytest.mark.parametrize(("words", "page"), [("calibration table", "commands.html"), ("ベースモデル", "ja/")])
def test_search_works_from_the_disk(browser: Browser, site: Path, words: str, page: str) -> None:
    requests: list[str] = []
    with browser.new_page(viewport={"width": 1280, "height": 900}) as opened:
        opened.on("request", lambda request: requests.append(request.url))
        opened.goto((site / "index.html").as_uri())
        opened.get_by_placeholder("Search").fill(words)
        results = opened.locator(".md-search-result__link")
        results.first.wait_for(state="attached", timeout=60_000)
        assert any(page in (link.get_attribute("href") or "") for link in results.all())
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture
def documents(adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Real documents of the commands that need no model that draws."""
    monkeypatch.setattr(demonstration, "PACKAGES", ("no_such_package",))
    tuned = lorashrink_example.path("base.safetensors")
    missing = tmp_path / "missing.safetensors"
    lines: list[list[object]] = [
        ["resize", "-o", tmp_path, "-r", "fro_ckpt,thr=-1.6", "--clip", "0.001", "-v", base, adapter],
        ["resize", "-o", tmp_path / "sum", "-r", "rank=1", "--dry-run", f"{adapter}:0.5,{adapter}:0.2"],
        ["resize", "-o", tmp_path / "stack", "-r", "bytes,size=0.05", "--stack", adapter],
        ["resize", "-r", "rank=1", missing],
        ["inspect", "--spectrum", "--recommend", base, adapter],
        ["inspect", "--header", adapter, missing],
        ["compare", adapter, tmp_path / "m.safetensors"],
        ["overlap", base, adapter, tmp_path / "m.safetensors"],
        ["base-norms", base, "-o", tmp_path / "norms.json"],
        ["sweep", base, adapter],
        ["report", "-o", tmp_path / "r.html", base, adapter],
        ["convert", "-t", "bf16", "-o", tmp_path / "c.safetensors", adapter],
        ["extract", tuned, tuned, "-r", "rank=2", "-o", tmp_path / "e.safetensors"],
        ["demo", "-o", tmp_path / "demo"],
        ["shrink", "-o", tmp_path / "shrunk", adapter, missing],
        ["pack", "-o", tmp_path / "packed.safetensors", adapter],
        ["evidence", lorashrink_example.path("model"), adapter, "-o", tmp_path / "evidence", "--plan"],
        ["unpack", "-o", tmp_path / "unpacked.safetensors", tmp_path / "packed.safetensors"],
    ]
    merge = ["merge", f"{adapter}:0.5", "-o", tmp_path / "m.safetensors"]
    gathered: dict[str, list[Any]] = {}
    for line in [merge, *lines]:
        outcome = CliRunner().invoke(app, [*map(str, line), "--json"])
        document = json.loads(outcome.stdout)
        if "error" not in document:
            gathered.setdefault(str(line[0]), []).append(document)
    return gathered


def test_real_documents_fit_their_schemas(documents: dict[str, list[Any]]) -> None:
    assert documents.keys() >= SCHEMAS.keys() - {"calibrate", "refine", "extract"}
    for name, several in documents.items():
        validator = jsonschema.Draft202012Validator(SCHEMAS[name])
        for document in several:
            errors = [f"{name}: {error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]
            assert not errors


def test_schemas_refuse_a_document_that_lacks_something(documents: dict[str, list[Any]]) -> None:
    document = documents["base-norms"][0]
    del document["weights"]
    assert not jsonschema.Draft202012Validator(SCHEMAS["base-norms"]).is_valid(document)
