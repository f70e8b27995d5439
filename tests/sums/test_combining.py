"""Weighted sums of adapters against sums of ΔW in float64: every family, rank, naming and layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import fixtures
import pytest
import torch
from conversions import ADAPTERS, assert_same_effect, bases, converted, effect, few, numbers
from fixtures import shapes, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorashrink.adapters import layer_name, open_adapter
from lorashrink.bases import open_base
from lorashrink.errors import FamilyMismatch, InputError, NonFinite, ShapeError, UsageError
from lorashrink.linking.inputs import to_sum
from lorashrink.making.merging import merge
from lorashrink.sums.summing import combined

__all__ = ["bases"]  # a fixture

Q, K = (f"lora_unet_middle_block_1_transformer_blocks_0_attn1_to_{which}" for which in "qk")
KERNEL = "lora_unet_middle_block_0_in_layers_2"
Tensors = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(name: str, out: int, inner: int, rank: int, alpha: float | None = None, seed: int = 0) -> Tensors:
    factors = {
        f"{name}.lora_up.weight": randn(out, rank, seed=seed).float(),
        f"{name}.lora_down.weight": randn(rank, inner, seed=seed + 1).float(),
    }
    return factors if alpha is None else {**factors, f"{name}.alpha": torch.tensor(alpha)}


def write(folder: Path, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    return write_tensors(folder / f"{name}.safetensors", tensors, metadata)


def added(path: Path) -> dict[str, Tensor]:
    """Layer -> ΔW as a matrix, float64."""
    with open_adapter(path) as adapter:
        return {layer.name: layer.delta.dense().double().flatten(1) for layer in adapter}


def summed(terms: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, weight in terms:
        for name, delta in added(path).items():
            total[name] = total.get(name, 0) + weight * delta
    return total


def merged(terms: Sequence[tuple[Path, float]], output: Path, **options: object) -> Path:
    texts = [f"{path}:{weight}" for path, weight in terms]
    report = merge(texts, output=output, **{"dtype": "fp32", "jobs": 1, **options})  # type: ignore[arg-type]
    assert report.failed == ()
    return Path(report.results[0].output)


def assert_sum(terms: Sequence[tuple[Path, float]], output: Path, **options: object) -> dict[str, Tensor]:
    expected, result = summed(terms), added(merged(terms, output, **options))
    assert result.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((result[name] - delta).norm()) <= 1e-6 * float(delta.norm()), name
    return result


# --- numbers ------------------------------------------------------------------------------------

KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-3, -1e-3), st.floats(1e-3, 3))


@settings(max_examples=40)
@given(
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    terms=st.lists(
        st.tuples(
            st.integers(1, 24),
            WEIGHTS,
            st.sampled_from([None, 0.5, 8.0, -3.0]),
            st.sampled_from(KINDS),
            st.floats(-3, 3),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 1 << 20),
)
def test_the_sum_is_the_dense_one(tmp_path_factory, sides, terms, seed: int) -> None:
    """Also for large ranks, factors of unequal lengths and any weights."""
    folder = tmp_path_factory.mktemp("x")
    written = []
    for number, (rank, weight, alpha, dtype, uneven) in enumerate(terms):
        tensors = {key: tensor.to(dtype) for key, tensor in lora(Q, *sides, rank, seed=seed + 2 * number).items()}
        shift = 2.0 ** round(uneven)
        tensors[f"{Q}.lora_up.weight"] *= shift
        tensors[f"{Q}.lora_down.weight"] /= shift
        if alpha is not None:
            tensors[f"{Q}.alpha"] = torch.tensor(alpha)
        written.append((write(folder, f"{number}", tensors), weight))
    expected = summed(written)[Q]
    size = sum(abs(weight) * float(added(path)[Q].norm()) for path, weight in written)
    if not any(weight for _, weight in written):
        with pytest.raises(UsageError, match="weights are all 0"):
            merged(written, folder / "out.safetensors")
        return
    result = added(merged(written, folder / "out.safetensors"))[Q]
    assert float((result - expected).norm()) <= 1e-6 * size


@settings(max_examples=40)
@given(
    ranks=st.lists(st.integers(1, 10), min_size=2, max_size=3),
    kept=st.integers(1, 12),
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.01), min_size=3, max_size=3),
    seed=st.integers(0, 1 << 20),
)
def test_a_shrunk_sum_is_the_best_of_its_rank(tmp_path_factory, ranks, kept, weights, seed: int) -> None:
    """Compared with the first singular triples of the dense sum."""
    folder = tmp_path_factory.mktemp("x")
    terms = [
        (write(folder, f"{number}", lora(Q, 48, 40, rank, seed=seed + 2 * number)), weight)
        for number, (rank, weight) in enumerate(zip(ranks, weights, strict=False))
    ]
    exact = summed(terms)[Q]
    u, sigma, v = torch.linalg.svd(exact, full_matrices=False)
    best = u[:, :kept] * sigma[:kept] @ v[:kept]
    result = added(merged(terms, folder / "out.safetensors", recipes=f"rank={kept}"))[Q]
    assert float(torch.linalg.svdvals(result)[kept:].sum()) <= 1e-5 * float(sigma[0])
    lost, least = float((result - exact).norm()), float((best - exact).norm())
    assert abs(lost - least) <= 1e-6 * float(exact.norm())


def test_ranks_add_up_and_single_layers_stay(tmp_path: Path) -> None:
    a = write(tmp_path, "a", lora(Q, 160, 96, 64, 32.0) | lora(K, 160, 96, 64, seed=9))
    b = write(tmp_path, "b", lora(Q, 160, 96, 32, 16.0, seed=4))
    assert_sum([(a, 0.7), (b, -0.5)], tmp_path / "out.safetensors")
    with open_adapter(tmp_path / "out.safetensors") as adapter:
        assert {layer.name: layer.rank for layer in adapter} == {Q: 96, K: 64}


def test_factors_of_very_different_lengths_keep_their_digits(tmp_path: Path) -> None:
    """up·10⁷ and down·10⁻⁷ are not taken for rounding."""
    long = lora(Q, 40, 30, 4, seed=5)
    long[f"{Q}.lora_up.weight"] *= 1e7
    long[f"{Q}.lora_down.weight"] *= 1e-7
    a, b = write(tmp_path, "a", lora(Q, 40, 30, 4)), write(tmp_path, "b", long)
    assert_sum([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")


def test_terms_that_cancel_leave_no_layer(tmp_path: Path) -> None:
    """Also where equal layers have unlike factors."""
    turn = randn(4, 4, seed=8) + 3 * torch.eye(4)
    twin = lora(Q, 40, 30, 4)
    up, down = (twin[f"{Q}.lora_{side}.weight"].double() for side in ("up", "down"))
    turned = {f"{Q}.lora_up.weight": up @ turn, f"{Q}.lora_down.weight": torch.linalg.solve(turn, down)}
    a = write(tmp_path, "a", twin | lora(K, 40, 30, 4, seed=5))
    b = write(tmp_path, "b", turned)
    report = merge([f"{a}:0.3", f"{b}:-0.3"], output=tmp_path / "out.safetensors", dtype="fp32")
    (result,) = report.results
    assert [(layer.name, layer.reason) for layer in result.removed] == [(Q, "ΔW is zero")]
    assert set(added(Path(result.output))) == {K}
    c = write(tmp_path, "c", twin | lora(K, 40, 30, 4, seed=5))
    with pytest.raises(InputError, match="every layer is zero"):
        merge([a, f"{c}:-1"], output=tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_equal_directions_are_written_once(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", lora(Q, 40, 30, 4)), write(tmp_path, "b", lora(Q, 40, 30, 4, 2.0))
    assert_sum([(a, 0.4), (b, 0.8)], tmp_path / "out.safetensors")
    with open_adapter(tmp_path / "out.safetensors") as adapter:
        assert [layer.rank for layer in adapter] == [4]


# --- families -----------------------------------------------------------------------------------


def loha(name: str, out: int, inner: int, rank: int, seed: int = 0) -> Tensors:
    sides = {"w1_a": (out, rank), "w1_b": (rank, inner), "w2_a": (out, rank), "w2_b": (rank, inner)}
    return {
        f"{name}.hada_{role}": randn(*shape, seed=seed + index).float()
        for index, (role, shape) in enumerate(sides.items())
    } | {f"{name}.alpha": torch.tensor(2.0)}


def lokr(name: str, first: int, second: tuple[int, int], rank: int | None, seed: int = 0) -> Tensors:
    """(first·second[0]) × (first·second[1])."""
    second_factors = {"w2": second} if rank is None else {"w2_a": (second[0], rank), "w2_b": (rank, second[1])}
    return {
        f"{name}.lokr_{role}": randn(*shape, seed=seed + index).float()
        for index, (role, shape) in enumerate({"w1": (first, first), **second_factors}.items())
    } | {f"{name}.alpha": torch.tensor(2.0)}


OTHERS = {
    "loha of low rank": loha(Q, 48, 40, 3, seed=3),
    "loha of full rank": loha(Q, 48, 40, 8, seed=3),
    "lokr of low rank": lokr(Q, 4, (12, 10), 2, seed=3),
    "lokr of full rank": lokr(Q, 4, (12, 10), None, seed=3),
    "full": {f"{Q}.diff": randn(48, 40, seed=3).float()},
    "tucker": {
        f"{Q}.lora_up.weight": randn(48, 5, 1, 1, seed=3).float(),
        f"{Q}.lora_mid.weight": randn(5, 5, 3, 3, seed=4).float(),
        f"{Q}.lora_down.weight": randn(5, 40, 1, 1, seed=5).float(),
    },
}


@pytest.mark.parametrize("kind", [family for family in OTHERS if family != "tucker"])
@pytest.mark.parametrize("lead", ["lora", "other"])
def test_lora_with_another_family(tmp_path: Path, kind: str, lead: str) -> None:
    a, b = write(tmp_path, "a", lora(Q, 48, 40, 6, 3.0)), write(tmp_path, "b", OTHERS[kind])
    terms = [(a, 0.7), (b, -0.5)] if lead == "lora" else [(b, -0.5), (a, 0.7)]
    assert_sum(terms, tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", [family for family in OTHERS if family != "tucker"])
def test_one_adapter_with_a_weight_is_its_strength(tmp_path: Path, kind: str) -> None:
    a = write(tmp_path, "a", OTHERS[kind])
    assert_sum([(a, -0.25)], tmp_path / "out.safetensors")


def test_every_two_families_together(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{index}", OTHERS[kind]) for index, kind in enumerate(OTHERS) if kind != "tucker"]
    for index, path in enumerate(paths):
        for later in paths[index + 1 :]:
            assert_sum([(path, 0.3), (later, 1.5)], tmp_path / "out.safetensors", force=True)


def test_a_convolution_with_a_core_and_one_without(tmp_path: Path) -> None:
    plain = {
        f"{Q}.lora_up.weight": randn(48, 4, 1, 1).float(),
        f"{Q}.lora_down.weight": randn(4, 40, 3, 3, seed=1).float(),
    }
    a, b = write(tmp_path, "a", plain), write(tmp_path, "b", OTHERS["tucker"])
    assert_sum([(a, 1.0), (b, 2.0)], tmp_path / "out.safetensors")
    assert_sum([(b, 1.0), (a, 2.0)], tmp_path / "out.safetensors", force=True)
    with open_adapter(tmp_path / "out.safetensors") as adapter:
        assert [layer.shape for layer in adapter] == [(48, 40, 3, 3)]


def test_a_linear_layer_and_a_convolution_of_1x1_are_the_same(tmp_path: Path) -> None:
    square = {
        key: tensor[..., None, None] if tensor.ndim else tensor
        for key, tensor in lora(Q, 24, 20, 3, 1.0, seed=7).items()
    }
    a, b = write(tmp_path, "a", lora(Q, 24, 20, 5)), write(tmp_path, "b", square)
    assert_sum([(a, 1.0), (b, 1.0)], tmp_path / "out.safetensors")
    for path, shape in ((a, (24, 20)), (b, (24, 20, 1, 1))):
        with combined(to_sum([path, a if path == b else b])) as adapter:
            assert [layer.shape for layer in adapter] == [shape]


def test_linear_layers_only_with_convolutions_too(tmp_path: Path) -> None:
    kernel = {
        f"{KERNEL}.lora_up.weight": randn(24, 4, 1, 1).float(),
        f"{KERNEL}.lora_down.weight": randn(4, 20, 3, 3, seed=1).float(),
    }
    a, b = write(tmp_path, "a", lora(Q, 24, 20, 5)), write(tmp_path, "b", kernel | lora(Q, 24, 20, 2, seed=7))
    assert set(assert_sum([(a, 1.0), (b, 0.5)], tmp_path / "out.safetensors")) == {Q, KERNEL}


def test_a_kernel_shape_comes_from_the_other_adapter(tmp_path: Path) -> None:
    """A LoHa without cores stores its kernel flattened."""
    flat = loha(KERNEL, 24, 20 * 9, 2)
    kernel = {
        f"{KERNEL}.lora_up.weight": randn(24, 4, 1, 1).float(),
        f"{KERNEL}.lora_down.weight": randn(4, 20, 3, 3, seed=1).float(),
    }
    a, b = write(tmp_path, "a", flat), write(tmp_path, "b", kernel)
    assert_sum([(a, 1.0), (b, 0.5)], tmp_path / "out.safetensors")
    with open_adapter(tmp_path / "out.safetensors") as adapter:
        assert [layer.shape for layer in adapter] == [(24, 20, 3, 3)]
    with pytest.raises(UsageError, match="whether this is a convolution"):
        combined(to_sum([f"{a}:0.5"]))


# --- namings and layouts ------------------------------------------------------------------------

PAIRS = [name for name in ADAPTERS if ADAPTERS[name][0] in ("sdxl", "sd15", "flux", "sd3", "wan", "llm")]


@pytest.mark.parametrize("name", PAIRS)
def test_two_namings_become_the_first_one(bases, tmp_path: Path, name: str) -> None:
    """In both orders, fused and split; one adapter lacks a layer."""
    family, pattern = ADAPTERS[name]
    listed = {key: shape for key, shape in few(shapes(name)).items() if re.search(pattern, key)}
    native = bases(family, "native")
    left_out = max(map(layer_name, listed))
    some = {key: shape for key, shape in listed.items() if layer_name(key) != left_out}
    a = write_tensors(tmp_path / "a.safetensors", numbers(listed), fixtures.metadata(name))
    b = write_tensors(tmp_path / "b.safetensors", numbers(some, seed=1), fixtures.metadata(name))
    effect_a, effect_b = effect(a, native), effect(b, native)
    expected = {key: 0.7 * effect_a[key] - 0.5 * effect_b.get(key, torch.zeros(1)) for key in effect_a}
    namings = ("peft",) if family == "llm" else ("kohya", "diffusers", "comfy")
    for naming in namings:
        renamed = Path(converted(a, native, naming, tmp_path / f"a {naming}").output)
        for turn, terms in enumerate(([(renamed, 0.7), (b, -0.5)], [(b, -0.5), (renamed, 0.7)])):
            kind = bases(family, "norms" if turn else "diffusers")
            # names that are nobody else's cannot be made
            requested = naming if turn and name == "flux_lora_xlabs" else None
            out = merged(terms, tmp_path / f"{naming} {turn}", base=kind, naming=requested)
            assert_same_effect(out, expected, native, 1e-4)


FUSED = "lora_unet_double_blocks_0_img_attn_qkv"
SPLIT = "transformer.transformer_blocks.0.attn.to_"


def flux(side: int = 96) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in few(shapes("base_flux_dev_comfy_full")).items() if "double_blocks.0" in key}


@pytest.mark.parametrize("fused", ["lora", "loha", "loha of full rank", "full"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_fused_layer_is_added_to_some_of_its_parts(bases, tmp_path: Path, fused: str, order) -> None:
    """Parts that the first adapter lacks get the names of its layout."""
    tensors = {
        "lora": lora(FUSED, 288, 96, 6, 3.0),
        "loha": loha(FUSED, 288, 96, 3),
        "loha of full rank": loha(FUSED, 288, 96, 10),
        "full": {f"{FUSED}.diff": randn(288, 96).float()},
    }[fused]
    parts = {
        f"{SPLIT}{which}.lora_{side}.weight": randn(*shape, seed=seed).float()
        for seed, which in enumerate("qv")
        for side, shape in (("A", (5, 96)), ("B", (96, 5)))
    }
    paths = write(tmp_path, "fused", tensors), write(tmp_path, "split", parts)
    base = bases("flux", "native")
    (key,) = effect(paths[0], base)
    expected = {key: 0.7 * effect(paths[0], base)[key] - 0.5 * effect(paths[1], base)[key]}
    terms = [[(paths[0], 0.7), (paths[1], -0.5)][index] for index in order]
    out = merged(terms, tmp_path / "out.safetensors", base=bases("flux", "norms"))
    assert_same_effect(out, expected, base, 2e-6)
    names = [FUSED] if order == (0, 1) else [f"{SPLIT}{which}" for which in "kqv"]
    assert sorted(added(out)) == names


def test_fused_parts_with_equal_inputs_keep_their_rank(bases, tmp_path: Path) -> None:
    parts = {f"{SPLIT}{which}.lora_A.weight": randn(5, 96).float() for which in "qkv"}
    parts |= {f"{SPLIT}{which}.lora_B.weight": randn(96, 5, seed=seed).float() for seed, which in enumerate("qkv")}
    fused, split = write(tmp_path, "fused", lora(FUSED, 288, 96, 4)), write(tmp_path, "split", parts)
    with open_base(bases("flux", "native")) as base, combined(to_sum([fused, split]), base) as adapter:
        (layer,) = adapter
        assert layer.delta.rank == 9


def test_dotted_names_match_layers_without_a_base(tmp_path: Path) -> None:
    dotted = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    flat = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    b = {
        f"{dotted}.lora_A.weight": randn(4, 40, seed=1).float(),
        f"{dotted}.lora_B.weight": randn(48, 4, seed=2).float(),
    }
    kohya, diffusers = write(tmp_path, "a", lora(flat, 48, 40, 6, 3.0)), write(tmp_path, "b", b)
    expected = 0.5 * added(kohya)[flat] + 2 * added(diffusers)[dotted]
    for terms, name in (
        ([(kohya, 0.5), (diffusers, 2.0)], flat),
        ([(diffusers, 2.0), (kohya, 0.5)], dotted),
    ):
        result = added(merged(terms, tmp_path / "out.safetensors", force=True))
        assert list(result) == [name]
        assert float((result[name] - expected).norm()) <= 1e-6 * float(expected.norm())


def test_a_name_that_needs_a_base(tmp_path: Path, bases) -> None:
    flat = write(tmp_path, "a", lora("lora_unet_input_blocks_4_1_proj_in", 20, 20, 6))
    name = "unet.mid_block.attentions.0.proj_in"
    dotted = {f"{name}.lora_A.weight": randn(4, 40).float(), f"{name}.lora_B.weight": randn(40, 4).float()}
    b = write(tmp_path, "b", dotted)
    with pytest.raises(UsageError, match="Give the base"):
        combined(to_sum([flat, b]))
    with open_base(bases("sdxl", "norms")) as base, combined(to_sum([flat, b]), base) as adapter:
        assert [layer.name for layer in adapter] == [
            "lora_unet_input_blocks_4_1_proj_in",
            "lora_unet_middle_block_1_proj_in",
        ]


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "comfy"])
def test_the_sum_takes_the_requested_naming(bases, tmp_path: Path, naming: str) -> None:
    listed = {key: shape for key, shape in few(shapes("flux_lora_kohya")).items() if "double_blocks_0" in key}
    a = write_tensors(tmp_path / "a.safetensors", numbers(listed))
    b = write_tensors(tmp_path / "b.safetensors", numbers(listed, seed=1))
    base = bases("flux", "native")
    effect_a, effect_b = effect(a, base), effect(b, base)
    out = merged([(a, 1.0), (b, -1.0)], tmp_path / "out", base=base, naming=naming)
    assert_same_effect(out, {key: effect_a[key] - effect_b[key] for key in effect_a}, base)
    start = {"kohya": "lora_unet_", "diffusers": "transformer.", "comfy": "diffusion_model."}[naming]
    assert all(name.startswith(start) for name in added(out))
    if naming == "diffusers":
        assert f"{SPLIT}q" in added(out)


# --- DoRA ---------------------------------------------------------------------------------------

DORA_BASE = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"


def dora(rank: int, magnitude: tuple[int, ...], seed: int) -> Tensors:
    more = {f"{Q}.dora_scale": randn(*magnitude, seed=seed).abs().float() * 6}
    return lora(Q, 40, 40, rank, 3.0, seed=seed) | more


@pytest.mark.parametrize("magnitude", [(40, 1), (1, 40)])
def test_dora_is_merged_as_what_it_adds_to_the_base(tmp_path: Path, magnitude: tuple[int, int]) -> None:
    """A magnitude per output belongs to rows, one per input to columns."""
    base_tensors = {
        key: torch.randn(s, generator=torch.Generator().manual_seed(3))
        for key, s in few(shapes("base_sdxl_ldm")).items()
    }
    base = write_tensors(tmp_path / "base.safetensors", base_tensors)
    a, b = write(tmp_path, "a", dora(4, magnitude, 5)), write(tmp_path, "b", dora(6, magnitude, 9))
    c = write(tmp_path, "c", lora(Q, 40, 40, 3, seed=20))
    weight = base_tensors[DORA_BASE].double()
    expected = 0.3 * added(c)[Q]
    for path, share in ((a, 0.7), (b, -0.5)):
        changed = weight + added(path)[Q]
        with open_adapter(path) as adapter:
            magnitudes = adapter.store.read(f"{Q}.dora_scale").double()
        norms = changed.norm(dim=1 if magnitude[1] == 1 else 0, keepdim=True)
        expected = expected + share * (magnitudes / norms * changed - weight)
    terms = [(a, 0.7), (b, -0.5), (c, 0.3)]
    result = added(merged(terms, tmp_path / "out.safetensors", base=base, as_base_delta=True))[Q]
    assert float((result - expected).norm()) <= 1e-6 * float(expected.norm())
    with pytest.raises(InputError, match="is DoRA, whose strength is not linear"):
        merged(terms, tmp_path / "no.safetensors", base=base)
    with pytest.raises(UsageError, match="needs the weights of the base"):
        merged(terms, tmp_path / "no.safetensors", as_base_delta=True)


def test_dora_needs_more_than_a_norm_table(bases, tmp_path: Path) -> None:
    a = write(tmp_path, "a", dora(4, (40, 1), 5))
    with pytest.raises(InputError, match="a norm table is not enough"):
        merged([(a, 0.5)], tmp_path / "no.safetensors", base=bases("sdxl", "norms"), as_base_delta=True)


# --- tensors beside the layers ------------------------------------------------------------------


def test_only_differences_of_biases_and_norms_are_added(tmp_path: Path) -> None:
    bias, norm = f"{Q}.diff_b", "lora_unet_out_0.w_norm"
    own = {f"{Q}.diff_b": randn(40).float(), "lora_unet_out_0.w_norm": randn(8).float()}
    second = {
        f"{Q}.diff_b": randn(40, seed=1).float(),
        "lora_unet_out_0.set_weight": randn(8).float(),
        "same.emb_params": torch.ones(3),
    }
    a = write(tmp_path, "a", lora(Q, 40, 40, 4) | own | {"same.emb_params": torch.ones(3)})
    b = write(tmp_path, "b", lora(Q, 40, 40, 4, seed=7) | second)
    report = merge([f"{a}:0.5", f"{b}:2"], output=tmp_path / "out.safetensors")
    with open_adapter(tmp_path / "out.safetensors") as adapter:
        read = adapter.store.read
        assert torch.allclose(read(bias), 0.5 * own[bias] + 2 * second[bias])
        assert torch.allclose(read(norm), 0.5 * own[norm])
        assert torch.equal(read("same.emb_params"), torch.ones(3))
    (result,) = report.results
    assert [(removed.name, removed.reason) for removed in result.removed] == [
        (
            "lora_unet_out_0.set_weight (b.safetensors)",
            "replaces a weight of the base, which cannot be weighted or added",
        )
    ]


def test_biases_of_peft_go_into_kohyas_names_only(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    factors = {f"{name}.lora_A.weight": randn(4, 40).float(), f"{name}.lora_B.weight": randn(40, 4).float()}
    b = write(tmp_path, "b", factors | {f"{name}.lora_B.bias": randn(40).float()})
    with pytest.raises(UsageError, match="has a bias beside its factors"):
        combined(to_sum([b]))


# --- what cannot be merged ----------------------------------------------------------------------


def test_adapters_of_two_models_are_refused(tmp_path: Path) -> None:
    paths = [fixtures.write_adapter(tmp_path, name) for name in ("sdxl_lora_kohya_te1_te2", "sd15_lora_kohya")]
    with pytest.raises(
        FamilyMismatch, match=r"sdxl_lora_kohya_te1_te2.safetensors is an adapter for SDXL.*is one for SD 1"
    ):
        combined(to_sum(paths))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", lora(Q, 40, 40, 4)), write(tmp_path, "b", lora(Q, 40, 32, 4))
    with pytest.raises(ShapeError, match=r"\[40, 40\] in the first and \[40, 32\]"):
        combined(to_sum([a, b]))


def test_a_base_for_one_adapter_names_the_other(bases, tmp_path: Path) -> None:
    name = "sdxl_lora_kohya_te1_te2"
    a = write_tensors(tmp_path / "a.safetensors", numbers(few(shapes(name))))
    b = write_tensors(tmp_path / "b.safetensors", numbers(few(shapes("flux_lora_kohya"))))
    with open_base(bases("sdxl", "native")) as base, pytest.raises(FamilyMismatch, match=r"b\.safetensors"):
        combined(to_sum([a, b]), base)


def test_layers_with_nan_are_named(tmp_path: Path) -> None:
    broken = lora(Q, 40, 40, 4)
    broken[f"{Q}.lora_up.weight"][3, 2] = math.nan
    a, b = write(tmp_path, "a", lora(Q, 40, 40, 4, seed=3)), write(tmp_path, "b", broken)
    with (
        combined(to_sum([a, b])) as adapter,
        pytest.raises(NonFinite, match=rf"b\.safetensors: layer {Q} contains NaN"),
    ):
        adapter.layers[0].delta  # noqa: B018
    with pytest.raises(InputError, match="contains NaN"):
        merge([a, b], output=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_family_that_needs_the_base(tmp_path: Path) -> None:
    a = write(tmp_path, "a", {f"{Q}.oft_blocks": randn(4, 10, 10).float(), f"{Q}.alpha": torch.tensor(0.0)})
    with pytest.raises(UsageError, match="Give the checkpoint with --base"):
        combined(to_sum([f"{a}:0.5"]))
