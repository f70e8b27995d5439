"""`merge`: files, metadata and errors, and its outputs in diffusers and PEFT."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from loaders import (
    CHANGED,
    SAME,
    differences,
    diffusers_file,
    folder,
    kohya,
    ldm_name,
    loaded,
    outputs,
    pipe,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_combining import Q, added, lora, merged, summed, write
from torch import nn
from typer.testing import CliRunner

import lorashrink
from lorashrink.cli import app
from lorashrink.errors import InputError, OutputError, UsageError
from lorashrink.making.merging import merge
from lorashrink.shrinking.run import resize

__all__ = ["folder", "pipe"]  # fixtures


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["merge", *(str(argument) for argument in arguments)])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    a = write(tmp_path, "a", lora(Q, 40, 30, 6, 3.0))
    return a, write(tmp_path, "b", lora(Q, 40, 30, 4, seed=7))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("alone", [False, True])
def test_an_alpha_that_is_no_number_is_an_error_of_its_file(
    tmp_path: Path, pair: tuple[Path, Path], alpha: float, alone: bool
) -> None:
    bad = write(tmp_path, "bad", lora(Q, 40, 30, 6, alpha))
    with pytest.raises(InputError, match=r"bad\.safetensors: layer .* contains NaN or infinity"):
        merge([bad] if alone else [pair[0], f"{bad}:0.5"], output=tmp_path / "sum.safetensors")


def test_factors_whose_sum_overflows_are_an_error(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    large = {key: torch.full_like(tensor.float(), 3e37) for key, tensor in lora(Q, 40, 30, 4).items()}
    bad = write(tmp_path, "bad", large)
    with pytest.raises(InputError, match="contains NaN or infinity"):
        merge([pair[0], f"{bad}:100"], output=tmp_path / "sum.safetensors")


def test_a_vector_and_a_matrix_of_one_weight_are_not_added(tmp_path: Path) -> None:
    matrix, vector = ({f"{Q}.diff": torch.ones(shape)} for shape in ((40, 30), (40,)))
    other = {"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(8, 8)}
    a, b = write(tmp_path, "a", matrix | other), write(tmp_path, "b", vector | other)
    with pytest.raises(InputError, match="is a vector in one adapter"):
        merge([a, b], output=tmp_path / "sum.safetensors")


# --- the sum in other programs --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # two adapters, as meant
@pytest.mark.parametrize("first", ["kohya", "diffusers"])
def test_diffusers_draws_with_the_sum_as_with_both(pipe, folder, tmp_path: Path, first: str) -> None:
    """Other namings, ranks and layers, compared with `set_adapters`."""
    paths = {
        "kohya": kohya(pipe, tmp_path / "kohya.safetensors", ldm_name),
        "diffusers": diffusers_file(pipe, tmp_path / "diffusers.safetensors"),
    }
    weights = {"kohya": 0.7, "diffusers": -0.4}
    bare = outputs(pipe)
    try:
        for name, path in paths.items():
            pipe.load_lora_weights(str(path), adapter_name=name)
        pipe.set_adapters(list(weights), adapter_weights=list(weights.values()))
        expected = outputs(pipe)
    finally:
        pipe.unload_lora_weights()
    order = sorted(weights, key=lambda name: name != first)
    out = merged([(paths[name], weights[name]) for name in order], tmp_path / "out.safetensors", base=folder)
    actual, _ = loaded(pipe, out)
    assert max(differences(actual, expected).values()) < SAME
    assert min(differences(expected, bare).values()) > CHANGED


def test_a_peft_folder_first_gives_a_peft_folder_that_peft_loads(tmp_path: Path) -> None:
    """The settings include modules that only the second adapter has."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(12, 10), "two": nn.Linear(10, 8)})
    for number, names in enumerate((["one"], ["one", "two"])):
        config = LoraConfig(r=3 + number, lora_alpha=5, target_modules=names, init_lora_weights=False)
        get_peft_model(
            nn.ModuleDict({k: nn.Linear(v.in_features, v.out_features) for k, v in model.items()}), config
        ).save_pretrained(tmp_path / f"{number}")
    terms = [(tmp_path / "0", 0.5), (tmp_path / "1", -2.0)]
    out = merged(terms, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    expected = summed(terms)
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}
    changed = PeftModel.from_pretrained(model, out).merge_and_unload()
    for name, weight in before.items():
        difference = changed[name].weight.detach() - weight
        assert torch.allclose(difference.double(), expected[f"base_model.model.{name}"], atol=1e-5)


