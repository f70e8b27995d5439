"""Parts of a model for which diffusers alone has names: Wan 2.2's second transformer, and connectors of LTX-2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conversions import few
from fixtures import shapes
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import lorashrink
from lorashrink.bases import open_base
from lorashrink.cli import app
from lorashrink.making.conversion import convert
from lorashrink.making.extraction import extract
from lorashrink.shrinking.run import resize

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "blocks.0.attn1.to_q"


def random(tensors: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) / 16 for key, shape in tensors.items()}


def folder(path: Path, seeds: dict[str, int]) -> Path:
    """A folder of Wan 2.2 whose parts have the numbers of these seeds."""
    for part, seed in seeds.items():
        (path / part).mkdir(parents=True)
        save_file(random(few(shapes("base_wan21_1_3b_diffusers")), seed), path / part / WEIGHTS)
    return path


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    return folder(tmp_path / "wan", {"transformer": 0, "transformer_2": 1})


def adapter(path: Path, *prefixes: str, columns: int = 48) -> Path:
    names = [f"{prefix}{LAYER}" for prefix in prefixes]
    pairs = {
        f"{name}.lora_{side}.weight": shape
        for name in names
        for side, shape in (("A", (4, columns)), ("B", (columns, 4)))
    }
    save_file(random(pairs, 2), path)
    return path


def test_layers_of_the_second_transformer_find_its_weights(wan: Path) -> None:
    with open_base(wan) as base:
        for part in ("transformer", "transformer_2"):
            (view,) = base.find(f"{part}.{LAYER}")
            assert view.key == f"{part}.{LAYER}.weight"
        (view,) = base.find(f"base_model.model.{LAYER}")
        assert view.key == f"transformer.{LAYER}.weight"


def test_both_transformers_shrink_by_their_own_base(wan: Path, tmp_path: Path) -> None:
    source = adapter(tmp_path / "a.safetensors", "transformer.", "transformer_2.")
    (result,) = resize(source, base=wan, recipes="fro_ckpt=1,thr=-9", output=tmp_path / "out").results
    assert len(result.layers) == 2
    assert result.verbatim == ()
    assert lorashrink.inspect(source).files[0].loads.loads_in == ()


def test_the_difference_of_both_transformers_is_extracted(wan: Path, tmp_path: Path) -> None:
    tuned = folder(tmp_path / "tuned", {"transformer": 0, "transformer_2": 3})
    report = extract(tuned, wan, recipes="energy=0.99", naming="diffusers", output=tmp_path / "a.safetensors")
    keys = load_file(report.results[0].output).keys()
    assert f"transformer_2.{LAYER}.lora_A.weight" in keys
    assert not any(key.startswith("transformer.") for key in keys)  # it has not changed


@pytest.mark.parametrize(("naming", "program"), [("kohya", "kohya"), ("comfy", "ComfyUI")])
def test_a_naming_without_a_name_for_a_part_is_refused(wan: Path, tmp_path: Path, naming: str, program: str) -> None:
    source = adapter(tmp_path / "a.safetensors", "transformer.", "transformer_2.")
    (failure,) = convert(source, base=wan, naming=naming, output=tmp_path / "out").failed
    assert f"{program} has no name for the part transformer_2" in failure.error
    first = adapter(tmp_path / "b.safetensors", "transformer.")
    assert not convert(first, base=wan, naming=naming, output=tmp_path / "out").failed


def test_equal_names_of_two_models_are_printed_with_their_folders(wan: Path, tmp_path: Path) -> None:
    tuned = folder(tmp_path / "tuned", {"transformer_2": 3})
    paths = [str(path / "transformer_2") for path in (tuned, wan)]
    result = CliRunner().invoke(app, ["extract", *paths, "-r", "rank=2", "-o", str(tmp_path / "a.safetensors")])
    line = next(line for line in result.output.replace("\n", "").split("The LoRA turns ")[1:])
    assert line.replace(" ", "").startswith(f"{paths[1]}into{paths[0]}".replace(" ", ""))


def test_connectors_of_ltx_2_find_their_weights(tmp_path: Path) -> None:
    model = tmp_path / "ltx"
    (model / "transformer").mkdir(parents=True)
    (model / "connectors").mkdir()
    save_file(random(few(shapes("base_ltxv_2b_diffusers")), 0), model / "transformer" / WEIGHTS)
    name = "video_connector.transformer_blocks.0.attn1.to_q"
    save_file(random({f"{name}.weight": (48, 48)}, 1), model / "connectors" / WEIGHTS)
    with open_base(model) as base:
        (view,) = base.find(f"connectors.{name}")
        assert view.key == f"connectors.{name}.weight"
    pairs = {f"connectors.{name}.lora_A.weight": (4, 48), f"connectors.{name}.lora_B.weight": (48, 4)}
    wide = {
        f"transformer.transformer_blocks.0.attn{n}.to_k.lora_{side}.weight": shape
        for n in (1, 2)
        for side, shape in (("A", (4, 2048)), ("B", (2048, 4)))
    }
    save_file(random({**pairs, **wide}, 2), tmp_path / "a.safetensors")
    assert "diffusers" in lorashrink.inspect(tmp_path / "a.safetensors").files[0].loads.loads_in
