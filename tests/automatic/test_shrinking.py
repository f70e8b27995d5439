"""Shrinking without a recipe: where outputs go, what is left alone, which method is taken, and what a rerun does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.automatic.run import PAGE
from lorashrink.cli import app
from lorashrink.errors import UsageError
from lorashrink.recipes.levels import ADAPTER_LINE, BASE_LINE, LEVELS, error_for

MODEL = lorashrink_example.path("model")
TABLE = lorashrink_example.path("table.safetensors")
STYLE = lorashrink_example.path("loras", "style.safetensors")


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout


@pytest.fixture
def collection(adapter: Path, tmp_path: Path) -> Path:
    """A folder of two adapters, one of them below, with what other programs keep beside them."""
    folder = tmp_path / "loras"
    (folder / "styles").mkdir(parents=True)
    shutil.copy(adapter, folder / "lora.safetensors")
    shutil.copy(adapter, folder / "styles" / "other.v2.safetensors")
    (folder / "lora.preview.png").write_bytes(b"a picture")
    (folder / "styles" / "other.v2.civitai.info").write_text("{}")
    (folder / "styles" / "notes.md").write_text("not of an adapter")
    return folder


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def truth(path: Path) -> dict[str, torch.Tensor]:
    """Layer -> ΔW [out, numbers of in], computed from the file's own tensors in float64."""
    tensors = load_file(path)
    deltas = {}
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            down = tensors[f"{name}.lora_down.weight"].double().flatten(1)
            scale = float(tensors[f"{name}.alpha"]) / len(down)
            deltas[name] = scale * up.double().flatten(1) @ down
    return deltas


def error_between(before: Path, after: Path) -> float:
    old, new = truth(before), truth(after)
    lost = sum(float((delta - new.get(name, torch.zeros(1))).square().sum()) for name, delta in old.items())
    return (lost / sum(float(delta.square().sum()) for delta in old.values())) ** 0.5


def test_a_folder_keeps_its_names_and_tree_below_shrunk(collection: Path) -> None:
    before = snapshot(collection)
    report = ls.shrink(collection)
    names = {
        str(path.relative_to(collection / "shrunk")) for path in (collection / "shrunk").rglob("*") if path.is_file()
    }
    assert {name for name in names if not name.startswith(".")} == {
        "lora.safetensors",
        "lora.preview.png",
        "styles/other.v2.safetensors",
        "styles/other.v2.civitai.info",
        PAGE,
    }
    assert {key: value for key, value in snapshot(collection).items() if not key.startswith("shrunk")} == before
    for result in report.results:
        assert result.output
        assert Path(result.output).stat().st_size == result.bytes_after < 0.9 * result.bytes_before


