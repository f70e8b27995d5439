"""What `compare` says of two adapters, against ΔW formed in float64."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conversions import few, numbers
from fixtures import shapes, write_header
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import lorashrink
from lorashrink.cli import app
from lorashrink.errors import FamilyMismatch, InputError, NotAnAdapter, ShapeError, UsageError
from lorashrink.insight.comparison import compare
from lorashrink.plots.difference import difference_per_block
from lorashrink.results.comparison import Comparison, LayerDifference
from lorashrink.text import size_text

NAME = "lora_unet_input_blocks_4_1_proj_in"
Tensors = Mapping[str, Tensor]


def write(folder: Path, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def lora(up: Tensor, down: Tensor, alpha: float | None = None, name: str = NAME) -> dict[str, Tensor]:
    factors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return factors if alpha is None else {**factors, f"{name}.alpha": torch.tensor(alpha, dtype=torch.float64)}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compared(folder: Path, a: Tensors, b: Tensors, **options: object) -> Comparison:
    return compare(write(folder, "a", a), write(folder, "b", b), **options)  # type: ignore[arg-type]


def only(comparison: Comparison) -> LayerDifference:
    assert (comparison.only_a, comparison.only_b) == ((), ())
    (layer,) = comparison.layers
    return layer


def assert_numbers(row: object, a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    """Whatever has numbers has those of these two ΔW, in float64."""
    size_a, size_b, apart = float(a.norm()), float(b.norm()), float((a - b).norm())
    cosine = float((a * b).sum()) / size_a / size_b
    expected = {
        "fro_a": size_a,
        "fro_b": size_b,
        "difference": apart,
        "relative_difference": apart / size_a,
    }
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(value, rel=tolerance), name
    assert getattr(row, "cosine") == pytest.approx(cosine, abs=max(tolerance, 1e-12))  # noqa: B009
    energy = 1 - (apart / size_a) ** 2
    assert getattr(row, "energy_kept") == pytest.approx(energy, rel=tolerance, abs=max(tolerance, 1e-12))  # noqa: B009


# --- numbers ------------------------------------------------------------------------------------

KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    alphas=st.tuples(st.sampled_from([-3.0, 0.5, 8.0]), st.sampled_from([None, 0.01, 4.0])),
    seed=st.integers(0, 1 << 20),
)
def test_two_loras_of_any_rank_scale_and_dtype(tmp_path_factory, sides, ranks, kinds, alphas, seed: int) -> None:
    out, inner = sides
    a, b = (
        (randn(out, rank, seed=seed + side).to(kind), randn(rank, inner, seed=seed + side + 2).to(kind), alpha)
        for side, (rank, kind, alpha) in enumerate(zip(ranks, kinds, alphas, strict=True))
    )
    truth = [up.double() @ down.double() * (1 if alpha is None else alpha / up.shape[1]) for up, down, alpha in (a, b)]
    result = compared(tmp_path_factory.mktemp("x"), lora(*a), lora(*b))
    assert_numbers(only(result), *truth)
    assert_numbers(result.total, *truth)
    assert_numbers(result.blocks[0], *truth)
    assert (only(result).rank_a, only(result).rank_b) == ranks


@given(
    exponent=st.floats(-6, 0),
    sides=st.tuples(st.integers(20, 48), st.integers(20, 48)),
    more=st.integers(0, 3),
    seed=st.integers(0, 1 << 20),
)
def test_small_differences_keep_their_digits_in_any_basis(
    tmp_path_factory, exponent: float, sides: tuple[int, int], more: int, seed: int
) -> None:
    """A difference of 1e-6 in other factors has 8 correct digits."""
    rank, (out, inner) = 6, sides
    up, down = randn(out, rank, seed=seed), randn(rank, inner, seed=seed + 1)
    turn = randn(rank, rank, seed=seed + 2) + 3 * torch.eye(rank, dtype=torch.float64)
    small = 10.0**exponent
    up_b = torch.cat([up @ turn + small * randn(out, rank, seed=seed + 3), randn(out, more, seed=seed + 4)], 1)
    down_b = torch.cat([torch.linalg.solve(turn, down), small * randn(more, inner, seed=seed + 5)])
    result = compared(tmp_path_factory.mktemp("x"), lora(up, down), lora(up_b, down_b))
    assert_numbers(only(result), up @ down, up_b @ down_b, 1e-8)


def test_norms_of_factors_that_cancel_each_other_keep_their_digits(tmp_path: Path) -> None:
    column, row = randn(24, 1), randn(1, 30, seed=1)
    up = torch.cat([column, column + 1e-6 * randn(24, 1, seed=2)], 1)
    down = torch.cat([row, -row])
    result = compared(tmp_path, lora(up, down), lora(randn(24, 2, seed=3), randn(2, 30, seed=4)))
    truth = (up[:, :1] - up[:, 1:]) @ row
    assert only(result).fro_a == pytest.approx(float(truth.norm()), rel=1e-8)


def lokr(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    return {f"{NAME}.lokr_w1": first, f"{NAME}.lokr_w2": second}


@given(exponent=st.floats(-6, 0), share=st.sampled_from([-2.0, 0.3, 1.0]), seed=st.integers(0, 1 << 20))
def test_kronecker_products_of_equal_factors(tmp_path_factory, exponent: float, share: float, seed: int) -> None:
    first, second = randn(4, 5, seed=seed), randn(6, 3, seed=seed + 1)
    first_b = share * first + 10**exponent * randn(4, 5, seed=seed + 2)
    second_b = second / share + 10**exponent * randn(6, 3, seed=seed + 3)
    result = compared(tmp_path_factory.mktemp("x"), lokr(first, second), lokr(first_b, second_b))
    assert_numbers(only(result), torch.kron(first, second), torch.kron(first_b, second_b), 1e-8)


def test_kronecker_products_that_have_nothing_in_common(tmp_path: Path) -> None:
    a, b = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    a[0, 0] = b[1, 1] = 2.0
    second = randn(3, 4)
    assert_numbers(only(compared(tmp_path, lokr(a, second), lokr(b, second))), *(torch.kron(x, second) for x in (a, b)))


UP, DOWN = randn(24, 4), randn(4, 30, seed=1)
W1, W2 = randn(4, 5, seed=2), randn(6, 6, seed=3)
HADA = [randn(24, 2, seed=4), randn(2, 30, seed=5), randn(24, 2, seed=6), randn(2, 30, seed=7)]
FULL = randn(24, 30, seed=8)
# name -> (tensors, ΔW)
FORMS: dict[str, tuple[Tensors, Tensor]] = {
    "lora": (lora(UP, DOWN, 2.0), UP @ DOWN / 2),
    "wide lora": (lora(randn(24, 28), randn(28, 30, seed=1), 28.0), randn(24, 28) @ randn(28, 30, seed=1)),
    "lokr": (lokr(W1, W2), torch.kron(W1, W2)),
    "other lokr": (lokr(randn(6, 3), randn(4, 10)), torch.kron(randn(6, 3), randn(4, 10))),
    "lokr of factors": (
        {f"{NAME}.lokr_w1": W1, f"{NAME}.lokr_w2_a": randn(6, 2), f"{NAME}.lokr_w2_b": randn(2, 6, seed=1)},
        torch.kron(W1, randn(6, 2) @ randn(2, 6, seed=1)),
    ),
    "loha": (
        {f"{NAME}.hada_w{part}": factor for part, factor in zip(("1_a", "1_b", "2_a", "2_b"), HADA, strict=True)},
        (HADA[0] @ HADA[1]) * (HADA[2] @ HADA[3]),
    ),
    "full": ({f"{NAME}.diff": FULL}, FULL),
}


@pytest.mark.parametrize("form_a", FORMS)
@pytest.mark.parametrize("form_b", FORMS)
def test_every_form_against_every_other(tmp_path: Path, form_a: str, form_b: str, engine_device: str) -> None:
    (a, truth_a), (b, truth_b) = FORMS[form_a], FORMS[form_b]
    layer = only(compared(tmp_path, a, b, device=engine_device))
    if form_a == form_b:
        assert (layer.difference, layer.cosine, layer.energy_kept) == (0.0, 1.0, 1.0)
        assert layer.fro_a == layer.fro_b == pytest.approx(float(truth_a.norm()), rel=1e-6)
    else:
        assert_numbers(layer, truth_a, truth_b, 1e-6)  # factors of LoHa are multiplied in float32


def test_large_matrices_are_read_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorashrink.insight.differences._BLOCK", 70)  # two rows of 30, which also cuts blocks of w2
    (a, truth_a), (b, truth_b) = FORMS["lokr"], FORMS["lora"]
    assert_numbers(only(compared(tmp_path, a, b)), truth_a, truth_b)


def test_tucker_cores_and_flattened_kernels(tmp_path: Path) -> None:
    up, core, down = randn(8, 3), randn(3, 3, 3, 3, seed=1), randn(3, 5, seed=2)
    a = {f"{NAME}.lora_up.weight": up[:, :, None, None], f"{NAME}.lora_mid.weight": core}
    a[f"{NAME}.lora_down.weight"] = down[:, :, None, None]
    b = randn(8, 5, 3, 3, seed=3)
    truth = torch.einsum("oa,abhw,bi->oihw", up, core, down)
    layer = only(compared(tmp_path, a, {f"{NAME}.diff": b}))
    assert layer.shape == (8, 5, 3, 3)
    assert_numbers(layer, truth, b)


def test_rotations_are_compared_on_their_base(tmp_path: Path, base: Path) -> None:
    weight = load_file(base)["model.diffusion_model.input_blocks.4.1.proj_in.weight"].double()
    blocks = 0.1 * randn(6, 4, 4).float()
    skew = (blocks - blocks.mT).double()
    turns = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + skew, torch.eye(4, dtype=torch.float64) - skew)
    delta = torch.block_diag(*turns) @ weight - weight  # Rᵀ with R = (I + Q)(I − Q)⁻¹
    up, down = randn(24, 2), randn(2, 24, seed=1)
    layer = only(compared(tmp_path, {f"{NAME}.oft_blocks": blocks}, lora(up, down), base=base))
    assert layer.algo_a == "oft"
    assert_numbers(layer, delta, up @ down, 1e-5)


def test_rotations_without_their_base_are_left_out(tmp_path: Path, base: Path) -> None:
    turned = {f"{NAME}.oft_blocks": 0.1 * randn(6, 4, 4).float()}
    plain_lora = lora(randn(24, 2), randn(2, 24, seed=1), name="lora_unet_middle_block_1_proj_in")
    result = compared(tmp_path, {**turned, **plain_lora}, {**turned, **plain_lora})
    plain, flagged = sorted(result.layers, key=lambda layer: len(layer.flags))
    assert (flagged.flags, flagged.fro_a, flagged.cosine) == (("needs_base",), None, None)
    assert (result.total.layers, result.total.left_out) == (2, 1)
    assert result.total.fro_a == plain.fro_a
    with pytest.raises(UsageError, match="--base"):
        compared(tmp_path, turned, turned)
    lorashrink.norms(base, tmp_path / "norms.json")
    with pytest.raises(UsageError, match="a norm table is not enough"):
        compared(tmp_path, turned, turned, base=tmp_path / "norms.json")


# --- whole files --------------------------------------------------------------------------------


def test_the_same_file_twice_is_exactly_the_same(adapter: Path) -> None:
    result = compare(adapter, adapter)
    assert len(result.layers) == 178
    for row in (result.total, *result.blocks, *result.layers):
        assert row.difference == 0
        assert row.cosine == (1.0 if row.fro_a else None)
    assert result.total.energy_kept == 1
    assert (result.metadata, result.others, result.others_equal) == ((), (), 0)


@pytest.mark.parametrize("recipe", ["energy=0.9", "rank=3", "fro_ckpt,thr=-1.6"])
def test_the_difference_is_what_resize_lost(adapter: Path, base: Path, tmp_path: Path, recipe: str) -> None:
    report = lorashrink.resize(adapter, base=base, recipes=recipe, dtype="fp32", output=tmp_path / "small.safetensors")
    (shrunk,) = report.results
    result = compare(adapter, shrunk.output)
    assert result.total.relative_difference == pytest.approx(shrunk.relative_error, rel=1e-6)
    assert result.total.energy_kept == pytest.approx(shrunk.energy, rel=1e-6)
    lost = {layer.name: layer.rle_lora for layer in shrunk.layers}
    for layer in (*result.layers, *result.only_a):
        if layer.fro_a:
            assert layer.relative_difference == pytest.approx(lost[layer.name], rel=1e-5, abs=1e-6)
    assert {layer.name for layer in result.only_a} <= {removed.name for removed in shrunk.removed}
    assert (result.a.bytes, result.b.bytes) == (shrunk.bytes_before, shrunk.bytes_after)
    assert "lorashrink.recipe" in {entry.key for entry in result.metadata}


@pytest.mark.parametrize("naming", ["diffusers", "comfy"])
@pytest.mark.parametrize("source", ["checkpoint", "norms", "nothing"])
def test_other_names_make_no_difference(adapter: Path, base: Path, tmp_path: Path, naming: str, source: str) -> None:
    lorashrink.convert(adapter, base=base, naming=naming, dtype="fp32", output=tmp_path / "b.safetensors")
    lorashrink.norms(base, tmp_path / "norms.json")
    base_path = {"checkpoint": base, "norms": tmp_path / "norms.json", "nothing": None}[source]
    for files in ((adapter, tmp_path / "b.safetensors"), (tmp_path / "b.safetensors", adapter)):
        result = compare(*files, base=base_path)
        assert (len(result.layers), result.only_a, result.only_b) == (178, (), ())
        assert result.total.relative_difference < 1e-7
        assert {result.a.naming, result.b.naming} == {"kohya", naming}


def test_a_peft_folder_against_a_file(tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.proj_in"
    up, down = randn(24, 4).float(), randn(4, 24, seed=1).float()
    factors = {"lora_A.weight": down, "lora_B.weight": up}
    (tmp_path / "peft").mkdir()
    save_file(
        {f"base_model.model.{module}.{k}": t for k, t in factors.items()}, tmp_path / "peft/adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["proj_in"]}
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(settings))
    single = write(tmp_path, "file", {f"unet.{module}.{key}": tensor for key, tensor in factors.items()})
    result = compare(tmp_path / "peft", single)
    layer = only(result)
    assert (result.a.naming, result.b.naming) == ("peft", "diffusers")
    assert layer.relative_difference == 1.0  # its alpha halves it
    assert layer.cosine == pytest.approx(1)
    assert layer.fro_b == 2 * layer.fro_a
    assert {entry.key: entry.a for entry in result.metadata}["adapter_config.json: lora_alpha"] == "2"
    inside = tmp_path / "peft/adapter_model.safetensors"
    assert only(compare(inside, single)).relative_difference == 1.0


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 with small widths, native, so that q, k and v are one weight; no numbers."""
    return write_header(tmp_path_factory.mktemp("flux") / "flux.safetensors", few(shapes("base_flux_dev_comfy_full")))


