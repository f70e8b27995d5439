"""The page of a report: its numbers against those of the commands, what it escapes, and requests that are refused."""

from __future__ import annotations

import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures import write_tensors
from markupsafe import escape
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lorashrink as ls
from lorashrink.cli import app
from lorashrink.errors import InputError, LorashrinkError, OutputError, UsageError
from lorashrink.insight.inspection import inspect
from lorashrink.plots.overview import layer_overview
from lorashrink.plots.style import INK, ROLES, darken, inline_svg, save
from lorashrink.reports.findings import Findings
from lorashrink.reports.page import page
from lorashrink.reports.report import ReportFile
from lorashrink.reports.sheet import picture_uri
from lorashrink.results.inspection import AdapterTable, LayerRow

EVIL = "</script><img src=x onerror=document.title='hacked'>"


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def numbers(text: str) -> dict:
    """The numbers that the page holds as JSON."""
    match = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    assert match
    return json.loads(match[1])


def table_rows(text: str, name: str) -> list[dict[str, str]]:
    """Column -> what a cell is sorted by or says, of each row of a table of the page."""
    (table,) = re.findall(rf'<table id="{name}">(.*?)</table>', text, re.DOTALL)
    heads = [html.unescape(head) for head in re.findall(r'<button type="button">(.*?)</button>', table)]
    rows = []
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table.partition("<tbody>")[2]):
        cells = re.findall(r'<t[hd](?: scope="row")?(?: class="[^"]*")?(?: data-value="([^"]*)")?>(.*?)</t[hd]>', row)
        texts = [value or html.unescape(re.sub("<[^>]+>", "", inner)) for value, inner in cells]
        rows.append(dict(zip(heads, texts, strict=True)))
    return rows


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ReportFile]:
    data = Path(__file__).parents[1] / "data" / "parity"
    path = tmp_path_factory.mktemp("report") / "report.html"
    result = ls.report(data / "lora.safetensors", base=data / "base.safetensors", output=path, paths=True)
    return path.read_text(encoding="utf-8"), result


# --- numbers ---


def test_page_numbers_equal_those_of_the_commands(
    written: tuple[str, ReportFile], adapter: Path, base: Path, tmp_path: Path
) -> None:
    text, result = written
    held = numbers(text)
    inspected = json.loads(run("inspect", "--json", base, adapter))["files"][0]
    swept = json.loads(run("sweep", "--json", base, adapter))
    assert held["inspect"] == inspected
    assert {"version": ls.__version__, "command": "sweep", **held["sweep"]} == swept
    recipe = swept["suggestion"]["recipe"]
    resized = json.loads(run("resize", "--json", "--dry-run", "-r", recipe, "-o", tmp_path, base, adapter))["results"]
    assert held["resize"]["layers"] == resized[0]["layers"]
    assert result.bytes == len(text.encode())
    assert result.sweep == ls.sweep(adapter, base=base)


def test_page_tables_show_the_numbers_in_its_json(written: tuple[str, ReportFile]) -> None:
    text, _ = written
    held = numbers(text)
    rows = table_rows(text, "layer-table")
    results = {layer["name"]: layer for layer in held["resize"]["layers"]}
    assert [row["layer"] for row in rows] == [layer["name"] for layer in held["inspect"]["layers"]]
    for row, layer in zip(rows, held["inspect"]["layers"], strict=True):
        assert float(row["‖ΔW‖"]) == layer["fro"]
        assert float(row["of base"]) == layer["fro_ratio"]
        assert int(row["rank"]) == layer["rank"]
        if "zero" not in layer["flags"]:
            assert int(row["new rank"]) == results[layer["name"]]["rank_after"]
            assert float(row["error"]) == results[layer["name"]]["rle_lora"]
            assert float(row["error of base"]) == results[layer["name"]]["rle_ckpt"]
    points = table_rows(text, "recipe-table")
    assert [row["recipe"] for row in points] == [point["recipe"] for point in held["sweep"]["points"]]
    assert [float(row["error"]) for row in points] == [point["relative_error"] for point in held["sweep"]["points"]]
    assert ["★" in row["best"] for row in points] == [point["best"] for point in held["sweep"]["points"]]
    chosen = re.findall(r'<tr class="chosen"><th [^>]*><code>(.*?)</code>', text)
    assert chosen == [held["sweep"]["suggestion"]["recipe"]]


