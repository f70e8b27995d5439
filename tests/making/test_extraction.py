"""Extraction: the difference of two checkpoints as the best adapter of its rank."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import fixtures
import pytest
import torch
from fixtures import WEIGHTS, write_folder, write_tensors
from loaders import COMPONENTS, differences, loaded, outputs, small_sdxl
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import lorashrink
import lorashrink_example
from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.cli import app
from lorashrink.errors import InputError, OutputError, RecipeError, UsageError
from lorashrink.making.extraction import extract
from lorashrink.results.shrinking import FileResult, Report

EXAMPLE = lorashrink_example.path("base.safetensors")


def changed(tensors: Mapping[str, Tensor], size: float = 0.02, seed: int = 0) -> dict[str, Tensor]:
    """The tensors in float32 with noise on all matrices."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: tensor.float() + size * torch.randn(tensor.shape, generator=generator) if tensor.dim() > 1 else tensor
        for key, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return load_file(EXAMPLE)


@pytest.fixture(scope="module")
def tuned(base: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model with noise on each of its weights."""
    return write_tensors(tmp_path_factory.mktemp("tuned") / "tuned.safetensors", changed(base))


def only(report: Report) -> FileResult:
    assert report.failed == ()
    (result,) = report.results
    return result


def deltas(path: str | Path) -> dict[str, Tensor]:
    with open_adapter(path) as adapter:
        return {layer.name: layer.delta.dense().flatten(1).double() for layer in adapter}


def best_error(matrix: Tensor, rank: int) -> float:
    """‖lost‖ of the best matrix of this rank."""
    return float(torch.linalg.svdvals(matrix.double())[rank:].norm())


# --- accuracy -------------------------------------------------------------------------------------

# layer -> where its weight lies in the file
BY_HAND = {
    "lora_unet_input_blocks_0_0": ("model.diffusion_model.input_blocks.0.0.weight", None),
    "lora_unet_input_blocks_3_0_op": ("model.diffusion_model.input_blocks.3.0.op.weight", None),
    "lora_unet_output_blocks_0_0_skip_connection": (
        "model.diffusion_model.output_blocks.0.0.skip_connection.weight",
        None,
    ),
    "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj": (
        "model.diffusion_model.middle_block.1.transformer_blocks.1.ff.net.0.proj.weight",
        None,
    ),
    "lora_unet_label_emb_0_0": ("model.diffusion_model.label_emb.0.0.weight", None),
    "lora_te1_text_model_encoder_layers_1_mlp_fc2": (
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        None,
    ),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
        (0, 24),
    ),
    "lora_te2_text_model_encoder_layers_1_self_attn_v_proj": (
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        (48, 72),
    ),
}


def test_every_layer_is_the_best_one_of_its_rank(base: dict[str, Tensor], tuned: Path, tmp_path: Path) -> None:
    result = only(extract(tuned, EXAMPLE, recipes="rank=8", dtype="fp32", output=tmp_path / "out.safetensors"))
    extracted, after = deltas(result.output), load_file(tuned)
    errors = {row.name: row.rle_lora for row in result.layers}
    differences = {key: after[key].double() - base[key].double() for key in base}
    truth = dict.fromkeys(extracted)
    with open_base(EXAMPLE) as opened:
        for name in extracted:
            truth[name] = torch.cat(
                [differences[view.key][slice(*(view.rows or (None,)))] for view in opened.find(name)]
            )
    for name, (key, rows) in BY_HAND.items():
        assert torch.equal(truth[name], differences[key][slice(*(rows or (None,)))])
    assert len(extracted) == len(result.layers) == 286
    lost = total = 0.0
    for name, delta in truth.items():
        matrix = delta.flatten(1)
        norm, error = float(matrix.norm()), float((extracted[name] - matrix).norm())
        assert error == pytest.approx(best_error(matrix, 8), rel=1e-4, abs=1e-5 * norm), name
        assert errors[name] == pytest.approx(error / norm, abs=1e-4), name
        lost, total = lost + error**2, total + norm**2
    assert result.relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-4)


LARGE = (1200, 1000)


def with_spectrum(sigma: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.linalg.qr(torch.randn(side, len(sigma), generator=generator)).Q for side in LARGE]
    return sides[0] * sigma @ sides[1].T


SPECTRA = {
    "flat": torch.ones(1000),
    "falling slowly": torch.arange(1, 1001).float() ** -0.5,
    "falling fast": 0.98 ** torch.arange(1000).float(),
    "one step": torch.cat([torch.full((16,), 1.0), torch.full((984,), 0.1)]),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_large_layer_is_within_one_percent_of_the_best(tmp_path: Path, spectrum: str) -> None:
    """Only dimensions that a recipe can keep are computed."""
    delta = 1e-2 * with_spectrum(SPECTRA[spectrum])
    weight = torch.randn(LARGE, generator=torch.Generator().manual_seed(5)) * 1e-2
    small = {"block.small.weight": torch.zeros(8, 8)}
    old = write_tensors(tmp_path / "base.safetensors", {"block.large.weight": weight, **small})
    new = write_tensors(tmp_path / "tuned.safetensors", {"block.large.weight": weight + delta, **small})
    result = only(extract(new, old, recipes="rank=16", dtype="fp32", output=tmp_path / "out.safetensors"))
    delta = (weight + delta).double() - weight.double()
    (extracted,) = deltas(result.output).values()
    error, best = float((extracted - delta).norm()), best_error(delta, 16)
    assert best <= error * (1 + 1e-5)
    assert error <= 1.01 * best
    assert result.relative_error == pytest.approx(error / float(delta.norm()), rel=1e-4)
    assert result.layers[0].rle_lora == pytest.approx(result.relative_error)


def test_several_recipes_share_one_reading(tuned: Path, tmp_path: Path) -> None:
    """Dimensions reach up to the largest limit, and all results are right."""
    texts = ["rank=2", "rank=8,conv_rank=4", "energy=0.9", "fro_ckpt=1,thr=-3.5"]
    together = extract(tuned, EXAMPLE, recipes=texts, dtype="fp32", output=tmp_path / "together")
    for text, result in zip(texts, together.results, strict=True):
        alone = only(extract(tuned, EXAMPLE, recipes=text, dtype="fp32", output=tmp_path / "alone"))
        assert alone.relative_error == pytest.approx(result.relative_error, rel=1e-6)
        assert [row.rank_after for row in alone.layers] == [row.rank_after for row in result.layers]
        if "ckpt" in text:
            assert all(row.rle_ckpt is not None for row in result.layers)


@pytest.mark.parametrize("recipe", ["rank=4", "energy=1", "rank=9"])
def test_a_planted_change_is_found_exactly(tmp_path: Path, recipe: str) -> None:
    """Eighths are not rounded, so the difference has rank 4 to the last bit."""
    generator = torch.Generator().manual_seed(0)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator) / 8

    shapes = {
        "block.linear.weight": (64, 48),
        "block.conv.weight": (32, 16, 3, 3),
        "block.point.weight": (24, 40, 1, 1),
    }
    old = {key: eighths(*shape) for key, shape in shapes.items()}
    planted = {key: (eighths(shape[0], 4) @ eighths(4, math.prod(shape[1:]))) for key, shape in shapes.items()}
    new = {key: tensor + planted[key].reshape(tensor.shape) for key, tensor in old.items()}
    files = [
        write_tensors(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("tuned", new), ("base", old))
    ]
    result = only(extract(*files, recipes=recipe, dtype="fp32", output=tmp_path / "out.safetensors"))
    extracted = deltas(result.output)
    for key, matrix in planted.items():
        name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        assert float((extracted[name] - matrix).norm()) < 2e-6 * float(matrix.norm())
    assert {row.rank_after for row in result.layers} == {4}
    assert result.relative_error < 1e-6


def test_convolutions_keep_their_form(base: dict[str, Tensor], tuned: Path, tmp_path: Path) -> None:
    result = only(extract(tuned, EXAMPLE, recipes="rank=3", output=tmp_path / "out.safetensors"))
    tensors = load_file(result.output)
    key, name = "model.diffusion_model.input_blocks.3.0.op.weight", "lora_unet_input_blocks_3_0_op"
    out, fan_in, *kernel = base[key].shape
    assert tensors[f"{name}.lora_up.weight"].shape == (out, 3, 1, 1)
    assert tensors[f"{name}.lora_down.weight"].shape == (3, fan_in, *kernel)
    assert {tensor.dtype for key, tensor in tensors.items() if "alpha" not in key} == {torch.float16}


# --- from any layout, for any program -----------------------------------------------------------


def encoder_in_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    outer = {"embeddings.token_embedding.weight": "token_embedding.weight"}
    outer |= {"embeddings.position_embedding.weight": "positional_embedding"}
    outer |= {f"final_layer_norm.{kind}": f"ln_final.{kind}" for kind in ("weight", "bias")}
    renamed = {}
    for key, tensor in state.items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif name in outer:
            renamed[outer[name]] = tensor
        elif "q_proj" in name:
            parts = [state[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            at = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn.q_proj.", "attn.in_proj_")
            renamed[at] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            renamed[name.replace("encoder.layers", "transformer.resblocks")] = tensor
    return renamed


def in_one_file(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A pipeline's weights as an SDXL checkpoint has them."""
    renamed = {}
    for key, tensor in states["unet"].items():
        module, _, kind = key.rpartition(".")
        renamed[f"model.diffusion_model.{fixtures.ldm_module(module)}.{kind}"] = tensor
    for key, tensor in states["text_encoder"].items():
        renamed[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor
    encoder = encoder_in_open_clip_names(states["text_encoder_2"])
    return renamed | {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in encoder.items()}


@pytest.fixture(scope="module")
def pipe():
    return small_sdxl()


@pytest.fixture(scope="module")
def states(pipe) -> dict[str, dict[str, Tensor]]:
    """The weights of a small SDXL pipeline."""
    return {
        name: {
            key: value.clone() for key, value in getattr(pipe, name).state_dict().items() if value.is_floating_point()
        }
        for name in COMPONENTS
    }


def is_embedding(key: str) -> bool:
    """Weights that no trainer of adapters changes: token and position tables, and the text projection."""
    return "token_embedding" in key or "position_embedding" in key or "text_projection" in key


@pytest.fixture(scope="module")
def tuned_states(states) -> dict[str, dict[str, Tensor]]:
    """The weights after a change of all layers that a LoRA can change."""
    return {
        name: {key: state[key] if is_embedding(key) else value for key, value in changed(state, 0.03, number).items()}
        for number, (name, state) in enumerate(states.items())
    }


@pytest.fixture(scope="module")
def checkpoints(states, tuned_states, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "base folder": write_folder(folder / "base", states),
        "tuned folder": write_folder(folder / "tuned", tuned_states),
        "base file": write_tensors(folder / "base.safetensors", in_one_file(states)),
        "tuned file": write_tensors(folder / "tuned.safetensors", in_one_file(tuned_states)),
    }


@pytest.mark.parametrize("old", ["base folder", "base file"])
@pytest.mark.parametrize("new", ["tuned folder", "tuned file"])
def test_layouts_of_the_two_checkpoints_may_differ(
    states, tuned_states, checkpoints: dict[str, Path], tmp_path: Path, new: str, old: str
) -> None:
    result = only(
        extract(checkpoints[new], checkpoints[old], recipes="energy=1", dtype="fp32", output=tmp_path / "a.safetensors")
    )
    modules = {
        key.removesuffix(".weight")
        for name in COMPONENTS
        for key, value in states[name].items()
        if value.dim() > 1 and not is_embedding(key)
    }
    assert sum(row.rank_after > 0 for row in result.layers) == len(result.layers) >= len(modules)
    assert all("embedding" in removed.name or "text_projection" in removed.name for removed in result.removed)
    extracted = deltas(result.output)
    with open_base(checkpoints["base folder"]) as base:
        for name, delta in extracted.items():
            (view,) = base.find(name)
            component, _, key = view.key.partition(".")
            truth = (tuned_states[component][key] - states[component][key]).flatten(1).double()
            assert float((delta - truth).norm()) < 1e-5 * float(truth.norm()), name


def test_checkpoints_may_be_pickled(base: dict[str, Tensor], tuned: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": base}, tmp_path / "base.ckpt")
    torch.save({"state_dict": load_file(tuned)}, tmp_path / "tuned.ckpt")
    files = [(tuned, EXAMPLE), (tmp_path / "tuned.ckpt", tmp_path / "base.ckpt")]
    first, second = (
        load_file(only(extract(*file, recipes="rank=2", output=tmp_path / f"{number}.safetensors")).output)
        for number, file in enumerate(files)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def put(pipe, states) -> None:
    for name, state in states.items():
        getattr(pipe, name).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("naming", "new", "old"),
    [
        ("kohya", "tuned file", "base file"),
        ("kohya", "tuned folder", "base file"),
        ("diffusers", "tuned folder", "base folder"),
        ("diffusers", "tuned file", "base folder"),
    ],
)
def test_diffusers_draws_like_the_tuned_model(
    pipe, states, tuned_states, checkpoints: dict[str, Path], tmp_path: Path, naming: str, new: str, old: str
) -> None:
    path = tmp_path / "lora.safetensors"
    extract(checkpoints[new], checkpoints[old], recipes="energy=1", dtype="fp32", naming=naming, output=path)
    bare = outputs(pipe)
    try:
        put(pipe, tuned_states)
        expected = outputs(pipe)
    finally:
        put(pipe, states)
    actual, layers = loaded(pipe, path)
    with open_adapter(path) as adapter:
        assert len(adapter) == layers
    assert min(differences(expected, bare).values()) > 0.02
    assert max(differences(actual, expected).values()) < 1e-3
    assert max(differences(outputs(pipe), bare).values()) == 0


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "comfy"])
def test_each_naming_has_its_own_names_for_the_same_numbers(
    checkpoints: dict[str, Path], tmp_path: Path, naming: str
) -> None:
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("kohya", naming)}
    for name, path in paths.items():
        extract(checkpoints["tuned folder"], checkpoints["base file"], recipes="rank=4", naming=name, output=path)
    prefixes = {
        "kohya": ("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_"),
        "diffusers": ("unet.", "text_encoder.text_model.", "text_encoder_2.text_model."),
        "comfy": ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    }[naming]
    counts = [sum(key.startswith(prefix) for key in load_file(paths[naming])) for prefix in prefixes]
    assert min(counts) > 20
    assert sum(counts) == len(load_file(paths[naming]))
    with open_base(checkpoints["base file"]) as base:
        by_weight = [{base.find(name): delta for name, delta in deltas(path).items()} for path in paths.values()]
    assert by_weight[0].keys() == by_weight[-1].keys()
    for views, delta in by_weight[0].items():
        assert float((by_weight[-1][views] - delta).norm()) < 2e-3 * float(delta.norm())


