"""The page of `lorashrink ui` in a real browser, with a real server behind it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import needs_chromium
from fixtures import write_tensors
from playwright.sync_api import Browser, Locator, Page, expect
from running import PATIENCE, TOKEN, Server, until
from safetensors.torch import load_file, save_file

import lorashrink as ls
import lorashrink_example

pytestmark = needs_chromium

Start = Callable[..., Server]

EXAMPLE = lorashrink_example.path()
STYLE, HEART = EXAMPLE / "loras" / "style.safetensors", EXAMPLE / "loras" / "heart.safetensors"
EVIL = "<img src=x onerror=document.title='evil'>"
MILLISECONDS = 1000 * PATIENCE

expect.set_options(timeout=MILLISECONDS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    shutil.copy(STYLE, folder)
    (folder / "people").mkdir()
    shutil.copy(HEART, folder / "people")
    shutil.copytree(EXAMPLE / "model", folder / "model")
    (folder / "damaged.safetensors").write_bytes(b"no tensors in here")
    return folder


@pytest.fixture(scope="module")
def server(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server([library], cache=tmp_path_factory.mktemp("cache"))
    yield started
    assert started.stop()[0] == 0


class Opened:
    """A page in the browser, with all that it requested and logged."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.page.set_default_timeout(MILLISECONDS)
        self.requested: list[str] = []
        self.messages: list[str] = []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.goto(address)

    def open(self, name: str) -> Page:
        """Open a LoRA and wait until its size can be chosen."""
        self.page.get_by_role("button", name=name, exact=True).click()
        expect(self.page.get_by_role("slider", name="Size of the smaller file")).to_be_enabled()
        expect(self.page.locator(".sizes [role=status]")).to_contain_text("model")
        return self.page


@contextlib.contextmanager
def opened(browser: Browser, server: Server, **options: Any) -> Iterator[Opened]:
    page = Opened(browser, server.first_line, **options)
    yield page
    page.page.close()


@pytest.fixture
def front(browser: Browser, server: Server) -> Iterator[Opened]:
    with opened(browser, server) as page:
        yield page
        assert page.messages == []


def names(page: Page) -> list[str]:
    return page.locator("#files .open").all_inner_texts()


def tile(page: Page, name: str) -> Locator:
    return page.locator(".tiles div").filter(has_text=name).locator("dd")


# --- the list ---------------------------------------------------------------------------------------


def test_the_page_lists_loras_and_asks_nobody_but_its_server(front: Opened, server: Server) -> None:
    expect(front.page.locator("#files .open")).to_have_count(3)
    assert names(front.page) == ["damaged", "heart", "style"]
    expect(front.page.locator("#totals")).to_contain_text("could be saved")
    assert all(url.startswith(server.url) for url in front.requested)
    assert TOKEN not in front.page.url  # nobody copies it out of the address bar
    front.page.reload()
    expect(front.page.locator("#files .open")).to_have_count(3)


def test_the_list_is_searched_filtered_and_sorted(front: Opened) -> None:
    page = front.page
    expect(page.locator("#files")).to_contain_text("% of it")
    page.get_by_label("Find", exact=True).fill("PEOPLE hea")
    expect(page.locator("#files .open")).to_have_count(1)
    page.get_by_label("Find", exact=True).fill("nothing has this name")
    expect(page.locator("#empty")).to_contain_text("No LoRA fits")
    page.get_by_label("Find", exact=True).fill("")
    page.get_by_label("Model", exact=True).select_option("sdxl")
    expect(page.locator("#files .open")).to_have_count(2)
    page.get_by_label("Show", exact=True).select_option("unusual")
    expect(page.locator("#files .open")).to_have_count(1)
    page.get_by_label("Show", exact=True).select_option("")
    size = page.get_by_role("button", name="size", exact=True)
    for direction, expected in (("descending", ["style", "heart"]), ("ascending", ["heart", "style"])):
        size.press("Enter")
        assert page.locator("[data-sort=bytes]").get_attribute("aria-sort") == direction
        assert names(page) == expected


def test_keys_move_through_the_list_open_a_lora_and_come_back(front: Opened) -> None:
    page = front.page
    expect(page.locator("#files .open")).to_have_count(3)
    page.get_by_role("button", name="damaged", exact=True).focus()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "style"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.textContent") == "heart"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="heart")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#adapter")).to_be_hidden()
    expect(page.get_by_role("button", name="heart", exact=True)).to_be_focused()