def test_equal_requests_give_equal_bytes(adapter: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ls.report(adapter, recipes="rank=1..4/3", output=tmp_path / name / "r.html")
    first, second = ((tmp_path / name / "r.html").read_text() for name in ("a", "b"))
    assert first.replace(str(tmp_path / "a"), str(tmp_path / "b")) == second


def test_page_commands_reproduce_the_page(adapter: Path, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "with space" / "r.html"
    ls.report(adapter, base=base, recipes=["rank=1..4/3", "energy=0.9"], sizes=[0.1, 0.125], output=path, paths=True)
    text = path.read_text()
    commands = [html.unescape(command) for command in re.findall(r"<pre[^>]*><code>(.*?)</code>", text)]
    assert len(commands) == 4
    for command in commands[:1] + commands[2:]:
        program, *arguments = shlex.split(command)
        assert program == "lorashrink"
        run(*arguments, *(["--force", "--paths"] if arguments[0] == "report" else []))
    assert path.read_text() == text
    assert shlex.split(commands[1])[1:3] == ["resize", "-r"]


def test_page_loads_nothing_from_outside(written: tuple[str, ReportFile]) -> None:
    text, _ = written
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|url\((?!#)|@import', text)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', text)
    assert {name for match in references for name in match if name} <= set(ids)
    assert text.count("<svg ") == 5


# --- inputs ---


def test_texts_of_files_are_escaped(tmp_path: Path) -> None:
    path = write_tensors(
        tmp_path / "evil.safetensors",
        {
            f"lora_unet_{EVIL}.lora_down.weight": torch.ones(2, 8),
            f"lora_unet_{EVIL}.lora_up.weight": torch.ones(8, 2),
        },
    )
    save_file(load_file(path), path, metadata={"modelspec.title": EVIL, "ss_training_comment": EVIL})
    ls.report(path, recipes="rank=1", output=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text
    assert text.count("</script>") == 2
    assert numbers(text)["inspect"]["metadata"]["modelspec.title"] == EVIL


def test_page_without_a_base_omits_what_needs_one(adapter: Path, tmp_path: Path) -> None:
    ls.report(adapter, recipes="rank=1..8/4", output=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "figure-norms" not in text
    assert {"of base", "error of base"}.isdisjoint(table_rows(text, "layer-table")[0])


def adapter_of_zeros(path: Path) -> Path:
    pair = {"lora_unet_x.lora_down.weight": torch.zeros(2, 8), "lora_unet_x.lora_up.weight": torch.zeros(8, 2)}
    return write_tensors(path, pair)


def adapter_with_nan(path: Path) -> Path:
    pair = {"lora_unet_x.lora_down.weight": torch.ones(2, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 2)}
    pair["lora_unet_y.lora_down.weight"] = torch.full((2, 8), float("nan"))
    pair["lora_unet_y.lora_up.weight"] = torch.ones(8, 2)
    pair["lora_unet_y.alpha"] = torch.tensor(float("nan"))
    return write_tensors(path, pair)


def adapter_without_layers(path: Path) -> Path:
    return write_tensors(path, {"lora_unet_out_0.w_norm": torch.ones(8)})


@pytest.mark.parametrize("make", [adapter_of_zeros, adapter_with_nan, adapter_without_layers])
def test_page_says_why_an_adapter_cannot_be_shrunk(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path / "a.safetensors")
    result = ls.report(path, output=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert result.sweep is None
    assert "It cannot be shrunk as it is: " in text
    assert 'id="sizes"' not in text
    assert numbers(text)["sweep"] is None
    assert numbers(text)["inspect"]["health"]


def test_page_lies_beside_the_adapter_by_default(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "style.safetensors"
    copy.write_bytes(adapter.read_bytes())
    text = run("report", "-r", "rank=1..8/4", copy)
    assert "recommended: -r rank=" in text
    assert "style_report.html" in text
    document = json.loads(run("report", "--json", "-r", "rank=2", "-o", tmp_path / "new" / "page.HTML", copy))
    assert set(document) == {"version", "command", "path", "bytes", "inspection", "sweep"}
    assert Path(document["path"]).stat().st_size == document["bytes"]


def test_a_page_shows_no_folders_unless_asked(adapter: Path, base: Path, tmp_path: Path) -> None:
    home = tmp_path / "home of ada"
    copy = home / "style.safetensors"
    copy.parent.mkdir()
    save_file(load_file(adapter), copy, {"ss_sd_model_name": str(home / "base.safetensors")})
    ls.report(copy, base=base, recipes="rank=1..4/3", output=home / "r.html")
    text = (home / "r.html").read_text()
    assert "home of ada" not in text
    assert str(base.parent) not in text
    ls.report(copy, base=base, recipes="rank=1..4/3", output=home / "r.html", paths=True, force=True)
    assert "home of ada" in (home / "r.html").read_text()


def test_a_card_is_markdown_with_its_figure_beside_it(adapter: Path, base: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter)
    save_file(tensors, tmp_path / "st*yle.safetensors", {"modelspec.title": "<img src=x> [a](b)", "ss_epoch": "1"})
    run("report", "-r", "rank=1..4/3", "-o", tmp_path / "card.md", "--base", base, tmp_path / "st*yle.safetensors")
    text = (tmp_path / "card.md").read_text()
    assert text.startswith("# st\\*yle.safetensors\n")
    assert "\\<img src=x\\> \\[a\\](b)" in text
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", text) == ["card_sizes.png"]
    with Image.open(tmp_path / "card_sizes.png") as figure:
        assert figure.format == "PNG"
    assert str(tmp_path) not in text
    before = text
    assert "exists already" in run(
        "report", "-r", "rank=1", "-o", tmp_path / "card.md", tmp_path / "st*yle.safetensors", status=2
    )
    assert (tmp_path / "card.md").read_text() == before


def test_wrong_requests_fail_before_anything_is_written(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "file").write_text("")
    wrong: list[tuple[dict, type[LorashrinkError], str]] = [
        ({"output": tmp_path / "page.txt"}, UsageError, "ends in .html"),
        ({"output": tmp_path / "there.html"}, OutputError, "--force"),
        ({"output": tmp_path / "file" / "page.html"}, OutputError, "is no folder"),
        ({"output": tmp_path / "a.html", "recipes": "nonsense"}, UsageError, "nonsense"),
        ({"output": tmp_path / "a.html", "recipes": "fro_ckpt,thr=-3"}, UsageError, "compares with the base"),
        ({"output": tmp_path / "a.html", "recipes": "fro_lora,thr=9"}, InputError, "keeps nothing"),
        ({"output": tmp_path / "a.html", "images": "model"}, UsageError, "both --images"),
        ({"output": tmp_path / "a.html", "base": tmp_path / "none.safetensors"}, InputError, "none"),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message):
            ls.report(adapter, **arguments)
    with pytest.raises(InputError, match="missing"):
        ls.report(tmp_path / "missing.safetensors", output=tmp_path / "a.html")
    assert (tmp_path / "there.html").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.html", "file"}
    assert "one adapter" in run("report", base, adapter, adapter, status=2)
    ls.report(adapter, recipes="rank=1", output=tmp_path / "there.html", force=True)
    assert (tmp_path / "there.html").read_text().startswith("<!DOCTYPE html>")


# --- figures ---


def row(block: str, kind: str, rank: int, alpha: float | None) -> LayerRow:
    scale = None if alpha is None else alpha / rank
    return LayerRow(f"{block}.{kind}", block, kind, (8, 8), "lora", rank, "F16", alpha=alpha, scale=scale)


def table(*rows: LayerRow) -> AdapterTable:
    return AdapterTable(
        path="a.safetensors", bytes=2_000_000, family="sdxl", algo="lora", naming="kohya", dtype="F16", fro=None,
        fro_ratio=None, metadata={}, notes={}, health=(), layers=rows, blocks=(), others={},
    )  # fmt: skip


def test_overview_has_a_dot_for_each_value_of_a_block() -> None:
    rows = [row("MID", "attn", 8, 4.0), row("MID", "attn", 8, 4.0), row("MID", "mlp", 2, 4.0)]
    rows += [row("IN01", "conv", 64, None)]
    figure = layer_overview(table(*rows))
    ranks, alphas, scales = figure.axes
    dots = {series.get_label(): series for series in ranks.collections}
    assert [(round(x), y) for x, y in dots["other layers"].get_offsets().tolist()] == [(1, 2), (1, 8)]
    assert [(round(x), y) for x, y in dots["convolutions"].get_offsets().tolist()] == [(0, 64)]
    small, large = dots["other layers"].get_sizes().tolist()
    assert small < large
    assert [y for series in alphas.collections for _, y in series.get_offsets().tolist()] == [4]
    assert [y for series in scales.collections for _, y in series.get_offsets().tolist()] == [0.5, 2]
    assert [label.get_text() for label in scales.get_xticklabels()] == ["IN01", "MID"]
    assert ranks.get_yscale() == "log"


@pytest.mark.parametrize("rows", [(), (row("MID", "attn", 8, None),), (row("MID", "attn", 8, -4.0),)])
def test_overview_is_drawn_without_layers_or_alphas(rows: tuple[LayerRow, ...], tmp_path: Path) -> None:
    figure = layer_overview(table(*rows))
    save(figure, tmp_path / "a.png")
    low, high = figure.axes[1].get_ylim()
    assert low < high
    if rows and rows[0].alpha is None:
        assert [text.get_text() for text in figure.axes[1].texts] == ["no layer tells its alpha"]


def drawing() -> Figure:
    figure = layer_overview(table(row("MID", "attn", 8, 4.0)))
    figure.axes[0].plot([0, 1], [2, 3], color="#000000")
    return figure


def test_dark_figures_change_paper_and_ink_but_keep_curves(tmp_path: Path) -> None:
    figure = drawing()
    axes = figure.axes[0]
    before = to_hex(axes.collections[0].get_facecolor()[0])
    darken(figure)
    assert to_hex(figure.get_facecolor()) == to_hex(axes.get_facecolor()) == ROLES["paper"][1]
    assert to_hex(axes.title.get_color()) == ROLES["ink"][1]
    assert to_hex(axes.get_lines()[-1].get_color()) == ROLES["black"][1]
    assert to_hex(axes.collections[0].get_facecolor()[0]) == before
    save(drawing(), tmp_path / "dark.png", dark=True)
    save(drawing(), tmp_path / "light.png")
    corners = [Image.open(tmp_path / f"{name}.png").convert("RGB").getpixel((0, 0)) for name in ("dark", "light")]
    assert corners == [tuple(bytes.fromhex(ROLES["paper"][1][1:])), (255, 255, 255)]


def test_inline_figures_take_their_colours_from_the_page() -> None:
    first, second = (inline_svg(drawing(), name) for name in ("first", "second"))
    assert first.startswith("<svg ")
    assert "<?xml" not in first
    assert f"fill: var(--figure-ink, {INK})" in first
    assert f": {INK}" not in first
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', first)) == ids[0]


# --- pictures ---


def test_pictures_are_stored_in_their_smallest_form(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "speck.png")
    noise = torch.randint(0, 256, (1024, 1024, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "large.png")
    speck, is_speck = picture_uri(tmp_path / "speck.png")
    large, is_large_speck = picture_uri(tmp_path / "large.png")
    assert (is_speck, is_large_speck) == (True, False)
    assert speck.startswith("data:image/")
    assert len(speck) < 400
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < (tmp_path / "large.png").stat().st_size / 2


def test_page_escapes_every_text_of_its_findings(adapter: Path) -> None:
    (adapter_table,) = inspect(adapter, spectrum=True).files
    findings = Findings(
        table=replace(adapter_table, path=f"/x/{EVIL}"),
        base=None,
        sweep=None,
        unswept=EVIL,
        shrunk=None,
        hashes={EVIL: EVIL},
        commands={EVIL: EVIL},
    )
    text = page(findings, paths=True).decode()
    assert "<img" not in text
    assert text.count(escape(EVIL)) >= 5