# --- vectors ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_changed(states, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A checkpoint whose biases and normalisation layers changed too; half of its blocks changed in nothing else."""
    generator = torch.Generator().manual_seed(9)
    new = {
        name: {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in state.items()}
        for name, state in states.items()
    }
    return write_folder(tmp_path_factory.mktemp("all") / "tuned", new), new


VECTORS = {
    "lora_unet_input_blocks_0_0.diff_b": ("unet", "conv_in.bias"),
    "lora_unet_input_blocks_4_0_in_layers_0.diff": ("unet", "down_blocks.1.resnets.0.norm1.weight"),
    "lora_unet_input_blocks_4_0_in_layers_0.diff_b": ("unet", "down_blocks.1.resnets.0.norm1.bias"),
    "lora_unet_middle_block_1_transformer_blocks_0_norm2.diff": (
        "unet",
        "mid_block.attentions.0.transformer_blocks.0.norm2.weight",
    ),
    "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.diff_b": (
        "unet",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",
    ),
    "lora_unet_out_0.diff": ("unet", "conv_norm_out.weight"),
    "lora_te1_text_model_encoder_layers_1_layer_norm2.diff": ("text_encoder", "encoder.layers.1.layer_norm2.weight"),
    "lora_te2_text_model_encoder_layers_2_mlp_fc1.diff_b": ("text_encoder_2", "encoder.layers.2.mlp.fc1.bias"),
    "lora_te2_text_model_encoder_layers_2_self_attn_k_proj.diff_b": (
        "text_encoder_2",
        "encoder.layers.2.self_attn.k_proj.bias",
    ),
    "lora_te2_text_model_final_layer_norm.diff": ("text_encoder_2", "final_layer_norm.weight"),
}


