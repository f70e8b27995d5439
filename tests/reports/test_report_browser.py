"""Report pages in a real browser: what can be clicked and typed, what stays inert, how they look dark and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsing import needs_chromium
from fixtures import write_tensors
from PIL import Image
from playwright.sync_api import Browser, Page
from safetensors.torch import load_file, save_file
from test_reporting import EVIL, table_rows
from tiny_pipelines import write_sdxl_adapter

import lorashrink as ls
import lorashrink_example

pytestmark = needs_chromium

MODEL = lorashrink_example.path("model")
PARITY = Path(__file__).parents[1] / "data" / "parity"


@pytest.fixture(scope="module")
def numbers_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an adapter and its base, without pictures."""
    path = tmp_path_factory.mktemp("numbers") / "r.html"
    ls.report(
        PARITY / "lora.safetensors", base=PARITY / "base.safetensors", recipes="fro_ckpt,thr=-3..-2/3", output=path
    )
    return path


@pytest.fixture(scope="module")
def pictures_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with pictures: two prompts, one of them hostile, three recipes."""
    folder = tmp_path_factory.mktemp("pictures")
    modules = {"te1": [f"text_model_encoder_layers_0_self_attn_{name}_proj" for name in ("q", "v", "out")]}
    lora = write_sdxl_adapter(folder / "lora.safetensors", MODEL, modules, strength=0.3)
    prompts = folder / "prompts.txt"
    prompts.write_text(f"a red circle --w 64 --h 64 --s 2\n{EVIL} --w 64 --h 64 --s 2\n")
    path = folder / "r.html"
    ls.report(lora, recipes="rank=1..4/3", images=MODEL, prompts=prompts, pictures=folder / "png", output=path)
    return path


class Opened:
    """A page in the browser, with all that it requested and logged."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.requested: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url.partition(":")[0]))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.goto(path.as_uri())

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def numbers(browser: Browser, numbers_page: Path) -> Iterator[Opened]:
    opened = Opened(browser, numbers_page)
    opened.page.locator("summary", has_text="All ").click()  # layers are folded
    yield opened
    opened.page.close()


@pytest.fixture
def pictures(browser: Browser, pictures_page: Path) -> Iterator[Opened]:
    opened = Opened(browser, pictures_page)
    yield opened
    opened.page.close()


@pytest.mark.parametrize("name", ["numbers", "pictures"])
def test_page_makes_no_requests_and_logs_no_errors(name: str, request: pytest.FixtureRequest) -> None:
    opened: Opened = request.getfixturevalue(name)
    opened.page.wait_for_load_state("networkidle")
    assert set(opened.requested) <= {"file", "data"}
    assert opened.messages == []
    broken = "[...document.images].filter((image) => image.src && image.naturalWidth === 0).length"
    assert opened.page.evaluate(broken) == 0


def test_a_column_sorts_by_its_numbers_in_both_directions(numbers: Opened) -> None:
    button = numbers.page.locator("#layer-table th button", has_text="‖ΔW‖")
    header = button.locator("xpath=..")
    expected = sorted(float(row["‖ΔW‖"]) for row in table_rows(numbers.page.content(), "layer-table"))
    index = header.evaluate("head => head.cellIndex")
    values = f"[...document.querySelectorAll('#layer-table tbody tr')].map((row) => +row.cells[{index}].dataset.value)"
    for direction, order in (("ascending", expected), ("descending", expected[::-1])):
        button.focus()
        numbers.page.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == direction
        assert numbers.page.evaluate(values) == order
    numbers.page.locator("#layer-table th button", has_text="layer").first.click()
    assert header.get_attribute("aria-sort") is None
    names = numbers.texts("#layer-table tbody th")
    assert len(names) == len(expected)
    assert names[0] <= names[-1]


