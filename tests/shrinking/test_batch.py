"""Shrinking whole files: parity with resize_lora, the loader contract, metadata, batches and reruns."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import lorashrink
import lorashrink_example
from lorashrink.adapters import open_adapter
from lorashrink.errors import InputError, RecipeError
from lorashrink.files.writing import SafetensorsWriter
from lorashrink.results.shrinking import Report
from lorashrink.shrinking.run import resize

EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "parity" / "expected.json").read_text())["recipes"]


def make(path: Path, layers: dict[str, tuple[Tensor, Tensor, float | None]], **metadata: str) -> Path:
    """A kohya file of these (up, down, alpha)."""
    tensors = {}
    for name, (up, down, alpha) in layers.items():
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata)
    return path


def pair(out: int = 24, rank: int = 8, columns: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(rank, columns, generator=generator)


def deltas(path: Path) -> dict[str, Tensor]:
    with open_adapter(path) as adapter:
        return {layer.name: layer.delta.dense() for layer in adapter}


def only(report: Report) -> Path:
    assert not report.failed
    (result,) = report.results
    return Path(result.output)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()


# --- parity and exactness -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, int]]]:
    folder = Path(__file__).parents[1] / "data" / "parity"
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    report = resize(
        folder / "lora.safetensors",
        base=folder / "base.safetensors",
        recipes=list(EXPECTED),
        output=tmp_path_factory.mktemp("out"),
        dtype="fp32",
    )
    return {
        text: (Path(result.output), {row.name: row.rank_after for row in result.layers if row.rank_after})
        for text, result in zip(EXPECTED, report.results, strict=True)
    }


@pytest.mark.parametrize("text", EXPECTED)
def test_ranks_and_norms_equal_those_of_resize_lora(text: str, parity: dict[str, tuple[Path, dict[str, int]]]) -> None:
    path, ranks = parity[text]
    assert path.name == EXPECTED[text]["file"]
    expected = EXPECTED[text]["kept_rank"]
    # diffusers reads no encoder without an out_proj; where resize_lora drops them all, one dimension is kept
    added = {name: rank for name, rank in ranks.items() if name not in expected}
    assert {name.partition("_layers")[0]: rank for name, rank in added.items()} == dict.fromkeys(
        (encoder for encoder in encoders(expected) if not has_out_proj(encoder, expected)), 1
    )
    assert all(name.endswith("out_proj") for name in added)
    assert ranks == {**expected, **added}
    norms = {name: float(delta.norm()) for name, delta in deltas(path).items() if name not in added}
    assert norms == pytest.approx(EXPECTED[text]["frobenius_norm_of_delta"], rel=1e-5, abs=1e-6)


def encoders(names: Iterable[str]) -> set[str]:
    return {name.partition("_layers")[0] for name in names if name.startswith("lora_te")}


def has_out_proj(encoder: str, names: Iterable[str]) -> bool:
    return any(name.startswith(encoder) and name.endswith("out_proj") for name in names)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-6), ("same", 2e-3), ("bf16", 1e-2)])
def test_full_energy_changes_the_delta_by_rounding_only(
    adapter: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    after = deltas(only(resize(adapter, recipes="energy=1", output=tmp_path, dtype=dtype)))
    for name, before in deltas(adapter).items():
        if name in after:
            assert float((after[name] - before).norm()) <= tolerance * float(before.norm()), name
        else:
            assert not before.any(), name


def test_the_reported_error_is_the_error_of_the_file(adapter: Path, base: Path, tmp_path: Path) -> None:
    report = resize(adapter, base=base, recipes="fro_ckpt,thr=-1.6", output=tmp_path, dtype="fp32")
    before, after = deltas(adapter), deltas(only(report))
    lost = {name: float((delta - after.get(name, 0 * delta)).norm()) for name, delta in before.items()}
    result = report.results[0]
    for row in result.layers:
        assert row.rle_lora == pytest.approx(lost[row.name] / float(before[row.name].norm()), rel=1e-3, abs=1e-5)
        assert row.energy == pytest.approx(1 - row.rle_lora**2)
    total = math.hypot(*(float(delta.norm()) for delta in before.values()))
    assert result.relative_error == pytest.approx(math.hypot(*lost.values()) / total, rel=1e-4)
    assert result.bytes_after == Path(result.output).stat().st_size
    assert result.bytes_before == adapter.stat().st_size


@pytest.mark.parametrize("megabytes", [0.05, 0.1, 0.2, 0.25])
@pytest.mark.parametrize("recipe", ["size", "fro_ckpt,bytes,size", "size,uniform;size", "size,multiple=4;size"])
def test_a_file_is_never_larger_than_its_budget(
    adapter: Path, base: Path, tmp_path: Path, megabytes: float, recipe: str
) -> None:
    text = recipe.partition(";")[0].replace("size", f"size={megabytes}")
    report = resize(adapter, base=base, recipes=text, output=tmp_path)
    size = only(report).stat().st_size
    assert size <= megabytes * 2**20
    if "," not in text:  # the last dimension that did not fit, with the names of its layer, is this large at most
        assert size > megabytes * 2**20 - 2000


def test_rescale_multiplies_the_delta_with_its_sign(adapter: Path, tmp_path: Path) -> None:
    plain = deltas(only(resize(adapter, recipes="rank=2", output=tmp_path, dtype="fp32")))
    negated = deltas(only(resize(adapter, recipes="rank=2,rescale=-0.5", output=tmp_path, dtype="fp32")))
    for name, delta in plain.items():
        assert_close(negated[name], -0.5 * delta, rtol=1e-4, atol=1e-6)


# --- the loader contract ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "scale"), [(8.0, 1.0), (4.0, 0.5), (0.3, 0.0375), (-4.0, -0.5), (None, 1.0)], ids=str
)
def test_factors_take_the_scale_and_alpha_becomes_the_rank(tmp_path: Path, alpha: float | None, scale: float) -> None:
    up, down = pair()
    name = "lora_unet_input_blocks_4_1_proj_in"
    path = only(resize(make(tmp_path / "a.safetensors", {name: (up, down, alpha)}), recipes="rank=3", dtype="fp32"))
    tensors = load_file(path)
    assert (f"{name}.alpha" in tensors) == (alpha is not None)
    if alpha is not None:
        assert float(tensors[f"{name}.alpha"]) == 3
    up3, down3 = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    u, s, v = torch.linalg.svd(scale * up @ down)
    assert_close(up3 @ down3, u[:, :3] @ torch.diag(s[:3]) @ v[:3], rtol=1e-4, atol=1e-5)
    assert_close(up3.norm(dim=0), down3.norm(dim=1), rtol=1e-4, atol=0)


def test_layers_of_different_rank_share_one_alpha(tmp_path: Path) -> None:
    """diffusers 0.42 gives all attention layers the most frequent alpha."""
    layers = {"lora_unet_a": (*pair(), 8.0), "lora_unet_b": (*pair(rank=3, seed=5), 1.5)}
    source = make(tmp_path / "a.safetensors", layers, ss_network_dim="8", ss_network_alpha="8")
    path = only(resize(source, recipes="rank=5", dtype="fp32"))
    tensors = load_file(path)
    assert [float(tensors[f"{name}.alpha"]) for name in layers] == [5, 5]
    assert [tensors[f"{name}.lora_down.weight"].shape[0] for name in layers] == [5, 3]
    assert_close(deltas(path)["lora_unet_b"], deltas(source)["lora_unet_b"], rtol=1e-4, atol=1e-5)
    assert metadata(path)["ss_network_alpha"] == "5"


def test_a_layer_with_alpha_zero_is_removed_with_a_warning(tmp_path: Path) -> None:
    layers = {"lora_unet_a": (*pair(), 0.0), "lora_unet_b": (*pair(), 8.0)}
    report = resize(make(tmp_path / "a.safetensors", layers), recipes="rank=2")
    assert [(removed.name, "alpha is 0" in removed.reason) for removed in report.results[0].removed] == [
        ("lora_unet_a", True)
    ]
    assert "sd-scripts" in report.results[0].warnings[0]


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)], ids=["linear", "1x1", "3x3"])
def test_convolutions_keep_their_dimensions(tmp_path: Path, kernel: tuple[int, ...]) -> None:
    up, down = torch.randn(24, 8, *(1 for _ in kernel)), torch.randn(8, 12, *kernel)
    source = make(tmp_path / "a.safetensors", {"lora_unet_a": (up, down, 8.0)})
    path = only(resize(source, recipes="energy=1", dtype="fp32"))
    tensors = load_file(path)
    assert tensors["lora_unet_a.lora_up.weight"].shape == up.shape
    assert tensors["lora_unet_a.lora_down.weight"].shape == down.shape
    assert_close(deltas(path)["lora_unet_a"], deltas(source)["lora_unet_a"], rtol=1e-4, atol=1e-4)


def test_a_tucker_core_is_folded_in_and_named(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    up, mid, down = torch.randn(24, 6, 1, 1), torch.randn(6, 6, 3, 3), torch.randn(6, 12, 1, 1)
    save_file(
        {"l.lora_up.weight": up, "l.lora_mid.weight": mid, "l.lora_down.weight": down, "l.alpha": torch.tensor(3.0)},
        source,
    )
    report = resize(source, recipes="energy=1", dtype="fp32", form="lora")
    truth = 0.5 * torch.einsum("oa,abxy,bi->oixy", up[..., 0, 0], mid, down[..., 0, 0])
    assert_close(deltas(only(report))["l"], truth, rtol=1e-4, atol=1e-4)
    assert {removed.name for removed in report.results[0].removed} == {"l.lora_mid.weight"}
    assert load_file(only(report))["l.lora_down.weight"].shape == (6, 12, 3, 3)


def test_layers_of_different_rank_keep_their_dtypes(tmp_path: Path) -> None:
    layers = {
        f"lora_unet_{dtype}".replace(".", "_"): (pair(rank=rank)[0].to(dtype), pair(rank=rank)[1].to(dtype), 4.0)
        for rank, dtype in ((4, torch.float16), (9, torch.bfloat16), (16, torch.float32), (3, torch.float64))
    }
    source = make(tmp_path / "a.safetensors", layers)
    after = load_file(only(resize(source, recipes="energy=.8")))
    for name, (up, _, _) in layers.items():
        assert after[f"{name}.lora_up.weight"].dtype == up.dtype
        assert after[f"{name}.alpha"].dtype == torch.float32


def test_uniform_pads_with_zeros_only_past_a_layers_own_rank(tmp_path: Path) -> None:
    layers = {"lora_unet_a": (*pair(), 8.0), "lora_unet_b": (*pair(out=3, seed=5), 8.0)}
    tensors = load_file(only(resize(make(tmp_path / "a.safetensors", layers), recipes="rank=6,uniform")))
    assert tensors["lora_unet_a.lora_up.weight"].shape[1] == tensors["lora_unet_b.lora_up.weight"].shape[1] == 6
    assert not tensors["lora_unet_b.lora_up.weight"][:, 3:].any()
    assert float(tensors["lora_unet_b.alpha"]) == 6


def test_an_encoder_keeps_the_out_proj_that_diffusers_needs(tmp_path: Path) -> None:
    up, down = pair()
    layers = {
        f"lora_te{encoder}_text_model_encoder_layers_0_self_attn_{name}": (up * strength, down.clone(), 8.0)
        for encoder, name, strength in ((1, "q_proj", 1), (1, "out_proj", 1e-6), (2, "q_proj", 1), (2, "out_proj", 1))
    }
    path = make(tmp_path / "a.safetensors", layers)
    (shrunk,) = resize(path, recipes="thr=-1", output=tmp_path / "out").results
    assert shrunk.removed == ()
    ranks = {layer.name: layer.rank_after for layer in shrunk.layers}
    assert ranks["lora_te1_text_model_encoder_layers_0_self_attn_out_proj"] == 1
    (warning,) = shrunk.warnings
    assert warning.startswith("lora_te1 keeps the best dimension of a self_attn_out_proj")
    (full,) = resize(path, recipes="thr=-1,min_rank=1", output=tmp_path / "out").results
    assert not full.warnings


def test_the_out_proj_that_diffusers_needs_counts_for_size(tmp_path: Path) -> None:
    up, down = pair(out=64, rank=8)
    layers = {
        f"lora_te1_text_model_encoder_layers_{block}_self_attn_{name}": (up * strength, down.clone(), 8.0)
        for block in (0, 1)
        for name, strength in (("q_proj", 1.0), ("out_proj", 1e-6 * (1 + block)))
    }
    path = make(tmp_path / "a.safetensors", layers)
    (unlimited,) = resize(path, recipes="thr=-1", output=tmp_path / "whole").results
    budget = unlimited.bytes_after - 300
    (shrunk,) = resize(path, recipes=f"size={budget / 2**20}", output=tmp_path / "out").results
    assert shrunk.bytes_after <= budget
    (kept,) = [layer for layer in shrunk.layers if "out_proj" in layer.name and layer.rank_after]
    assert kept.name.endswith("layers_1_self_attn_out_proj")
    assert kept.rank_after == 1


def test_nothing_is_dropped_silently(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    up, down = pair()
    extras = {
        "lora_unet_x.diff": torch.randn(4).half(),
        "lora_unet_n.w_norm": torch.randn(7),
        "bundle_emb.cat.clip_l": torch.randn(2, 8).bfloat16(),
        "lora_unet_d.diff_b": torch.ones(24),
        "lora_unet_m.hada_w1_a": torch.ones(24),
        "lora_unet_m.lora_up.weight": up.clone(),
        "lora_unet_m.lora_down.weight": down.clone(),
        "note": torch.arange(3),
    }
    zero = {"lora_unet_z.lora_up.weight": 0 * up, "lora_unet_z.lora_down.weight": down.clone()}
    save_file({**extras, **zero, "lora_unet_a.lora_up.weight": up, "lora_unet_a.lora_down.weight": down}, source)
    report = resize(source, recipes="rank=2", dtype="fp16")
    result, after = report.results[0], load_file(only(report))
    assert {copied.key for copied in result.verbatim} == set(extras)
    assert all(removed.reason for removed in (*result.verbatim, *result.removed))
    for key, tensor in extras.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor)
    assert {removed.name for removed in result.removed} == {"lora_unet_z"}
    assert set(after) == set(extras) | {"lora_unet_a.lora_up.weight", "lora_unet_a.lora_down.weight"}


def test_multiplied_layers_depend_on_the_base(tmp_path: Path) -> None:
    """The recipe does not need the base, but OFT multiplies its weights."""
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    bases = [tmp_path / f"base{number}.safetensors" for number in (0, 1)]
    shapes = load_file(lorashrink_example.path("base.safetensors"))
    for number, path in enumerate(bases):
        save_file({key: tensor + number for key, tensor in shapes.items()}, path)
    source = tmp_path / "oft.safetensors"
    blocks = 0.1 * torch.randn(shapes[name].shape[0] // 4, 4, 4)
    save_file({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.oft_blocks": blocks}, source)
    options = {"recipes": "rank=2", "form": "lora", "output": tmp_path / "out", "skip_existing": True}
    assert not resize(source, base=bases[0], **options).results[0].skipped
    assert resize(source, base=bases[0], **options).results[0].skipped
    assert "made from another source, base" in resize(source, base=bases[1], **options).failed[0].error


@pytest.mark.parametrize("side", ["out", "in"])
def test_dora_keeps_its_magnitude_and_at_least_one_dimension(tmp_path: Path, side: str) -> None:
    """Without ΔW the weight would be m·W/‖W‖ and not W."""
    source = tmp_path / "a.safetensors"
    magnitude = torch.rand(24, 1).half() if side == "out" else torch.rand(1, 40).half()
    tensors = {}
    for name, size in (("weak", 1e-4), ("strong", 1.0), ("zero", 0.0)):
        up, down = pair()
        tensors |= {f"{name}.lora_up.weight": size * up, f"{name}.lora_down.weight": down}
        tensors |= {f"{name}.dora_scale": magnitude.clone(), f"{name}.alpha": torch.tensor(4.0)}
    save_file(tensors, source)
    report = resize(source, recipes="thr=0", dtype="fp32", output=tmp_path / "out")
    after = load_file(only(report))
    assert set(after) == set(tensors)
    assert all(torch.equal(after[f"{name}.dora_scale"], magnitude) for name in ("weak", "strong", "zero"))
    ranks = {row.name: row.rank_after for row in report.results[0].layers}
    assert ranks["weak"] == 1
    assert 1 < ranks["strong"] <= 8
    assert {row.algo for row in report.results[0].layers} == {"dora"}
    assert any("DoRA" in warning for warning in report.results[0].warnings)


@pytest.mark.parametrize("unmapped", ["keep", "drop", "error"])
def test_layers_without_a_base_weight_are_kept_dropped_or_refused(base: Path, tmp_path: Path, unmapped: str) -> None:
    mapped = "lora_unet_input_blocks_4_1_proj_in"
    layers = {mapped: (*pair(24, 4, 24), 4.0), "lora_unet_nowhere": (*pair(24, 4, 24), 4.0)}
    report = resize(make(tmp_path / "a.safetensors", layers), base=base, recipes="fro_ckpt,thr=-4", unmapped=unmapped)
    if unmapped == "error":
        assert "lora_unet_nowhere" in report.failed[0].error
        return
    names = {key.partition(".")[0] for key in load_file(only(report))}
    assert names == ({mapped, "lora_unet_nowhere"} if unmapped == "keep" else {mapped})
    fates = [*report.results[0].verbatim, *report.results[0].removed]
    assert any("changes no weight of the base" in fate.reason for fate in fates)


def test_an_overflow_in_half_precision_fails_and_leaves_no_file(tmp_path: Path) -> None:
    up, down = pair()
    source = make(tmp_path / "a.safetensors", {"lora_unet_a": (up * 1e6, down * 1e6, 8.0)})
    report = resize(source, recipes="rank=2", dtype="fp16", output=tmp_path / "out")
    assert "use -t fp32 or -t bf16" in report.failed[0].error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_norms_beyond_float32_are_checked_in_float64(tmp_path: Path, size: float) -> None:
    up, down = (factor.to(torch.bfloat16) for factor in pair())
    source = make(tmp_path / "a.safetensors", {"lora_unet_a": (up * size, down * size, 8.0)})
    report = resize(source, recipes="rank=2", output=tmp_path / "out")
    written = load_file(only(report))
    assert not report.results[0].warnings
    up, down = (written[f"lora_unet_a.lora_{side}.weight"].double() / size for side in ("up", "down"))
    (before,) = deltas(make(tmp_path / "b.safetensors", {"lora_unet_a": (*pair(), 8.0)})).values()
    expected = torch.linalg.svdvals(before.double())[:2]
    scale = float(written["lora_unet_a.alpha"]) / 2
    assert scale * torch.linalg.svdvals(up @ down)[:2] == pytest.approx(expected.numpy(), rel=0.02)


def test_a_layer_too_weak_for_the_dtype_is_named_beside_others(tmp_path: Path) -> None:
    (up, down), names = pair(), ("lora_unet_a", "lora_unet_b")
    source = make(tmp_path / "a.safetensors", {names[0]: (up, down, 8.0), names[1]: (up * 1e-7, down * 1e-6, 8.0)})
    report = resize(source, recipes="rank=2", dtype="fp16", output=tmp_path / "out")
    assert "1 layer, first lora_unet_b: so weak" in report.results[0].warnings[0]
    assert deltas(only(report)).keys() == set(names)
    alone = make(tmp_path / "b.safetensors", {names[1]: (up * 1e-7, down * 1e-6, 8.0)})
    assert "use -t fp32 or -t bf16" in resize(alone, recipes="rank=2", dtype="fp16").failed[0].error


def test_dimensions_balanced_against_each_other_stay(tmp_path: Path) -> None:
    up, down = pair()
    skew = 10 ** torch.linspace(-6, 6, 8)
    source = make(tmp_path / "a.safetensors", {"lora_unet_a": (up * skew, down / skew[:, None], 8.0)})
    report = resize(source, recipes="rank=6", output=tmp_path / "out")
    (before,), (after,) = deltas(source).values(), deltas(only(report)).values()
    sigma = torch.linalg.svdvals(before.double())
    assert float((before - after).norm()) == pytest.approx(float(sigma[6:].norm()), rel=1e-4)
    assert report.results[0].relative_error == pytest.approx(float(sigma[6:].norm() / sigma.norm()), rel=1e-5)


def test_a_recipe_that_keeps_nothing_fails_and_leaves_no_file(adapter: Path, tmp_path: Path) -> None:
    report = resize(adapter, recipes="spn_lora,thr=3", output=tmp_path)
    assert "keeps nothing: the best dimension scores 0.00" in report.failed[0].error
    assert not list(tmp_path.iterdir())


def test_a_damaged_output_is_not_published(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SafetensorsWriter.write

    def damaged(self: SafetensorsWriter, tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if "middle_block_0_in_layers_2.lora_up" in name:
                tensors[name] = tensors[name] * 0
        original(self, tensors)

    monkeypatch.setattr(SafetensorsWriter, "write", damaged)
    report = resize(adapter, recipes="rank=2", output=tmp_path)
    assert "lora_unet_middle_block_0_in_layers_2 has norm 0 after writing" in report.failed[0].error
    assert not list(tmp_path.iterdir())


def test_two_layers_for_one_weight_get_a_warning(base: Path, tmp_path: Path) -> None:
    layers = {
        "lora_unet_input_blocks_4_1_proj_in": (*pair(24, 4, 24), 4.0),
        "unet.down_blocks.1.attentions.0.proj_in": (*pair(24, 4, 24, seed=3), 4.0),
    }
    report = resize(make(tmp_path / "a.safetensors", layers), base=base, recipes="rank=2")
    assert "change the same weight" in report.results[0].warnings[0]


# --- metadata -----------------------------------------------------------------------------------

TRAINING = {
    "ss_network_dim": "8",
    "ss_network_alpha": "4.0",
    "ss_training_comment": "mine",
    "ss_tag_frequency": '{"img": {"a": 3, "é": 1}}',
    "ss_network_args": '{"algo": "locon", "conv_dim": "8", "conv_alpha": "4", "block_dims": "8,8", "dropout": 0.1}',
    "sshs_model_hash": "stale",
    "sshs_legacy_hash": "stale",
    "modelspec.title": "my lora",
    "modelspec.hash_sha256": "0xstale",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "foo": "bar",
}


def test_metadata_is_updated_and_otherwise_kept(tmp_path: Path) -> None:
    source = make(tmp_path / "a.safetensors", {"lora_unet_a": (*pair(), 4.0)}, **TRAINING)
    path = only(resize(source, recipes="rank=3"))
    new = metadata(path)
    assert (new["ss_network_dim"], new["ss_network_alpha"]) == ("3", "3")
    assert new["ss_training_comment"].startswith("resized from rank 8 ")
    assert new["ss_training_comment"].endswith("; mine")
    assert json.loads(new["ss_network_args"]) == {"algo": "locon", "dropout": 0.1}
    for key in ("ss_tag_frequency", "modelspec.title", "modelspec.architecture", "foo"):
        assert new[key] == TRAINING[key]
    assert new["lorashrink.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert new["lorashrink.recipe"] == "rank=3"
    energy, ratio = float(new["lorashrink.energy"]), float(new["lorashrink.norm_ratio"])
    assert ratio == pytest.approx(energy**0.5, abs=1e-6)
    assert 0 < energy < 1


def test_hashes_equal_those_of_other_tools(tmp_path: Path) -> None:
    """sshs_model_hash, and the legacy hash of sd-scripts over a re-save."""
    layers = {f"lora_unet_{i}": (*pair(400, 64, 300, seed=i), 4.0) for i in range(12)}
    path = only(resize(make(tmp_path / "a.safetensors", layers, **TRAINING), recipes="rank=60"))
    raw, new = path.read_bytes(), metadata(path)
    data = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    assert new["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert new["modelspec.hash_sha256"] == "0x" + new["sshs_model_hash"]
    again = tmp_path / "again.safetensors"
    save_file(load_file(path), again, {key: value for key, value in new.items() if key.startswith("ss_")})
    window = again.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert len(window) == 0x10000
    assert new["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


@pytest.mark.parametrize("recipe", ["rank=3", "size=0.05", "size=100"])
def test_resize_params_are_valid_json(adapter: Path, tmp_path: Path, recipe: str) -> None:
    """resize_lora writes -Infinity when everything fits."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    params = json.loads(
        metadata(only(resize(adapter, recipes=recipe, output=tmp_path)))["resize_params"], parse_constant=refuse
    )
    assert set(params) == {"recipe_str", "weights", "target_size", "threshold", "rescale", "lorashrink_version"}
    assert params["threshold"] is None or recipe == "size=0.05"