def tensor_of(states: Mapping[str, Mapping[str, Tensor]], part: str, key: str) -> Tensor:
    state = states[part]
    return state[key] if key in state else state[f"text_model.{key}"]


@pytest.mark.parametrize("old", ["base folder", "base file"])
def test_vectors_are_the_differences_themselves(
    states, all_changed, checkpoints: dict[str, Path], tmp_path: Path, old: str
) -> None:
    path, new = all_changed
    options = {"recipes": "rank=4", "output": tmp_path / "out.safetensors"}
    result = only(extract(path, checkpoints[old], vectors=True, **options))
    after = load_file(result.output)
    for key, (part, name) in VECTORS.items():
        assert torch.equal(after[key], tensor_of(new, part, name) - tensor_of(states, part, name)), key
    vectors = [key for key, value in after.items() if value.dim() == 1]
    assert len(vectors) == sum(value.dim() == 1 for state in states.values() for value in state.values())
    assert {copied.key for copied in result.verbatim} == set(vectors)
    without = only(extract(path, checkpoints[old], force=True, **options))
    assert not [key for key in load_file(without.output) if ".diff" in key]


# --- what is not extracted ----------------------------------------------------------------------


def test_unchanged_weights_are_listed(base: dict[str, Tensor], tmp_path: Path) -> None:
    noise = changed(base)
    half = {key: noise[key] if "middle_block" in key else tensor for key, tensor in base.items()}
    path = write_tensors(tmp_path / "tuned.safetensors", half)
    result = only(extract(path, EXAMPLE, recipes="rank=4", output=tmp_path / "out.safetensors"))
    assert {removed.reason for removed in result.removed} == {"ΔW is zero"}
    assert len(result.removed) + len(result.layers) == 286
    assert all("middle_block" in row.name for row in result.layers)
    assert all("middle_block" in key for key in load_file(result.output))


