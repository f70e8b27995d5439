"""Conversion: the same ΔW under other names, with the same bits where the format allows."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import fixtures
import pytest
import torch
from conversions import (
    ADAPTERS,
    KINDS,
    NAMINGS,
    assert_same_effect,
    bases,
    converted,
    effect,
    few,
    metadata_of,
    numbers,
    only,
    tensors_of,
)
from fixtures import scaled, shapes, write_header, write_tensors
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import lorashrink
from lorashrink.adapters import open_adapter
from lorashrink.cli import app
from lorashrink.errors import InputError, OutputError, UsageError
from lorashrink.making.conversion import convert

__all__ = ["bases"]  # a fixture

# --- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_pair_of_namings_keeps_the_effect(bases, tmp_path: Path, name: str) -> None:
    """All results are compared on the native file of each kind of base."""
    family, pattern = ADAPTERS[name]
    listed = {key: shape for key, shape in few(shapes(name)).items() if re.search(pattern, key)}
    source = write_tensors(tmp_path / "a.safetensors", numbers(listed), fixtures.metadata(name))
    native, expected = bases(family, "native"), effect(source, bases(family, "native"))
    assert len(expected) > 5
    has_encoders = any(key.startswith(("lora_te", "text_encoder")) for key in listed)
    namings = [naming for naming in NAMINGS if naming != "peft" or not has_encoders]
    first = {}
    for number, naming in enumerate(namings):
        result = converted(source, bases(family, KINDS[number % 3]), naming, tmp_path / f"{number}")
        assert result.kept == ()
        first[naming] = Path(result.output)
        assert_same_effect(first[naming], expected, native)
    for number, (start, path) in enumerate(first.items()):
        for second, naming in enumerate(namings):
            kind = KINDS[(number + second + 1) % 3]
            result = converted(path, bases(family, kind), naming, tmp_path / f"{number}{second}")
            assert result.kept == (), (start, naming)
            assert_same_effect(Path(result.output), expected, native)


# What one weight is called: family, shape in the small base, names of kohya, diffusers and ComfyUI.
NAMES = [
    (
        "sd15",
        (10, 24),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    ),
    (
        "sd15",
        (96, 24),
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
    ),
    (
        "sdxl",
        (20, 20),
        "lora_unet_input_blocks_4_1_proj_in",
        "unet.down_blocks.1.attentions.0.proj_in",
        "diffusion_model.input_blocks.4.1.proj_in",
    ),
    (
        "sdxl",
        (24, 24),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    ),
    (
        "sdxl",
        (40, 40),
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj",
        "text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.self_attn.v_proj",
    ),
    (
        "flux",
        (576, 96),
        "lora_unet_double_blocks_0_img_mod_lin",
        "transformer.transformer_blocks.0.norm1.linear",
        "diffusion_model.double_blocks.0.img_mod.lin",
    ),
    (
        "flux",
        (96, 480),
        "lora_unet_single_blocks_37_linear2",
        "transformer.single_transformer_blocks.37.proj_out",
        "diffusion_model.single_blocks.37.linear2",
    ),
    (
        "flux",
        (24, 24),
        "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.k_proj",
    ),
    (
        "flux",  # whose second folder holds what sd-scripts counts as the third encoder
        (128, 128),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ),
    (
        "sd3",
        (48, 192),
        "lora_unet_joint_blocks_0_x_block_mlp_fc2",
        "transformer.transformer_blocks.0.ff.net.2",
        "diffusion_model.joint_blocks.0.x_block.mlp.fc2",
    ),
    (
        "wan",
        (280, 48),
        "lora_unet_blocks_0_ffn_0",
        "transformer.blocks.0.ffn.net.0.proj",
        "diffusion_model.blocks.0.ffn.0",
    ),
    (
        "qwen-image",
        (576, 96),
        "lora_unet_transformer_blocks_0_img_mod_1",
        "transformer.transformer_blocks.0.img_mod.1",
        "diffusion_model.transformer_blocks.0.img_mod.1",
    ),
    (
        "z-image",
        (120, 120),
        "lora_unet_layers_0_attention_out",
        "transformer.layers.0.attention.to_out.0",
        "diffusion_model.layers.0.attention.out",
    ),
]


@pytest.mark.parametrize("weight", NAMES, ids=[f"{names[0]} {names[3]}" for names in NAMES])
def test_each_naming_has_its_own_name_for_a_weight(bases, tmp_path: Path, weight: tuple) -> None:
    family, (out, columns), *names = weight
    for number, (name, kind) in enumerate(zip(names, KINDS, strict=True)):
        source = diffusers_file(tmp_path / f"{number}.safetensors", {name: pair(out, 2, columns)})
        for naming, expected in zip(("kohya", "diffusers", "comfy"), names, strict=True):
            result = converted(source, bases(family, kind), naming, tmp_path / f"{number}")
            assert {key.rpartition(".lora_")[0] for key in tensors_of(result) if ".lora_" in key} == {expected}


# --- bit by bit ---------------------------------------------------------------------------------


def whole_scale(name: str, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """An adapter whose alphas are its ranks, so that no naming has to change a number."""
    listed = few(shapes(name))
    tensors = {key: tensor.to(dtype) for key, tensor in numbers(listed).items()}
    for key in tensors:
        if key.endswith(".alpha"):
            rank = listed[key.replace(".alpha", ".lora_down.weight")][0]
            tensors[key] = torch.tensor(float(rank))
    return tensors


@pytest.mark.parametrize("name", ["sd15_lora_kohya", "sdxl_lora_kohya_te1_te2", "flux_lora_kohya_te1"])
def test_a_round_trip_gives_the_same_bits(bases, tmp_path: Path, name: str) -> None:
    """FLUX is fused for kohya and split for diffusers, with one `down`."""
    family, before = ADAPTERS[name][0], whole_scale(name)
    source = write_tensors(tmp_path / "a.safetensors", before)
    renamed = converted(source, bases(family, "diffusers"), "diffusers", tmp_path / "there")
    back = converted(Path(renamed.output), bases(family, "native"), "kohya", tmp_path / "back")
    assert renamed.exact
    assert back.exact
    assert (back.layers, back.kept) == (len(before) // 3, ())
    after = tensors_of(back)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize(
    ("name", "naming", "exact"),
    [
        ("sd15_lora_kohya", "kohya", True),
        ("sd15_lora_kohya", "diffusers", False),  # has no place for an alpha
        ("wan21_1_3b_lora_fun_double_underscore", "comfy", True),
        ("wan21_1_3b_lora_fun_double_underscore", "peft", True),
        ("wan21_1_3b_lora_fun_double_underscore", "diffusers", False),
        ("flux_lora_diffusers", "kohya", True),
        ("flux_lora_aitoolkit_bfl", "diffusers", True),
        ("llama_peft_lora", "diffusers", True),
    ],
)
def test_factors_keep_their_bits_if_the_format_has_a_scale(
    bases, tmp_path: Path, name: str, naming: str, exact: bool
) -> None:
    """`exact` promises that all rows of the output are rows of the input."""
    family = ADAPTERS[name][0]
    tensors = {key: value.half() for key, value in numbers(few(shapes(name)), alphas=(3.0,)).items()}
    result = converted(write_tensors(tmp_path / "a.safetensors", tensors), bases(family, "native"), naming, tmp_path)
    assert result.exact == exact
    source_rows = {bytes(row) for value in tensors.values() if value.dim() > 1 for row in rows_of(value)}
    written = [(key, row) for key, value in tensors_of(result).items() if value.dim() > 1 for row in rows_of(value)]
    strange = {
        key for key, row in written if bytes(row) not in source_rows and "qkv" not in key and "linear1" not in key
    }
    assert (not strange) == exact


def rows_of(tensor: Tensor) -> list[memoryview]:
    return [memoryview(row.numpy()).cast("B") for row in tensor.flatten(1)]


def test_rounded_layers_are_not_called_exact(bases, tmp_path: Path) -> None:
    up, down = pair(96, 4, 96)
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {f"{name}.lora_B.weight": up.half(), f"{name}.lora_A.weight": down}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("flux", "native"), "kohya", tmp_path / "out")
    after = tensors_of(result)["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"]
    assert result.exact == (after.dtype == torch.float32 and torch.equal(after, down))


# --- fused and split ----------------------------------------------------------------------------

WIDTH = 96  # of the small FLUX


def pair(out: int, rank: int, columns: int, seed: int = 0, kernel: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    return up, torch.randn(rank, columns, *kernel, generator=generator)


def diffusers_file(path: Path, layers: Mapping[str, tuple[Tensor, Tensor]], **metadata: str) -> Path:
    tensors = {}
    for name, (up, down) in layers.items():
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    return write_tensors(path, tensors, metadata)


def kohya_file(path: Path, layers: Mapping[str, tuple[Tensor, Tensor, float | None]], **metadata: str) -> Path:
    tensors = {}
    for name, (up, down, alpha) in layers.items():
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return write_tensors(path, tensors, metadata)


BLOCK, QKV = "transformer.transformer_blocks.0.attn", "lora_unet_double_blocks_0_img_attn_qkv"


def test_a_fused_layer_is_split_by_rows(bases, tmp_path: Path) -> None:
    up, down = pair(3 * WIDTH, 4, WIDTH)
    source = kohya_file(tmp_path / "a.safetensors", {QKV: (up, down, 4.0)})
    result = converted(source, bases("flux", "native"), "diffusers", tmp_path / "out")
    after = tensors_of(result)
    assert result.exact
    assert len(after) == 6
    for position, letter in enumerate("qkv"):
        assert torch.equal(after[f"{BLOCK}.to_{letter}.lora_A.weight"], down)
        assert torch.equal(after[f"{BLOCK}.to_{letter}.lora_B.weight"], up[position * WIDTH : (position + 1) * WIDTH])


def test_parts_with_one_down_are_fused_at_their_own_rank(bases, tmp_path: Path) -> None:
    _, down = pair(WIDTH, 4, WIDTH)
    ups = {letter: pair(WIDTH, 4, WIDTH, seed)[0] for seed, letter in enumerate("qkv")}
    layers = {f"{BLOCK}.to_{letter}": (up, down.clone()) for letter, up in ups.items()}
    source = diffusers_file(tmp_path / "a.safetensors", layers)
    result = converted(source, bases("flux", "diffusers"), "kohya", tmp_path / "out")
    after = tensors_of(result)
    assert result.exact
    assert torch.equal(after[f"{QKV}.lora_down.weight"], down)
    assert torch.equal(after[f"{QKV}.lora_up.weight"], torch.cat([ups[letter] for letter in "qkv"]))
    assert float(after[f"{QKV}.alpha"]) == 4


def test_parts_with_downs_of_their_own_become_a_block_diagonal(bases, tmp_path: Path) -> None:
    """The ranks of the parts add up, and other parts' rows are zero."""
    ranks = {"q": 4, "k": 2, "v": 3}
    parts = {letter: pair(WIDTH, rank, WIDTH, rank) for letter, rank in ranks.items()}
    source = diffusers_file(tmp_path / "a.safetensors", {f"{BLOCK}.to_{letter}": parts[letter] for letter in "vqk"})
    result = converted(source, bases("flux", "native"), "kohya", tmp_path / "out")
    after = tensors_of(result)
    assert result.exact
    up, down = after[f"{QKV}.lora_up.weight"], after[f"{QKV}.lora_down.weight"]
    assert torch.equal(down, torch.cat([parts[letter][1] for letter in "qkv"]))
    assert torch.equal(up, torch.block_diag(*(parts[letter][0] for letter in "qkv")))
    assert float(after[f"{QKV}.alpha"]) == sum(ranks.values())
    assert_same_effect(Path(result.output), effect(source, bases("flux", "native")), bases("flux", "native"))