def test_a_file_without_metadata_is_shrunk(tmp_path: Path) -> None:
    """resize_lora fails with a TypeError."""
    new = metadata(only(resize(make(tmp_path / "a.safetensors", {"lora_unet_a": (*pair(), 4.0)}), recipes="rank=3")))
    assert "ss_network_dim" not in new


def test_peft_settings_in_the_header_follow_the_ranks(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    tensors = {}
    for number, rank in enumerate((8, 2)):
        up, down = pair(rank=rank, seed=number)
        tensors |= {f"unet.block.{number}.lora_A.weight": down, f"unet.block.{number}.lora_B.weight": up}
    config = {"unet.r": 8, "unet.lora_alpha": 16, "unet.target_modules": ["0", "1"], "unet.rank_pattern": {"1": 2}}
    save_file(tensors, source, {"lora_adapter_metadata": json.dumps(config)})
    path = only(resize(source, recipes="rank=4", dtype="fp32"))
    new = json.loads(metadata(path)["lora_adapter_metadata"])
    assert new["unet.r"] == new["unet.lora_alpha"] == 4
    assert new["unet.rank_pattern"] == new["unet.alpha_pattern"] == {"^block.1": 2}
    assert new["unet.target_modules"] == ["0", "1"]
    u, s, v = torch.linalg.svd(2.0 * tensors["unet.block.0.lora_B.weight"] @ tensors["unet.block.0.lora_A.weight"])
    assert_close(deltas(path)["unet.block.0"], u[:, :4] @ torch.diag(s[:4]) @ v[:4], rtol=1e-4, atol=1e-4)


def test_equal_runs_write_equal_bytes(adapter: Path, base: Path, tmp_path: Path) -> None:
    first, second = (
        only(resize(adapter, base=base, recipes="fro_ckpt,thr=-1.6", output=tmp_path / name, jobs=jobs))
        for name, jobs in (("one", 1), ("two", 3))
    )
    assert first.read_bytes() == second.read_bytes()


# --- batches ------------------------------------------------------------------------------------


def copies(adapter: Path, folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"copy{number}.safetensors" for number in range(count)]
    for path in paths:
        shutil.copy(adapter, path)
    return paths


def test_an_adapter_named_twice_is_shrunk_once(adapter: Path, base: Path, tmp_path: Path) -> None:
    paths = copies(adapter, tmp_path / "in", 3)
    shutil.copy(base, tmp_path / "in" / "base.safetensors")
    (tmp_path / "in" / "deeper").mkdir()
    shutil.copy(adapter, tmp_path / "in" / "deeper" / "deep.safetensors")
    arguments = [tmp_path / "in", f"{tmp_path}/in/copy*.safetensors", paths[1]]
    report = resize(arguments, recipes="rank=1:rank=2", output=tmp_path / "out")
    assert [Path(result.source).name for result in report.results] == [path.name for path in paths for _ in range(2)]
    assert len(list((tmp_path / "out").iterdir())) == 6
    deep = resize(tmp_path / "in", recipes="rank=1", output=tmp_path / "deep", recursive=True)
    assert len(deep.results) == 4


def test_progress_ends_at_its_total(adapter: Path, base: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(text: str, done: int, total: int) -> None:
        assert done >= seen.get(text, (0, 0))[0]
        seen[text] = (done, total)

    paths = copies(adapter, tmp_path / "in", 2)
    paths[1].write_bytes(b"broken")
    resize(paths, base=base, recipes="fro_ckpt,thr=-1.6:rank=2", output=tmp_path / "out", progress=progress)
    assert set(seen) == {"norms of the base", "decomposing copy0.safetensors", "writing copy0.safetensors", "files"}
    assert all(done == total for done, total in seen.values())


def test_one_bad_file_does_not_stop_the_others(adapter: Path, tmp_path: Path) -> None:
    paths = copies(adapter, tmp_path / "in", 3)
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    report = resize(tmp_path / "in", recipes="rank=1", output=tmp_path / "out")
    assert [Path(failure.source).name for failure in report.failed] == ["copy1.safetensors"]
    assert len(report.results) == len(list((tmp_path / "out").iterdir())) == 2


def test_skip_existing_keeps_equal_results_and_refuses_others(adapter: Path, tmp_path: Path) -> None:
    first = resize(adapter, recipes="rank=1", output=tmp_path)
    before = only(first).stat().st_mtime_ns
    again = resize(adapter, recipes="rank=2:rank=1", output=tmp_path, skip_existing=True)
    assert [result.skipped for result in again.results] == [False, True]
    assert [result.recipe for result in again.results] == ["rank=2", "rank=1"]
    assert only(first).stat().st_mtime_ns == before
    assert again.results[1].relative_error == pytest.approx(first.results[0].relative_error, abs=1e-3)
    changed = resize(adapter, recipes="rank=1", output=tmp_path, skip_existing=True, dtype="fp32")
    assert "made from another source, base, recipe, options or version" in changed.failed[0].error


def test_a_dry_run_reports_the_exact_size_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    planned = resize(adapter, recipes="rank=2", output=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert (
        planned.results[0].bytes_after
        == only(resize(adapter, recipes="rank=2", output=tmp_path / "out")).stat().st_size
    )


def test_pickles_become_safetensors(adapter: Path, tmp_path: Path) -> None:
    torch.save(load_file(adapter), tmp_path / "old.pt")
    path = only(resize(tmp_path / "old.pt", recipes="rank=2", dtype="fp32"))
    assert path.suffix == ".safetensors"
    reference = deltas(only(resize(adapter, recipes="rank=2", dtype="fp32", output=tmp_path / "out")))
    for name, delta in deltas(path).items():
        assert_close(delta, reference[name])


def test_a_norm_table_stands_in_for_its_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    table = lorashrink.norms(base, tmp_path / "norms.json")
    assert table.bytes < 1_000_000
    recipes = "fro_ckpt,thr=-1.6:spn_ckpt,thr=-1.2"
    direct = resize(adapter, base=base, recipes=recipes, output=tmp_path / "one")
    by_table = resize(adapter, base=table.path, recipes=recipes, output=tmp_path / "two")
    assert by_table.base is not None
    assert (by_table.base.kind, by_table.base.family) == ("norms", "sdxl")
    for a, b in zip(direct.results, by_table.results, strict=True):
        assert Path(a.output).read_bytes() == Path(b.output).read_bytes()
    report = resize(adapter, base=table.path, recipes="subspace,thr=-1", output=tmp_path / "three")
    assert "norm table holds no weights" in report.failed[0].error


def test_a_recipe_with_base_terms_needs_a_base(adapter: Path) -> None:
    with pytest.raises(RecipeError, match="compares with the base model"):
        resize(adapter, recipes="fro_ckpt,thr=-3")


def test_the_python_interface_of_the_documentation_works(adapter: Path, base: Path, tmp_path: Path) -> None:
    result = lorashrink.resize(adapter, base=base, recipes=["fro_ckpt=1,thr=-3.55"], output=tmp_path)
    assert result.results[0].bytes_after > 0
    assert lorashrink.inspect(adapter, base=base).files[0].layers[0].fro_ratio is not None
    for layer in lorashrink.open_adapter(adapter):
        assert layer.delta.dense().shape == layer.shape
    with pytest.raises(InputError):
        lorashrink.open_adapter(tmp_path / "missing.safetensors")
