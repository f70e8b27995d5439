"""Files that were made to do harm: refused in a moment, with little memory, and with printable names."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorashrink.calibration.statistics import FORMAT, VERSION, open_statistics
from lorashrink.cli import app
from lorashrink.cli.printing import cells, new_console, write_csv
from lorashrink.cli.tables import TextTable
from lorashrink.errors import DamagedFile, InputError, RecipeError
from lorashrink.files.header import read_header
from lorashrink.files.reading import open_tensors
from lorashrink.linking.inputs import find_adapters, looks_like_base
from lorashrink.pictures.prompts import read_prompts
from lorashrink.recipes.grammar import parse_recipes
from lorashrink.shrinking.run import resize
from lorashrink.text import printable

LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
SECONDS = 20.0  # a moment, on a machine with other work


def with_header(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    raw = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def with_shape(shape: str) -> str:
    return f'{{"{LAYER}.lora_up.weight":{{"dtype":"F16","shape":{shape},"data_offsets":[0,0]}}}}'


@pytest.mark.parametrize(
    "header",
    [
        with_shape(f"[{','.join([str(2**62)] * 300_000)}]"),
        with_shape(f"[{','.join(['9' * 4200] * 300)}]"),
        with_shape("[1e400]"),
        with_shape("[" * 100_000),
        with_shape(f"[{2**62},{2**62},0]"),
        with_shape("[1]").replace('"F16"', '["F16"]'),
        with_shape("[0]").replace('"F16"', "5"),
        with_shape("[0]").replace("lora_unet", "\\ud800"),
        with_shape("[0]").replace("{", '{"__metadata__":{"a":"\\udfff"},', 1),
    ],
    ids=["sides", "digits", "infinite", "deep", "overflow", "dtype list", "dtype number", "name", "metadata"],
)
def test_a_hostile_header_is_refused_in_a_moment(tmp_path: Path, header: str) -> None:
    path = with_header(tmp_path / "a.safetensors", header)
    start = time.perf_counter()
    with pytest.raises(DamagedFile) as raised:
        read_header(path)
    assert time.perf_counter() - start < SECONDS
    assert len(str(raised.value)) < len(str(path)) + 400


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_a_pickle_that_claims_more_than_it_holds_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save({f"{LAYER}.lora_up.weight": torch.zeros(1).expand(200_000, 100_000)}, path)
    with pytest.raises(DamagedFile, match=r"says that it holds 80000000000 bytes of numbers, and has \d+\."):
        open_tensors(path)


def test_a_pickle_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(4 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
    with pytest.raises(DamagedFile, match="says that it holds"):
        open_tensors(packed)


def test_a_small_tensor_that_repeats_a_number_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(1).expand(320)}, path)
    with open_tensors(path) as store:
        assert store.read("a").sum() == 320


def run_limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lorashrink.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("name", ["a.safetensors", "adapter_config.json", "model.safetensors.index.json"])
def test_a_pipe_is_named_and_nobody_waits_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    if name == "adapter_config.json":
        save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    result = run_limited("inspect", tmp_path / name if "index" in name else tmp_path)
    assert result.returncode == 2
    assert str(tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
    if name == "a.safetensors":
        assert "not a regular file" in result.stderr


def test_a_pipe_is_no_base(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "a.gguf")
    assert not looks_like_base(str(tmp_path / "a.safetensors"))
    assert not looks_like_base(str(tmp_path / "a.gguf"))


def test_folders_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read all folders, so that the refusal is made."""
    save_file({f"{LAYER}.lora_up.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def refuses(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(InputError, match=r"closed: cannot be read \(Permission denied\)"):
        find_adapters([tmp_path / "closed"])
    assert find_adapters([tmp_path], recursive=True) == [tmp_path / "a.safetensors", tmp_path / "closed"]


def test_a_shard_name_with_nul_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x\0.safetensors"}}))
    with pytest.raises(DamagedFile, match="outside its own folder"):
        open_tensors(index)


@pytest.mark.parametrize("number", ["1e308", "1e400", "9" * 400, "nan", "-1"])
def test_a_size_that_no_file_can_have_is_refused(number: str) -> None:
    with pytest.raises(RecipeError, match="size= needs"):
        parse_recipes(f"size={number}")


PROMPTS = [
    '[{"prompt": "a", "width": Infinity, "seed": Infinity, "scale": 1e999}]',
    f'[{{"prompt": "a", "width": {"9" * 4000}, "sample_steps": {"9" * 4000}, "scale": {"9" * 4000}}}]',
    '[{"prompt": "\\ud800", "width": NaN}]',
    '["a --w 99999999999999999999 --l inf --s 1e9"]',
]


@pytest.mark.parametrize("text", PROMPTS)
def test_numbers_of_prompts_that_no_picture_can_have_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        (prompt,) = read_prompts(path)
    assert "ignored" in caplog.text
    for side in (prompt.width, prompt.height):
        assert side is None or side <= 1 << 14
    prompt.prompt.encode()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1}', "[5]"])
def test_a_file_that_holds_no_prompts_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError):
        read_prompts(path)


