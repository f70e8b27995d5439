"""Outputs in 8 bits: budgets, alphas, what stays in 16, names under which programs load them, and bad input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import fixtures
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorashrink as ls
import lorashrink_example
from lorashrink.bases import open_base
from lorashrink.calibration.statistics import Side, Sides, write_table
from lorashrink.errors import UsageError
from lorashrink.results.shrinking import FileResult

FP8 = torch.float8_e4m3fn
EXAMPLE = lorashrink_example.path()
STYLE, MODEL, TABLE = EXAMPLE / "loras" / "style.safetensors", EXAMPLE / "model", EXAMPLE / "table.safetensors"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn2_to_k"
FLUX_BASE = "base_flux_dev_comfy_full"


def factors(out: int, fan_in: int, rank: int, sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """Factors whose product has the singular values σ, σ/2, σ/3, ..."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=generator)).Q for side in (out, fan_in))
    return (left * (sigma / torch.arange(1, rank + 1))).contiguous(), right.mT.contiguous()


def kohya(
    path: Path,
    sigmas: Mapping[str, float],
    shape: tuple[int, int] = (64, 2048),
    alpha: float | None = 4.0,
    rank: int = 8,
) -> Path:
    tensors = {}
    for seed, (name, sigma) in enumerate(sigmas.items()):
        up, down = factors(*shape, rank, sigma if alpha is None else sigma * rank / alpha, seed)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def sdxl(path: Path, *sigmas: float, **options: object) -> Path:
    return kohya(
        path, {SDXL.format(number): sigma for number, sigma in enumerate(sigmas or (1.0, 0.7, 0.4))}, **options
    )


def only(source: Path, dtype: str = "fp8", **options: object) -> FileResult:
    report = ls.resize(source, dtype=dtype, output=source.parent / "out", force=True, **options)
    assert not report.failed, report.failed
    return report.results[0]


def deltas(path: str | Path) -> dict[str, Tensor]:
    with ls.open_adapter(path) as adapter:
        return {layer.name: layer.delta.dense().double() for layer in adapter}


