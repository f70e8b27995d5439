"""Wrong files and requests: messages, leftovers, and the work that is done all the same."""

import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.files.writing import SafetensorsWriter

PARITY = Path(__file__).parents[1] / "data" / "parity"
BASE, LORA = PARITY / "base.safetensors", PARITY / "lora.safetensors"
# Layers of the base, 32×32 and 24×28.
LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
NOWHERE = "lora_unet_no_such_block_0_to_q"
AGAIN = "Download or copy"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return adapter(tmp_path / "good.safetensors")


class Run:
    """The outcome of a command line."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert isinstance(result.exception, SystemExit | None), repr(result.exception)
        self.status, self.stdout, self.errors = result.exit_code, result.stdout, result.stderr.splitlines()

    def failed(self, status: int, *words: object) -> None:
        """Check for one complaint of at most two lines that has all the words."""
        assert self.status == status, self.errors
        assert 1 <= len(self.errors) <= 2
        text = "\n".join(self.errors)
        assert text.startswith("lorashrink: ")
        assert "Traceback" not in text
        assert "unexpected" not in text
        for word in words:
            assert str(word) in text

    def succeeded(self) -> None:
        assert (self.status, self.errors) == (0, [])


def resize(*arguments: object, base: Path | None = BASE, recipe: str = "rank=1") -> Run:
    return Run("resize", "-r", recipe, *(["--base", base] if base else []), *arguments)


def factors(
    layer: str = LAYER, *, out: int = 32, fan_in: int = 32, rank: int = 2, kind: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    torch.manual_seed(rank)
    return {
        f"{layer}.lora_up.weight": torch.randn(out, rank).to(kind),
        f"{layer}.lora_down.weight": torch.randn(rank, fan_in).to(kind),
        f"{layer}.alpha": torch.tensor(float(rank)),
    }


def adapter(path: Path, *removed: str, metadata: dict[str, str] | None = None, **changed: Tensor) -> Path:
    """An adapter of one layer; `changed` and `removed` name the last part of a key with `_` for `.`."""
    tensors = factors()
    for key in list(tensors):
        short = key.removeprefix(f"{LAYER}.").removesuffix(".weight")
        if short in removed:
            del tensors[key]
        elif short in changed:
            tensors[key] = changed[short]
    save_file(tensors, path, metadata)
    return path


def with_number(value: float, key: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        tensors = factors()
        tensors[f"{LAYER}.{key}"].view(-1)[-1] = value
        save_file(tensors, path)

    return make


def raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def with_header(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """An adapter with its header changed by a function."""

    def make(path: Path) -> None:
        content = save(factors())
        (length,) = struct.unpack("<Q", content[:8])
        raw(path, change(content[8 : 8 + length].rstrip()), content[8 + length :])

    return make


def with_length(length: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", length) + save(factors())[8:])


def overlapping(header: bytes) -> bytes:
    table = json.loads(header)
    table[f"{LAYER}.lora_up.weight"]["data_offsets"] = table[f"{LAYER}.lora_down.weight"]["data_offsets"]
    return json.dumps(table).encode()


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def with_configuration(**entries: object) -> Callable[[Path], object]:
    """A PEFT adapter whose configuration has these entries for the UNet."""
    config = json.dumps({f"unet.{key}": value for key, value in entries.items()})
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    return lambda path: save_file(tensors, path, {"lora_adapter_metadata": config})


# What is wrong with a file -> (its suffix, a function that makes it, words of the complaint)
BAD: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "cut short": (".safetensors", lambda path: path.write_bytes(save(factors())[:-10]), ("cut short", AGAIN)),
    "empty": (".safetensors", lambda path: path.touch(), (AGAIN,)),
    "a header length of zero": (".safetensors", with_length(0), ("claims 0 bytes", AGAIN)),
    "a huge header length": (".safetensors", with_length((1 << 64) - 1), (str((1 << 64) - 1), AGAIN)),
    "a header longer than the file": (".safetensors", with_length(100_000), ("claims 100000 bytes", AGAIN)),
    "a header that is no JSON": (".safetensors", with_header(lambda header: header[:-1] + b"]"), (AGAIN,)),
    "a header that is a deep nest": (".safetensors", lambda path: raw(path, b"[" * 200_000), (AGAIN,)),
    "a header that is a list": (".safetensors", lambda path: raw(path, b'["lora_up.weight"]'), (AGAIN,)),
    "overlapping tensors": (".safetensors", with_header(overlapping), ("overlaps", AGAIN)),
    "a name twice": (".safetensors", with_header(lambda raw: raw[:-1] + b"," + raw[1:]), ("twice", AGAIN)),
    "NaN in up": (
        ".safetensors",
        with_number(float("nan"), "lora_up.weight"),
        (f"{LAYER}.lora_up.weight", "NaN", "use an earlier checkpoint"),
    ),
    "infinity in down": (
        ".safetensors",
        with_number(float("inf"), "lora_down.weight"),
        (f"{LAYER}.lora_down.weight", "infinity", "use an earlier checkpoint"),
    ),
    "NaN as alpha": (".safetensors", with_number(float("nan"), "alpha"), (LAYER, "use an earlier checkpoint")),
    "an alpha of two numbers": (
        ".safetensors",
        lambda path: adapter(path, alpha=torch.ones(2)),
        (f"{LAYER}.alpha", "one number"),
    ),
    "complex factors": (
        ".safetensors",
        lambda path: adapter(path, lora_up=torch.ones(32, 2, dtype=torch.complex64)),
        (LAYER, "C64"),
    ),
    "up without down": (
        ".safetensors",
        lambda path: adapter(path, "lora_down"),
        (f"{LAYER}.lora_up.weight", "no down", "export it again"),
    ),
    "down without up": (
        ".safetensors",
        lambda path: adapter(path, "lora_up", "alpha"),
        (f"{LAYER}.lora_down.weight", "no up", "export it again"),
    ),
    "factors of different rank": (
        ".safetensors",
        lambda path: adapter(path, lora_down=torch.randn(3, 32)),
        (LAYER, "[32, 2]", "[3, 32]", "Export the file again"),
    ),
    "factors that are vectors": (
        ".safetensors",
        lambda path: adapter(path, lora_down=torch.randn(32)),
        (LAYER, "Export the file again"),
    ),
    "no adapter": (
        ".safetensors",
        lambda path: save_file({"embedding": torch.randn(4, 8)}, path),
        ("no adapter layer", "--base"),
    ),
    "the base": (".safetensors", lambda path: shutil.copy(BASE, path), ("base model",)),
    "a shape that the base has not": (
        ".safetensors",
        lambda path: save_file(factors(out=48), path),
        (LAYER, "[48, 32]", "[32, 32]", BASE.name, "Give the base"),
    ),
    "layers that the base has not": (
        ".safetensors",
        lambda path: save_file(factors(NOWHERE), path),
        (NOWHERE, BASE.name, "Give the base"),
    ),
    "another family than the base": (
        ".safetensors",
        lambda path: save_file(factors(CROSS, out=24, fan_in=768), path),
        ("SD 1.x", "SDXL", BASE.name, "Give the base"),
    ),
    "only zeros": (
        ".safetensors",
        lambda path: save_file({key: value * 0 for key, value in factors().items()}, path),
        ("zero", "nothing to shrink"),
    ),
    "a pattern that is no expression": (".safetensors", with_configuration(alpha_pattern={"(": 4}), ()),
    "an alpha that is a word": (".safetensors", with_configuration(lora_alpha="four"), ()),
    "a pickle with code": (
        ".pt",
        lambda path: torch.save(factors() | {"state": Payload(path.with_name("marker"))}, path),
        ("could run code", "safetensors"),
    ),
    "a pickle with code that is named safetensors": (
        ".safetensors",
        lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("marker")))),
        ("pickle", "Rename it"),
    ),
    "a pickle with an odd dtype": (
        ".pt",
        lambda path: torch.save({f"{LAYER}.lora_up.weight": torch.zeros(2, 2, dtype=torch.complex128)}, path),
        (),
    ),
    "a text that is named pt": (".pt", lambda path: path.write_text("hello"), ("safetensors",)),
}
each_bad_file = pytest.mark.parametrize(("suffix", "make", "words"), BAD.values(), ids=BAD.keys())


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- bad files ----------------------------------------------------------------------------------


@each_bad_file
def test_a_bad_file_alone_is_named_and_nothing_is_written(
    tmp_path: Path, out: Path, suffix: str, make: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    bad = tmp_path / f"bad{suffix}"
    make(bad)
    resize(bad, "-o", out).failed(2, bad, *words)
    assert contents(out) == []
    assert not (tmp_path / "marker").exists()


@each_bad_file
def test_a_bad_file_does_not_stop_a_batch(
    tmp_path: Path, out: Path, good: Path, suffix: str, make: Callable[[Path], object], words: tuple[str, ...]
) -> None:
    bad = tmp_path / f"bad{suffix}"
    make(bad)
    last = adapter(tmp_path / "last.safetensors")
    run = resize(good, bad, last, "-o", out)
    run.failed(1, bad, *words)
    assert contents(out) == ["good_rank1.safetensors", "last_rank1.safetensors"]
    assert load_file(out / "good_rank1.safetensors")[f"{LAYER}.lora_up.weight"].shape == (32, 1)
    assert "last_rank1.safetensors" in run.stdout
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["cut short", "overlapping tensors", "NaN in up", "up without down"])
def test_a_bad_file_in_a_folder_is_named(tmp_path: Path, out: Path, name: str) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    BAD[name][1](folder / "bad.safetensors")
    adapter(folder / "good.safetensors")
    resize(folder, "-o", out).failed(1, folder / "bad.safetensors")
    assert contents(out) == ["good_rank1.safetensors"]


def test_every_bad_file_of_a_batch_has_its_own_line(tmp_path: Path, out: Path, good: Path) -> None:
    names = ["cut short", "NaN in up", "no adapter", "a shape that the base has not"]
    bad = [tmp_path / f"bad{number}.safetensors" for number in range(len(names))]
    for path, name in zip(bad, names, strict=True):
        BAD[name][1](path)
    run = resize(good, *bad, "-o", out)
    assert run.status == 1
    assert [line.partition(": ")[2].partition(":")[0] for line in run.errors] == [str(path) for path in bad]
    assert contents(out) == ["good_rank1.safetensors"]


@pytest.mark.parametrize("name", ["cut short", "a header that is no JSON", "up without down", "no adapter"])
def test_inspect_names_a_bad_file_and_shows_the_others(tmp_path: Path, good: Path, name: str) -> None:
    bad = tmp_path / "bad.safetensors"
    BAD[name][1](bad)
    Run("inspect", "--base", BASE, bad).failed(2, bad)
    run = Run("inspect", "--base", BASE, good, bad)
    run.failed(1, bad)
    assert str(good) in run.stdout


def test_an_unreadable_configuration_does_not_stop_an_adapter(tmp_path: Path, out: Path) -> None:
    odd = adapter(tmp_path / "odd.safetensors", metadata={"lora_adapter_metadata": "{no json"})
    resize(odd, "-o", out).succeeded()
    assert contents(out) == ["odd_rank1.safetensors"]


def test_an_overflow_of_the_dtype_fails_and_leaves_no_file(tmp_path: Path, out: Path, good: Path) -> None:
    strong = adapter(tmp_path / "strong.safetensors", lora_up=torch.full((32, 2), 1e12))
    resize(good, strong, "-o", out, "-t", "fp16").failed(1, strong.stem, LAYER, "-t fp32 or -t bf16")
    assert contents(out) == ["good_rank1.safetensors"]


def test_a_recipe_that_keeps_nothing_names_the_best_score(out: Path, good: Path) -> None:
    resize(good, "-o", out, recipe="fro_ckpt=1,thr=9").failed(2, good, "thr=9", "scores", "lower threshold")
    assert contents(out) == []


def test_an_impossible_size_names_the_smallest_possible(out: Path, good: Path) -> None:
    run = resize(good, "-o", out, recipe="size=0.00001")
    run.failed(2, "size=1e-05", "cannot shrink", "smallest possible is size=")
    assert contents(out) == []


# --- bad bases ----------------------------------------------------------------------------------


def copy_of_base(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(BASE)
    change(tensors)
    save_file(tensors, path)
    return path


def test_a_base_with_nan_is_named_and_nothing_is_written(tmp_path: Path, out: Path, good: Path) -> None:
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    base = copy_of_base(tmp_path / "base.safetensors", lambda tensors: tensors[key][3].fill_(torch.nan))
    resize(good, "-o", out, base=base).failed(2, base, key, "another copy")
    assert contents(out) == []


@pytest.mark.parametrize("option", [True, False])
def test_a_base_cut_short_is_named(tmp_path: Path, out: Path, good: Path, option: bool) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(BASE.read_bytes()[:-100])
    run = Run("resize", "-o", out, "-r", "fro_ckpt=1,thr=-3", *(["--base", base, good] if option else [base, good]))
    run.failed(2, base, AGAIN)
    assert contents(out) == []


@pytest.mark.parametrize("option", [True, False])
def test_a_missing_base_is_named(tmp_path: Path, out: Path, good: Path, option: bool) -> None:
    base = tmp_path / "modle.safetensors"
    run = Run("resize", "-o", out, "-r", "fro_ckpt=1,thr=-3", *(["--base", base, good] if option else [base, good]))
    run.failed(2, base)
    assert contents(out) == []


def test_an_adapter_is_no_base(tmp_path: Path, out: Path, good: Path) -> None:
    second = adapter(tmp_path / "other.safetensors")
    resize(good, "-o", out, base=second).failed(2, second, "is a LoRA, and a base model is needed here")
    assert contents(out) == []


def test_a_base_without_an_adapter_is_not_shrunk(out: Path) -> None:
    Run("resize", BASE, "-o", out).failed(2, BASE, "is a base model, not a LoRA")
    assert contents(out) == []


def test_a_recipe_that_needs_a_base_says_how_to_give_one(out: Path, good: Path) -> None:
    resize(good, "-o", out, base=None, recipe="fro_ckpt=1,thr=-3").failed(2, "fro_ckpt=1,thr=-3", "--base")
    assert contents(out) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "lorashrink-norms", "version": 2}'])
def test_a_damaged_norm_table_is_named(tmp_path: Path, out: Path, good: Path, text: str) -> None:
    table = tmp_path / "norms.json"
    table.write_text(text)
    resize(good, "-o", out, base=table).failed(2, table, "lorashrink base-norms")
    assert contents(out) == []


def test_norms_of_a_file_that_is_no_base_write_no_table(tmp_path: Path, good: Path) -> None:
    table = tmp_path / "norms" / "table.json"
    Run("norms", good, "-o", table).failed(2, good, "is a LoRA, and a base model is needed here")
    Run("norms", tmp_path / "none.safetensors", "-o", table).failed(2, "none.safetensors")
    Run("norms", BASE, "-o", table.with_suffix(".txt")).failed(2, "table.txt", ".json")
    assert contents(table.parent) == []


def test_an_existing_norm_table_is_replaced_only_with_force(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text("mine")
    Run("norms", BASE, "-o", table).failed(2, table, "--force")
    assert table.read_text() == "mine"
    Run("norms", BASE, "-o", table, "--force").succeeded()
    assert strict_json(table.read_text())["format"] == "lorashrink-norms"


# --- bad places ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["file", "file/sub", "file/sub/x.safetensors"])
def test_an_impossible_output_folder_is_named_before_any_work(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setattr("lorashrink.shrinking.session.use_base", lambda *_: pytest.fail("the base was opened"))
    (tmp_path / "file").write_text("mine")
    resize(good, "-o", tmp_path / folder).failed(2, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert contents(tmp_path) == ["file", "good.safetensors"]


@pytest.mark.parametrize("name", ["good.safetensors", "sub/../good.safetensors", "link.safetensors"])
@pytest.mark.parametrize("options", [[], ["--force"], ["--skip-existing"]], ids=str)
def test_an_input_is_never_overwritten(tmp_path: Path, good: Path, name: str, options: list[str]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.safetensors").symlink_to(good)
    before = good.read_bytes()
    resize(good, "-o", tmp_path / name, *options).failed(2, name, "input", "another place")
    assert good.read_bytes() == before
    assert contents(tmp_path) == ["good.safetensors", "link.safetensors", "sub"]


def test_the_base_is_never_overwritten(tmp_path: Path, good: Path) -> None:
    base = Path(shutil.copy(BASE, tmp_path / "base.safetensors"))
    resize(good, "-o", base, "--force", base=base).failed(2, base, "input", "another place")
    assert base.read_bytes() == BASE.read_bytes()


def test_an_existing_output_is_replaced_only_with_force(out: Path, good: Path) -> None:
    out.mkdir()
    target = out / "good_rank1.safetensors"
    target.write_text("mine")
    resize(good, "-o", out).failed(2, target, "--force", "--skip-existing")
    assert target.read_text() == "mine"
    resize(good, "-o", out, "--force").succeeded()
    assert load_file(target).keys() == factors().keys()
    assert contents(out) == ["good_rank1.safetensors"]


def test_one_existing_output_stops_a_batch_before_any_work(
    tmp_path: Path, out: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorashrink.shrinking.session.use_base", lambda *_: pytest.fail("the base was opened"))
    last = adapter(tmp_path / "last.safetensors")
    out.mkdir()
    (out / "last_rank1.safetensors").write_text("mine")
    resize(good, last, "-o", out).failed(2, out / "last_rank1.safetensors", "--force")
    assert contents(out) == ["last_rank1.safetensors"]


@pytest.mark.parametrize("change", ["foreign", "garbage", "recipe", "source"])
def test_an_existing_output_of_another_run_is_not_skipped(tmp_path: Path, out: Path, good: Path, change: str) -> None:
    out.mkdir()
    target = out / "x.safetensors"
    if change == "foreign":
        adapter(target)
    elif change == "garbage":
        target.write_text("mine")
    else:
        source = good if change == "recipe" else adapter(tmp_path / "other.safetensors", alpha=torch.tensor(7.0))
        resize(source, "-o", target, recipe="rank=2" if change == "recipe" else "rank=1").succeeded()
    before = target.read_bytes()
    resize(good, "-o", target, "--skip-existing").failed(2, target)
    assert target.read_bytes() == before


def test_a_dry_run_writes_nothing(out: Path, good: Path) -> None:
    resize(good, "-o", out, "--dry-run").succeeded()
    assert not out.exists()


def test_one_file_name_for_two_outputs_is_refused(tmp_path: Path, out: Path, good: Path) -> None:
    target = out / "x.safetensors"
    resize(good, "-o", target, "-r", "rank=2").failed(2, target, "2 outputs", "folder")
    resize(good, adapter(tmp_path / "last.safetensors"), "-o", target).failed(2, target, "2 outputs", "folder")
    assert contents(out) == []


def test_two_sources_of_one_name_in_one_folder_do_not_become_one_output(tmp_path: Path, out: Path) -> None:
    paths = [adapter(tmp_path / "x.safetensors"), tmp_path / "x.pt"]
    torch.save(load_file(paths[0]), paths[1])
    resize(*paths, "-o", out).failed(2, *paths, "x_rank1.safetensors", "Rename")
    assert contents(out) == []


def test_a_table_does_not_overwrite_an_input(tmp_path: Path, out: Path, good: Path) -> None:
    last = adapter(tmp_path / "last.safetensors")
    before = last.read_bytes()
    resize(good, last, "-o", out, "--csv", last).failed(2, last, "--csv")
    assert last.read_bytes() == before


def test_an_unwritable_table_is_named_before_any_work(tmp_path: Path, out: Path, good: Path) -> None:
    (tmp_path / "file").write_text("")
    table = tmp_path / "file" / "table.csv"
    resize(good, "-o", out, "--csv", table).failed(2, table, "--csv")
    assert contents(out) == []


# --- full disks ---------------------------------------------------------------------------------


def test_a_disk_full_of_data_fails_the_file_and_leaves_nothing(
    tmp_path: Path, out: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def small_disk(number: int, data: bytes, offset: int) -> int:
        if offset + len(data) > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(number, data, offset)

    monkeypatch.setattr(os, "pwrite", small_disk)
    last = adapter(tmp_path / "last.safetensors")
    resize(good, LORA, last, "-o", out).failed(1, out / "lora_rank1.safetensors", "No space left", "another place")
    assert contents(out) == ["good_rank1.safetensors", "last_rank1.safetensors"]


@pytest.mark.parametrize("function", ["pwrite", "fsync", "replace"])
def test_a_full_disk_leaves_no_file(out: Path, good: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    resize(good, "-o", out, "-r", "rank=2", base=None).failed(2, out, "No space left", "another place")
    assert contents(out) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a file system, and only Linux has tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets root mount nothing: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_full_disk_fails_the_file_and_leaves_nothing(tmp_path: Path, good: Path, tiny_disk: Path) -> None:
    last = adapter(tmp_path / "last.safetensors")
    resize(good, LORA, last, "-o", tiny_disk, recipe="rank=8").failed(
        1, tiny_disk / "lora_rank8.safetensors", "No space left"
    )
    assert contents(tiny_disk) == ["good_rank8.safetensors", "last_rank8.safetensors"]
    assert load_file(tiny_disk / "last_rank8.safetensors").keys() == factors().keys()


def test_a_cache_on_a_full_disk_does_not_stop_the_work(
    out: Path, good: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tiny_disk / "filler").write_bytes(bytes(64 << 10))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny_disk))
    assert resize(good, "-o", out, recipe="fro_ckpt=1,thr=-9").status == 0
    assert contents(out) == ["good_frockpt1_th-9.safetensors"]
    assert [path for path in contents(tiny_disk) if path.endswith((".json", ".tmp"))] == []


# --- interruptions ------------------------------------------------------------------------------


def test_an_interruption_while_writing_leaves_finished_files_alone(
    tmp_path: Path, out: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = SafetensorsWriter.write

    def interrupted(self: SafetensorsWriter, tensors: dict[str, Tensor]) -> None:
        if self.path.name.startswith("lora"):
            raise KeyboardInterrupt
        write(self, tensors)

    monkeypatch.setattr(SafetensorsWriter, "write", interrupted)
    last = adapter(tmp_path / "last.safetensors")
    resize(good, LORA, last, "-o", out).failed(130, "interrupted")
    assert "good_rank1.safetensors" in contents(out)
    assert set(contents(out)) <= {"good_rank1.safetensors", "last_rank1.safetensors"}


# A command whose writing takes some seconds.
SLOW = """
import time
from lorashrink.cli import main
from lorashrink.files.writing import SafetensorsWriter
write = SafetensorsWriter.write
def slow(*arguments):
    time.sleep(0.3)
    write(*arguments)