def test_cells_without_a_number_sort_last_in_both_directions(numbers: Opened) -> None:
    button = numbers.page.locator("#layer-table th button", has_text="new rank")
    index = button.evaluate("button => button.parentElement.cellIndex")
    for _ in range(2):
        button.click()
        column = numbers.texts(f"#layer-table tbody tr > :nth-child({index + 1})")
        assert column.index("–") == len(column) - column.count("–")


def test_layers_are_filtered_by_words_block_and_kind(numbers: Opened) -> None:
    page, count = numbers.page, numbers.page.locator("#count")
    shown = page.locator("#layer-table tbody tr:visible")
    every = shown.count()
    assert count.inner_text() == f"{every} of {every} layers"
    assert count.get_attribute("aria-live") == "polite"
    page.get_by_label("Find", exact=True).fill("ATTN1 to_q")
    assert 0 < shown.count() < every
    assert all("attn1_to_q" in name for name in numbers.texts("#layer-table tbody tr:visible th"))
    page.get_by_label("Find", exact=True).fill("")
    page.get_by_label("Block", exact=True).select_option("MID")
    page.get_by_label("Kind", exact=True).select_option("conv")
    rows = table_rows(page.content(), "layer-table")
    expected = [row["layer"] for row in rows if (row["block"], row["kind"]) == ("MID", "conv")]
    assert numbers.texts("#layer-table tbody tr:visible th") == expected
    assert count.inner_text() == f"{len(expected)} of {every} layers"
    page.get_by_label("Find", exact=True).fill("nothing has this name")
    assert count.inner_text() == f"0 of {every} layers"


def test_keyboard_lays_a_picture_over_the_original_one(pictures: Opened) -> None:
    page = pictures.page
    button = page.locator(".sheet button").nth(2)
    chosen = button.locator("img").get_attribute("src")
    reference = page.locator(".sheet tbody tr").first.locator("img.whole").get_attribute("src")
    assert chosen != reference
    button.focus()
    page.keyboard.press("Enter")
    divider = page.get_by_label("Divider between the two pictures")
    assert divider.evaluate("input => input === document.activeElement")
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator(".sheet button[aria-pressed=true]").count() == 1
    sources = [image.get_attribute("src") for image in page.locator(".slider img").all()]
    assert sources == [reference, chosen]
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert divider.input_value() == "47"
    assert page.locator(".slider").evaluate("box => box.style.getPropertyValue('--cut')") == "47%"
    page.keyboard.press("Home")
    assert "inset(0px 0px 0px 0%)" in page.locator(".slider img").nth(1).evaluate("i => getComputedStyle(i).clipPath")
    page.get_by_label("Show the difference").press("Space")
    assert page.locator(".slider").evaluate("box => box.classList.contains('difference')")


def test_hostile_names_and_metadata_do_nothing(browser: Browser, tmp_path: Path) -> None:
    name = f"lora_unet_{EVIL}"
    pair = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    path = write_tensors(tmp_path / "evil'\"<b>&.safetensors", pair)
    save_file(load_file(path), path, metadata={"modelspec.title": EVIL, "ss_output_name": EVIL})
    ls.report(path, recipes="rank=1", output=tmp_path / "r.html")
    opened = Opened(browser, tmp_path / "r.html")
    assert opened.page.title().startswith("evil'\"<b>&.safetensors")
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("#layer-table tbody th").all_text_contents() == [name]
    assert EVIL in opened.texts(".notes dd")
    assert (
        opened.page.evaluate("JSON.parse(document.getElementById('numbers').textContent).inspect.notes.title") == EVIL
    )
    assert opened.messages == []
    opened.page.close()


def test_a_hostile_prompt_does_nothing(pictures: Opened) -> None:
    assert pictures.page.title().startswith("lora.safetensors")
    (row,) = [number for number, text in enumerate(pictures.texts(".sheet tbody th")) if EVIL in text]
    assert EVIL in str(pictures.page.locator(".sheet tbody tr").nth(row).locator("img").first.get_attribute("alt"))
    assert pictures.page.locator("img[onerror]").count() == 0