BASE = {"family": "sdxl", "fingerprint": "x", "tensors": {}, "weights": []}


@pytest.mark.parametrize(
    "base",
    [
        json.dumps({**BASE, "tensors": {"a": [1, 2]}}).replace("[1, 2]", "[Infinity]"),
        json.dumps({**BASE, "tensors": 5}),
        json.dumps({**BASE, "family": "none"}),
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_damaged_statistics_are_an_input_error(tmp_path: Path, base: str) -> None:
    path = tmp_path / "a.safetensors"
    entries = {"format": FORMAT, "version": str(VERSION), "kind": "base", "base": base, "rows": "{}"}
    save_file({"a": torch.ones(1)}, path, entries)
    with pytest.raises(InputError, match="damaged statistics"):
        open_statistics(path)


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ESCAPE, "a\nb", "\u202efdp.exe", "\x9b2J", "\x7f", "\udc80", "\u2028"])
def test_a_printable_text_has_nothing_that_drives_a_terminal(text: str) -> None:
    shown = printable(f"<{text}>")
    assert shown.isprintable()
    assert shown.startswith("<")
    assert shown.endswith(">")


def test_a_printable_text_is_left_as_it_is() -> None:
    text = "ΔW – σ × 3, 猫 [pony] 'é'"
    assert printable(text) == text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r="])
def test_no_cell_of_a_table_is_a_formula(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [{"layer": f"{start}cmd|' /C calc'!A0", "fro": -1.5, "shape": [1, 2]}])
    (row,) = csv.DictReader(io.StringIO(path.read_text(), newline=""))
    assert row["layer"][0] not in "=+-@\t\r"
    assert float(row["fro"]) == -1.5
    assert cells({"layer": "lora_unet"}) == {"layer": "lora_unet"}


def hostile_adapter(folder: Path) -> Path:
    name = f"lora_unet_{ESCAPE}\u202e"
    path = folder / f"a{ESCAPE.replace('/', '')}.safetensors"
    tensors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.lora_down.weight": torch.ones(2, 8)}
    save_file(tensors, path, {"ss_output_name": ESCAPE, "ss_network_dim": ESCAPE, "modelspec.title": ESCAPE})
    return path


COMMANDS: list[Callable[[Path, Path], list[object]]] = [
    lambda path, out: ["inspect", "-v", path],
    lambda path, out: ["inspect", "--json", path],
    lambda path, out: ["inspect", "-q", "--csv", out / "a.csv", path],
    lambda path, out: ["resize", "-vv", "-r", "rank=1", "-o", out, path],
    lambda path, out: ["convert", "-v", "-t", "bf16", "-o", out, path],
    lambda path, out: ["compare", "-v", path, path],
    lambda path, out: ["inspect", path.with_suffix(".gone")],
    lambda path, out: ["report", "-o", out / "a.html", path],
    lambda path, out: ["inspect", "--debug", "-vv", path],
]


@pytest.mark.parametrize("line", COMMANDS)
def test_no_name_of_a_file_or_layer_reaches_the_terminal_raw(
    tmp_path: Path, line: Callable[[Path, Path], list[object]]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    result = CliRunner().invoke(app, [str(word) for word in line(hostile_adapter(tmp_path), out)])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    pages = [path.read_bytes().decode() for path in out.iterdir() if path.suffix in (".csv", ".html")]
    for text in (result.stdout, result.stderr, *pages):
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(text)


def test_tables_and_lines_of_a_console_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    console = new_console()
    console.print(TextTable({"layer": [ESCAPE], "rank": [ESCAPE]}))
    console.print(ESCAPE)
    assert "\x1b" not in capsys.readouterr().out


# --- stdout ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_under_stdout_is_a_message(tmp_path: Path, options: list[str]) -> None:
    save_file({f"{LAYER}.lora_{side}.weight": torch.ones(4, 4) for side in ("up", "down")}, tmp_path / "a.safetensors")
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "lorashrink.cli", "inspect", *options, str(tmp_path / "a.safetensors")]
        result = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    assert result.returncode == 2
    assert "could not be printed (No space left on device)" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_layer_whose_square_is_zero_is_no_error_of_the_program(tmp_path: Path) -> None:
    name, path = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", tmp_path / "a.safetensors"
    tensors = {f"{name}.hada_{factor}_a": torch.ones(8, 4) for factor in ("w1", "w2")}
    tensors |= {f"{name}.hada_{factor}_b": torch.ones(4, 8) for factor in ("w1", "w2")}
    save_file({**tensors, f"{name}.alpha": torch.tensor(1e-300, dtype=torch.float64)}, path)
    report = resize(path, recipes="rank=1", output=tmp_path / "out")
    assert not any("unexpected" in failure.error for failure in report.failed)