@pytest.mark.parametrize("shared", [True, False])
def test_a_part_that_was_not_trained_has_rows_of_zeros(bases, tmp_path: Path, shared: bool) -> None:
    parts = {letter: pair(WIDTH, 4, WIDTH, seed) for seed, letter in enumerate("qv")}
    if shared:
        parts["v"] = (parts["v"][0], parts["q"][1].clone())
    source = diffusers_file(
        tmp_path / "a.safetensors", {f"{BLOCK}.to_{letter}": part for letter, part in parts.items()}
    )
    result = converted(source, bases("flux", "native"), "kohya", tmp_path / "out")
    up = tensors_of(result)[f"{QKV}.lora_up.weight"]
    assert result.exact
    assert up.shape == (3 * WIDTH, 4 if shared else 8)
    assert not up[WIDTH : 2 * WIDTH].any()
    assert_same_effect(Path(result.output), effect(source, bases("flux", "native")), bases("flux", "native"))
    back = converted(Path(result.output), bases("flux", "native"), "diffusers", tmp_path / "back")
    assert_same_effect(Path(back.output), effect(source, bases("flux", "native")), bases("flux", "native"))


@pytest.mark.parametrize(
    ("family", "theirs", "ours", "rows"),
    [
        ("flux", "transformer.norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1", 96),
        ("sd3", "transformer.norm_out.linear", "lora_unet_final_layer_adaLN_modulation_1", 48),
        (
            "sd3",
            "transformer.transformer_blocks.23.norm1_context.linear",
            "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
            48,
        ),
    ],
)
def test_shift_and_scale_change_places(bases, tmp_path: Path, family: str, theirs: str, ours: str, rows: int) -> None:
    up, down = pair(2 * rows, 4, rows)
    source = diffusers_file(tmp_path / "a.safetensors", {theirs: (up, down)})
    for kind in KINDS:
        result = converted(source, bases(family, kind), "kohya", tmp_path / kind)
        after = tensors_of(result)
        assert result.exact
        assert torch.equal(after[f"{ours}.lora_up.weight"], torch.cat([up[rows:], up[:rows]]))
        assert torch.equal(after[f"{ours}.lora_down.weight"], down)
        back = tensors_of(converted(Path(result.output), bases(family, kind), "diffusers", tmp_path / f"{kind} back"))
        assert torch.equal(back[f"{theirs}.lora_B.weight"], up)