def test_content_policy_blocks_unescaped_scripts(browser: Browser, numbers_page: Path, tmp_path: Path) -> None:
    """The policy of the page names its one script by its hash."""
    text = numbers_page.read_text().replace(
        "<main>", f'<main><img src=x onerror="{"document.title=1"}"><script>document.title=2</script>'
    )
    (tmp_path / "r.html").write_text(text)
    opened = Opened(browser, tmp_path / "r.html")
    assert opened.page.title().startswith("lora.safetensors")
    assert len(opened.messages) >= 2
    assert opened.page.locator("#controls").get_attribute("hidden") is None  # the page's own script ran
    opened.page.close()


def brightness(png: bytes, path: Path) -> float:
    path.write_bytes(png)
    with Image.open(path) as picture:
        return float(np.asarray(picture.convert("L"), dtype=np.float64).mean())


def test_page_is_dark_for_readers_who_prefer_dark(browser: Browser, numbers_page: Path, tmp_path: Path) -> None:
    means, inks = [], []
    for scheme in ("light", "dark"):
        opened = Opened(browser, numbers_page, color_scheme=scheme)
        means.append(brightness(opened.page.screenshot(), tmp_path / "a.png"))
        inks.append(brightness(opened.page.locator("#figure-error svg").screenshot(), tmp_path / "b.png"))
        opened.page.close()
    assert means[0] > 200
    assert means[1] < 70
    assert inks[0] > 200
    assert inks[1] < 70


def test_print_is_white_and_holds_every_layer(browser: Browser, numbers_page: Path, tmp_path: Path) -> None:
    opened = Opened(browser, numbers_page, color_scheme="dark")
    opened.page.emulate_media(media="print")
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")  # as printing does, which unfolds
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not opened.page.locator("#controls").is_visible()
    rows = table_rows(opened.page.content(), "layer-table")
    assert opened.page.locator("#layer-table tbody tr:visible").count() == len(rows) > 100
    document = opened.page.pdf(path=tmp_path / "a.pdf")
    assert document.count(b"/Type /Page\n") + document.count(b"/Type /Page ") >= 4
    opened.page.close()


def test_narrow_screens_need_no_sideways_scrolling(browser: Browser, pictures_page: Path) -> None:
    opened = Opened(browser, pictures_page, viewport={"width": 390, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
    opened.page.close()


def test_page_has_the_labels_that_screen_readers_need(pictures: Opened) -> None:
    """Controls, pictures and tables have names, and no heading level is skipped."""
    page = pictures.page
    for selector, condition in (
        ("img[src]", "each.alt"),
        ("svg", "each.ariaLabelledByElements?.length"),
        ("table", "each.caption?.textContent"),
        ("th", "each.scope"),
        ("input, select", "each.labels.length || each.ariaLabel"),
    ):
        every = f"[...document.querySelectorAll('{selector}')]"
        assert page.evaluate(f"{every}.length") > 0
        assert page.evaluate(f"{every}.filter((each) => !({condition})).length") == 0, selector
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((each) => +each.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_pictures_come_first_and_bear_their_own_level(pictures: Opened) -> None:
    page = pictures.page
    assert page.locator("main > section").first.get_attribute("id") == "pictures"
    box = page.locator(".slider").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= page.viewport_size["height"]
    levels = pictures.texts(".sheet tbody tr:first-child small")
    assert len(levels) == page.locator(".sheet tbody tr:first-child button").count()
    assert all(level.endswith(" dB") for level in levels)
    assert "recommended" in "".join(pictures.texts("#recipe-table tbody tr.chosen"))


def test_page_without_scripts_shows_everything_but_controls(browser: Browser, pictures_page: Path) -> None:
    opened = Opened(browser, pictures_page, java_script_enabled=False)
    assert opened.page.locator("#layer-table tbody tr").count() == 3
    assert not opened.page.locator("#controls").is_visible()
    assert not opened.page.locator("#compare").is_visible()
    assert opened.page.locator(".sheet img").first.is_visible()
    opened.page.close()