@pytest.mark.parametrize("missing", ["", "to_k"])
def test_fused_layers_against_split_ones(flux: Path, tmp_path: Path, missing: str) -> None:
    width, rank = 96, 4
    fused = lora(randn(3 * width, rank), randn(rank, width, seed=1), name="lora_unet_double_blocks_0_img_attn_qkv")
    split, truth = {}, []
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        up, down = randn(width, number + 2, seed=2 + number), randn(number + 2, width, seed=5 + number)
        truth.append(torch.zeros(width, width, dtype=torch.float64) if part == missing else up @ down)
        if part != missing:
            name = f"transformer.transformer_blocks.0.attn.{part}"
            split |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    fused_delta = fused["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] @ randn(rank, width, seed=1)
    result = compared(tmp_path, fused, split, base=flux)
    layer = only(result)
    assert layer.name == "lora_unet_double_blocks_0_img_attn_qkv"
    assert [name.rpartition(".")[2] for name in layer.names_b] == [p for p in ("to_q", "to_k", "to_v") if p != missing]
    assert (layer.shape, layer.rank_a, layer.rank_b) == ((3 * width, width), rank, 4)
    assert_numbers(layer, fused_delta, torch.cat(truth))
    turned = only(compared(tmp_path, split, fused, base=flux))
    assert turned.name == layer.name
    assert_numbers(turned, torch.cat(truth), fused_delta)
    # split on both sides they are three layers, though the base has but one weight
    assert len(compared(tmp_path, split, split, base=flux).layers) == len(layer.names_b)


@pytest.mark.parametrize("with_base", [True, False])
def test_converted_fused_layers_are_the_same(flux: Path, tmp_path: Path, with_base: bool) -> None:
    source = write(tmp_path, "a", numbers(few(shapes("flux_lora_kohya"))))
    lorashrink.convert(source, base=flux, naming="diffusers", output=tmp_path / "b.safetensors")
    result = compare(source, tmp_path / "b.safetensors", base=flux if with_base else None)
    assert any(len(layer.names_b) > 2 for layer in result.layers)
    assert (result.only_a, result.only_b) == ((), ())
    assert result.total.relative_difference < 1e-6


def test_layers_of_one_side_count_against_zero(tmp_path: Path) -> None:
    common, mine, yours = (f"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_{x}" for x in "qkv")
    factors = {name: (randn(24, 4, seed=n), randn(4, 24, seed=n + 9)) for n, name in enumerate((common, mine, yours))}
    a, b = (
        {k: v for name in names for k, v in lora(*factors[name], name=name).items()}
        for names in ((common, mine), (common, yours))
    )
    result = compared(tmp_path, a, b)
    assert ([x.name for x in result.only_a], [x.name for x in result.only_b]) == ([mine], [yours])
    zero = torch.zeros(24, 24, dtype=torch.float64)
    truth = {name: up @ down for name, (up, down) in factors.items()}
    assert_numbers(
        result.total, torch.cat([truth[common], truth[mine], zero]), torch.cat([truth[common], zero, truth[yours]])
    )
    (alone,), (second,) = result.only_a, result.only_b
    assert (alone.relative_difference, alone.energy_kept, alone.cosine, alone.fro_b) == (1.0, 0.0, None, 0.0)
    assert (second.relative_difference, second.energy_kept, second.fro_a) == (None, None, 0.0)
    assert (alone.rank_b, second.rank_a, second.names_a) == (None, None, ())


@pytest.mark.parametrize(("value", "side"), [(math.nan, "a"), (math.inf, "b")])
def test_layers_that_are_not_finite_are_flagged_and_left_out(tmp_path: Path, value: float, side: str) -> None:
    good = lora(randn(24, 2), randn(2, 24, seed=1), name="lora_unet_middle_block_1_proj_in")
    broken = randn(24, 2)
    broken[3, 1] = value
    sides = {"a": lora(randn(24, 2), randn(2, 24)), "b": lora(randn(24, 2, seed=3), randn(2, 24))}
    sides[side] = lora(broken, randn(2, 24))
    a, b = (write(tmp_path, name, {**tensors, **good}) for name, tensors in sides.items())
    document = json.loads(run("compare", "--json", a, b))
    (layer,) = (layer for layer in document["layers"] if layer["name"] == NAME)
    assert layer["flags"] == [f"nan_{side}"]
    assert (layer["fro_a"], layer["cosine"]) == (None, None)
    assert (document["total"]["left_out"], document["total"]["difference"]) == (1, 0)
    (block,) = (block for block in document["blocks"] if block["block"] == "IN04")
    assert (block["left_out"], block["fro_a"]) == (1, None)
    assert f"because {side.upper()} holds NaN or infinity: {NAME}" in run("compare", a, b)


def test_adapters_without_a_finite_layer_cannot_be_compared(tmp_path: Path) -> None:
    good = write(tmp_path, "a", lora(randn(24, 2), randn(2, 24)))
    bad = write(tmp_path, "b", lora(randn(24, 2) * math.nan, randn(2, 24)))
    text = run("compare", good, bad)
    assert "no layer of A and B can be compared" in text
    assert "1 layer of rank 2" in text


def test_zero_has_no_direction(tmp_path: Path) -> None:
    zero = lora(torch.zeros(24, 2), randn(2, 24).float())
    result = compared(tmp_path, zero, lora(randn(24, 2), randn(2, 24)))
    layer = only(result)
    assert (layer.cosine, layer.relative_difference, layer.energy_kept) == (None, None, None)
    assert layer.difference == layer.fro_b
    assert layer.flags == ("zero_a",)


def test_adapters_without_layers_have_no_direction_either(tmp_path: Path) -> None:
    bias = write(tmp_path, "a", {"lora_unet_middle_block_1_norm.diff_b": torch.ones(4)})
    larger = write(tmp_path, "b", {"lora_unet_middle_block_1_norm.diff_b": torch.full((4,), 3.0)})
    result = compare(bias, larger)
    assert (result.total.cosine, result.total.relative_difference, result.total.fro_a) == (None, None, 0.0)
    assert (result.layers, result.blocks, result.a.ranks) == ((), (), ())
    assert [row.relative_difference for row in result.others] == [2.0]
    assert "nothing" in run("compare", bias, larger)
    full = write(tmp_path, "c", lora(randn(24, 2), randn(2, 24)))
    assert [row.name for row in compare(bias, full).only_b] == [NAME]


def test_tensors_beside_the_layers_and_metadata_are_compared(tmp_path: Path) -> None:
    factors = lora(randn(24, 2), randn(2, 24))
    beside = {f"{NAME}.diff_b": torch.ones(24), f"{NAME}.dora_scale": torch.ones(24, 1), "x.w_norm": torch.ones(3)}
    a = write(tmp_path, "a", {**factors, **beside}, {"same": "1", "gone": "x" * 200, "other": "1"})
    changed = {**beside, f"{NAME}.dora_scale": torch.full((24, 1), 1.5), "y.w_norm": torch.zeros(2)}
    b = write(tmp_path, "b", {**factors, **changed}, {"same": "1", "other": "2", "new": ""})
    result = compare(a, b)
    assert result.total.difference == 0
    assert result.others_equal == 2
    differences = {(entry.a, entry.b): entry.relative_difference for entry in result.others}
    assert differences == {(f"{NAME}.dora_scale",) * 2: 0.5, (None, "y.w_norm"): None}
    assert [(entry.key, entry.a, entry.b) for entry in result.metadata] == [
        ("gone", "x" * 200, None),
        ("new", None, ""),
        ("other", "1", "2"),
    ]
    text = run("compare", a, b)
    assert "metadata other: 1 -> 2" in text
    assert "x" * 200 not in text
    assert "2 equal, 2 not: " in text


# --- what cannot be compared --------------------------------------------------------------------


def test_bad_input_is_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotAnAdapter, match="base model"):
        compare(adapter, base)
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        compare(adapter, tmp_path / "nowhere.safetensors")
    for name in ("a", "b"):
        write(tmp_path, name, lora(randn(24, 2), randn(2, 24)))
    with pytest.raises(UsageError, match="stands for 2 adapters"):
        compare(adapter, tmp_path)


