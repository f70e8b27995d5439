"""The command line as people and programs use it: output, exit statuses, JSON, help, and what stays unimported."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.main import get_command
from typer.testing import CliRunner

import lorashrink_example
from lorashrink import __version__
from lorashrink.cli import app

COMMANDS = sorted(name for name, command in get_command(app).commands.items() if not command.hidden)  # type: ignore[attr-defined]


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout


def test_resize_accepts_the_command_of_training_guides(adapter: Path, base: Path, tmp_path: Path) -> None:
    text = run("resize", "-o", tmp_path, "-r", "fro_ckpt=1,thr=-3.55", base, adapter)
    assert (tmp_path / "lora_frockpt1_th-3.55.safetensors").is_file()
    assert "fro_ckpt=1,thr=-3.55" in text
    assert "saved" in text


def test_resize_defaults_to_the_recipe_of_training_guides(adapter: Path, base: Path, tmp_path: Path) -> None:
    run("resize", "-o", tmp_path, "--base", base, adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["lora_frockpt1_th-3.55.safetensors"]


def test_resize_without_a_base_keeps_99_percent_of_the_energy(adapter: Path, tmp_path: Path) -> None:
    run("resize", "-o", tmp_path, adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["lora_energy0.99.safetensors"]


def test_resize_without_a_recipe_names_a_base_that_is_missing(adapter: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["resize", "-o", str(tmp_path), str(tmp_path / "model.safetensors"), str(adapter)])
    assert result.exit_code == 2
    assert "model.safetensors: no such file" in result.stderr
    assert not list(tmp_path.iterdir())


def test_resize_json_has_the_documented_fields(adapter: Path, base: Path, tmp_path: Path) -> None:
    document = json.loads(run("resize", "-o", tmp_path, "-r", "fro_ckpt,thr=-1.6", "--json", base, adapter))
    assert document["version"] == __version__
    assert document["base"] == {"path": str(base), "family": "sdxl", "kind": "file"}
    assert document["failed"] == []
    (result,) = document["results"]
    assert {"source", "output", "recipe", "threshold", "bytes_before", "bytes_after", "relative_error"} < set(result)
    assert {"seconds", "layers", "verbatim", "removed", "warnings"} < set(result)
    assert set(result["layers"][0]) == {
        *("name", "shape", "algo", "rank_before", "rank_after", "energy", "rle_lora", "rle_ckpt")
    }
    assert result["source"] == str(adapter)


def test_verbose_lists_layers_quantiles_and_reasons(adapter: Path, base: Path, tmp_path: Path) -> None:
    text = run("resize", "-o", tmp_path, "-r", "fro_ckpt,thr=-1.6", "-vv", base, adapter)
    assert re.search(r"dim: +8 -> \d+ +rle_lora +[\d.]+% +rle_ckpt +[\d.]+% +lora_te1_", text)
    assert "score quantiles" in text
    assert re.search(r"removed lora_te1_\S+: \S", text)


def test_csv_holds_the_numbers_of_the_json(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    document = json.loads(run("inspect", adapter, "--json", "--csv", path))
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["fro"]) for row in rows] == [layer["fro"] for layer in document["files"][0]["layers"]]


def test_inspect_prints_layers_blocks_and_a_summary(adapter: Path, base: Path) -> None:
    text = run("inspect", base, adapter)
    assert re.search(r"lora_unet_middle_block_0_in_layers_2 +MID +conv +lora +32×32×3×3 +4 +4 +F16", text)
    assert re.search(r"^ *MID +15 ", text, re.MULTILINE)
    assert "178 layers of rank 4 to 8" in text


def test_inspect_prints_metadata_first_and_findings_last(adapter: Path) -> None:
    lines = run("inspect", adapter, "--recommend").splitlines()
    assert re.match(r"title +parity$", lines[0])
    assert re.search(r"^ *energy=0\.99 +[\d.]+ kB +[\d.]+% +[\d.]+%", "\n".join(lines), re.MULTILINE)
    assert "mixed_alpha: " in lines[-2]


def test_inspect_prints_several_files_side_by_side(adapter: Path, base: Path, tmp_path: Path) -> None:
    run("resize", "-r", "rank=2", "-o", tmp_path / "small.safetensors", adapter)
    text = run("inspect", base, adapter, tmp_path / "small.safetensors")
    assert re.search(r"^ *lora\.safetensors +[\d.]+ kB +sdxl +lora +178 +4 to 8 +1 to 8 ", text, re.MULTILINE)
    assert re.search(r"^ *small\.safetensors +[\d.]+ kB +sdxl +lora +\d+ +2 +2 +[\d.]+ +[\d.]+%", text, re.MULTILINE)
    assert "lora_unet_" not in text
    assert "lora_unet_" in run("inspect", "-v", adapter, tmp_path / "small.safetensors")


def test_inspect_plots_spectra_and_norms(adapter: Path, base: Path, tmp_path: Path) -> None:
    run("inspect", adapter, "--plot", tmp_path / "alone.svg")
    run("inspect", base, adapter, "--plot", tmp_path / "both.png")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"alone_spectra.svg", "both_spectra.png", "both_norms.png"}
    for arguments in (
        ["--plot", tmp_path / "both.png"],  # is there already
        ["--plot", tmp_path / "a.jpg"],
        ["--plot", tmp_path / "a.png", "--header"],
        ["--plot", tmp_path / "a.png", adapter],
        ["--recommend", "--header"],
    ):
        run("inspect", adapter, *arguments, status=2)


def test_inspect_prints_and_plots_files_without_layers(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "norms.safetensors"
    save_file({"lora_unet_out_0.w_norm": torch.ones(8)}, path)
    text = run("inspect", "--recommend", "--plot", tmp_path / "a.png", base, path)
    assert "no_layers: " in text
    assert "no recipe to recommend" in text
    assert "0 layers, 1 other tensor\n" in text


def test_names_that_look_like_markup_are_printed_as_they_are(adapter: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"[bold]{number}:smile:.safetensors" for number in (1, 2)]
    for path in paths:
        path.write_bytes(adapter.read_bytes())
    text = run("inspect", "--header", *paths)
    assert all(path.name in text for path in paths)


def test_norms_writes_a_table_that_resize_takes(adapter: Path, base: Path, tmp_path: Path) -> None:
    run("norms", base, "-o", tmp_path / "table.json")
    run("resize", "-o", tmp_path / "out", "-r", "spn_ckpt,thr=-1", tmp_path / "table.json", adapter)
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_dtype_32_means_float32(adapter: Path, tmp_path: Path) -> None:
    document = json.loads(run("resize", "-r", "rank=2", "-t", "32", "-o", tmp_path, "--json", adapter))
    assert document["results"][0]["bytes_after"] > 2 * 178 * 2 * 24 * 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_names_it(command: str) -> None:
    text = run(command, "--help")
    assert f"Example: lorashrink {command} " in re.sub(r"\s+", " ", text)
    options = get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert all(getattr(option, "help", None) for option in options)


def names(document: object) -> set[str]:
    """All keys of a document, at any depth, but for those that are data: metadata, notes, reasons by key, quantiles."""
    if isinstance(document, list):
        return set().union(*map(names, document))
    if not isinstance(document, dict):
        return set()
    data = ("metadata", "others", "quantiles", "notes")
    return set(document).union(*(names(value) for key, value in document.items() if key not in data))


def test_every_name_in_the_json_is_documented(adapter: Path, base: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "programs.md").read_text()
    documents = [
        run("resize", "-o", tmp_path, "-r", "fro_ckpt,thr=-1.6", "-v", "--json", base, adapter),
        run("inspect", "--json", "--spectrum", "--recommend", base, adapter),
        run("compare", "--json", adapter, adapter),
        run("norms", "--json", base, "-o", tmp_path / "norms.json"),
        run("sweep", "--json", base, adapter),
        run("merge", "--json", f"{adapter}:0.5", "-o", tmp_path / "m.safetensors"),
        run("overlap", "--json", base, adapter, tmp_path / "m.safetensors"),
        run("report", "--json", "-o", tmp_path / "r.html", base, adapter),
        run("pack", "--json", "-o", tmp_path / "p.safetensors", adapter),
        run("unpack", "--json", "-o", tmp_path / "u.safetensors", tmp_path / "p.safetensors"),
        run("resize", "--json", tmp_path / "missing.safetensors", "-r", "rank=1", status=2),
        run("resize", "--json", "-r", "nonsense", adapter, status=2),
    ]
    keys = set().union(*(names(json.loads(document)) for document in documents))
    assert len(keys) > 40
    assert {name for name in keys if f'"{name}"' not in text} == set()


def test_version_prints_the_version() -> None:
    assert run("--version").split() == ["lorashrink", __version__]


def test_help_and_header_import_neither_torch_nor_numpy_nor_rich(adapter: Path) -> None:
    code = (
        "import sys; from lorashrink.cli import app\n"
        "try: app([{arguments}])\n"
        "except SystemExit: pass\n"
        "print(sorted({{'torch', 'numpy', 'rich', 'matplotlib'}} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in ("'--help'", f"'inspect', '--header', '--json', {str(adapter)!r}"):
        done = subprocess.run([sys.executable, "-c", code.format(arguments=arguments)], capture_output=True, text=True)
        assert done.stderr.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", [["inspect"], ["resize", "-r", "rank=1", "-o", "out"], ["shrink", "-o", "small"]])
def test_a_line_break_in_a_name_ends_no_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's name must not look like a message of the program."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(lorashrink_example.path("adapter.safetensors"), "a\nlorashrink: all is well.safetensors")
    result = CliRunner().invoke(app, [command[0], "a\nlorashrink: all is well.safetensors", *command[1:]])
    assert result.exit_code == 0
    assert not any(line.startswith("lorashrink: all") for line in result.output.splitlines())
    assert "a\\nlorashrink: all" in result.output