def best(delta: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


# --- numbers --------------------------------------------------------------------------------------


def test_factors_are_the_truncated_ones_but_for_rounding(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "a.safetensors")
    before, result = deltas(source), only(source, recipes="rank=3")
    after = deltas(result.output)
    assert result.dtype == "fp8"
    for name, delta in before.items():
        expected = best(delta, 3)
        assert float((after[name] - expected).norm()) < 0.05 * float(expected.norm())


def test_sdxl_has_one_alpha_of_1_and_others_none(tmp_path: Path) -> None:
    tensors = load_file(only(sdxl(tmp_path / "a.safetensors"), recipes="energy=0.9").output)
    assert [float(tensor) for key, tensor in tensors.items() if key.endswith("alpha")] == [1.0] * 3
    wan = {f"diffusion_model.blocks.{number}.self_attn.q": 1.0 for number in range(2)}
    source = kohya(tmp_path / "wan.safetensors", wan, (1536, 1536))
    result = only(source, recipes="energy=0.9")
    assert not [key for key in load_file(result.output) if key.endswith("alpha")]
    assert {row.name for row in result.removed} == {f"{name}.alpha" for name in wan}
    before, after = deltas(source), deltas(result.output)
    for name in wan:
        rank = next(layer.rank_after for layer in result.layers if layer.name == name)
        expected = best(before[name], rank)
        assert float((after[name] - expected).norm()) < 0.1 * float(expected.norm())


def test_the_metadata_name_the_alpha_of_1(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "a.safetensors")
    save_file(load_file(source), source, {"ss_network_dim": "8", "ss_network_alpha": "4"})
    with ls.open_adapter(only(source, recipes="rank=3").output) as adapter:
        entries = adapter.store.metadata
        assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == ("3", "1")


def test_same_keeps_8_bits(tmp_path: Path) -> None:
    source = only(sdxl(tmp_path / "a.safetensors"), recipes="energy=1").output
    result = only(Path(source), dtype="same", recipes="rank=2")
    assert result.dtype == "fp8"
    assert {tensor.dtype for key, tensor in load_file(result.output).items() if "lora" in key.split(".")[1]} == {FP8}
    assert result.bytes_after < result.bytes_before


def test_same_keeps_e5m2_at_8_bits_in_the_finer_e4m3(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "a.safetensors")
    coarse = {key: t.to(torch.float8_e5m2) if t.ndim else t for key, t in load_file(source).items()}
    save_file(coarse, source)
    assert only(source, dtype="same", recipes="rank=2").dtype == "fp8"


@pytest.mark.parametrize("dtype", ["fp8", "mixed", "auto"])
@pytest.mark.parametrize("size", [0.004, 0.012, 0.02, 0.5])
def test_budgets_are_kept_to_the_byte(tmp_path: Path, dtype: str, size: float) -> None:
    source = sdxl(tmp_path / "a.safetensors", 1.0, 0.5, 0.3, shape=(256, 2048))
    result = only(source, dtype=dtype, recipes=f"bytes,size={size}")
    assert Path(result.output).stat().st_size == result.bytes_after <= size * 2**20
    dry = ls.resize(source, dtype=dtype, recipes=f"bytes,size={size}", dry_run=True, output=tmp_path / "dry").results[0]
    assert dry.bytes_after == result.bytes_after


def test_fp8_holds_more_dimensions_than_fp16_in_a_budget(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "a.safetensors", 1.0, 0.5, 0.3, shape=(256, 2048))
    small, wide = (only(source, dtype=dtype, recipes="bytes,size=0.03") for dtype in ("fp8", "fp16"))
    ranks = [sum(layer.rank_after for layer in result.layers) for result in (small, wide)]
    assert ranks[0] > 1.7 * ranks[1]
    assert small.relative_error < wide.relative_error


# --- layers that stay in 16 bits ------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-4, 1e8], ids=["too small", "too large"])
def test_layers_outside_of_the_range_stay_in_fp16(tmp_path: Path, sigma: float) -> None:
    source = sdxl(tmp_path / "a.safetensors", 1.0, sigma)
    result = only(source, recipes="rank=2")
    tensors, (strong, odd) = load_file(result.output), (SDXL.format(number) for number in (0, 1))
    assert tensors[f"{strong}.lora_up.weight"].dtype == FP8
    assert tensors[f"{odd}.lora_up.weight"].dtype == torch.float16
    assert result.dtype == "mixed"
    assert any(f"first {odd}, stay in fp16" in warning for warning in result.warnings)
    expected = best(deltas(source)[odd], 2)
    assert float((deltas(result.output)[odd] - expected).norm()) < 0.01 * float(expected.norm())


def test_outliers_beyond_448_fail_with_the_way_out(tmp_path: Path) -> None:
    """Numbers that no layer of this norm would have by chance."""
    up, down = torch.zeros(4096, 1), torch.zeros(1, 4096)
    up[0], down[0, 0] = 3e3, 3e3
    up[1:] += 1e-2
    name = SDXL.format(0)
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, tmp_path / "a.safetensors")
    report = ls.resize(tmp_path / "a.safetensors", dtype="fp8", recipes="rank=1", output=tmp_path / "out")
    assert "do not fit the dtype; use -t fp16" in report.failed[0].error
    assert not list(tmp_path.glob("out/*"))


def test_layers_of_zeros_are_removed_and_nan_is_refused(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "a.safetensors", 1.0, 0.0)
    assert [row.name for row in only(source, recipes="rank=2").removed] == [SDXL.format(1)]
    tensors = load_file(source)
    tensors[f"{SDXL.format(0)}.lora_up.weight"][0, 0] = math.nan
    save_file(tensors, source)
    for run in (lambda: ls.resize(source, dtype="fp8", recipes="rank=1", output=tmp_path / "n"),
                lambda: ls.convert(source, dtype="fp8", output=tmp_path / "n")):  # fmt: skip
        assert "contains NaN or infinity" in run().failed[0].error


# --- names ----------------------------------------------------------------------------------------


FLUX = {f"lora_unet_double_blocks_{number}_img_attn_proj": 3.0 for number in range(2)}