SafetensorsWriter.write = slow
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_writing_leaves_no_partial_file(out: Path, number: signal.Signals) -> None:
    arguments = ["resize", "-r", "rank=2", "-o", str(out), str(LORA)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell starts its children with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    patience = time.monotonic() + 30
    while not contents(out) and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    begun = contents(out)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert [name.endswith(".tmp") for name in begun] == [True]
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines() == ["lorashrink: interrupted; no unfinished file was left"]
    assert contents(out) == []


# --- wrong requests -----------------------------------------------------------------------------

BAD_RECIPES = [
    "",
    ",",
    "rank=1,",
    "rank=1:",
    "thr=",
    "thr=abc",
    "thr=nan",
    "thr=inf",
    "rank",
    "rank=0",
    "rank=1.5",
    "rank=-1",
    "size=0",
    "energy=0",
    "energy=1.1",
    "sv_ratio=0.5",
    "fro_ckpt=1",
    "rank=2,thr=1",
    "thr=-3,thr=-2",
    "frockpt=1,thr=-3",
    "fro_ckpt=1,fro_lora=-1,thr=1",
    "thr=1,rescale=0",
    "thr=1,conv_rank=2",
    "thr=1,min_rank=4,max_rank=2",
    "rank=1:rank=1",
    "rank=1;thr=2",
]


@pytest.mark.parametrize("recipe", BAD_RECIPES)
def test_a_bad_recipe_is_named_before_any_file_is_opened(tmp_path: Path, out: Path, recipe: str) -> None:
    none = tmp_path / "none.safetensors"
    run = resize(none, "-o", out, base=tmp_path / "no_base.safetensors", recipe=recipe)
    run.failed(2, "recipe '")
    assert str(tmp_path) not in "\n".join(run.errors)
    assert not out.exists()


def test_a_misspelt_key_of_a_recipe_gets_a_proposal(good: Path) -> None:
    resize(good, recipe="frockpt=1,thr=-3").failed(2, "unknown key 'frockpt'", "Did you mean fro_ckpt?")


def test_a_recipe_given_twice_is_refused(good: Path) -> None:
    resize(good, "-r", "rank=1").failed(2, "'rank=1'", "twice")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "fp4"], ("dtype", "'fp4'", "bf16")),
        (["-t", ""], ("dtype", "''")),
        (["--device", "nonsense"], ("device", "'nonsense'", "auto")),
        (["--device", "cuda:x"], ("device", "'cuda:x'")),
        (["--device", "cuda:99"], ("device", "cuda:99", "auto")),
        (["--unmapped", "ignore"], ("unmapped", "'ignore'", "keep")),
    ],
    ids=str,
)
def test_an_unknown_option_value_is_named_with_the_allowed_ones(
    out: Path, good: Path, options: list[str], words: tuple[str, ...]
) -> None:
    resize(good, "-o", out, *options).failed(2, *words)
    assert not out.exists()


