"""What `overlap` says of several adapters, against ΔW formed in float64."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import few
from fixtures import shapes, write_header
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_comparison import FORMS, KINDS, NAME, lora, randn, write
from torch import Tensor
from typer.testing import CliRunner

import lorashrink
from lorashrink import overlap
from lorashrink.cli import app
from lorashrink.engine.interaction import interaction
from lorashrink.errors import FamilyMismatch, InputError, NonFinite, UsageError
from lorashrink.plots.overlap import overlap_matrices
from lorashrink.results.overlap import LayerOverlap, Overlap, short_names

OTHER = "lora_unet_middle_block_1_proj_in"
CPU = torch.device("cpu")


def overlapped(folder: Path, *files: Mapping[str, Tensor], weights: Sequence[float] = (), **options: object) -> Overlap:
    """Of files a, b, c, ... with these tensors."""
    paths = [write(folder, "abcdefgh"[number], tensors) for number, tensors in enumerate(files)]
    entries = [f"{path}:{weight!r}" for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)]
    return overlap(entries, **options)  # type: ignore[arg-type]


def only(result: Overlap) -> LayerOverlap:
    (layer,) = result.layers
    return layer


def subspaces(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Bases of the left and right dimensions with 90 % of the energy."""
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    energies = (sigma**2).cumsum(0)
    count = int((energies < 0.9 * energies[-1]).sum()) + 1
    return left[:, :count], right[:count].mT


def shared(basis_a: Tensor, basis_b: Tensor) -> float:
    """The mean of cos² of the principal angles between two spaces, from the angles themselves."""
    cosines = torch.linalg.svdvals(basis_a.mT @ basis_b)
    return float((cosines**2).mean())