def test_names_under_which_factors_are_multiplied_need_a_base(tmp_path: Path) -> None:
    source = kohya(tmp_path / "flux.safetensors", FLUX, (3072, 3072))
    for run in (
        lambda: ls.resize(source, dtype="fp8", recipes="rank=2", output=tmp_path / "out").failed[0].error,
        lambda: ls.convert(source, dtype="fp8", output=tmp_path / "out").failed[0].error,
    ):
        assert "Give the base, or its norm table" in run()
    with pytest.raises(Exception, match="or use -t fp16"):
        ls.merge(source, dtype="fp8", output=tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_with_a_base_such_names_become_others(tmp_path: Path) -> None:
    base = fixtures.write_header(tmp_path / "base.safetensors", fixtures.shapes(FLUX_BASE))
    source = kohya(tmp_path / "flux.safetensors", FLUX, (3072, 3072))
    before = list(deltas(source).values())
    results = [
        only(source, recipes="rank=8", base=base),
        ls.merge(source, dtype="fp8", output=tmp_path / "m.safetensors", base=base).results[0],
        ls.convert(source, dtype="fp8", output=tmp_path / "c", base=base).results[0],
    ]
    for result in results:
        after = deltas(result.output)
        assert list(after) == [f"transformer.transformer_blocks.{number}.attn.to_out.0" for number in range(2)]
        for old, new in zip(before, after.values(), strict=True):
            assert float((new - old).norm()) < 0.1 * float(old.norm())
        assert "diffusers" in result.loads.loads_in


def test_an_8_bit_file_under_such_names_keeps_them_with_same(tmp_path: Path) -> None:
    source = kohya(tmp_path / "flux.safetensors", FLUX, (3072, 3072))
    save_file({key: t.to(FP8) if t.ndim else t for key, t in load_file(source).items()}, source)
    result = only(source, dtype="same", recipes="rank=2")
    assert all(key.startswith("lora_unet_double") for key in load_file(result.output))
    assert "fails" in result.loads.loads_not["diffusers"]


def test_auto_is_fp16_under_such_names_and_says_what_helps(tmp_path: Path) -> None:
    base = fixtures.write_header(tmp_path / "base.safetensors", fixtures.shapes(FLUX_BASE))
    source = kohya(tmp_path / "flux.safetensors", FLUX, (3072, 3072))
    alone = only(source, "auto", recipes="rank=2")
    (warning,) = (warning for warning in alone.warnings if warning.startswith("is in fp16"))
    assert warning.endswith("--base MODEL halves the file")
    assert "-t fp8" not in warning, "it is refused"
    based = only(source, "auto", recipes="rank=2", base=base)
    in_memory = ls.resize(load_file(source), dtype="auto", recipes="rank=2", base=base).results[0]
    assert (alone.dtype, based.dtype, in_memory.dtype) == ("fp16", "fp8", "fp16")
    assert not any("--base" in warning for warning in (*based.warnings, *in_memory.warnings))


def test_auto_is_fp16_under_unknown_names_where_fp8_can_be_had(tmp_path: Path) -> None:
    source = kohya(tmp_path / "odd.safetensors", {"lora_unet_foo_1": 1.0})
    result = only(source, "auto", recipes="rank=2")
    assert result.dtype == "fp16"
    assert any("-t fp8 writes it anyway" in warning for warning in result.warnings)
    in_fp8 = only(source, "fp8", recipes="rank=2")
    again = only(Path(in_fp8.output), "auto", recipes="rank=1")
    assert (in_fp8.dtype, again.dtype) == ("fp8", "fp8"), "a file in fp8 does not grow"


def test_quality_changes_such_names_in_a_sum_as_well(tmp_path: Path) -> None:
    base = fixtures.write_header(tmp_path / "base.safetensors", fixtures.shapes(FLUX_BASE))
    source = kohya(tmp_path / "flux.safetensors", FLUX, (3072, 3072))
    with open_base(base) as opened, ls.open_adapter(source) as adapter:
        side = Side(torch.ones(3072), torch.zeros(3072, 1))
        views = [view for layer in adapter for view in opened.find(layer.name)]
        write_table(tmp_path / "table.safetensors", dict.fromkeys(views, Sides(side, side)), opened, {})
    options = {"base": base, "calibration": tmp_path / "table.safetensors", "recipes": "quality=40"}
    for result in (
        ls.merge(source, output=tmp_path / "m.safetensors", **options).results[0],
        only(source, "same", **options),
    ):
        assert result.dtype == "fp8"
        assert all(key.startswith("transformer.") for key in load_file(result.output))


# --- other commands and options -------------------------------------------------------------------


def test_convert_scales_to_an_alpha_of_1_and_leaves_the_rest(tmp_path: Path) -> None:
    source = sdxl(tmp_path / "a.safetensors", 1.0, 0.6)
    save_file({**load_file(source), "unknown.weight": torch.randn(3)}, source)
    result = ls.convert(source, dtype="fp8", output=tmp_path / "out").results[0]
    tensors = load_file(result.output)
    assert {tensor.dtype for key, tensor in tensors.items() if "lora_" in key.split(".")[1]} == {FP8}
    assert tensors["unknown.weight"].dtype == torch.float16
    assert float(tensors[f"{SDXL.format(0)}.alpha"]) == 1.0
    for old, new in zip(deltas(source).values(), deltas(result.output).values(), strict=True):
        assert float((new - old).norm()) < 0.05 * float(old.norm())
    assert not result.exact


def test_a_sum_is_written_in_8_bits(tmp_path: Path) -> None:
    a, b = sdxl(tmp_path / "a.safetensors"), sdxl(tmp_path / "b.safetensors", 0.5, 0.5, 0.9)
    result = ls.merge([f"{a}:0.7", f"{b}:-0.4"], dtype="fp8", output=tmp_path / "m.safetensors").results[0]
    expected = {name: 0.7 * delta - 0.4 * deltas(b)[name] for name, delta in deltas(a).items()}
    for name, delta in deltas(result.output).items():
        assert float((delta - expected[name]).norm()) < 0.06 * float(expected[name].norm())


def test_a_stack_shares_bytes_in_fp8_but_not_in_mixtures(tmp_path: Path) -> None:
    a, b = sdxl(tmp_path / "a.safetensors"), sdxl(tmp_path / "b.safetensors", 0.5, 0.5, 0.9)
    report = ls.resize([a, b], stack=True, dtype="fp8", recipes="bytes,size=0.02", output=tmp_path / "out")
    assert report.failed == ()
    assert sum(result.bytes_after for result in report.results) <= 0.02 * 2**20
    with pytest.raises(UsageError, match="use -t fp8 or -t fp16 instead of mixed"):
        ls.resize([a, b], stack=True, dtype="mixed", recipes="bytes,size=0.02", output=tmp_path / "out")


def test_vllm_gets_one_rank_in_8_bits(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {}
    for number in range(2):
        up, down = factors(1024, 1024, 8, 2.0 / (number + 1), number)
        name = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}'
    )
    result = only(folder, recipes="energy=0.8", target="vllm")
    assert "vLLM" in result.loads.loads_in
    before, after = deltas(folder), deltas(result.output)
    for name, delta in before.items():
        expected = best(delta, result.layers[0].rank_after)
        assert float((after[name] - expected).norm()) < 0.06 * float(expected.norm())


