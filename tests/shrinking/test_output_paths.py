"""Where outputs go: names that tell recipes apart, folders that keep equal names apart, nothing in the way."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lorashrink
from lorashrink.cli import app
from lorashrink.errors import LorashrinkError, OutputError


def adapter(path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    layer = "lora_unet_b_to_q"
    save_file({f"{layer}.lora_up.weight": torch.randn(8, 4), f"{layer}.lora_down.weight": torch.randn(4, 8)}, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def run(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == status, result.output
    return result.output


def test_recipes_that_round_to_two_equal_decimals_are_both_written(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a.safetensors")
    lorashrink.resize(path, recipes="energy=0.999:energy=0.9991:energy=1", output=tmp_path / "out")
    assert names(tmp_path / "out") == [
        "a_energy0.999.safetensors",
        "a_energy0.9991.safetensors",
        "a_energy1.safetensors",
    ]


@pytest.mark.parametrize("command", ["resize", "convert"])
def test_equal_names_keep_the_tree_below_the_common_folder(command: str, tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "in/x/a.safetensors"), adapter(tmp_path / "in/y/z/a.safetensors", seed=1)
    words = {"resize": ("-r", "rank=2"), "convert": ("-t", "fp16")}[command]
    run(command, *words, "-o", tmp_path / "out", first, second)
    ending = {"resize": "rank2", "convert": "fp16"}[command]
    assert names(tmp_path / "out") == [f"x/a_{ending}.safetensors", f"y/z/a_{ending}.safetensors"]


def test_names_that_differ_stay_in_one_folder(tmp_path: Path) -> None:
    paths = [adapter(tmp_path / "x/a.safetensors"), adapter(tmp_path / "y/b.safetensors")]
    lorashrink.resize(paths, recipes="rank=2", output=tmp_path / "out")
    assert names(tmp_path / "out") == ["a_rank2.safetensors", "b_rank2.safetensors"]


def test_names_that_no_file_can_have_are_refused_before_work(tmp_path: Path) -> None:
    path = adapter(tmp_path / f"{'é' * 121}.safetensors")
    with pytest.raises(OutputError, match=r"a name of .* bytes, and files can have 255"):
        lorashrink.resize(path, recipes="energy=0.5", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_not_utf8_are_refused_before_work(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    adapter(tmp_path / "a.safetensors").rename(path)
    with pytest.raises(OutputError, match="not UTF-8"):
        lorashrink.resize(path, recipes="rank=2", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_table_never_replaces_an_output_of_the_same_call(tmp_path: Path, force: tuple[str, ...]) -> None:
    path, out = adapter(tmp_path / "a.safetensors"), tmp_path / "out"
    text = run("resize", "-r", "rank=2", "-o", out, "--csv", out / "a_rank2.safetensors", *force, path, status=2)
    assert "--csv" in text
    assert "is the name of an adapter" in text
    assert not out.exists()


@pytest.mark.parametrize("command", ["compare", "overlap"])
def test_a_table_and_a_figure_cannot_share_a_name(command: str, tmp_path: Path) -> None:
    paths = adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors", seed=1)
    text = run(command, "--plot", tmp_path / "same.svg", "--csv", tmp_path / "same.svg", *paths, status=2)
    assert "is another output of the same call" in text


@pytest.mark.parametrize(
    ("output", "table", "words"),
    [
        ("x.csv", "x.csv", "is another output of the same call"),
        ("x.csv/b", "x.csv", "lies below"),
        ("x.safetensors", "x.safetensors/t.csv", "lies below"),
        ("x", "y/../x", "is another output of the same call"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "resize"])
def test_a_table_is_not_in_the_way_of_adapters(
    tmp_path: Path, command: str, output: str, table: str, words: str
) -> None:
    paths = [adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors", seed=1)]
    before = sorted(tmp_path.rglob("*"))
    given = paths if command == "merge" else paths[:1]
    text = run(command, "-r", "rank=2", "-o", tmp_path / output, "--csv", tmp_path / table, *given, status=2)
    assert words in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("below", ["", "below"])
def test_pictures_are_not_in_the_way_of_a_page(tmp_path: Path, below: str) -> None:
    path, page = adapter(tmp_path / "a.safetensors"), tmp_path / "page.html"
    before = sorted(tmp_path.rglob("*"))
    text = run("report", "-o", page, "--images-out", page / below, path, status=2)
    assert "--images-out" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_never_replaces_the_base_that_an_option_names(tmp_path: Path) -> None:
    path, base = adapter(tmp_path / "a.safetensors"), tmp_path / "norms.json"
    base.write_text("{}")
    text = run("resize", "--base", base, "--csv", base, "--force", "-o", tmp_path / "out", path, status=2)
    assert "is an input" in text
    assert base.read_text() == "{}"


def test_recipes_that_mean_the_same_are_refused_by_name(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a.safetensors")
    with pytest.raises(LorashrinkError, match=r"same file name: .*\. They mean the same"):
        lorashrink.resize(path, recipes="fro_lora=1,thr=-3:fro_lora=2,thr=-3", output=tmp_path / "out")
