"""What `inspect` says, against numbers that are known beforehand."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorashrink as ls
import lorashrink_example
from lorashrink.errors import UsageError
from lorashrink.insight.inspection import inspect
from lorashrink.results.inspection import LayerRow

NAME = "lora_unet_input_blocks_4_1_proj_in"


def row(tmp_path: Path, up: torch.Tensor, down: torch.Tensor, alpha: float, **options: object) -> LayerRow:
    path = tmp_path / "a.safetensors"
    save_file(
        {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": down, f"{NAME}.alpha": torch.tensor(alpha)}, path
    )
    return inspect(path, **options).files[0].layers[0]  # type: ignore[arg-type]


def planted(*sigma: float, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    rank = rank or len(sigma)
    up, down = torch.zeros(24, rank), torch.zeros(rank, 24)
    for i, value in enumerate(sigma):
        up[i, i], down[i, i] = value, 1.0
    return up, down


def test_the_numbers_of_a_layer(tmp_path: Path, base: Path) -> None:
    layer = row(tmp_path, *planted(8.0, 6.0), 1.0, base=base, spectrum=True)
    assert (layer.block, layer.kind, layer.algo, layer.rank, layer.shape) == ("IN04", "proj", "lora", 2, (24, 24))
    assert (layer.alpha, layer.scale) == (1.0, 0.5)
    assert layer.fro == pytest.approx(5)
    assert layer.spectral == pytest.approx(4)
    assert layer.stable_rank == pytest.approx(25 / 16)
    shares = (0.64, 0.36)
    assert layer.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert layer.rank_for_energy == {"0.9": 2, "0.95": 2, "0.99": 2}
    assert layer.singular_values == pytest.approx((4, 3))
    assert layer.base_keys == ("model.diffusion_model.input_blocks.4.1.proj_in.weight",)
    assert layer.fro_ratio == pytest.approx(5 / layer.base_fro)
    assert layer.spectral_ratio == pytest.approx(4 / layer.base_spectral)


@pytest.mark.parametrize(
    ("sigma", "rank", "alpha", "flags"),
    [
        ((3.0, 2.0), 2, 2.0, ()),
        ((0.0, 0.0), 2, 2.0, ("zero",)),
        ((3.0, 2.0), 4, 2.0, ("padded_rank",)),
        ((30.0, 2.0), 2, 2.0, ("spike",)),
        ((3.0, 2.0), 2, -2.0, ("negative_alpha",)),
        ((3.0, 2.0), 2, 0.0, ("zero", "zero_alpha")),
        ((3.0, 2.0), 2, 1.0, ()),
        ((3.0, 2.0), 2, 4.0, ("odd_alpha",)),
        ((3.0, 2.0), 2, 0.5, ("odd_alpha",)),
        ((math.nan, 2.0), 2, 1.0, ("nan",)),
    ],
)
def test_unusual_layers_are_flagged(
    tmp_path: Path, sigma: tuple[float, ...], rank: int, alpha: float, flags: tuple[str, ...]
) -> None:
    assert row(tmp_path, *planted(*sigma, rank=rank), alpha).flags == flags


def test_numbers_whose_squares_are_too_small_are_measured(tmp_path: Path) -> None:
    up, down = planted(8.0, 6.0)
    tensors = {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": down}
    save_file({**tensors, f"{NAME}.alpha": torch.tensor(1e-300, dtype=torch.float64)}, tmp_path / "a.safetensors")
    layer = inspect(tmp_path / "a.safetensors").files[0].layers[0]
    assert layer.fro == pytest.approx(5e-300, rel=1e-6)
    assert layer.stable_rank == pytest.approx(25 / 16)
    assert layer.rank_for_energy == {"0.9": 2, "0.95": 2, "0.99": 2}


def write(path: Path, layers: Mapping[str, tuple[int, ...]], alpha: float | None = None, **entries: str) -> Path:
    """An adapter of random layers, name -> (out, in, rank[, kernel]); `alpha` None: each layer's rank."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, into, rank, *kernel) in layers.items():
        sides = [kernel[0]] * 2 if kernel else []
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(sides), generator=generator)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, into, *sides, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    save_file(tensors, path, entries)
    return path


def health(path: Path, **options: object) -> dict[str, tuple[int, str]]:
    findings = inspect(path, **options).files[0].health  # type: ignore[arg-type]
    return {finding.flag: (finding.layers, finding.text) for finding in findings}


CONV, LINEAR = "lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_input_blocks_4_1_proj_in"