@pytest.mark.parametrize("command", ["resize", "inspect"])
@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "none", "none/deep.safetensors", "n" * 300])
def test_a_missing_file_is_named(tmp_path: Path, command: str, name: str) -> None:
    Run(command, tmp_path / name, *(["-r", "rank=1"] if command == "resize" else [])).failed(2, name)
    assert contents(tmp_path) == []


def test_a_missing_file_does_not_stop_the_others(tmp_path: Path, out: Path, good: Path) -> None:
    resize(good, tmp_path / "none.safetensors", "-o", out).failed(1, "none.safetensors")
    assert contents(out) == ["good_rank1.safetensors"]


@pytest.mark.parametrize("command", ["resize", "inspect"])
def test_a_circular_link_is_named(tmp_path: Path, command: str) -> None:
    path = tmp_path / "loop.safetensors"
    path.symlink_to(path)
    Run(command, path, *(["-r", "rank=1"] if command == "resize" else [])).failed(2, path)


@pytest.mark.parametrize("command", ["resize", "inspect"])
def test_a_link_to_nothing_is_named_as_one(tmp_path: Path, command: str) -> None:
    path = tmp_path / "link.safetensors"
    path.symlink_to(tmp_path / "gone.safetensors")
    options = ["-r", "rank=1"] if command == "resize" else []
    Run(command, path, *options).failed(2, path, "is a link to", "gone.safetensors, where there is no file")