def test_adapters_for_different_models_are_refused(tmp_path: Path) -> None:
    def listed(name: str) -> Path:
        return write_header(tmp_path / f"{name}.safetensors", shapes(name))

    with pytest.raises(FamilyMismatch, match=r"SDXL.*SD 1"):
        compare(listed("sdxl_lora_kohya_te1_te2"), listed("sd15_lora_kohya"))
    with pytest.raises(FamilyMismatch, match=r"SD 1.*SD 2"):
        compare(listed("sd15_lora_kohya"), listed("sd2_lora_kohya"))
    name = "lora_unet_foo_proj_in"
    with pytest.raises(ShapeError, match=r"\[24, 24\] in the first and \[24, 20\] in the second"):
        compared(tmp_path, lora(randn(24, 2), randn(2, 24), name=name), lora(randn(24, 2), randn(2, 20), name=name))


def test_ambiguous_names_ask_for_the_base(flux: Path, tmp_path: Path) -> None:
    """Both flattened: no dots tell where the names of modules end."""
    down, up = randn(4, 96), randn(288, 4)
    native = write(tmp_path, "a", lora(up, down, name="lora_unet_double_blocks_0_img_attn_qkv"))
    name = "lora_transformer_transformer_blocks_0_attn_to_q"
    diffusers = write(tmp_path, "b", lora(up[:96], down, name=name))
    with pytest.raises(UsageError, match="--base"):
        compare(native, diffusers)
    layer = only(compare(native, diffusers, base=flux))
    assert layer.energy_kept == pytest.approx(float((up[:96] @ down).norm() / (up @ down).norm()) ** 2)
    # nor does it help that they have a text encoder's names in common
    shared = lora(randn(24, 2), randn(2, 24), name="lora_te1_text_model_encoder_layers_0_mlp_fc1")
    with pytest.raises(UsageError, match="--base"):
        compared(tmp_path, {**load_file(native), **shared}, {**load_file(diffusers), **shared})