def test_a_shared_alpha_of_the_largest_rank_is_not_odd(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {LINEAR: (24, 24, 2), CONV: (24, 24, 8, 3)}, alpha=8)
    assert [layer.flags for layer in inspect(path).files[0].layers] == [(), ()]
    assert "odd_alpha" not in health(path)


def test_oversized_convolutions_are_reported_with_their_share(tmp_path: Path) -> None:
    """The share is computed from the shapes of the layers."""
    path = write(tmp_path / "a.safetensors", {LINEAR: (24, 24, 2), CONV: (24, 24, 16, 3)}, alpha=2)
    for header in (False, True):
        layers, text = health(path, header=header)["conv_rank"]
        assert layers == 1
        share = 100 * (16 * 240 * 4 + 4) / (16 * 240 * 4 + 2 * 48 * 4 + 8)
        assert f"rank 16, other layers 2, and hold {share:.0f} % of the bytes" in text
    usual = write(tmp_path / "b.safetensors", {LINEAR: (24, 24, 4), CONV: (24, 24, 16, 3)}, alpha=2)
    assert "conv_rank" not in health(usual)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"ss_network_dim": "4", "ss_network_alpha": "2.0"}, None),
        ({"ss_network_dim": "None"}, None),
        ({}, None),
        ({"ss_network_dim": "64"}, "ss_network_dim says '64', the tensors 4"),
        ({"ss_network_dim": "Dynamic"}, "ss_network_dim says 'Dynamic'"),
        ({"ss_network_dim": "4", "ss_network_alpha": "32"}, "ss_network_alpha says '32', the tensors 2"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_stale(
    tmp_path: Path, entries: dict[str, str], text: str | None
) -> None:
    findings = health(write(tmp_path / "a.safetensors", {LINEAR: (24, 24, 4)}, alpha=2, **entries))
    assert ("stale_metadata" in findings) == (text is not None)
    assert text is None or text in findings["stale_metadata"][1]


def test_several_alphas_of_a_kohya_file_are_reported(tmp_path: Path) -> None:
    layers = {LINEAR: (24, 24, 4), LINEAR.replace("4_1", "5_1"): (24, 24, 4), CONV: (24, 24, 2, 3)}
    count, text = health(write(tmp_path / "a.safetensors", layers))["mixed_alpha"]
    assert (count, "another alpha than 4" in text) == (1, True)
    assert "mixed_alpha" not in health(write(tmp_path / "b.safetensors", layers, alpha=4))


def test_zero_layers_are_reported_and_normal_in_sdxl(tmp_path: Path, adapter: Path) -> None:
    example = lorashrink_example.path("adapter.safetensors")
    count, text = health(example)["zero"]
    assert (count, "TE1.01 is zero, as in every SDXL adapter" in text) == (6, True)
    tensors = load_file(example)
    name = "lora_unet_output_blocks_8_0_skip_connection"
    save_file(tensors | {f"{name}.lora_up.weight": 0 * tensors[f"{name}.lora_up.weight"]}, tmp_path / "a.safetensors")
    count, text = health(tmp_path / "a.safetensors")["zero"]
    assert (count, f"1 of 284 layers are zero and change nothing (first {name}); all of TE1.01" in text) == (7, True)
    save_file({key: 0 * tensor for key, tensor in tensors.items()}, tmp_path / "b.safetensors")
    assert health(tmp_path / "b.safetensors")["zero"] == (284, "every layer is zero: this adapter changes nothing")


def test_flags_become_sentences(tmp_path: Path) -> None:
    row(tmp_path, *planted(30.0, 2.0, rank=4), -2.0)
    findings = health(tmp_path / "a.safetensors")
    assert set(findings) == {"padded_rank", "spike", "negative_alpha"}
    assert all(count == 1 and f"in 1 of 1 layers (first {NAME}): " in text for count, text in findings.values())


def test_an_adapter_of_nan_has_no_numbers_and_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {LINEAR: (24, 24, 4)}, alpha=math.nan)
    (table,) = inspect(path, recommend=True).files
    assert (table.fro, table.layers[0].fro, table.recommendations) == (None, None, ())
    assert set(health(path)) == {"nan"}


def test_an_adapter_without_layers_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"lora_unet_out_0.w_norm": torch.ones(8), "lora_unet_out_0.b_norm": torch.ones(8)}, path)
    (table,) = inspect(path, recommend=True, spectrum=True).files
    assert (table.layers, table.blocks, table.fro, table.recommendations) == ((), (), None, ())
    assert [finding.flag for finding in table.health] == ["no_layers"]
    assert inspect(path, header=True).files[0].health == table.health