def test_a_pipe_is_named_as_a_base(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base.safetensors")
    Run("base-norms", tmp_path / "base.safetensors", "-o", tmp_path / "n.json").failed(2, "not a regular file")


@pytest.mark.parametrize("command", ["resize", "inspect"])
def test_a_folder_without_adapters_is_named(tmp_path: Path, command: str, good: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    good.rename(folder / "deep" / "good.safetensors")
    shutil.copy(BASE, folder)
    (folder / ".hidden.safetensors").write_text("")
    (folder / "notes.txt").write_text("")
    options = ["-r", "rank=1"] if command == "resize" else []
    Run(command, folder, *options).failed(2, folder, "--recursive")
    run = Run(command, folder, *options, "--recursive")
    run.succeeded()
    assert "good" in run.stdout


@pytest.mark.parametrize("command", ["resize", "inspect"])
def test_a_glob_that_matches_nothing_is_named(tmp_path: Path, command: str) -> None:
    glob = tmp_path / "style_*.safetensors"
    Run(command, glob, *(["-r", "rank=1"] if command == "resize" else [])).failed(2, glob, "no file matches")


# --- JSON ---------------------------------------------------------------------------------------


def test_json_of_a_run_with_failures_is_one_valid_document(tmp_path: Path, out: Path, good: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    BAD["NaN in up"][1](bad)
    run = resize(good, bad, "-o", out, "--json")
    run.failed(1, bad)
    report = strict_json(run.stdout)
    assert [result["source"] for result in report["results"]] == [str(good)]
    assert [(failure["source"], "NaN" in failure["error"]) for failure in report["failed"]] == [(str(bad), True)]


def test_json_of_a_run_without_success_is_one_valid_document(tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    BAD["cut short"][1](bad)
    run = resize(bad, "-o", out, "--json")
    run.failed(2, bad)
    report = strict_json(run.stdout)
    assert report["results"] == []
    assert [failure["source"] for failure in report["failed"]] == [str(bad)]


@pytest.mark.parametrize(("recipe", "threshold"), [("size=5", None), ("rank=1", None), ("fro_ckpt=1,thr=-3.5", -3.5)])
def test_json_has_null_where_no_score_decided(out: Path, recipe: str, threshold: float | None) -> None:
    run = resize(LORA, "-o", out, "--json", recipe=recipe)
    run.succeeded()
    (result,) = strict_json(run.stdout)["results"]
    assert result["threshold"] == threshold
    assert result["bytes_after"] == Path(result["output"]).stat().st_size


def test_json_of_layers_that_keep_everything_has_no_nan(out: Path, good: Path) -> None:
    run = resize(good, "-o", out, "--json", "-v", base=None, recipe="size=5")
    run.succeeded()
    (result,) = strict_json(run.stdout)["results"]
    assert result["threshold"] is None
    assert [layer["rle_ckpt"] for layer in result["layers"]] == [None]
    assert [layer["rank_after"] for layer in result["layers"]] == [2]


@pytest.mark.parametrize("name", ["NaN in up", "infinity in down", "NaN as alpha", "only zeros"])
def test_json_of_an_inspected_adapter_with_odd_numbers_is_valid(tmp_path: Path, name: str) -> None:
    path = tmp_path / "odd.safetensors"
    BAD[name][1](path)
    run = Run("inspect", "--base", BASE, path, "--json", "--spectrum")
    run.succeeded()
    (table,) = strict_json(run.stdout)["files"]
    assert [layer["name"] for layer in table["layers"]] == [LAYER]


def test_json_of_an_inspection_with_failures_is_one_valid_document(tmp_path: Path, good: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    BAD["cut short"][1](bad)
    run = Run("inspect", good, bad, "--json")
    run.failed(1, bad)
    document = strict_json(run.stdout)
    assert [file["path"] for file in document["files"]] == [str(good)]
    assert [failure["source"] for failure in document["failed"]] == [str(bad)]
