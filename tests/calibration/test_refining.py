"""`refine` brings predictions nearer, never further, and changes nothing else of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import write_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import write_adapter, write_flux, write_sd1, write_sd3
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.calibration import refine
from lorashrink.calibration.refine import Refined
from lorashrink.cli import app
from lorashrink.cli.refining import print_refined
from lorashrink.errors import FamilyMismatch, InputError, LorashrinkError, NonFinite, OutputError, UsageError
from lorashrink.files.disk import sha256_file
from lorashrink.files.hashes import with_hashes
from lorashrink.files.header import Arrangement
from lorashrink.files.reading import open_tensors

MODEL, STYLE = lorashrink_example.path("model"), lorashrink_example.path("loras", "style.safetensors")
LINES = (
    "a big red circle on a white background, sks style --w 64 --h 64 --d 1 --l 4 --s 4\n"
    "a small blue star on a black background, sks style --w 64 --h 64 --d 2 --l 4 --s 4\n"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(LINES)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The style with one rank of each layer."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    assert not ls.resize(STYLE, recipes="rank=1", output=path).failed
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        metadata: dict[str, str] = opened.metadata()
        return metadata


def equal(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(
        torch.equal(tensor.reshape(-1).view(torch.uint8), second[key].reshape(-1).view(torch.uint8))
        for key, tensor in first.items()
    )


@pytest.fixture(scope="module")
def refined(prompts: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a few steps, as the command prints it."""
    output = tmp_path_factory.mktemp("refined") / "better.safetensors"
    command = ["refine", str(small), "--like", str(STYLE), "--model", str(MODEL), "--prompts", str(prompts), "--json"]
    outcome = CliRunner().invoke(app, [*command, "-o", str(output), "--steps", "10", "--batch", "3"])
    assert outcome.exit_code == 0, outcome.stderr
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


# --- what it gains ------------------------------------------------------------------------------


def test_a_few_steps_bring_predictions_nearer_and_keep_all_shapes(small: Path, refined: dict[str, Any]) -> None:
    assert refined["improved"]
    assert refined["loss_after"] < 0.9 * refined["loss_before"]
    assert refined["steps"] == 10
    old, new = load_file(small), load_file(refined["path"])
    assert refined["layers"] == len({key.partition(".")[0] for key in old})
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in old.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in new.items()
    }
    changed = [key for key in old if not torch.equal(old[key], new[key])]
    assert {key.partition(".")[2] for key in changed} == {"lora_up.weight", "lora_down.weight"}
    assert {key[:8] for key in changed} == {"lora_une", "lora_te1", "lora_te2"}


def test_only_hashes_and_the_refinement_are_new_in_the_metadata(small: Path, refined: dict[str, Any]) -> None:
    output = Path(refined["path"])
    old, new = metadata_of(small), metadata_of(output)
    # the legacy hash reads bytes from 1 MB on, and a file as small as this has none
    hashes = {"sshs_model_hash", "modelspec.hash_sha256"} & old.keys()
    assert {key for key in new if new[key] != old.get(key)} == {"lorashrink.refined", *hashes}
    assert json.loads(new["lorashrink.refined"]) == {"steps": 10, "like_sha256": sha256_file(STYLE)}
    with open_tensors(output) as store:
        names = sorted(store.tensors, key=lambda key: store.tensors[key].offset)
        data = [bytes(chunk) for key in names for chunk in store.chunks(key)]
        assert with_hashes(new, Arrangement(store.tensors), data) == new


def test_the_reported_loss_is_that_of_the_written_file(prompts: Path, refined: dict[str, Any], tmp_path: Path) -> None:
    """A refined file refined again starts where the first one ended."""
    source = refined["path"]
    again = ls.refine(
        source, like=STYLE, model=MODEL, output=tmp_path / "two.safetensors", prompts=prompts, steps=1, batch=1
    )
    assert again.loss_before == pytest.approx(refined["loss_after"], rel=1e-3)
    assert again.loss_after <= again.loss_before


def test_training_gains_on_every_device(small: Path, prompts: Path, tmp_path: Path, device: str) -> None:
    """In the dtype that is usual there."""
    result = ls.refine(
        small, like=STYLE, model=MODEL, output=tmp_path / "r.safetensors", prompts=prompts, steps=10, batch=3,
        device=device,
    )  # fmt: skip
    assert result.improved
    assert result.loss_after < 0.95 * result.loss_before


# --- what it never does -------------------------------------------------------------------------