def test_a_base_of_another_family_is_said(tmp_path: Path, base: Path) -> None:
    """Which programs load the adapter is then told of its own family."""
    path = tmp_path / "a.safetensors"
    tensors = {
        f"diffusion_model.transformer_blocks.0.attn{number}.to_k.lora_{side}.weight": torch.ones(shape)
        for number in (1, 2)
        for side, shape in (("A", (4, 2048)), ("B", (2048, 4)))
    }
    save_file(tensors, path)
    (table,) = inspect(path, base=base).files
    assert table.health[0].flag == "other_base"
    assert "is for LTX-Video" in table.health[0].text
    assert table.loads == inspect(path).files[0].loads


def test_an_adapter_of_convolutions_alone_is_measured_like_others(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path / "a.safetensors", {CONV: (16, 16, 4, 3)})
    (table,) = inspect(path, recommend=True).files
    assert table.fro == pytest.approx(table.layers[0].fro)
    assert table.health == ()
    assert [row.recipe for row in table.recommendations or ()] == ["energy=0.99", "energy=0.95"]


def test_recommendations_are_what_a_dry_run_says(base: Path) -> None:
    adapter, model = map(lorashrink_example.path, ("adapter.safetensors", "base.safetensors"))
    for base_path in (None, model):
        (table,) = inspect(adapter, base=base_path, recommend=True).files
        rows = table.recommendations
        assert rows is not None
        assert len(rows) == (4 if base_path is None else 5)
        for row in rows:
            (result,) = ls.resize(adapter, base=base_path, recipes=row.recipe, dry_run=True).results
            assert (row.bytes, row.relative_error, row.energy) == (
                result.bytes_after,
                result.relative_error,
                result.energy,
            )
        half, quarter = rows[-2:]
        for share, row in ((0.5, half), (0.25, quarter)):
            assert 0.95 * share < row.bytes / table.bytes <= share * 1.001
    assert inspect(adapter).files[0].recommendations is None


def test_a_recipe_that_keeps_nothing_is_left_out(adapter: Path, base: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter)
    weak = {key: tensor * 1e-4 if "lora_up" in key else tensor for key, tensor in tensors.items()}
    save_file({key: tensor.float() for key, tensor in weak.items()}, tmp_path / "weak.safetensors")
    (table,) = inspect(tmp_path / "weak.safetensors", base=base, recommend=True).files
    assert [row.recipe for row in table.recommendations or ()][:2] == ["energy=0.99", "energy=0.95"]


def test_recommendations_need_more_than_headers(adapter: Path) -> None:
    with pytest.raises(UsageError, match="headers alone"):
        inspect(adapter, header=True, recommend=True)


def test_notes_come_from_the_metadata_of_the_file(adapter: Path) -> None:
    (table,) = inspect(adapter, header=True).files
    assert table.notes["title"] == "parity"
    assert table.notes["rank and alpha"] == "rank 8, alpha 4"


def test_blocks_add_up(adapter: Path, base: Path) -> None:
    table = inspect(adapter, base=base).files[0]
    assert sum(block.layers for block in table.blocks) == len(table.layers) == 178
    layers = [layer for layer in table.layers if layer.block == "MID"]
    (middle,) = (block for block in table.blocks if block.block == "MID")
    assert middle.fro == pytest.approx(math.hypot(*(layer.fro or 0 for layer in layers)))
    assert middle.fro_ratio == pytest.approx(middle.fro / math.hypot(*(layer.base_fro or 0 for layer in layers)))
    assert (table.family, table.naming, table.algo, table.dtype) == ("sdxl", "kohya", "lora", "F16")


def test_a_damaged_file_is_named_beside_the_others(adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(adapter.read_bytes()[:1000])
    inspection = inspect([adapter, broken])
    assert len(inspection.files) == 1
    assert [failure.source for failure in inspection.failed] == [str(broken)]


def test_the_header_view_needs_no_torch(adapter: Path, base: Path) -> None:
    code = (
        "import sys; from lorashrink.insight.inspection import inspect; "
        f"table = inspect({str(adapter)!r}, base={str(base)!r}, header=True).files[0]; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "print(len(table.layers), table.layers[0].rank, len(table.layers[0].base_keys), table.layers[0].fro); "
        "print(table.notes['title'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["178", "8", "1", "None", "parity"]