# --- the command --------------------------------------------------------------------------------


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


@pytest.fixture
def pair(adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    lorashrink.resize(adapter, recipes="energy=0.9", output=tmp_path / "small.safetensors")
    return adapter, tmp_path / "small.safetensors"


def test_the_last_line_is_the_result_in_words(pair: tuple[Path, Path], base: Path) -> None:
    total = compare(*pair).total
    share = pair[1].stat().st_size / pair[0].stat().st_size
    text = run("compare", *pair)
    last = text.strip().splitlines()[-1]
    assert last.startswith(
        f"B has {100 * share:.3g} % of A's size and differs from A by {100 * total.relative_difference:.3g} % (weights"
    )
    assert NAME not in text
    assert NAME in run("compare", "-v", base, *pair)
    assert "exactly what A adds, with 100 % of A's size" in run("compare", pair[0], pair[0])
    assert run("compare", "-q", *pair) == ""


def test_other_adapters_are_not_called_the_same(tmp_path: Path) -> None:
    a, b = (write(tmp_path, name, lora(randn(24, 2, seed=n), randn(2, 24, seed=n + 5))) for n, name in enumerate("ab"))
    assert "B is another LoRA: it has " in run("compare", a, b)


def test_json_and_csv_have_the_numbers_of_the_function(pair: tuple[Path, Path], tmp_path: Path) -> None:
    expected = compare(*pair)
    document = json.loads(run("compare", "--json", "--csv", tmp_path / "t.csv", *pair))
    assert document["version"] == lorashrink.__version__
    assert document["base"] is None
    assert document["total"]["relative_difference"] == expected.total.relative_difference
    assert [layer["fro_b"] for layer in document["layers"]] == [layer.fro_b for layer in expected.layers]
    assert document["a"]["path"] == str(pair[0])
    with open(tmp_path / "t.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    everything = (*expected.layers, *expected.only_a, *expected.only_b)
    assert [row["name"] for row in rows] == [layer.name for layer in everything]
    assert [float(row["difference"]) for row in rows] == [layer.difference for layer in everything]


def test_bars_are_the_numbers_of_the_blocks(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = compare(*pair)
    figure = difference_per_block(result)
    upper, lower = figure.axes
    names = [label.get_text() for label in lower.get_xticklabels()]
    assert names == ["TE1.00", "TE1.01", "TE2.00", "TE2.01", "IN01", "IN03", "IN04", "MID", "OUT02", "OUT08"]
    by_name = {block.block: block for block in result.blocks}
    shares = [bar.get_height() for bar in upper.containers[0]]
    assert shares == [100 * by_name[name].relative_difference for name in names]
    (line,) = upper.lines
    assert set(line.get_ydata()) == {100 * result.total.relative_difference}
    norms = [[bar.get_height() for bar in bars] for bars in lower.containers]
    assert norms == [[getattr(by_name[name], side) for name in names] for side in ("fro_a", "fro_b")]
    assert upper.get_title(loc="left") == f"B against A:  {size_text(result.a.bytes)} → {size_text(result.b.bytes)}"
    run("compare", "--plot", tmp_path / "d.png", *pair)
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"


def test_a_block_of_b_alone_has_a_label_instead_of_a_bar(tmp_path: Path) -> None:
    only_b = lora(randn(24, 2), randn(2, 24), name="lora_unet_middle_block_1_proj_in")
    factors = lora(randn(24, 2), randn(2, 24))
    upper, lower = difference_per_block(compared(tmp_path, factors, {**factors, **only_b})).axes
    assert [text.get_text() for text in upper.texts] == ["0", "only in B"]
    assert [bar.get_height() for bar in lower.containers[0]][1] == 0


def test_a_block_of_a_alone_says_so(tmp_path: Path) -> None:
    only_a = lora(randn(24, 2), randn(2, 24), name="lora_unet_middle_block_1_proj_in")
    factors = lora(randn(24, 2), randn(2, 24))
    upper, _ = difference_per_block(compared(tmp_path, {**factors, **only_a}, factors)).axes
    assert [text.get_text() for text in upper.texts] == ["0", "only in A"]


def test_a_block_that_is_zero_in_a_and_missing_in_b_is_not_of_b(tmp_path: Path) -> None:
    zero = lora(torch.zeros(24, 2), randn(2, 24), name="lora_unet_middle_block_1_proj_in")
    factors = lora(randn(24, 2), randn(2, 24))
    upper, _ = difference_per_block(compared(tmp_path, {**factors, **zero}, factors)).axes
    assert [text.get_text() for text in upper.texts] == ["0", ""]


def test_wrong_commands_end_with_status_2(pair: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    assert "takes two LoRAs" in run("compare", pair[0], status=2)
    assert "takes two LoRAs" in run("compare", base, pair[0], status=2)
    assert "Give it first: " in run("compare", pair[0], base, status=2)
    assert "no such file" in run("compare", pair[0], tmp_path / "nowhere.safetensors", status=2)
    assert ".png or .svg" in run("compare", "--plot", tmp_path / "d.bmp", *pair, status=2)
    assert "--csv" in run("compare", "--csv", pair[1], *pair, status=2)
    error = json.loads(run("compare", "--json", pair[0], tmp_path / "nowhere.safetensors", status=2).splitlines()[0])
    assert set(error) == {"version", "command", "error"}