def test_three_names_of_one_weight_get_their_own_rows(bases, tmp_path: Path) -> None:
    """XLabs changes the first rows of `linear1`, diffusers the rest."""
    layers = {
        "single_blocks.1.processor.qkv_lora": pair(3 * WIDTH, 4, WIDTH),
        "transformer.single_transformer_blocks.1.proj_mlp": pair(4 * WIDTH, 2, WIDTH, seed=1),
    }
    source = diffusers_file(tmp_path / "a.safetensors", layers)
    result = converted(source, bases("flux", "native"), "comfy", tmp_path / "out")
    name = "diffusion_model.single_blocks.1.linear1"
    assert {key: tuple(value.shape) for key, value in tensors_of(result).items()} == {
        f"{name}.lora_A.weight": (6, WIDTH),
        f"{name}.lora_B.weight": (7 * WIDTH, 6),
    }
    assert_same_effect(Path(result.output), effect(source, bases("flux", "native")), bases("flux", "native"))


@pytest.mark.parametrize(
    "second", ["transformer.transformer_blocks.0.attn.to_k", "lora_unet_double_blocks_0_img_attn_qkv"]
)
def test_layers_that_change_the_same_rows_are_an_error(bases, tmp_path: Path, second: str) -> None:
    first = "double_blocks.0.processor.qkv_lora1"
    layers = {first: pair(3 * WIDTH, 4, WIDTH), second: pair(WIDTH if "to_k" in second else 3 * WIDTH, 4, WIDTH)}
    source = diffusers_file(tmp_path / "a.safetensors", layers)
    (failure,) = convert(source, base=bases("flux", "native"), naming="kohya", output=tmp_path / "out").failed
    assert first in failure.error
    assert second in failure.error
    assert "change the same rows" in failure.error
    assert not list(tmp_path.glob("out/*"))


# --- strength -----------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    "alphas",
    [(4.0, 1.0, 0.3), (None, 4.0, 8.0), (-2.0, 4.0, 1.0), (4.0, 0.0, 1.0), (0.0, 4.0, 1.0)],
    ids=["mixed", "one without", "negative", "zero", "zero first"],
)
def test_fused_parts_keep_their_strengths(bases, tmp_path: Path, alphas: tuple[float | None, ...], naming: str) -> None:
    layers = {
        f"lora_transformer_transformer_blocks_0_attn_to_{letter}": (*pair(WIDTH, 4, WIDTH, seed), alpha)
        for seed, (letter, alpha) in enumerate(zip("qkv", alphas, strict=True))
    }
    source, native = kohya_file(tmp_path / "a.safetensors", layers), bases("flux", "native")
    result = converted(source, native, naming, tmp_path / "out")
    assert_same_effect(Path(result.output), effect(source, native), native)
    assert result.exact == (naming == "peft")


def test_alphas_keep_their_values(bases, tmp_path: Path) -> None:
    """Alphas are written as float32, because half precision has no 0.3."""
    name = "lora_unet_double_blocks_0_img_attn_proj"
    up, down = pair(WIDTH, 4, WIDTH)
    tensors = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(0.3).half(),
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    for naming, key in (("kohya", name), ("comfy", "diffusion_model.double_blocks.0.img_attn.proj")):
        alpha = tensors_of(converted(source, bases("flux", "native"), naming, tmp_path / naming))[f"{key}.alpha"]
        assert alpha.dtype == torch.float32
        assert float(alpha) == float(tensors[f"{name}.alpha"])


def test_diffusers_settings_go_when_alphas_are_written(bases, tmp_path: Path) -> None:
    """`lora_adapter_metadata` would name modules that are not there."""
    layers = {f"{BLOCK}.to_out.0": pair(WIDTH, 4, WIDTH), f"{BLOCK}.to_add_out": pair(WIDTH, 2, WIDTH)}
    settings = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.rank_pattern": {"to_add_out": 2},
        "transformer.alpha_pattern": {"to_add_out": 1},
    }
    text = json.dumps(settings)
    source = diffusers_file(tmp_path / "a.safetensors", layers, lora_adapter_metadata=text, mine="yes")
    native = bases("flux", "native")
    for naming in ("kohya", "diffusers", "comfy"):
        result = converted(source, native, naming, tmp_path / naming)
        assert metadata_of(result.output) == {"mine": "yes"}
        assert_same_effect(Path(result.output), effect(source, native), native)
    assert metadata_of(converted(source, None, None, tmp_path, dtype="bf16").output) == {
        "mine": "yes",
        "lora_adapter_metadata": text,
    }


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "comfy"])
def test_layers_that_keep_their_names_keep_their_strength(bases, tmp_path: Path, naming: str) -> None:
    """The new file lacks the settings that had their strength."""
    mapped, unknown = f"{BLOCK}.to_out.0", "transformer.somewhere.else"
    settings = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    layers = {name: pair(WIDTH, 4, WIDTH) for name in (mapped, unknown)}
    source = diffusers_file(tmp_path / "a.safetensors", layers, lora_adapter_metadata=settings)
    result = converted(source, bases("flux", "native"), naming, tmp_path / "out")
    assert all(unknown in tensor.key for tensor in result.kept)
    with open_adapter(source) as before, open_adapter(result.output) as after:
        scales = [layer.delta.dense() for opened in (before, after) for layer in opened if layer.name == unknown]
    assert torch.allclose(*scales, rtol=1e-5)