def test_a_rate_that_is_too_high_falls_and_nothing_gets_worse(
    prompts: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refine, "_RATE", 1e3)
    monkeypatch.setattr(refine, "_ROUND", 1)
    output = tmp_path / "same.safetensors"
    result = ls.refine(
        small, like=STYLE, model=MODEL, output=output, prompts=prompts, steps=3, batch=1, closed_form=False
    )
    assert result.rates == (1e3, 5e2, 2.5e2)
    assert not result.improved
    assert result.loss_after == result.loss_before
    assert equal(small, output)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (write_sd1, ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_down_blocks_0_resnets_0_conv1")),
        (write_flux, ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1")),
        (write_sd3, ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.1.ff.net.0.proj")),
    ],
    ids=["sd1", "flux", "sd3"],
)
def test_a_perfect_start_stays_bit_by_bit_on_every_kind_of_model(
    write: Callable[[Path], Path], names: tuple[str, ...], tmp_path: Path
) -> None:
    """These hooks and PEFT give the same predictions, also for fused layers."""
    model = write(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 4 --l 4 --d 1\na dog --w 64 --h 64 --s 4 --l 4 --d 2\n")
    lora = write_adapter(tmp_path / "lora.safetensors", model, names)
    output = tmp_path / "same.safetensors"
    result = ls.refine(lora, like=lora, model=model, output=output, prompts=prompts, steps=3)
    assert result.loss_before < 1e-8
    assert (result.improved, result.steps, result.layers) == (False, 0, len(names))
    assert equal(lora, output)


def test_an_interrupted_refinement_leaves_no_file(prompts: Path, small: Path, tmp_path: Path) -> None:
    def stop(text: str, _: int, __: int) -> None:
        if text == "refining":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ls.refine(
            small, like=STYLE, model=MODEL, output=tmp_path / "a.safetensors", prompts=prompts, batch=1, progress=stop
        )
    assert list(tmp_path.iterdir()) == []


# --- bad input ----------------------------------------------------------------------------------


def test_wrong_requests_are_refused(prompts: Path, small: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"

    def refused(error: type[LorashrinkError], match: str, shrunk: Path = small, **options: object) -> None:
        with pytest.raises(error, match=match):
            ls.refine(shrunk, **{"like": STYLE, "model": MODEL, "output": output, "prompts": prompts} | options)

    refused(UsageError, r"ends in \.safetensors", output=tmp_path / "a.pt")
    refused(UsageError, "at least 1", steps=0, closed_form=False)
    refused(OutputError, "is an input", output=small, force=True)
    refused(OutputError, "is an input", output=STYLE, force=True)
    (tmp_path / "one.txt").write_text("a cat --w 64 --h 64 --s 1 --l 4\n")
    refused(UsageError, "too few steps", prompts=tmp_path / "one.txt")
    output.touch()
    refused(OutputError, "exists already")
    assert output.read_bytes() == b""


def test_adapters_that_cannot_be_refined_are_refused(prompts: Path, tmp_path: Path) -> None:
    def refused(error: type[LorashrinkError], match: str, tensors: dict[str, torch.Tensor]) -> None:
        path = write_tensors(tmp_path / "bad.safetensors", tensors)
        with pytest.raises(error, match=match):
            ls.refine(path, like=STYLE, model=MODEL, output=tmp_path / "out.safetensors", prompts=prompts)
        assert not (tmp_path / "out.safetensors").exists()

    style = load_file(STYLE)
    name = next(key.partition(".")[0] for key in style if "proj_in" in key)
    layer = {key: tensor for key, tensor in style.items() if key.startswith(f"{name}.")}
    refused(NonFinite, "shrunk adapter", {key: torch.full_like(tensor, math.nan) for key, tensor in layer.items()})
    refused(InputError, "dora", {**layer, f"{name}.dora_scale": torch.ones(len(layer[f"{name}.lora_up.weight"]), 1)})
    flux = "transformer.single_transformer_blocks.0.proj_mlp.lora_"
    refused(FamilyMismatch, "FLUX", {f"{flux}A.weight": torch.ones(2, 3072), f"{flux}B.weight": torch.ones(12288, 2)})


def test_the_command_names_what_is_missing(small: Path) -> None:
    outcome = CliRunner().invoke(app, ["refine", str(small), "--like", str(STYLE)])
    assert outcome.exit_code == 2
    assert "--model" in outcome.stderr


def test_the_command_says_whether_anything_was_gained(capsys: pytest.CaptureFixture[str]) -> None:
    better = Refined("b.safetensors", "a.safetensors", "l.safetensors", "sdxl", 7, 120, (0.01,), 4.0, 1.0, True, 61.0)
    print_refined(better)
    assert "25% of what it was" in capsys.readouterr().out
    print_refined(replace(better, loss_after=4.0, improved=False))
    assert "did not help; the file has the tensors of a.safetensors" in capsys.readouterr().out