# --- quality --------------------------------------------------------------------------------------


def test_quality_needs_statistics(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="needs a calibration table"):
        ls.resize(STYLE, recipes="quality=40", output=tmp_path)


def styled(tmp_path: Path, recipe: str, dtype: str = "same", **options: object) -> FileResult:
    report = ls.resize(
        STYLE, base=MODEL, calibration=TABLE, recipes=recipe, dtype=dtype, output=tmp_path, force=True, **options
    )
    assert not report.failed, report.failed
    return report.results[0]


def test_quality_chooses_8_bits_and_the_smallest_file(tmp_path: Path) -> None:
    chosen, wide = styled(tmp_path, "quality=40"), styled(tmp_path, "quality=40", "fp16")
    assert chosen.dtype == "fp8"
    assert wide.dtype == "fp16"
    assert chosen.bytes_after < 0.7 * wide.bytes_after
    for result in (chosen, wide):
        assert 40 <= result.predicted_db < 40.5
    less = styled(tmp_path, f"calib,bytes,size={0.97 * chosen.bytes_after / 2**20}", "mixed")
    assert less.predicted_db < 40


def test_an_anchor_moves_the_choice(tmp_path: Path) -> None:
    sizes = [styled(tmp_path, "quality=40", anchor=anchor).bytes_after for anchor in (18.0, 15.7, 12.0)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_high_quality_mixes_dtypes_and_low_quality_does_not(tmp_path: Path) -> None:
    assert styled(tmp_path, "quality=30", "auto").dtype == "fp8"
    assert styled(tmp_path, "quality=60", "auto").dtype == "mixed"


def test_statistics_choose_the_rounding(tmp_path: Path) -> None:
    """The weighted error is lower than with rounding without statistics."""
    from lorashrink.calibration.statistics import open_statistics
    from lorashrink.engine.rounding import to_float8

    with open_statistics(TABLE) as statistics, ls.open_adapter(STYLE) as adapter:
        plain, weighed = [], []
        layers = list(zip(adapter.layers, statistics.of_layers(adapter), strict=True))[10:150:7]
        for layer, of_layer in layers:
            if of_layer is None:
                continue
            delta, (view,) = layer.delta, statistics.base.find(layer.name)
            inputs, outputs = statistics.sides(str(view))
            exact = delta.up.double() @ delta.down.double()
            for results, energies in ((plain, ()), (weighed, of_layer.energies())):
                rounded = to_float8(delta.up.float(), delta.down.float(), *energies)
                change = rounded.up.double() @ rounded.down.double() - exact
                results.append(float((outputs.gram(change.mT) * inputs.gram(torch.eye(change.shape[1]))).sum()))
    assert len(plain) > 10
    assert sum(weighed) < 0.7 * sum(plain)