# --- DoRA, LoHa, LoKr and others ----------------------------------------------------------------


def test_dora_magnitudes_are_renamed(bases, tmp_path: Path) -> None:
    """Kohya's [out, 1] becomes PEFT's [out] with the same numbers."""
    name, theirs = "lora_unet_double_blocks_0_img_attn_proj", f"{BLOCK}.to_out.0"
    (up, down), magnitude = pair(WIDTH, 4, WIDTH), torch.rand(WIDTH, 1)
    tensors = {
        **{f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)},
        f"{name}.dora_scale": magnitude,
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    renamed = converted(source, bases("flux", "native"), "diffusers", tmp_path / "there")
    after = tensors_of(renamed)
    assert renamed.exact
    assert torch.equal(after[f"{theirs}.lora_magnitude_vector"], magnitude[:, 0])
    back = tensors_of(converted(Path(renamed.output), bases("flux", "diffusers"), "kohya", tmp_path / "back"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_dora_magnitudes_of_convolutions_are_renamed(bases, tmp_path: Path, naming: str) -> None:
    """Kohya's [out, 1, 1, 1] becomes PEFT's [1, out, 1, 1]."""
    up, down = pair(10, 4, 10, kernel=(3, 3))
    names = {"kohya": "lora_unet_down_blocks_0_resnets_0_conv1", "diffusers": "unet.down_blocks.0.resnets.0.conv1"}
    values = torch.rand(10)
    kohya = {
        f"{names['kohya']}.lora_up.weight": up,
        f"{names['kohya']}.lora_down.weight": down,
        f"{names['kohya']}.alpha": torch.tensor(4.0),
        f"{names['kohya']}.dora_scale": values.reshape(10, 1, 1, 1),
    }
    diffusers = {
        f"{names['diffusers']}.lora_B.weight": up,
        f"{names['diffusers']}.lora_A.weight": down,
        f"{names['diffusers']}.lora_magnitude_vector": values.reshape(1, 10, 1, 1),
    }
    layers, expected = (diffusers, kohya) if naming == "kohya" else (kohya, diffusers)
    source = write_tensors(tmp_path / "a.safetensors", layers)
    after = tensors_of(converted(source, bases("sd15", "native"), naming, tmp_path / "out"))
    assert {key: tuple(value.shape) for key, value in after.items()} == {
        key: tuple(value.shape) for key, value in expected.items()
    }
    assert all(torch.equal(after[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("naming", ["kohya", "comfy", "diffusers"])
def test_magnitudes_per_input_are_renamed(bases, tmp_path: Path, naming: str) -> None:
    """OneTrainer's DoRA has one number per input, which PEFT cannot read."""
    name, theirs = "lora_unet_double_blocks_0_txt_mlp_0", "diffusion_model.double_blocks.0.txt_mlp.0"
    (up, down), magnitude = pair(4 * WIDTH, 4, WIDTH), torch.rand(1, WIDTH)
    tensors = {
        **{f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(4.0)},
        f"{name}.dora_scale": magnitude,
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("flux", "native"), naming, tmp_path / "out")
    after = tensors_of(result)
    if naming == "diffusers":
        assert {tensor.key for tensor in result.kept} == after.keys() == tensors.keys()
        assert all("per input" in tensor.reason for tensor in result.kept)
    else:
        assert result.kept == ()
        assert torch.equal(after[f"{theirs if naming == 'comfy' else name}.dora_scale"], magnitude)


def test_a_fused_dora_layer_cannot_be_split_and_is_kept(bases, tmp_path: Path) -> None:
    up, down = pair(3 * WIDTH, 4, WIDTH)
    tensors = {
        f"{QKV}.lora_up.weight": up,
        f"{QKV}.lora_down.weight": down,
        f"{QKV}.dora_scale": torch.rand(3 * WIDTH, 1),
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("flux", "native"), "diffusers", tmp_path / "out")
    assert {tensor.key for tensor in result.kept} == tensors.keys()
    assert all("dora" in tensor.reason for tensor in result.kept)
    assert all(torch.equal(value, tensors[key]) for key, value in tensors_of(result).items())


OTHERS = {
    "sd15_loha_conv_kohya": "sd15",
    "sd15_loha_tucker_kohya": "sd15",
    "sd15_lokr_both_kohya": "sd15",
    "sd15_lokr_unbalanced_kohya": "sd15",
    "sd15_full_kohya": "sd15",
    "sd15_glora_kohya": "sd15",
    "sd15_diag_oft_rescale_kohya": "sd15",
    "sd15_boft_kohya": "sd15",
    "sdxl_ia3_kohya": "sdxl",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_renamed_with_their_tensors(tmp_path: Path, name: str) -> None:
    """Endings and bits stay, and a round trip gives the same file."""
    listed = {key: shape for key, shape in shapes(name).items() if re.search("mid_block|middle_block", key)}
    tensors = {key: torch.randn(shape).half() for key, shape in listed.items() if not key.endswith(".diff_b")}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    full = write_header(tmp_path / "base.safetensors", shapes(f"base_{OTHERS[name]}_ldm"))
    result = converted(source, full, "diffusers", tmp_path / "there")
    after = tensors_of(result)
    assert result.exact
    assert result.kept == ()
    assert all(key.startswith("unet.") for key in after)
    assert sorted(key.rpartition(".")[2] for key in after) == sorted(key.rpartition(".")[2] for key in tensors)
    back = tensors_of(converted(Path(result.output), full, "kohya", tmp_path / "back"))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_a_tucker_core_is_renamed_and_keeps_its_alpha(bases, tmp_path: Path) -> None:
    """The strength cannot go into a layer of three factors."""
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{name}.lora_up.weight": torch.randn(10, 4, 1, 1),
        f"{name}.lora_mid.weight": torch.randn(4, 4, 3, 3),
        f"{name}.lora_down.weight": torch.randn(4, 10, 1, 1),
        f"{name}.alpha": torch.tensor(3.0),
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("sd15", "native"), "comfy", tmp_path / "out")
    after = tensors_of(result)
    assert result.exact
    assert after.keys() == {key.replace(name, "diffusion_model.input_blocks.1.0.in_layers.2") for key in tensors}
    assert_same_effect(Path(result.output), effect(source, bases("sd15", "native")), bases("sd15", "native"))


@pytest.mark.parametrize("name", ["flux_lokr_simpletuner", "sd35_medium_lokr_simpletuner"])
def test_layers_that_cannot_be_split_are_kept_and_listed(tmp_path: Path, name: str) -> None:
    """A Kronecker product has no rows of q, k and v; equal rows are renamed."""
    listed = {key: shape for key, shape in shapes(name).items() if re.search("_transformer_blocks_0_", key)}
    tensors = {key: torch.randn(shape).half() for key, shape in listed.items()}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    family = "flux_dev_comfy_full" if "flux" in name else "sd35_medium_native"
    native = write_header(tmp_path / "base.safetensors", shapes(f"base_{family}"))
    result = converted(source, native, "kohya", tmp_path / "out")
    kept = {tensor.key for tensor in result.kept}
    assert kept == {key for key in tensors if re.search("to_[qkv]\\.|add_[qkv]_proj|proj_mlp", key)}
    assert all("lokr, which cannot be cut to the rows of lora_unet_" in tensor.reason for tensor in result.kept)
    after = tensors_of(result)
    assert len(after) == len(tensors)
    assert all(torch.equal(after[key], tensors[key]) for key in kept)
    assert {key.partition("blocks")[0] for key in after.keys() - kept} <= {
        "lora_unet_double_",
        "lora_unet_single_",
        "lora_unet_joint_",
    }


def test_a_lora_beside_an_unsplit_layer_has_its_own_reason(bases, tmp_path: Path) -> None:
    up, down = pair(WIDTH, 4, WIDTH)
    tensors = {
        f"{BLOCK}.to_q.lokr_w1": torch.randn(12, 12),
        f"{BLOCK}.to_q.lokr_w2": torch.randn(8, 8),
        f"{BLOCK}.to_k.lora_B.weight": up,
        f"{BLOCK}.to_k.lora_A.weight": down,
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("flux", "native"), "kohya", tmp_path / "out")
    reasons = {tensor.key: tensor.reason for tensor in result.kept}
    assert reasons.keys() == tensors.keys()
    assert not any(reasons[key].startswith("lora, which cannot be cut") for key in reasons)


def test_bias_differences_are_renamed_with_their_weight(bases, tmp_path: Path) -> None:
    up, down = pair(WIDTH, 4, WIDTH)
    name, bias = "lora_unet_double_blocks_0_img_attn_proj", torch.randn(WIDTH)
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.diff_b": bias}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("flux", "native"), "comfy", tmp_path / "out")
    assert result.kept == ()
    assert torch.equal(tensors_of(result)["diffusion_model.double_blocks.0.img_attn.proj.diff_b"], bias)


def test_tensors_without_a_layer_are_kept_and_listed(bases, tmp_path: Path) -> None:
    up, down = pair(WIDTH, 4, WIDTH)
    others = {
        "lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm": torch.randn(4).half(),
        "bundle_emb.cat.clip_l": torch.randn(2, 8).bfloat16(),
        "note": torch.arange(3),
    }
    tensors = {"lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": up}
    tensors |= {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": down, **others}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    result = converted(source, bases("flux", "native"), "diffusers", tmp_path / "out")
    assert {tensor.key for tensor in result.kept} == others.keys()
    assert all(tensor.reason for tensor in result.kept)
    after = tensors_of(result)
    assert all(torch.equal(after[key], tensor) for key, tensor in others.items())


# --- PEFT folders -------------------------------------------------------------------------------


class Llama(nn.Module):
    """Linear layers under the names of a language model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        attention = {
            f"{letter}_proj": nn.Linear(16, out, bias=False) for letter, out in zip("qkv", (16, 8, 8), strict=True)
        }
        mlp = {"up_proj": nn.Linear(16, 24), "down_proj": nn.Linear(24, 16)}
        block = nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([block])})
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        block = self.model["layers"][0]
        q, k, v = (block["self_attn"][f"{letter}_proj"](x) for letter in "qkv")
        x = x + torch.tanh(q * torch.cat([k, v], -1))
        return x + block["mlp"]["down_proj"](torch.tanh(block["mlp"]["up_proj"](x)))


INPUTS = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "patterns": {"r": 4, "lora_alpha": 2, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 12}},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 3, "use_dora": True},
    "bias": {"r": 4, "lora_alpha": 10, "lora_bias": True, "target_modules": ["up_proj", "down_proj"]},
}


def peft_folder(path: Path, **config: object) -> Path:
    """A folder as PEFT saves it after training: no tensor is zero, no magnitude is a norm."""
    model = get_peft_model(Llama(), LoraConfig(**{"target_modules": ["q_proj", "v_proj", "up_proj"], **config}))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    model.save_pretrained(path)
    return path


def peft_output(folder: str | Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(Llama(), folder)(INPUTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of that model as a base."""
    return write_tensors(tmp_path_factory.mktemp("llama") / "model.safetensors", Llama().state_dict())


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape:peft.utils.warning.PeftWarning")  # biases
@pytest.mark.parametrize(
    ("config", "naming"),
    [
        (config, naming)
        for config in CONFIGS
        for naming in NAMINGS
        if config != "bias" or naming in ("peft", "diffusers")  # the others have another form for it
    ],
)
def test_peft_reads_a_folder_after_a_round_trip(llama: Path, tmp_path: Path, config: str, naming: str) -> None:
    folder = peft_folder(tmp_path / "adapter", **CONFIGS[config])
    with torch.no_grad():
        assert float((peft_output(folder) - Llama()(INPUTS)).norm()) > 0.1
    renamed = converted(folder, llama, naming, tmp_path / "there")
    assert renamed.kept == ()
    back = Path(converted(Path(renamed.output), llama, "peft", tmp_path / "back").output)
    assert sorted(path.name for path in back.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.allclose(peft_output(back), peft_output(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("naming", ["kohya", "comfy"])
def test_a_bias_gets_the_name_of_other_programs(llama: Path, tmp_path: Path, naming: str) -> None:
    """PEFT scales a bias as the factors, ComfyUI adds `diff_b` unscaled."""
    folder = peft_folder(tmp_path / "adapter", **CONFIGS["bias"])
    result = converted(folder, llama, naming, tmp_path / "out")
    name = {"kohya": "lora_unet_model_layers_0_mlp_up_proj", "comfy": "diffusion_model.model.layers.0.mlp.up_proj"}
    before = load_file(folder / "adapter_model.safetensors")["base_model.model.model.layers.0.mlp.up_proj.lora_B.bias"]
    assert torch.allclose(tensors_of(result)[f"{name[naming]}.diff_b"], 2.5 * before)


OTHER_KINDS = {
    "loha": LoHaConfig(r=2, alpha=3),
    "lokr": LoKrConfig(r=1, alpha=3, decompose_both=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=10),
}


def folder_of_kind(path: Path, config: PeftConfig) -> Path:
    """A folder of another kind than LoRA as PEFT saves it; no tensor is zero."""
    config.target_modules = {"q_proj", "v_proj", "up_proj"}
    model = get_peft_model(Llama(), config)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_the_scale_in_the_settings_of_other_kinds_is_kept(llama: Path, tmp_path: Path, kind: str, naming: str) -> None:
    folder = folder_of_kind(tmp_path / "adapter", OTHER_KINDS[kind])
    result = converted(folder, llama, naming, tmp_path / "out")
    assert result.kept == ()
    assert_same_effect(Path(result.output), effect(folder, llama), llama)


@pytest.mark.parametrize(
    "config",
    [
        LoKrConfig(r=64, alpha=3),  # both factors are whole, and programs read no alpha beside them
        OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False),
        OFTConfig(r=0, oft_block_size=4, coft=True, eps=0.01),
    ],
)
def test_what_only_settings_can_say_is_not_renamed(llama: Path, tmp_path: Path, config: PeftConfig) -> None:
    folder = folder_of_kind(tmp_path / "adapter", config)
    (failure,) = convert(folder, base=llama, naming="kohya", output=tmp_path / "out").failed
    assert "PEFT's settings" in failure.error
    assert "--as lora" in failure.error


def test_the_settings_of_a_folder_match_its_layers(llama: Path, tmp_path: Path) -> None:
    layers = {
        "lora_unet_model_layers_0_self_attn_q_proj": (*pair(16, 4, 16), 8.0),
        "lora_unet_model_layers_0_self_attn_k_proj": (*pair(8, 4, 16), 8.0),
        "lora_unet_model_layers_0_mlp_up_proj": (*pair(24, 2, 16), 3.0),
    }
    source = kohya_file(tmp_path / "a.safetensors", layers)
    folder = Path(converted(source, llama, "peft", tmp_path / "out").output)
    assert folder.name == "a_peft"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["target_modules"] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.q_proj",
    ]
    assert list(config["rank_pattern"].values()) == [2]
    assert list(config["alpha_pattern"].values()) == [3.0]
    with torch.no_grad():
        model = Llama()
        for key, added in effect(source, llama).items():
            model.get_parameter(key).data += added
        expected = model(INPUTS)
    assert torch.allclose(peft_output(folder), expected, rtol=1e-4, atol=1e-5)


def test_settings_about_the_model_stay_in_a_folder(llama: Path, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "adapter", r=4, lora_alpha=4)
    settings = {"base_model_name_or_path": "a/model", "task_type": "CAUSAL_LM"}
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    new = Path(converted(folder, llama, "peft", tmp_path / "out").output)
    assert settings.items() <= json.loads((new / "adapter_config.json").read_text()).items()


def test_a_folder_is_for_one_model(bases, tmp_path: Path) -> None:
    listed = {key: shape for key, shape in few(shapes("sd15_lora_kohya")).items() if "_0_" in key}
    source = write_tensors(tmp_path / "a.safetensors", numbers(listed))
    (failure,) = convert(source, base=bases("sd15", "native"), naming="peft", output=tmp_path / "out").failed
    assert "a PEFT folder is for one" in failure.error
    assert "te1, unet" in failure.error


def test_only_lora_becomes_a_folder(bases, tmp_path: Path) -> None:
    tensors = {f"{BLOCK}.to_out.0.lokr_w1": torch.randn(12, 12), f"{BLOCK}.to_out.0.lokr_w2": torch.randn(8, 8)}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    (failure,) = convert(source, base=bases("flux", "native"), naming="peft", output=tmp_path / "out").failed
    assert "is lokr, and only LoRA is written as a PEFT folder" in failure.error
    assert "--as lora" in failure.error


@pytest.mark.parametrize("name", ["out.safetensors", "adapter_model.safetensors"])
def test_a_folder_is_not_written_as_a_single_file(llama: Path, tmp_path: Path, name: str) -> None:
    """Settings beside a file might belong to another adapter."""
    second = peft_folder(tmp_path / "other", r=2)
    before = (second / "adapter_config.json").read_bytes()
    source = kohya_file(tmp_path / "a.safetensors", {"lora_unet_model_layers_0_mlp_up_proj": (*pair(24, 2, 16), 3.0)})
    with pytest.raises((UsageError, OutputError)):
        convert(source, base=llama, naming="peft", output=second / name)
    assert (second / "adapter_config.json").read_bytes() == before


# --- dtype --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "16", "32"])
def test_every_float_gets_the_dtype_but_alphas(tmp_path: Path, dtype: str) -> None:
    kind = {"fp16": torch.float16, "16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    up, down = pair(16, 4, 16)
    tensors = {
        "lora_unet_a.lora_up.weight": up.half(),
        "lora_unet_a.lora_down.weight": down.bfloat16(),
        "lora_unet_a.alpha": torch.tensor(0.3).half(),
        "lora_unet_a.dora_scale": torch.rand(16, 1),
        "lora_unet_b.hada_w1_a": up.double(),
        "lora_unet_b.hada_w1_b": down,
        "lora_unet_b.hada_w2_a": up.clone(),
        "lora_unet_b.hada_w2_b": down.clone(),
        "lora_unet_b.alpha": torch.tensor(2, dtype=torch.int64),
        "lora_unet_n.w_norm": torch.rand(7),
        "note": torch.arange(3),
    }
    source = write_tensors(tmp_path / "a.safetensors", tensors, {"mine": "yes"})
    result = converted(source, None, None, tmp_path / "out", dtype=dtype)
    after = tensors_of(result)
    assert Path(result.output).name == f"a_{dtype}.safetensors"
    assert not result.exact
    assert metadata_of(result.output) == {"mine": "yes"}
    assert after.keys() == tensors.keys()
    for key, tensor in tensors.items():
        same = key.endswith(".alpha") or key == "note"
        assert after[key].dtype == (tensor.dtype if same else kind)
        assert torch.equal(after[key], tensor.to(after[key].dtype))


def test_an_equal_dtype_changes_no_bit(tmp_path: Path) -> None:
    source = write_tensors(tmp_path / "a.safetensors", whole_scale("sd15_lora_kohya"))
    result = converted(source, None, None, tmp_path / "out", dtype="fp16")
    assert result.exact
    before = load_file(source)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(result).items())


def test_an_overflow_of_the_dtype_fails_and_leaves_no_file(tmp_path: Path) -> None:
    up, down = pair(16, 4, 16)
    source = kohya_file(tmp_path / "a.safetensors", {"lora_unet_a": (1e6 * up, 1e6 * down, 4.0)})
    (failure,) = convert(source, dtype="fp16", output=tmp_path / "out").failed
    assert "lora_unet_a.lora_" in failure.error
    assert "-t bf16 or -t fp32" in failure.error
    assert not list((tmp_path / "out").iterdir())
    assert only(convert(source, dtype="bf16", output=tmp_path / "out")).layers == 1


def test_an_overflow_of_a_folded_strength_fails(bases, tmp_path: Path) -> None:
    up, down = pair(WIDTH, 4, WIDTH)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    source = kohya_file(tmp_path / "a.safetensors", {name: ((1e4 * up).half(), down.half(), 4000.0)})
    report = convert(source, base=bases("flux", "native"), naming="diffusers", output=tmp_path / "out")
    (failure,) = report.failed
    assert "-t fp32" in failure.error
    assert not list((tmp_path / "out").glob("*"))


def test_names_and_dtype_change_together_without_rounding_twice(bases, tmp_path: Path) -> None:
    up, down = pair(WIDTH, 3, WIDTH)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    source = kohya_file(tmp_path / "a.safetensors", {name: (up.half(), down.half(), 1.0)})
    result = converted(source, bases("flux", "native"), "diffusers", tmp_path / "out", dtype="fp32")
    assert Path(result.output).name == "a_diffusers_fp32.safetensors"
    after = tensors_of(result)
    assert {value.dtype for value in after.values()} == {torch.float32}
    product = after[f"{BLOCK}.to_out.0.lora_B.weight"] @ after[f"{BLOCK}.to_out.0.lora_A.weight"]
    expected = up.half().double() @ down.half().double() / 3
    assert float((product - expected).norm()) < 1e-6 * float(expected.norm())


def test_factors_in_eight_bits_are_widened_exactly(tmp_path: Path) -> None:
    up, down = (factor.to(torch.float8_e4m3fn) for factor in pair(16, 4, 16))
    tensors = {"lora_unet_a.lora_up.weight": up, "lora_unet_a.lora_down.weight": down}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    after = tensors_of(converted(source, None, None, tmp_path / "out", dtype="fp16"))
    assert all(torch.equal(after[key], tensor.half()) for key, tensor in tensors.items())


# --- wrong requests -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return kohya_file(
        tmp_path / "small.safetensors", {"lora_unet_double_blocks_0_img_attn_proj": (*pair(WIDTH, 4, WIDTH), 4.0)}
    )


def test_new_names_need_a_base(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--base"):
        convert(small, naming="diffusers", output=tmp_path / "out")
    with pytest.raises(UsageError, match="--base"):
        lorashrink.resize(small, recipes="rank=2", naming="diffusers", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing to do"),
        ({"naming": "a1111"}, "'a1111' is not one of kohya, diffusers, comfy, peft"),
        ({"dtype": "int8"}, "'int8' is not one of"),
        ({"dtype": "mixed"}, "mixed chooses fp16 where nothing is dropped"),
    ],
)
def test_contradicting_options_are_refused(small: Path, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        convert(small, output=tmp_path / "out", **options)


def test_a_base_of_another_family_is_an_error(bases, small: Path, tmp_path: Path) -> None:
    """A file with its old names would look converted."""
    for naming in NAMINGS:
        report = convert(small, base=bases("sd15", "native"), naming=naming, output=tmp_path / "out")
        assert report.results == ()
        (failure,) = report.failed
        assert "small.safetensors" in failure.error
    assert not list(tmp_path.glob("out/*"))


def test_a_file_that_is_no_base_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        convert(small, base=tmp_path / "missing.safetensors", naming="kohya")
    with pytest.raises(InputError):
        convert(small, base=small, naming="kohya")


def test_outputs_are_not_replaced_unless_asked(bases, small: Path, tmp_path: Path) -> None:
    flux = bases("flux", "native")
    first = converted(small, flux, "diffusers", tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        convert(small, base=flux, naming="diffusers", output=tmp_path / "out")
    again = converted(small, flux, "diffusers", tmp_path / "out", force=True)
    assert first == again
    with pytest.raises(OutputError, match="is an input"):
        convert(small, dtype="bf16", output=small, force=True)
    folder = peft_folder(tmp_path / "adapter", r=2)
    with pytest.raises(UsageError, match="a folder with two files"):
        convert(folder, dtype="bf16", output=folder / "adapter_model.safetensors", force=True)


def test_where_outputs_go(bases, small: Path, tmp_path: Path) -> None:
    flux = bases("flux", "native")
    beside = only(convert(small, base=flux, naming="comfy"))
    assert Path(beside.output) == tmp_path / "small_comfy.safetensors"
    named = converted(small, flux, "comfy", tmp_path / "mine.safetensors")
    assert Path(named.output) == tmp_path / "mine.safetensors"
    second = shutil.copy(small, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="there are 2 outputs"):
        convert([small, second], base=flux, naming="comfy", output=tmp_path / "one.safetensors")
    report = convert([small, second], base=flux, naming="comfy", output=tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "other_comfy.safetensors",
        "small_comfy.safetensors",
    ]
    assert [result.source for result in report.results] == [str(small), str(second)]


def test_reading_patterns_takes_linear_time(tmp_path: Path) -> None:
    """A folder with a rank per layer has as many patterns as layers."""
    count = 700
    shape = {f"model.layers.{number}.mlp.up_proj.weight": (16, 8) for number in range(count)}
    big = write_header(tmp_path / "base.safetensors", {**shape, "model.layers.0.self_attn.q_proj.weight": (8, 8)})
    layers = {
        f"lora_unet_model_layers_{number}_mlp_up_proj": (*pair(16, 1 + number % 7, 8), 1.0 + number % 5)
        for number in range(count)
    }
    source = kohya_file(tmp_path / "a.safetensors", layers)
    start = time.process_time()
    result = converted(source, big, "peft", tmp_path / "out")
    assert result.layers == count
    assert time.process_time() - start < 20  # 700 patterns for each of 700 layers would take a minute


@pytest.mark.parametrize("ending", ["pt", "bin"])
def test_pickled_tensors_are_read_too(bases, small: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"small.{ending}"
    torch.save(load_file(small), path)
    for naming, dtype in (("diffusers", "same"), (None, "bf16")):
        first, second = (
            tensors_of(converted(adapter, bases("flux", "native"), naming, tmp_path / adapter.suffix, dtype=dtype))
            for adapter in (path, small)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_inputs_of_one_name_need_two_folders(bases, small: Path, tmp_path: Path) -> None:
    copy = small.with_suffix(".pt")
    torch.save(load_file(small), copy)
    with pytest.raises(OutputError, match="would be the output of both"):
        convert([small, copy], base=bases("flux", "native"), naming="comfy", output=tmp_path / "out")


def test_folders_of_adapters_are_searched(bases, small: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for folder in ("in/one", "in/two", "in/deeper/three"):
        shutil.copy(small, tmp_path / f"{folder}.safetensors")
    steps = []
    options = {"base": bases("flux", "native"), "naming": "comfy", "progress": lambda *step: steps.append(step)}
    assert len(convert(tmp_path / "in", output=tmp_path / "out", **options).results) == 2
    assert steps == [("converting", 1, 2), ("converting", 2, 2)]
    assert len(convert(tmp_path / "in", output=tmp_path / "all", recursive=True, **options).results) == 3


# --- several files, and programs that read the report -------------------------------------------


def test_broken_files_do_not_stop_the_conversion_of_others(bases, small: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(small.read_bytes()[:-100])
    report = convert([broken, small], base=bases("flux", "native"), naming="diffusers", output=tmp_path / "out")
    assert [result.source for result in report.results] == [str(small)]
    assert [failure.source for failure in report.failed] == [str(broken)]
    assert "cut short" in report.failed[0].error


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["convert", *(str(argument) for argument in arguments)])
    assert result.exit_code == status, result.output
    return result.stdout


def test_exit_statuses_of_the_command(bases, small: Path, tmp_path: Path) -> None:
    flux, broken = bases("flux", "native"), tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    run("--naming", "diffusers", flux, small, "-o", tmp_path / "a")
    run("--naming", "diffusers", "--base", flux, small, broken, "-o", tmp_path / "b", status=1)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["small_diffusers.safetensors"]
    run("--naming", "diffusers", flux, broken, "-o", tmp_path / "c", status=2)
    run("--naming", "diffusers", small, "-o", tmp_path / "c", status=2)
    run("--naming", "other", flux, small, "-o", tmp_path / "c", status=2)
    run(small, "-o", tmp_path / "c", status=2)
    run(flux, "--naming", "kohya", status=2)
    assert not list(tmp_path.glob("c/*"))


def test_the_json_of_the_command_is_the_report(bases, small: Path, tmp_path: Path) -> None:
    flux, broken = bases("flux", "native"), tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    text = run("--naming", "comfy", "-t", "bf16", "--json", flux, small, broken, "-o", tmp_path / "out", status=1)
    document = json.loads(text)
    assert list(document) == ["version", "command", "base", "results", "failed"]
    assert document["version"] == lorashrink.__version__
    assert document["base"] == {"path": str(flux), "family": "flux", "kind": "file"}
    output = tmp_path / "out" / "small_comfy_bf16.safetensors"
    assert "ComfyUI" in document["results"][0].pop("loads")["loads_in"]
    assert document["results"] == [
        {
            "source": str(small),
            "output": str(output),
            "naming": "comfy",
            "dtype": "bf16",
            "bytes_before": small.stat().st_size,
            "bytes_after": output.stat().st_size,
            "layers": 1,
            "exact": False,
            "kept": [],
            "warnings": [],
        }
    ]
    assert [failure["source"] for failure in document["failed"]] == [str(broken)]


def test_the_command_lists_kept_tensors(bases, tmp_path: Path) -> None:
    layers = {"lora_unet_double_blocks_0_img_attn_proj": (*pair(WIDTH, 4, WIDTH), 4.0)}
    source = kohya_file(tmp_path / "a.safetensors", {**layers, "lora_unet_elsewhere": (*pair(8, 2, 8), 2.0)})
    text = run("--naming", "diffusers", bases("flux", "native"), source, "-v", "-o", tmp_path / "out")
    assert "a_diffusers.safetensors: 2 layers" in text
    assert "3 tensors under old names" in text
    assert "kept lora_unet_elsewhere.alpha: the base has no other name for it" in text


def test_hashes_are_those_of_the_new_tensors(bases, tmp_path: Path) -> None:
    """As sd-scripts computes them, of the tensors and of a re-save."""
    entries = {
        "ss_network_dim": "4",
        "ss_tag_frequency": '{"img": {"a": 3, "é": 1}}',
        "sshs_model_hash": "stale",
        "sshs_legacy_hash": "stale",
        "modelspec.hash_sha256": "0xstale",
        "modelspec.title": "mine",
    }
    source = write_tensors(tmp_path / "a.safetensors", numbers(scaled(shapes("flux_lora_kohya"))), entries)
    result = converted(source, bases("flux", "native"), "kohya", tmp_path / "out")
    raw, new = Path(result.output).read_bytes(), metadata_of(result.output)
    assert new["sshs_model_hash"] == hashlib.sha256(raw[8 + struct.unpack("<Q", raw[:8])[0] :]).hexdigest()
    assert new["modelspec.hash_sha256"] == "0x" + new["sshs_model_hash"]
    assert (new["modelspec.title"], new["ss_tag_frequency"]) == ("mine", entries["ss_tag_frequency"])
    again = tmp_path / "again.safetensors"
    save_file(tensors_of(result), again, {key: value for key, value in new.items() if key.startswith("ss_")})
    window = again.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert len(window) == 0x10000
    assert new["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_a_file_without_hashes_gets_none(small: Path, tmp_path: Path) -> None:
    assert metadata_of(converted(small, None, None, tmp_path / "out", dtype="bf16").output) == {}


def test_equal_conversions_write_equal_bytes(bases, small: Path, tmp_path: Path) -> None:
    first, second = (
        Path(converted(small, bases("flux", kind), "diffusers", tmp_path / kind).output) for kind in ("native", "norms")
    )
    assert first.read_bytes() == second.read_bytes()