def test_the_output_names_its_folder_and_what_it_replaced(collection: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(collection)
    assert "1 file written to shrunk: " in run("shrink", "lora.safetensors")
    size = (collection / "shrunk" / "lora.safetensors").stat().st_size
    (result,) = ls.shrink("lora.safetensors", quality="small").results
    assert result.warnings == (f"replaced an earlier file of {size / 1e3:.1f} kB",)
    # relative and absolute names in one call
    assert "2 files written to 2 folders: " in run(
        "shrink", "--rank", "1", "lora.safetensors", collection / "styles" / "other.v2.safetensors"
    )


def test_notes_of_lora_manager_describe_the_smaller_file(collection: Path) -> None:
    notes = {"file_name": "lora", "size": 1, "sha256": "0", "file_path": "/loras/lora.safetensors", "tags": ["style"]}
    (collection / "lora.metadata.json").write_text(json.dumps(notes))
    ls.shrink(collection / "lora.safetensors")
    output = collection / "shrunk" / "lora.safetensors"
    assert json.loads(output.with_suffix(".metadata.json").read_text()) == {
        "file_name": "lora",
        "size": output.stat().st_size,
        "sha256": hashlib.sha256(output.read_bytes()).hexdigest(),
        "file_path": str(output),
        "tags": ["style"],
    }


def test_a_file_goes_into_shrunk_beside_it(collection: Path) -> None:
    report = ls.shrink(collection / "lora.safetensors")
    assert [result.output for result in report.results] == [str(collection / "shrunk" / "lora.safetensors")]


def test_outputs_have_the_error_of_the_level(collection: Path, base: Path) -> None:
    report = ls.shrink(collection / "lora.safetensors", base=base, output=collection / "out", quality="small")
    (result,) = report.results
    assert result.method == "base"
    allowed = error_for(LEVELS["small"], BASE_LINE)
    assert result.relative_error <= allowed
    assert error_between(collection / "lora.safetensors", Path(str(result.output))) == pytest.approx(
        result.relative_error,
        abs=5e-3,  # what 8 bits add
    )
    assert any("pictures not checked" in note and "22.4 %" in note for note in report.notes)


def test_without_a_base_the_energy_of_each_layer_decides(collection: Path) -> None:
    (result,) = ls.shrink(collection / "lora.safetensors").results
    assert result.method == "adapter"
    assert result.recipe == f"energy={1 - error_for(LEVELS['high'], ADAPTER_LINE) ** 2:.6g}"
    assert "about half as large" in result.why


def test_a_rerun_writes_nothing_again(collection: Path) -> None:
    ls.shrink(collection)
    before = snapshot(collection / "shrunk")
    report = ls.shrink(collection)
    assert {result.skipped for result in report.results} == {"made by an earlier run"}
    after = snapshot(collection / "shrunk")
    assert {key: value for key, value in after.items() if key != PAGE} == {
        key: value for key, value in before.items() if key != PAGE
    }


def test_a_rerun_makes_what_is_missing_or_changed(collection: Path) -> None:
    ls.shrink(collection)
    (collection / "shrunk" / "lora.safetensors").unlink()
    second = collection / "styles" / "other.v2.safetensors"
    tensors = {key: tensor * 2 if "up" in key else tensor for key, tensor in load_file(second).items()}
    save_file(tensors, second)
    with pytest.raises(AssertionError):
        assert error_between(second, collection / "shrunk/styles/other.v2.safetensors") < 0.2
    report = ls.shrink(collection, force=True)
    assert [result.skipped for result in report.results] == [None, None]
    assert error_between(second, collection / "shrunk/styles/other.v2.safetensors") < 0.2


def test_another_quality_replaces_own_outputs(collection: Path) -> None:
    (high,) = ls.shrink(collection / "lora.safetensors").results
    (small,) = ls.shrink(collection / "lora.safetensors", quality="small").results
    assert small.bytes_after < high.bytes_after
    assert Path(str(small.output)).stat().st_size == small.bytes_after


def test_a_damaged_record_costs_a_rerun_and_nothing_else(collection: Path) -> None:
    ls.shrink(collection)
    record = collection / "shrunk" / ".lorashrink-shrunk.jsonl"
    line = json.loads(record.read_text().splitlines()[0])
    line["result"]["bytes_before"] = "many"
    record.write_text(f"{json.dumps(line)}\n[1]\n{{broken\n")
    report = ls.shrink(collection)
    assert not report.failed
    assert [result.skipped for result in report.results] == [None, None]


def test_a_rerun_says_what_was_copied_and_removed(collection: Path) -> None:
    source = collection / "lora.safetensors"
    tensors = load_file(source)
    layer = next(key for key in tensors if key.endswith("lora_up.weight"))
    tensors[layer] = torch.zeros_like(tensors[layer])
    save_file({**tensors, "anything": torch.ones(3)}, source)
    first, second = (run("shrink", source, "-v") for _ in range(2))
    said = [line for line in first.splitlines() if line.startswith(("lora.safetensors: ", "lora: "))]
    assert "lora.safetensors: 1 copied: not part of an adapter layer" in said
    assert [line for line in second.splitlines() if line in said] == said
    (result,) = ls.shrink(source).results
    assert result.skipped == "made by an earlier run"


@pytest.mark.parametrize("damage", [{"details": [1]}, {"details": "text"}, {"warnings": [None]}, {"loads_in": [2]}])
def test_a_record_of_other_things_than_texts_is_not_believed(collection: Path, damage: dict[str, object]) -> None:
    ls.shrink(collection / "lora.safetensors")
    record = collection / "shrunk" / ".lorashrink-shrunk.jsonl"
    line = json.loads(record.read_text())
    line["result"] |= damage
    record.write_text(json.dumps(line) + "\n")
    (result,) = ls.shrink(collection / "lora.safetensors").results
    assert result.skipped is None


def test_other_files_in_the_way_are_not_replaced(collection: Path) -> None:
    output = collection / "shrunk" / "lora.safetensors"
    output.parent.mkdir()
    save_file({"a": torch.zeros(2)}, output)
    before = output.read_bytes()
    report = ls.shrink(collection)
    assert [Path(failure.input).name for failure in report.failed] == ["lora.safetensors"]
    assert "--force" in report.failed[0].hint
    assert output.read_bytes() == before
    assert len(report.written) == 1
    assert not ls.shrink(collection, force=True).failed


def test_own_outputs_are_never_shrunk_again(collection: Path) -> None:
    (first,) = ls.shrink(collection / "lora.safetensors", quality="small").results
    moved = collection / "small.safetensors"
    shutil.move(str(first.output), moved)
    results = {Path(result.input).name: result for result in ls.shrink(collection, quality=20).results}
    assert results["small.safetensors"].output is None
    assert "made by lorashrink" in str(results["small.safetensors"].skipped)
    assert results["lora.safetensors"].output


def test_files_that_would_gain_little_are_listed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    flat = torch.linalg.qr(torch.randn(64, 8))[0]
    tensors = {
        f"{name}.lora_up.weight": flat.contiguous().half(),
        f"{name}.lora_down.weight": flat.T.contiguous().half(),
        f"{name}.alpha": torch.tensor(8.0),
    }
    save_file(tensors, tmp_path / "flat.safetensors")
    (tmp_path / "flat.txt").write_text("what it is")
    text = run("shrink", "-t", "same", tmp_path)
    assert "not written, would" in text
    assert not (tmp_path / "shrunk" / "flat.safetensors").exists()
    assert not (tmp_path / "shrunk" / "flat.txt").exists()


def test_a_table_beside_the_model_is_taken_without_being_asked(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    shutil.copy(TABLE, tmp_path / "model-table.safetensors")
    shutil.copy(STYLE, tmp_path / "style.safetensors")
    (result,) = ls.shrink(tmp_path / "style.safetensors", base=tmp_path / "model", size="500kB").results
    assert result.method == "calibrated"
    assert "model-table.safetensors, beside the model" in result.why
    assert result.bytes_after <= 500_000
    assert result.recipe == "calib=1,bytes=1,size=0.5MB"


def test_a_table_in_the_users_cache_serves_without_a_model(tmp_path: Path) -> None:
    from lorashrink.automatic.methods import table_folder

    folder = table_folder()
    assert folder
    folder.mkdir(parents=True)
    shutil.copy(TABLE, folder / "any.safetensors")
    shutil.copy(STYLE, tmp_path / "style.safetensors")
    (result,) = ls.shrink(tmp_path / "style.safetensors", rank=4).results
    assert (result.method, result.recipe) == ("calibrated", "calib=1,rank=4")


def test_an_adapter_for_another_model_is_shrunk_alone(collection: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(16, 3072) * torch.logspace(0, -4, 16)[:, None],
        f"{name}.lora_B.weight": torch.randn(3072, 16),
    }
    save_file(tensors, collection / "flux.safetensors")
    results = {Path(result.input).name: result for result in ls.shrink(collection, calibration=TABLE, rank=2).results}
    assert results["flux.safetensors"].method == "adapter"
    assert results["flux.safetensors"].why == "method: the LoRA alone. table.safetensors is for another model"


def test_a_file_that_fails_does_not_stop_the_others(collection: Path) -> None:
    (collection / "broken.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{not json")
    document = json.loads(run("shrink", "--json", collection, status=1))
    assert [Path(failure["input"]).name for failure in document["failed"]] == ["broken.safetensors"]
    assert {"input", "error", "hint"} == set(document["failed"][0])
    assert len([result for result in document["results"] if result["output"]]) == 2


def test_json_has_the_documented_fields(collection: Path) -> None:
    document = json.loads(run("shrink", "--json", collection))
    assert {"version", "command", "results", "failed"} <= document.keys()
    assert document["command"] == "shrink"
    for result in document["results"]:
        assert {"input", "output", "bytes_before", "bytes_after", "method", "dtype"} <= result.keys()
        assert {"predicted_db", "worst_picture_db", "loads_in", "skipped"} <= result.keys()


def test_a_peft_folder_becomes_a_peft_folder(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -4, 8)[:, None]
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": torch.randn(8, 64) * spectrum, f"{key}.lora_B.weight": torch.randn(64, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (result,) = ls.shrink(folder).results
    assert result.output == str(tmp_path / "shrunk" / "peft")
    assert json.loads((Path(result.output) / "adapter_config.json").read_text())["r"] < 8
    (again,) = ls.shrink(folder).results
    assert again.skipped == "made by an earlier run"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quality": "best"}, "same, high, small"),
        ({"quality": 200}, "dB from 10 to 80"),
        ({"size": "large"}, "such as 50MB"),
        ({"size": "1MB", "rank": 4}, "one of them"),
        ({"rank": 0}, "at least 1"),
        ({"output": "out.pt"}, "Name a folder"),
    ],
)
def test_options_that_mean_nothing_are_refused(collection: Path, options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ls.shrink(collection, **options)
    assert not (collection / "shrunk").exists()


def test_a_record_serves_only_the_same_request(collection: Path) -> None:
    first = ls.shrink(collection, quality=35)
    coarser = ls.shrink(collection, quality=36)
    assert [result.skipped for result in coarser.results] == [None, None]
    assert [a.bytes_after < b.bytes_after for a, b in zip(first.results, coarser.results, strict=True)] == [True, True]


def test_outputs_never_replace_inputs(collection: Path) -> None:
    before = snapshot(collection)
    with pytest.raises(ls.LorashrinkError, match="never overwritten"):
        ls.shrink(collection, output=collection, force=True)
    assert snapshot(collection) == before


def test_sizes_are_those_on_the_disk_and_the_source_is_named(collection: Path) -> None:
    (result,) = ls.shrink(collection / "lora.safetensors").results
    assert result.bytes_before == os.path.getsize(result.input)
    with safe_open(str(result.output), "np") as opened:
        assert opened.metadata()["lorashrink.recipe"] == result.recipe
    assert np.isclose(result.share, result.bytes_after / result.bytes_before)