def test_thousands_of_files_scroll_with_few_elements(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    source = tmp_path / "source.safetensors"
    name = "lora_unet_mid_block_attentions_0_proj_in"
    write_tensors(
        source, {f"{name}.lora_down.weight": torch.randn(2, 64), f"{name}.lora_up.weight": torch.randn(64, 2)}
    )
    for number in range(5000):
        (folder / f"lora-{number:04d}.safetensors").hardlink_to(source)
    server = start(folder)
    with opened(browser, server) as page:
        expect(page.page.locator("#totals")).to_contain_text("5,000 LoRAs")
        assert page.page.locator("#files tr[data-id]").count() < 60
        assert page.page.locator("#files").get_attribute("aria-rowcount") == "5001"
        page.page.get_by_role("button", name="lora-0000", exact=True).focus()
        page.page.keyboard.press("End")
        expect(page.page.get_by_role("button", name="lora-4999", exact=True)).to_be_focused()
        row = page.page.locator("tr:has(:focus)")
        assert row.get_attribute("aria-rowindex") == "5001"
        box, table = row.bounding_box(), page.page.locator("#list").bounding_box()
        assert box
        assert table
        assert table["y"] <= box["y"]
        assert box["y"] + box["height"] <= table["y"] + table["height"] + 1
        expect(row.locator(".saving")).not_to_have_text("…")  # rows that can be seen are measured first
        page.page.get_by_label("Find", exact=True).fill("lora-31")
        expect(page.page.locator("#files")).to_have_attribute("aria-rowcount", "101")
        assert names(page.page)[0] == "lora-3100"
        assert page.messages == []


def test_all_loras_are_measured_on_request(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for number in range(60):
        shutil.copy(HEART, folder / f"{number:02d}.safetensors")
    server = start(folder)
    with opened(browser, server) as page:
        expect(page.page.locator("#totals")).to_contain_text("could be saved")
        page.page.get_by_role("button", name="Measure all").click()
        expect(page.page.locator("#totals")).not_to_contain_text("so far")
        expect(page.page.get_by_role("button", name="Measure all")).to_be_hidden()
        assert all(row["saving"] for row in server.rows())


# --- one LoRA ---------------------------------------------------------------------------------------


def test_the_slider_shows_size_and_error_of_what_would_be_written(front: Opened, tmp_path: Path) -> None:
    page = front.open("style")
    slider = page.get_by_role("slider", name="Size of the smaller file")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("PageDown")
    text = until(lambda: slider.get_attribute("aria-valuetext"), lambda text: bool(text))
    shown = tile(page, "would be").inner_text().split("\n")[0]
    assert shown in text
    assert page.get_by_role("button", name=f"Shrink to {shown}").is_enabled()
    assert page.get_by_role("radio", checked=True).count() == 0
    page.get_by_text("The same in a shell").click()
    expect(page.locator("pre code")).to_contain_text("size=")
    recipe = page.locator("pre code").inner_text().split(" -r ")[1].split()[0]
    model = Path(page.locator("pre code").inner_text().split("--base ")[1].split()[0])
    result = ls.resize(STYLE, base=model, recipes=recipe, dtype="auto", output=tmp_path).results[0]
    expect(tile(page, "would be")).to_contain_text(f"{result.bytes_after / 1e3:.1f} kB")


def test_the_page_predicts_pictures_with_its_table(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(STYLE, folder)
    shutil.copytree(EXAMPLE / "model", folder / "model")
    shutil.copy(EXAMPLE / "table.safetensors", folder)
    with opened(browser, start(folder)) as front:
        front.page.locator("#files tr", has_text="style").locator(".size").click()
        expect(front.page.locator(".sizes [role=status]")).to_contain_text("predicted by table.safetensors")
        expect(tile(front.page, "predicted")).to_contain_text("about 40 dB")
        front.page.get_by_role("radio", name="small file").click()
        expect(tile(front.page, "predicted")).to_contain_text("about 33 dB")
        front.page.get_by_text("More ways to say it").click()
        front.page.get_by_label("Numbers as").select_option("fp8")
        expect(front.page.get_by_role("radio", name="same pictures")).to_be_disabled()
        front.page.get_by_role("button", name="Shrink to").click()
        expect(front.page.locator(".job")).to_contain_text("done")
        expect(front.page.locator(".job")).to_contain_text("about 33 dB")
        assert front.messages == []


def test_a_model_that_does_not_fit_is_left_out(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(HEART, folder)
    shutil.copy(EXAMPLE / "base.safetensors", folder / "narrow.safetensors")
    with opened(browser, start(folder)) as page:
        page.page.locator("#files tr", has_text="heart").locator(".size").click()
        expect(page.page.locator(".sizes [role=status]")).to_contain_text("Measured on the LoRA alone: ")
        page.page.get_by_role("button", name="Shrink to").click()
        expect(page.page.locator(".job")).to_contain_text("done, 1.8 MB became")


def test_ranks_and_recipes_can_be_said_and_mistakes_are_explained(browser: Browser, server: Server) -> None:
    with opened(browser, server) as front:
        check_ranks_and_recipes(front.open("style"))


def check_ranks_and_recipes(page: Page) -> None:
    page.get_by_text("More ways to say it").click()
    page.get_by_label("Rank of all layers").fill("2")
    page.get_by_text("The same in a shell").click()
    expect(page.locator("pre code")).to_contain_text("rank=2")
    page.get_by_text("Block by block").click()
    assert page.locator(".blocks tbody tr").count() > 5
    page.get_by_label("Recipe", exact=True).fill("ranks=2")
    page.get_by_label("Recipe", exact=True).press("Enter")
    expect(page.locator(".sizes [role=status]")).to_contain_text("ranks")


def test_three_clicks_lead_to_a_smaller_file_and_one_more_undoes_it(front: Opened, library: Path) -> None:
    before = STYLE.stat().st_size
    page = front.open("style")
    page.get_by_role("radio", name="small file").click()
    page.get_by_role("button", name="Shrink to").click()
    job = page.locator(".job").first
    expect(job).to_contain_text("done")
    written = library / "shrunk" / "style.safetensors"
    assert written.stat().st_size < before / 4
    with page.expect_download() as download:
        job.get_by_role("link", name="Download style.safetensors").click()
    assert Path(download.value.path()).read_bytes() == written.read_bytes()
    expect(page.locator("#files .badge", has_text="shrunk")).to_have_count(1)
    job.get_by_role("button", name="Undo").click()
    expect(job).to_contain_text("undone")
    assert not (library / "shrunk").exists()
    assert (library / "style.safetensors").read_bytes() == STYLE.read_bytes()
    job.get_by_role("button", name="Close").click()
    expect(page.locator(".job")).to_have_count(0)


def test_ticked_loras_are_shrunk_together_and_can_be_cancelled(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for number in range(40):
        shutil.copy(STYLE, folder / f"{number:02d}.safetensors")
    server = start(folder)
    with opened(browser, server) as page:
        expect(page.page.locator("#totals")).to_contain_text("40 LoRAs")
        page.page.get_by_label("Tick all that are shown").check()
        expect(page.page.locator("#ticked-count")).to_contain_text("40 LoRAs ticked")
        page.page.get_by_role("button", name="Shrink 40 LoRAs").click()
        expect(page.page.locator("#ticked")).to_be_hidden()
        job = page.page.locator(".job")
        expect(job).to_contain_text("of 40")
        job.get_by_role("button", name="Cancel").click()
        expect(job).to_contain_text("cancelled")
        count = len(list((folder / "shrunk").iterdir())) if (folder / "shrunk").exists() else 0
        assert count < 40
        assert page.messages == []


def test_a_dropped_file_opens_and_one_from_the_folder_is_not_sent(front: Opened, tmp_path: Path) -> None:
    page = front.page
    expect(page.get_by_role("button", name="style", exact=True)).to_be_visible()
    page.locator("#file").set_input_files(STYLE)
    expect(page.get_by_role("heading", name="style")).to_be_visible()
    assert not any("/api/upload" in url for url in front.requested)
    fresh = tmp_path / "fresh.safetensors"
    save_file(load_file(HEART), fresh)
    page.locator("#file").set_input_files(fresh)
    expect(page.get_by_role("heading", name="fresh")).to_be_visible()
    expect(page.get_by_role("slider", name="Size of the smaller file")).to_be_enabled()
    expect(page.locator("#files")).to_contain_text("dropped here")


def test_hostile_names_and_metadata_do_nothing(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    path = folder / "evil'\"<img src=x onerror=document.title=1>\u202e&.safetensors"
    save_file(load_file(HEART), path, metadata={"modelspec.title": EVIL, "modelspec.trigger_phrase": EVIL})
    server = start(folder)
    with opened(browser, server) as page:
        button = page.page.locator("#files .open")
        expect(button).to_have_count(1)
        assert "\\u202e" in button.inner_text()
        button.click()
        expect(page.page.get_by_role("slider", name="Size of the smaller file")).to_be_enabled()
        page.page.get_by_text("How it was made").click()
        expect(page.page.locator(".notes")).to_contain_text(EVIL)
        assert page.page.locator("img").count() == 0
        assert page.page.title() == "lorashrink"
        assert page.messages == []


def test_pictures_before_and_after_lie_under_a_divider(front: Opened) -> None:
    page = front.open("style")
    page.get_by_label("Prompts, one a line").fill("a red circle --w 64 --h 64 --s 1")
    page.get_by_role("button", name="Draw before and after").click()
    images = page.locator(".compare img")
    expect(images).to_have_count(2, timeout=2 * MILLISECONDS)
    widths = "[...document.querySelectorAll('.compare img')].map((image) => image.naturalWidth)"
    assert until(lambda: page.evaluate(widths), all) == [64, 64]
    assert all(image.get_attribute("alt") for image in images.all())
    divider = page.get_by_role("slider", name="Divider of a red circle")
    divider.focus()
    page.keyboard.press("Home")
    assert "inset(0px 0px 0px 0%)" in images.nth(1).evaluate("image => getComputedStyle(image).clipPath")
    expect(page.locator(".compare figcaption")).to_contain_text("dB")


# --- how it looks, and to whom --------------------------------------------------------------------------


def test_every_control_has_a_name_and_headings_leave_no_level_out(front: Opened) -> None:
    page = front.open("style")
    page.get_by_text("More ways to say it").click()
    for selector, condition in (
        ("table", "item.caption?.textContent || item.getAttribute('aria-labelledby')"),
        ("th", "item.scope"),
        ("input, select, textarea", "item.labels?.length || item.ariaLabel"),
        ("button, a", "item.textContent.trim() || item.ariaLabel"),
        ("svg", "item.ariaLabel"),
    ):
        items = f"[...document.querySelectorAll('{selector}')]"
        assert page.evaluate(f"{items}.length") > 0
        assert page.evaluate(f"{items}.filter((item) => !({condition})).map((item) => item.outerHTML)") == [], selector
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((item) => +item.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_a_phone_shows_the_list_or_the_page_without_sideways_scrolling(browser: Browser, server: Server) -> None:
    with opened(browser, server, viewport={"width": 390, "height": 844}) as page:
        expect(page.page.get_by_role("button", name="style", exact=True)).to_be_visible()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.page.locator("#list").evaluate("list => list.scrollWidth <= list.clientWidth")
        page.open("style")
        assert not page.page.locator("#library").is_visible()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390
        page.page.get_by_role("button", name="Close", exact=True).click()
        expect(page.page.locator("#library")).to_be_visible()


def test_the_page_is_dark_for_people_who_prefer_dark(browser: Browser, server: Server) -> None:
    with opened(browser, server, color_scheme="dark") as page:
        assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 30)"


# --- when the server goes away --------------------------------------------------------------------------


def test_the_page_reports_a_lost_server_and_goes_on_later(browser: Browser, start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(HEART, folder)
    server = start(folder)
    page = Opened(browser, server.first_line)
    expect(page.page.locator("#files .open")).to_have_count(1)
    server.stop()
    expect(page.page.get_by_role("alert")).to_contain_text("not running any more")
    shutil.copy(STYLE, folder)
    start(folder, port=server.port)
    expect(page.page.locator("#files .open")).to_have_count(2)
    expect(page.page.get_by_role("alert")).to_be_hidden()
    page.page.close()


def test_a_page_without_the_right_token_says_what_to_open(browser: Browser, server: Server) -> None:
    page = Opened(browser, f"{server.url}/?token=of-an-earlier-start")
    expect(page.page.get_by_role("alert")).to_contain_text("Open the address that lorashrink ui printed")
    page.page.close()
