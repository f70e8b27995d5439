"""Sizes that pictures decide, on the embedded model: the worst picture, never the mean."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.automatic import run as automatic
from lorashrink.cli import app
from lorashrink.results.automatic import Shrunk

MODEL = lorashrink_example.path("model")
STYLE = lorashrink_example.path("loras", "style.safetensors")

PROMPTS = """\
a big red circle on a white background, sks style --w 64 --h 64 --d 1 --l 4 --s 6
a big blue star on a black background, sks style --w 64 --h 64 --d 2 --l 4 --s 6
a big green cross on a brown background --w 64 --h 64 --d 3 --l 4 --s 6
"""


def difference_db(a: str, b: str) -> float:
    first, second = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (a, b))
    return float(10 * np.log10(255**2 / np.mean((first - second) ** 2)))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def drawn(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("loras")
    shutil.copy(STYLE, folder / "style.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("pictures")))
        return folder, ls.shrink(folder, model=MODEL, quality=30, prompts=prompts)


def only(report: object) -> Shrunk:
    (result,) = report.results  # type: ignore[attr-defined]
    return result


def test_the_worst_picture_that_calls_the_adapter_decides(drawn: tuple[Path, object]) -> None:
    result = only(drawn[1])
    levels = {pair.label: difference_db(pair.before, pair.after) for pair in result.pictures}
    calling = [level for label, level in levels.items() if "sks style" in label]
    assert result.worst_picture_db == pytest.approx(min(calling), abs=1e-6)
    assert result.worst_picture_db >= 30
    assert [pair.counts for pair in result.pictures] == [True, True, False]
    assert {pair.label: pair.psnr for pair in result.pictures} == pytest.approx(levels)


def test_the_file_is_a_small_part_of_the_whole(drawn: tuple[Path, object]) -> None:
    result = only(drawn[1])
    assert Path(str(result.output)).stat().st_size == result.bytes_after
    assert result.share < 0.3
    assert result.method == "calibrated"
    assert "table.safetensors, beside the model" in result.why
    assert result.loads_in
    assert "ComfyUI" in result.loads_in


def test_the_page_shows_pictures_first(drawn: tuple[Path, object]) -> None:
    page = (drawn[0] / "shrunk" / automatic.PAGE).read_text()
    assert page.index('id="pictures"') < page.index('id="files"')
    assert page.count("<img ") == 9
    assert "http" not in page.replace("http-equiv", "")
    assert str(drawn[0]) not in page


def test_a_model_that_cannot_draw_is_a_base_and_says_so(tmp_path: Path) -> None:
    shutil.copy(STYLE, tmp_path / "style.safetensors")
    ls.norms(MODEL, tmp_path / "norms.json")
    report = ls.shrink(tmp_path, model=tmp_path / "norms.json", quality="small")
    assert only(report).worst_picture_db is None
    assert report.notes[0].startswith("no pictures were drawn")


def test_an_adapter_that_cannot_be_drawn_is_shrunk_without_pictures(tmp_path: Path, prompts: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(STYLE)
    name = next(key.removesuffix(".lora_down.weight") for key in tensors if key.endswith("to_q.lora_down.weight"))
    width = tensors[f"{name}.lora_down.weight"].shape[1]
    rows = tensors[f"{name}.lora_up.weight"].shape[0]
    torch.manual_seed(0)
    decay = torch.logspace(0, -4, 8)
    loha = {
        f"{name}.hada_w1_a": torch.randn(rows, 8) * decay,
        f"{name}.hada_w1_b": torch.randn(8, width),
        f"{name}.hada_w2_a": torch.randn(rows, 8) * decay,
        f"{name}.hada_w2_b": torch.randn(8, width),
        f"{name}.alpha": torch.tensor(8.0),
    }
    save_file(loha, tmp_path / "loha.safetensors")
    report = ls.shrink(tmp_path, model=MODEL, quality="small", prompts=prompts)
    result = only(report)
    assert not report.failed
    assert result.worst_picture_db is None
    assert any("pictures not checked" in warning for warning in result.warnings)


def test_a_table_without_a_name_goes_where_shrink_finds_it(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a red star --w 64 --h 64 --s 2 --l 4\n")
    line = ["calibrate", "--base-table", str(MODEL), "--prompts", str(tmp_path / "one.txt"), "--steps-used", "1"]
    outcome = CliRunner().invoke(app, line)
    assert outcome.exit_code == 0, outcome.output
    shutil.copy(STYLE, tmp_path / "style.safetensors")
    result = only(ls.shrink(tmp_path / "style.safetensors", size="300kB"))
    assert result.method == "calibrated"
    assert "from the user's cache" in result.why