def test_weights_of_only_one_checkpoint_are_listed(base: dict[str, Tensor], tmp_path: Path) -> None:
    """The first layer has more inputs, and a block is missing."""
    new = changed(base)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    gone = "model.diffusion_model.input_blocks.3.0.op.weight"
    new[first] = torch.cat([new[first], new[first][:, :1]], 1)
    del new[gone]
    path = write_tensors(tmp_path / "tuned.safetensors", new)
    result = only(extract(path, EXAMPLE, recipes="rank=4", output=tmp_path / "out.safetensors"))
    notes = [removed.name for removed in result.removed] + list(result.warnings)
    for name in ("input_blocks_0_0", "input_blocks_3_0_op"):
        assert not [row for row in result.layers if name in row.name]
        assert any(name in note or name.replace("_", ".") in note for note in notes), name


def test_two_equal_checkpoints_have_no_difference(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every layer is zero"):
        extract(EXAMPLE, EXAMPLE, recipes="rank=4", output=tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["tuned", "base"])
def test_norm_tables_hold_no_weights_to_compare(tuned: Path, tmp_path: Path, which: str) -> None:
    table = tmp_path / "table.json"
    lorashrink.norms(EXAMPLE, table)
    files = [table, EXAMPLE] if which == "tuned" else [tuned, table]
    with pytest.raises(InputError, match=r"table\.json: a norm table holds no weights"):
        extract(*files, recipes="rank=4", output=tmp_path / "out.safetensors")


def test_models_of_different_families_have_no_difference(tmp_path: Path) -> None:
    stranger = write_tensors(tmp_path / "other.safetensors", {"block.linear.weight": torch.randn(8, 8)})
    with pytest.raises(InputError, match="SDXL") as error:
        extract(stranger, EXAMPLE, recipes="rank=4", output=tmp_path / "out.safetensors")
    assert str(stranger) in str(error.value)
    strangers = write_tensors(tmp_path / "stranger.safetensors", {"another.linear.weight": torch.randn(8, 8)})
    with pytest.raises(InputError, match="no weight in common"):
        extract(stranger, strangers, recipes="rank=4", output=tmp_path / "out.safetensors")


def test_an_adapter_is_no_checkpoint(tuned: Path, tmp_path: Path) -> None:
    adapter = EXAMPLE.parent / "adapter.safetensors"
    for files in ((adapter, EXAMPLE), (tuned, adapter)):
        with pytest.raises(InputError, match=r"adapter\.safetensors"):
            extract(*files, recipes="rank=4", output=tmp_path / "out.safetensors")


def test_a_missing_file_is_named(tuned: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    for files in ((missing, EXAMPLE), (tuned, missing)):
        with pytest.raises(InputError, match=r"missing\.safetensors"):
            extract(*files, recipes="rank=4", output=tmp_path / "out.safetensors")


def test_nan_in_a_checkpoint_is_named(base: dict[str, Tensor], tmp_path: Path) -> None:
    new = changed(base)
    new["model.diffusion_model.out.2.weight"][0, 0] = math.nan
    path = write_tensors(tmp_path / "tuned.safetensors", new)
    with pytest.raises(InputError, match=r"lora_unet_out_2.* NaN"):
        extract(path, EXAMPLE, recipes="rank=4", output=tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.safetensors"]


def test_inputs_are_never_overwritten(tuned: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    before = tuned.read_bytes()
    for output in (tuned, EXAMPLE):
        with pytest.raises(OutputError, match="is an input"):
            extract(tuned, EXAMPLE, recipes="rank=4", output=output, force=True)
    folder = checkpoints["tuned folder"]
    with pytest.raises(OutputError, match="is an input"):
        extract(folder, EXAMPLE, recipes="rank=4", output=folder / "unet" / WEIGHTS["unet"], force=True)
    assert tuned.read_bytes() == before
    existing = tmp_path / "out.safetensors"
    existing.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        extract(tuned, EXAMPLE, recipes="rank=4", output=existing)
    assert existing.read_bytes() == b"mine"


def test_contradicting_requests_are_refused(tuned: Path, tmp_path: Path) -> None:
    for naming in ("peft", "a1111"):
        with pytest.raises(UsageError, match="kohya, diffusers, comfy"):
            extract(tuned, EXAMPLE, recipes="rank=4", naming=naming, output=tmp_path)
    with pytest.raises(RecipeError):
        extract(tuned, EXAMPLE, recipes="nonsense", output=tmp_path)
    with pytest.raises(UsageError, match="there are 2 outputs"):
        extract(tuned, EXAMPLE, recipes=["rank=4", "rank=2"], output=tmp_path / "one.safetensors")
    with pytest.raises(InputError, match="keeps nothing"):
        extract(tuned, EXAMPLE, recipes="fro_ckpt=1,thr=9", output=tmp_path)
    assert not list(tmp_path.iterdir())


# --- files and the command ----------------------------------------------------------------------


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["extract", *(str(argument) for argument in arguments)])
    assert result.exit_code == status, result.output
    return result.stdout


def test_the_command_writes_what_the_function_does(tuned: Path, tmp_path: Path) -> None:
    text = run(tuned, EXAMPLE, "-r", "rank=4", "-o", tmp_path / "a.safetensors", "--json")
    document = json.loads(text)
    (result,) = document["results"]
    assert (result["source"], result["recipe"]) == (str(tuned), "rank=4")
    assert document["base"] == {"path": str(EXAMPLE), "family": "sdxl", "kind": "file"}
    assert result["bytes_after"] == (tmp_path / "a.safetensors").stat().st_size
    extract(tuned, EXAMPLE, recipes="rank=4", output=tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    run(tuned, EXAMPLE, "-r", "rank=4", "-o", tmp_path / "a.safetensors", status=2)
    run(tuned, EXAMPLE, "-r", "rank=4", "-o", tmp_path / "none", "--dry-run")
    run(tuned, tmp_path / "missing.safetensors", "-o", tmp_path / "none", status=2)
    run(tuned, EXAMPLE, "--naming", "peft", "-o", tmp_path / "none", status=2)
    assert not (tmp_path / "none").exists()


def test_the_default_is_the_recipe_of_the_guide_in_half_precision(tuned: Path, tmp_path: Path) -> None:
    run(tuned, EXAMPLE, "-o", tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "tuned_frockpt1_th-3.55.safetensors"
    tensors = load_file(path)
    assert {value.dtype for key, value in tensors.items() if key.endswith("up.weight")} == {torch.float16}


def test_a_result_is_an_adapter_like_any_other(tuned: Path, tmp_path: Path) -> None:
    first = only(extract(tuned, EXAMPLE, recipes="rank=8", dtype="fp32", output=tmp_path / "a.safetensors"))
    again = lorashrink.resize(first.output, base=EXAMPLE, recipes="rank=4", output=tmp_path / "b.safetensors")
    straight = only(extract(tuned, EXAMPLE, recipes="rank=4", dtype="fp32", output=tmp_path / "c.safetensors"))
    ours, theirs = deltas(only(again).output), deltas(straight.output)
    assert ours.keys() == theirs.keys()
    for name, delta in ours.items():
        assert float((delta - theirs[name]).norm()) < 1e-3 * float(delta.norm())


MEASURE = """
import resource, sys
from lorashrink.making.extraction import extract
extract(sys.argv[1], sys.argv[2], recipes="rank=4", output=sys.argv[3], jobs=2, device="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
# The peak of a new process is at least that of the one which started it, so a small one has to.
START = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True)"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no getrusage")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    side, peaks = 1024, {}
    for count in (6, 60):
        generator = torch.Generator().manual_seed(count)
        weights = {
            f"blocks.{number}.proj.weight": (0.1 * torch.randn(side, side, generator=generator)).half()
            for number in range(count)
        }
        old = write_tensors(tmp_path / f"{count}" / "base.safetensors", weights)
        new = write_tensors(
            tmp_path / f"{count}" / "tuned.safetensors", {key: value + value.T / 64 for key, value in weights.items()}
        )
        arguments = [MEASURE, str(new), str(old), str(tmp_path / f"{count}" / "out.safetensors")]
        done = subprocess.run([sys.executable, "-c", START, *arguments], capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    both_files, output = 2 * 60 * side * side * 2, (tmp_path / "60" / "out.safetensors").stat().st_size
    assert output < 2e6
    assert peaks[60] - peaks[6] < both_files / 8