def assert_pairs(row: object, deltas: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Cosine and overlaps of every pair are those of these ΔW."""
    bases = [subspaces(delta) for delta in deltas]
    for a, delta_a in enumerate(deltas):
        for b, delta_b in enumerate(deltas):
            cosine = float((delta_a * delta_b).sum() / delta_a.norm() / delta_b.norm())
            sides = [shared(bases[a][side], bases[b][side]) for side in (0, 1)]
            expected = {"left": sides[0], "right": sides[1], "subspace": sum(sides) / 2}
            assert getattr(row, "cosine")[a][b] == pytest.approx(cosine, abs=tolerance)  # noqa: B009
            for name, value in expected.items():
                assert getattr(row, name)[a][b] == pytest.approx(value, abs=max(1e-7, tolerance)), name


def assert_sum(
    layer: LayerOverlap, deltas: Sequence[Tensor], weights: Sequence[float], tolerance: float = 1e-9
) -> None:
    """The numbers of the sum, and of each adapter alone, are those of these ΔW."""
    total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    assert isinstance(total, Tensor)
    assert layer.sum
    sigma = torch.linalg.svdvals(total)
    size = max(float(delta.norm()) for delta in deltas)
    assert layer.fro == pytest.approx([float(delta.norm()) for delta in deltas], rel=tolerance)
    tops = [float(torch.linalg.svdvals(delta)[0]) for delta in deltas]
    assert layer.spectral == pytest.approx(tops, rel=tolerance)
    assert layer.sum.fro == pytest.approx(float(total.norm()), rel=tolerance, abs=tolerance * size)
    assert layer.sum.spectral == pytest.approx(float(sigma[0]), rel=tolerance, abs=tolerance * size)
    # what is below 2^-23 of the first counts as nothing
    second = float(sigma[1]) if len(sigma) > 1 else 0.0
    assert layer.sum.second == pytest.approx(second, rel=tolerance, abs=max(tolerance * size, 2**-23 * float(sigma[0])))


# --- numbers ------------------------------------------------------------------------------------

SIDES = st.integers(2, 32)
MEMBERS = st.lists(
    st.tuples(
        st.integers(1, 10),  # rank
        st.sampled_from(KINDS),
        st.sampled_from([None, -3.0, 0.5, 8.0]),  # alpha
        st.sampled_from([-0.7, 0.0, 0.3, 1.0, 2.0]),  # weight
    ),
    min_size=2,
    max_size=4,
)


@given(out=SIDES, inner=SIDES, members=MEMBERS, seed=st.integers(0, 1 << 20))
def test_adapters_of_any_rank_scale_dtype_and_weight(tmp_path_factory, out, inner, members, seed: int) -> None:  # type: ignore[no-untyped-def]
    files, deltas = [], []
    for number, (rank, kind, alpha, _) in enumerate(members):
        up, down = (
            randn(out, rank, seed=seed + 2 * number).to(kind),
            randn(rank, inner, seed=seed + 2 * number + 1).to(kind),
        )
        files.append(lora(up, down, alpha))
        deltas.append(up.double() @ down.double() * (1 if alpha is None else alpha / rank))
    weights = [member[3] for member in members]
    result = overlapped(tmp_path_factory.mktemp("x"), *files, weights=weights)
    for row in (result, result.blocks[0], only(result)):
        assert_pairs(row, deltas)
    assert_sum(only(result), deltas, weights, 1e-7)
    assert [member.weight for member in result.adapters] == weights


@given(seed=st.integers(0, 1 << 20), small=st.floats(-3, 0))
def test_it_does_not_matter_how_an_adapter_is_factored(tmp_path_factory, seed: int, small: float) -> None:  # type: ignore[no-untyped-def]
    up, down = randn(30, 5, seed=seed), randn(5, 20, seed=seed + 1)
    turn = torch.linalg.qr(randn(5, 5, seed=seed + 2)).Q * torch.logspace(small, 0, 5, dtype=torch.float64)
    second = lora(randn(30, 3, seed=seed + 3), randn(3, 20, seed=seed + 4))
    plain, turned = (
        overlapped(tmp_path_factory.mktemp("x"), factors, second, weights=(0.8, -0.3))
        for factors in (lora(up, down), lora(up @ turn, torch.linalg.solve(turn, down)))
    )
    for name in ("cosine", "left", "right"):
        assert getattr(plain, name)[0][1] == pytest.approx(getattr(turned, name)[0][1], abs=1e-8)
    assert plain.sum.strongest == pytest.approx(turned.sum.strongest, rel=1e-9)


@pytest.mark.parametrize("form_a", FORMS)
@pytest.mark.parametrize("form_b", FORMS)
def test_every_form_with_every_other(tmp_path: Path, form_a: str, form_b: str, engine_device: str) -> None:
    (a, truth_a), (b, truth_b) = FORMS[form_a], FORMS[form_b]
    tolerance = 1e-6 if "loha" in (form_a, form_b) else 1e-9  # its factors are multiplied in float32
    result = overlapped(tmp_path, a, b, weights=(0.7, -0.4), device=engine_device)
    assert_pairs(only(result), [truth_a, truth_b], tolerance)
    assert_sum(only(result), [truth_a, truth_b], (0.7, -0.4), max(tolerance, 1e-8))


def test_one_full_difference_among_many_loras_stays_a_factor(tmp_path: Path) -> None:
    (full, truth), ups = FORMS["full"], [randn(24, 2, seed=20 + n) for n in range(5)]
    downs = [randn(2, 30, seed=40 + n) for n in range(5)]
    result = overlapped(tmp_path, full, *map(lora, ups, downs))
    deltas = [truth, *(up @ down for up, down in zip(ups, downs, strict=True))]
    assert_pairs(only(result), deltas)
    assert_sum(only(result), deltas, [1.0] * 6, 1e-9)


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_high_ranks_iterate_for_the_largest_singular_values(decay: float) -> None:
    ranks, out, inner = [100, 90, 120, 80], 420, 400
    sizes = torch.cat([torch.arange(1, rank + 1, dtype=torch.float64) ** -decay for rank in ranks])
    ups, downs = randn(out, sum(ranks)) * sizes, randn(sum(ranks), inner, seed=1)
    weights = [1.0, -0.5, 0.8, 1.2]
    numbers = interaction(ups, downs, [1.0] * sum(ranks), ranks, weights, CPU)
    deltas = [up @ down for up, down in zip(ups.split(ranks, 1), downs.split(ranks), strict=True)]
    total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    left, sigma, right = torch.linalg.svd(total)
    assert numbers.total[0] == pytest.approx(float(sigma.norm()), rel=1e-12)
    assert numbers.total[1:] == pytest.approx(sigma[:2].tolist(), rel=1e-7)
    parts = [float(weight * left[:, 0] @ delta @ right[0]) for weight, delta in zip(weights, deltas, strict=True)]
    assert (numbers.shares * sigma[0]).tolist() == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("rank", [4, 150])
def test_sums_that_cancel_keep_their_digits(rank: int) -> None:
    """A − B of nearly equal adapters in other factors has seven digits."""
    up, down, turn = (
        randn(200, rank),
        randn(rank, 180, seed=1),
        randn(rank, rank, seed=2) + 9 * torch.eye(rank).double(),
    )
    more = 1e-6 * randn(200, rank, seed=3)
    ups, downs = torch.cat([up, up @ turn + more], 1), torch.cat([down, torch.linalg.solve(turn, down)])
    numbers = interaction(ups, downs, [1.0] * 2 * rank, [rank, rank], [1.0, -1.0], CPU)
    rest = torch.linalg.svdvals(more @ torch.linalg.solve(turn, down))
    assert numbers.total == pytest.approx((float(rest.norm()), float(rest[0]), float(rest[1])), rel=1e-7)
    assert float(numbers.shares.sum()) == pytest.approx(1, rel=1e-4)


def test_equal_singular_values_stay_in_one_subspace() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    numbers = interaction(
        torch.cat([eye[:, :5], eye[:, 3:]], 1), torch.cat([eye[:5], eye[3:]]), [2.0] * 10, [5, 5], [1, 1], CPU
    )
    assert numbers.dimensions.tolist() == [5, 5]  # 4.5 of the energy of 5 are 90 %
    assert numbers.left[0, 1] == pytest.approx(2 / 5)
    assert numbers.products[0, 1] == pytest.approx(2 * 4)


# --- whole files --------------------------------------------------------------------------------


def test_a_copy_is_reported_as_the_same(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(adapter.read_bytes())
    result = overlap([f"{adapter}:0.6", f"{copy}:0.2"])
    assert result.cosine[0][1] == pytest.approx(1, abs=1e-12)
    assert result.subspace[0][1] == pytest.approx(1, abs=1e-9)
    assert [pair.kind for pair in result.pairs] == ["same"]
    (advice,) = (advice for advice in result.advice if advice.kind == "same")
    assert "lora:0.8 alone does what both do" in advice.text
    assert result.sum.fro == pytest.approx(0.8 * result.adapters[0].fro, rel=1e-9)
    assert sum(layer.sum is not None and "zero" not in layer.flags for layer in result.layers) > 170
    assert all(
        layer.sum.amplification == pytest.approx(4 / 3) for layer in result.layers if layer.sum and layer.sum.fro
    )


def test_three_namings_are_matched_without_a_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    files = [adapter]
    for naming in ("diffusers", "comfy"):
        files.append(tmp_path / f"{naming}.safetensors")
        lorashrink.convert(adapter, base=base, naming=naming, dtype="fp32", output=files[-1])
    for base_path in (base, None):
        result = overlap(files, base=base_path)
        assert len(result.layers) == 178
        assert [member.naming for member in result.adapters] == ["kohya", "diffusers", "comfy"]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert result.cosine[a][b] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("table", [False, True])
def test_the_sum_is_measured_against_the_base(adapter: Path, base: Path, tmp_path: Path, table: bool) -> None:
    """By the checkpoint as by its norm table."""
    lorashrink.norms(base, tmp_path / "norms.json")
    lorashrink.resize(adapter, recipes="rank=2", dtype="fp32", output=tmp_path / "small.safetensors")
    result = overlap(
        [adapter, f"{tmp_path / 'small.safetensors'}:0.5"], base=tmp_path / "norms.json" if table else base
    )
    layer = next(layer for layer in result.layers if layer.name == NAME)
    weight = load_file(base)["model.diffusion_model.input_blocks.4.1.proj_in.weight"].double()
    deltas = [
        next(layer for layer in lorashrink.open_adapter(path) if layer.name == NAME).delta.dense().double()
        for path in (adapter, tmp_path / "small.safetensors")
    ]
    total = deltas[0] + 0.5 * deltas[1]
    assert layer.sum
    assert layer.sum.fro_ratio == pytest.approx(float(total.norm() / weight.norm()), rel=1e-5)
    tops = [float(torch.linalg.svdvals(matrix)[0]) for matrix in (total, weight)]
    assert layer.sum.spectral_ratio == pytest.approx(tops[0] / tops[1], rel=1e-5)
    assert result.sum.measure == "spectral_ratio"
    ratios = [layer.sum.spectral_ratio for layer in result.layers if layer.sum]
    assert result.sum.strongest == max(ratio for ratio in ratios if ratio)


def test_fused_layers_with_split_ones(tmp_path: Path) -> None:
    flux = write_header(tmp_path / "flux.safetensors", few(shapes("base_flux_dev_comfy_full")))
    width, rank = 96, 4
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down = randn(3 * width, rank), randn(rank, width, seed=1)
    split, truth = {}, []
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        factors = randn(width, number + 2, seed=2 + number), randn(number + 2, width, seed=5 + number)
        truth.append(factors[0] @ factors[1])
        start = f"transformer.transformer_blocks.0.attn.{part}"
        split |= {f"{start}.lora_B.weight": factors[0], f"{start}.lora_A.weight": factors[1]}
    result = overlapped(tmp_path, split, lora(up, down, name=name), weights=(1.0, 0.5), base=_table(flux, tmp_path))
    layer = only(result)
    assert (layer.name, layer.shape, layer.adapters, layer.ranks) == (name, (3 * width, width), (0, 1), (9, 4))
    assert_pairs(layer, [torch.cat(truth), up @ down])
    assert_sum(layer, [torch.cat(truth), up @ down], (1.0, 0.5))
    # what splits stays beside what fuses where several split alike
    three = overlapped(tmp_path, split, split, lora(up, down, name=name), base=_table(flux, tmp_path, "more"))
    assert only(three).adapters == (0, 1, 2)
    assert_pairs(only(three), [torch.cat(truth), torch.cat(truth), up @ down])


def _table(flux: Path, folder: Path, name: str = "norms") -> Path:
    """A norm table of a base without numbers: all norms are 0, and no ratio to them is told."""
    return Path(lorashrink.norms(flux, folder / f"{name}.json").path)


def test_layers_of_one_adapter_count_in_the_whole(tmp_path: Path) -> None:
    first, mine = (randn(24, 4), randn(4, 24, seed=1)), (randn(24, 2, seed=2), randn(2, 24, seed=3))
    second = randn(24, 3, seed=4), randn(3, 24, seed=5)
    a = {**lora(*first), **lora(*mine, name=OTHER)}
    result = overlapped(tmp_path, a, lora(*second))
    shared_layer, alone = result.layers
    assert (alone.name, alone.adapters, alone.flags) == (OTHER, (0,), ("alone",))
    assert (alone.cosine[0][1], alone.subspace[0][1], alone.cosine[0][0]) == (None, None, 1.0)
    assert (alone.fro[1], alone.spectral[1]) == (0.0, 0.0)
    product = float(((first[0] @ first[1]) * (second[0] @ second[1])).sum())
    sizes = (
        math.hypot(float((first[0] @ first[1]).norm()), float((mine[0] @ mine[1]).norm())),
        float((second[0] @ second[1]).norm()),
    )
    assert result.cosine[0][1] == pytest.approx(product / sizes[0] / sizes[1], abs=1e-12)
    assert result.subspace[0][1] == pytest.approx(shared_layer.subspace[0][1])
    assert result.adapters[0].fro == pytest.approx(sizes[0])


def test_adapters_without_a_layer_in_common_do_not_interact(tmp_path: Path) -> None:
    encoder = lora(randn(24, 2), randn(2, 24), name="lora_te1_text_model_encoder_layers_0_mlp_fc1")
    result = overlapped(tmp_path, lora(randn(24, 2), randn(2, 24)), encoder)
    assert (result.cosine[0][1], result.subspace[0][1]) == (0.0, 0.0)
    assert [pair.kind for pair in result.pairs] == ["apart"]
    assert "a and b do not interact" in " ".join(advice.text for advice in result.advice)


def test_zero_has_no_direction(tmp_path: Path) -> None:
    zero = lora(torch.zeros(24, 2), randn(2, 30).float())
    result = overlapped(tmp_path, zero, *(lora(randn(24, 2, seed=n), randn(2, 30)) for n in (1, 2)))
    for row in (result, only(result)):
        assert row.cosine[0] == row.subspace[0] == row.left[0] == (None, None, None)
        assert row.cosine[1][2] is not None
    assert [advice.adapters for advice in result.advice if advice.kind == "zero"] == [(0,)]
    nothing = overlapped(tmp_path, zero, zero)
    assert (nothing.sum.strongest, nothing.sum.factor, nothing.sum.weights) == (0.0, None, (1.0, 1.0))
    assert only(nothing).flags == ("zero",)


# --- what it means ------------------------------------------------------------------------------


def planted(*sigma: float, name: str = NAME) -> dict[str, Tensor]:
    """A LoRA with these singular values, whose vectors are those of the axes."""
    eye = torch.eye(24, dtype=torch.float64)[:, : len(sigma)]
    return lora(eye * torch.tensor(sigma), eye.mT.contiguous(), name=name)


def test_the_factor_brings_the_strongest_layer_to_the_limit(tmp_path: Path) -> None:
    files = [{**planted(3.0, 1.0), **planted(1.0, name=OTHER)}, {**planted(2.0, 0.5), **planted(4.0, name=OTHER)}]
    total = overlapped(tmp_path, *files, weights=(1.0, 0.5)).sum
    assert (total.strongest, total.strongest_layer) == (pytest.approx(4.0), NAME)
    assert (total.alone, total.alone_layer, total.alone_adapter) == (pytest.approx(3.0), NAME, 0)
    assert total.limit == total.alone
    assert total.factor == pytest.approx(0.75)
    again = overlapped(tmp_path, *files, weights=total.weights).sum
    assert again.strongest == pytest.approx(total.limit, rel=1e-12)
    limited = overlapped(tmp_path, *files, weights=(1.0, 0.5), limit=8.0).sum
    assert (limited.limit, limited.factor, limited.weights) == (8.0, pytest.approx(2.0), (1.0, 0.5))


def test_the_limit_comes_with_weights_that_keep_it(tmp_path: Path) -> None:
    files = [planted(3.0, 1.0), planted(2.0, 0.5)]
    (advice,) = (advice for advice in overlapped(tmp_path, *files, limit=3.3).advice if advice.kind == "limit")
    assert "5 as σ, 1.52 times the limit of 3.3; a makes 60 % of it" in advice.text
    assert advice.text.endswith("All weights times 0.66 bring it back: a:0.66, b:0.66")
    (advice,) = (advice for advice in overlapped(tmp_path, *files, weights=(1.0, -0.5)).advice if advice.kind == "room")
    assert "which a reaches alone" in advice.text


@given(factor=st.floats(1e-6, 1e6))
def test_advised_weights_are_never_rounded_up(factor: float) -> None:
    from lorashrink.insight.stack_advice import rounded_down

    assert 0.989 * factor < float(rounded_down(factor)) <= factor * (1 + 1e-12)
    assert rounded_down(-factor) == f"-{rounded_down(factor)}"


def test_amplified_layers_have_shares_of_their_adapters(tmp_path: Path) -> None:
    layer = only(overlapped(tmp_path, planted(3.0, 1.0), planted(1.0, 2.0), weights=(1.0, 1.0)))
    assert layer.sum
    assert (layer.sum.spectral, layer.sum.second) == (pytest.approx(4.0), pytest.approx(3.0))
    assert layer.sum.amplification == pytest.approx(4 / 3)
    assert layer.sum.fro_amplification == pytest.approx(5 / math.sqrt(10))
    assert layer.sum.shares == pytest.approx((0.75, 0.25))
    assert layer.flags == ("amplified",)


def test_spikes_of_the_sum_follow_the_rule_of_inspect(tmp_path: Path) -> None:
    """Spikes can appear in a sum, and vanish in it."""
    result = overlapped(tmp_path, planted(6.0, 0.9), planted(6.0, -0.4))
    assert only(result).flags == ("amplified", "spike")
    assert [advice.kind for advice in result.advice if advice.kind == "spike"] == ["spike"]
    flags = lorashrink.inspect([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]).files
    assert [row.flags for table in flags for row in table.layers] == [(), ("spike",)]
    assert "spike" not in only(overlapped(tmp_path, planted(6.0, 0.1), planted(0.1, 6.0))).flags
    assert "spike" not in only(overlapped(tmp_path, planted(6.0), planted(3.0))).flags  # it has rank 1


def test_signs_of_weights_change_the_sum_and_not_the_cosine(tmp_path: Path) -> None:
    against = overlapped(tmp_path, planted(3.0, 1.0), planted(-2.0, 2.0))
    turned = overlapped(tmp_path, planted(3.0, 1.0), planted(-2.0, 2.0), weights=(1.0, -1.0))
    assert against.cosine == turned.cosine
    assert against.cosine[0][1] == pytest.approx(-4 / math.sqrt(80))
    assert [pair.kind for pair in against.pairs] == ["against"]
    kept = math.sqrt((1 + 9) / (10 + 8))
    texts = [next(advice.text for advice in result.advice if advice.kind == "against") for result in (against, turned)]
    assert f"they keep {100 * kept:.0f} % of the norm" in texts[0]
    assert "with weights of different signs they add up" in texts[1]
    assert turned.sum.strongest == pytest.approx(5.0)
    opposite = overlapped(tmp_path, planted(3.0, 1.0), planted(-3.0, -1.0))
    assert [pair.kind for pair in opposite.pairs] == ["opposite"]
    assert opposite.sum.fro == 0


def test_dora_is_counted_by_its_factors_and_reported(tmp_path: Path) -> None:
    factors = lora(randn(24, 2), randn(2, 30))
    result = overlapped(tmp_path, {**factors, f"{NAME}.dora_scale": torch.ones(24, 1)}, factors)
    assert result.cosine[0][1] == pytest.approx(1)
    assert [advice.adapters for advice in result.advice if advice.kind == "dora"] == [(0,)]


def test_layers_that_need_the_base_are_left_out(tmp_path: Path) -> None:
    turned = {f"{NAME}.oft_blocks": 0.1 * randn(6, 4, 4).float()}
    result = overlapped(tmp_path, {**turned, **lora(randn(24, 2), randn(2, 24), name=OTHER)}, planted(1.0, name=OTHER))
    row = next(layer for layer in result.layers if layer.name == NAME)
    assert (row.flags, row.sum, row.cosine[0][0]) == (("needs_base",), None, None)
    assert [(block.block, block.left_out) for block in result.blocks] == [("IN04", 1), ("MID", 0)]
    assert "needs_base" in {advice.kind for advice in result.advice}
    with pytest.raises(UsageError, match="--base"):
        overlapped(tmp_path, turned, turned)


def test_short_names_tell_files_apart() -> None:
    assert short_names(["x/a.safetensors", "b.v2.safetensors"]) == ["a", "b.v2"]
    assert short_names(["x/a.safetensors", "y/a.safetensors", "peft/b"]) == ["x/a", "y/a", "peft/b"]


# --- what cannot be used ------------------------------------------------------------------------


def test_bad_arguments_are_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two adapters or more, and was given 1"):
        overlap([adapter])
    with pytest.raises(UsageError, match="is given twice"):
        overlap([adapter, f"{adapter}:0.5"])
    with pytest.raises(UsageError, match="limit"):
        overlap([adapter, adapter], limit=0)
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        overlap([adapter, tmp_path / "nowhere.safetensors"])


def test_adapters_of_two_models_are_both_named(tmp_path: Path) -> None:
    paths = [
        write_header(tmp_path / f"{name}.safetensors", shapes(name))
        for name in ("sdxl_lora_kohya_te1_te2", "sd15_lora_kohya")
    ]
    with pytest.raises(FamilyMismatch, match=r"sdxl_lora_kohya_te1_te2.*SDXL.*sd15_lora_kohya.*SD 1"):
        overlap(paths)


def test_an_adapter_for_another_base_is_left_out_by_name(adapter: Path, base: Path, tmp_path: Path) -> None:
    stranger = write_header(tmp_path / "sd15.safetensors", shapes("sd15_lora_kohya"))
    copy = write(tmp_path, "copy", load_file(adapter))
    result = overlap([adapter, stranger, copy], base=base)
    (failure,) = result.failed
    assert failure.source == str(stranger)
    assert "SD 1" in failure.error
    assert [member.path for member in result.adapters] == [str(adapter), str(copy)]
    with pytest.raises(FamilyMismatch, match=r"sd15\.safetensors"):
        overlap([adapter, stranger], base=base)


def test_an_adapter_with_nan_is_left_out_by_name(tmp_path: Path) -> None:
    broken = randn(24, 2)
    broken[3, 1] = math.nan
    good = [lora(randn(24, 2, seed=n), randn(2, 30, seed=n)) for n in (1, 2)]
    paths = [
        write(tmp_path, name, tensors)
        for name, tensors in zip("abc", (good[0], lora(broken, randn(2, 30)), good[1]), strict=True)
    ]
    document = json.loads(run("overlap", "--json", f"{paths[0]}:0.5", *paths[1:], status=1).splitlines()[0])
    (failure,) = document["failed"]
    assert failure["source"] == str(paths[1])
    assert f"{NAME} contains NaN" in failure["error"]
    assert [member["weight"] for member in document["adapters"]] == [0.5, 1.0]
    assert document["cosine"] == [list(line) for line in overlap([paths[0], paths[2]]).cosine]
    with pytest.raises(NonFinite, match=r"b\.safetensors"):
        overlap(paths[:2])


# --- the command --------------------------------------------------------------------------------


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


@pytest.fixture
def stack(adapter: Path, tmp_path: Path) -> list[object]:
    """The parity adapter, and two that shrinking made of it, with weights."""
    for name, recipe in (("half", "rank=2"), ("most", "energy=0.9")):
        lorashrink.resize(adapter, recipes=recipe, output=tmp_path / f"{name}.safetensors")
    return [f"{adapter}:0.5", f"{tmp_path / 'half.safetensors'}:-0.25", tmp_path / "most.safetensors"]


def test_the_text_has_matrices_layers_and_advice(stack: list[object], base: Path) -> None:
    result = overlap(stack, base=base)  # type: ignore[arg-type]
    text = run("overlap", base, *stack)
    assert f"1 lora               1.000   {result.cosine[0][1]:.3f}   {result.cosine[0][2]:.3f}".split() in [
        line.split() for line in text.splitlines()
    ]
    assert "weight -0.25" in text
    assert all(f"{advice.kind}: {advice.text}" in text for advice in result.advice)
    rows = [line for line in text.splitlines() if line.strip().startswith("lora_")]
    assert len(rows) == 8
    most = max(layer.sum.amplification or 0 for layer in result.layers if layer.sum)
    assert f"{most:.2f}" in rows[0]
    assert text.count("lora_") < run("overlap", "-v", base, *stack).count("lora_") > 178
    assert run("overlap", "-q", *stack) == ""


def test_json_and_csv_have_the_numbers_of_the_function(stack: list[object], tmp_path: Path) -> None:
    expected = overlap(stack)  # type: ignore[arg-type]
    document = json.loads(run("overlap", "--json", "--csv", tmp_path / "t.csv", *stack))
    assert document["version"] == lorashrink.__version__
    assert len(document["cosine"]) == len(document["subspace"]) == len(document["adapters"]) == 3
    assert document["cosine"] == [list(line) for line in expected.cosine]
    assert [block["block"] for block in document["blocks"]] == [block.block for block in expected.blocks]
    assert document["sum"]["factor"] == expected.sum.factor
    assert len(document["pairs"]) == 3
    with open(tmp_path / "t.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["name"] for row in rows] == [layer.name for layer in expected.layers]
    first = expected.layers[0]
    assert first.sum
    assert float(rows[0]["cosine_1_3"]) == first.cosine[0][2]
    assert float(rows[0]["spectral_2"]) == first.spectral[1]
    assert float(rows[0]["sum_amplification"]) == first.sum.amplification
    assert float(rows[0]["share_3"]) == first.sum.shares[2]


def test_the_figure_holds_both_matrices(stack: list[object], tmp_path: Path) -> None:
    result = overlap(stack)  # type: ignore[arg-type]
    figure = overlap_matrices(result)
    for axes, table in zip(figure.axes[:2], (result.cosine, result.subspace), strict=True):
        shown = axes.get_images()[0].get_array()
        assert shown.mask.tolist() == np.eye(3, dtype=bool).tolist()
        assert shown[0, 2] == table[0][2]
        assert {text.get_text() for text in axes.texts} == {f"{table[a][b]:.2f}" for a in range(3) for b in range(a)}
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["lora : 0.5", "half : -0.25", "most : 1"]
    run("overlap", "--plot", tmp_path / "o.png", *stack)
    assert (tmp_path / "o.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_of_many_adapters_and_of_zero_ones(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}_a_name_that_is_far_too_long_for_a_figure.safetensors" for number in range(12)]
    for number, path in enumerate(paths):
        save_file(lora(number * randn(12, 2, seed=number), randn(2, 12, seed=number)), path)
    left, right = overlap_matrices(overlap(paths)).axes[:2]
    assert [text.get_text() for text in left.texts[:11]] == ["–"] * 11
    assert all(len(text.get_text()) <= 4 for text in (*left.texts, *right.texts))
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert len(set(labels)) == 12
    assert max(map(len, labels)) <= 22


def test_wrong_commands_end_with_status_2(stack: list[object], base: Path, tmp_path: Path) -> None:
    assert "two adapters or more" in run("overlap", base, stack[0], status=2)
    assert "no adapter layer" in run("overlap", stack[2], f"{base}:0.5", status=2)
    assert "'high' is no weight" in run("overlap", f"{stack[2]}:high", stack[0], status=2)
    assert ".png or .svg" in run("overlap", "--plot", tmp_path / "d.bmp", *stack, status=2)
    assert "is an input" in run("overlap", "--csv", tmp_path / "half.safetensors", "--force", *stack, status=2)
    error = json.loads(run("overlap", "--json", stack[0], status=2).splitlines()[0])
    assert set(error) == {"version", "command", "error"}


def test_a_missing_adapter_is_named(stack: list[object], tmp_path: Path) -> None:
    text = run("overlap", *stack, tmp_path / "nowhere.safetensors", status=1)
    assert "nowhere.safetensors" in text
    assert "norm of the sum" in text