# --- the command --------------------------------------------------------------------------------


def test_the_json_is_that_of_resize_with_sources(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    out = tmp_path / "out.safetensors"
    document = json.loads(run(f"{a}:0.7", b, "-o", out, "-r", "rank=2", "--json"))
    (result,) = document["results"]
    assert result["sources"] == [{"path": str(a), "weight": 0.7}, {"path": str(b), "weight": 1.0}]
    assert result["source"] == f"{a}:0.7,{b}:1"
    assert result["bytes_before"] == a.stat().st_size + b.stat().st_size
    assert [(layer["rank_before"], layer["rank_after"]) for layer in result["layers"]] == [(10, 2)]
    assert document["failed"] == []
    plain = json.loads(CliRunner().invoke(app, ["resize", "--json", "-r", "rank=1", str(a)]).stdout)
    assert plain["results"][0]["sources"] == []


def test_without_a_recipe_everything_is_kept_in_the_widest_dtype(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    half = write(
        tmp_path, "half", {key: tensor.half() if tensor.ndim else tensor for key, tensor in load_file(b).items()}
    )
    assert "1 file written" in run(f"{half}:0.5", f"{a}:0.5", "-o", tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors[f"{Q}.lora_up.weight"].dtype == torch.float32
    assert tensors[f"{Q}.lora_up.weight"].shape == (40, 10)
    assert float(tensors[f"{Q}.alpha"]) == 10
    run(f"{half}:0.5", "-o", tmp_path / "alone.safetensors")
    assert load_file(tmp_path / "alone.safetensors")[f"{Q}.lora_up.weight"].dtype == torch.float16


def test_several_recipes_go_into_a_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    run(*pair, "-o", tmp_path / "out", "-r", "rank=2:rank=3")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a+b_rank2.safetensors",
        "a+b_rank3.safetensors",
    ]


def test_resize_of_a_sum_is_the_same_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    merge([f"{a}:0.7", f"{b}:-0.5"], recipes="rank=3", output=tmp_path / "merged.safetensors")
    text = f"{a}:0.7,{b}:-0.5"
    report = resize([text, a], recipes="rank=3", output=tmp_path / "out")
    assert report.failed == ()
    assert [len(result.sources) for result in report.results] == [2, 0]
    resized = tmp_path / "out" / "a+b_rank3.safetensors"
    shrunk, merged_tensors = load_file(resized), load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(shrunk[key], merged_tensors[key]) for key in shrunk.keys() | merged_tensors.keys())
    again = resize([text], recipes="rank=3", output=tmp_path / "out", skip_existing=True)
    assert [result.skipped for result in again.results] == [True]
    with pytest.raises(OutputError, match="exists already"):
        resize([text], recipes="rank=3", output=tmp_path / "out")


def test_a_sum_with_other_contents_is_not_skipped(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    for text, skipped in ((f"{a}:0.7,{b}", 1), (f"{a}:0.6,{b}", 0), (f"{a}:0.7,{b}", 1)):
        report = resize([text], recipes="rank=3", output=tmp_path / "out", skip_existing=True)
        assert len(report.results) == skipped
    write(tmp_path, "b", lora(Q, 40, 30, 4, seed=8))
    report = resize([f"{a}:0.7,{b}"], recipes="rank=3", output=tmp_path / "out", skip_existing=True)
    assert "was made from another source" in report.failed[0].error


def test_a_dry_run_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = run(*pair, "-o", tmp_path / "out.safetensors", "-r", "rank=1", "--dry-run")
    assert "would be written" in text
    assert not (tmp_path / "out.safetensors").exists()


def test_recipes_with_a_base_see_the_sum(adapter: Path, base: Path, tmp_path: Path) -> None:
    """Twice the strength keeps more dimensions at the same threshold."""
    kept = []
    for weight in (0.5, 2):
        document = json.loads(
            run(base, f"{adapter}:{weight}", "-o", tmp_path / f"{weight}", "-r", "fro_ckpt,thr=-1.6", "--json")
        )
        kept.append(sum(layer["rank_after"] for layer in document["results"][0]["layers"]))
    assert kept[0] < kept[1]


# --- metadata -----------------------------------------------------------------------------------


def test_the_sum_keeps_metadata_that_all_parts_share(tmp_path: Path) -> None:
    common = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora", "ss_v2": "False"}
    common |= {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_sd_model_name": "/home/me/model.safetensors",
    }
    first = common | {
        "ss_network_dim": "6",
        "ss_learning_rate": "0.1",
        "modelspec.title": "Style",
        "sshs_model_hash": "1",
    }
    second = common | {"ss_network_dim": "4", "ss_learning_rate": "0.2", "ss_steps": "3", "sshs_model_hash": "1"}
    a = write(tmp_path, "a", lora(Q, 40, 30, 6, 3.0), first)
    b = write(tmp_path, "hero", lora(Q, 40, 30, 4, seed=7), second | {"modelspec.title": ""})
    merge([f"{a}:0.7", f"{b}:-0.5"], output=tmp_path / "out.safetensors")
    entries = metadata_of(tmp_path / "out.safetensors")
    sources = json.loads(entries["lorashrink.sources"])
    assert [(entry["name"], entry["weight"]) for entry in sources] == [
        ("a.safetensors", 0.7),
        ("hero.safetensors", -0.5),
    ]
    assert all(len(entry["sha256"]) == 64 for entry in sources)
    kept = {key: text for key, text in entries.items() if key.startswith(("ss_", "modelspec."))}
    assert kept == {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_v2": "False",
        "ss_network_dim": "10",
        "ss_network_alpha": "10",
        "ss_training_comment": "resized from rank 10 with lorashrink energy=1; "
        "merged from a.safetensors:0.7 + hero.safetensors:-0.5",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": "Style + hero",
        "modelspec.merged_from": "Style, hero",
    }
    assert entries["sshs_model_hash"] != "1"
    assert str(tmp_path) not in json.dumps(entries)


# --- errors -------------------------------------------------------------------------------------


def test_an_input_is_not_overwritten_and_an_output_only_with_force(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    assert "is an input" in run(a, b, "-o", b, "--force", status=2)
    run(a, b, "-o", tmp_path / "out.safetensors")
    before = (tmp_path / "out.safetensors").read_bytes()
    assert "exists already" in run(a, f"{b}:2", "-o", tmp_path / "out.safetensors", status=2)
    assert (tmp_path / "out.safetensors").read_bytes() == before
    run(a, f"{b}:2", "-o", tmp_path / "out.safetensors", "--force")
    assert (tmp_path / "out.safetensors").read_bytes() != before


def test_an_unwritable_output_is_found_before_any_work(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "is no folder" in run(*pair, "-o", tmp_path / "file" / "out.safetensors", status=2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["{a}:x", "{b}"], "'x' is no weight"),
        (["{a}", "{a}:0.5"], "is there twice"),
        (["{a}:0"], "weights are all 0"),
        (["{a}", "{folder}/missing.safetensors:0.5"], "missing.safetensors: no such file"),
        (["{a}", "{b}", "-r", "thr=-2,fro_ckpt"], "compares with the base model"),
        (["{a}", "{b}", "-r", "nonsense=1"], "unknown key"),
        (["{a}", "{b}", "--naming", "diffusers"], "new names come from the base"),
        (["{a}", "{b}", "--as-base-delta"], "needs the weights of the base"),
    ],
)
def test_errors_of_the_command_are_one_line(
    pair: tuple[Path, Path], tmp_path: Path, arguments: list[str], error: str
) -> None:
    a, b = pair
    words = [argument.format(a=a, b=b, folder=tmp_path) for argument in arguments]
    text = run(*words, "-o", tmp_path / "out.safetensors", status=2)
    assert error in text
    assert "Traceback" not in text
    assert not (tmp_path / "out.safetensors").exists()


def test_the_python_function_is_public(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = lorashrink.merge(pair, output=tmp_path / "out.safetensors")
    assert [source.weight for source in report.results[0].sources] == [1.0, 1.0]
    with pytest.raises(UsageError, match="name the adapters"):
        lorashrink.merge([], output=tmp_path / "out.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no adapter")
    with pytest.raises(InputError, match=r"broken\.safetensors"):
        lorashrink.merge([pair[0], tmp_path / "broken.safetensors"], output=tmp_path / "more.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors", "broken.safetensors", "out.safetensors"]
    assert added(tmp_path / "out.safetensors").keys() == {Q}
