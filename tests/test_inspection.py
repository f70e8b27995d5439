"""What `inspect` says, against numbers that are known beforehand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorashrink.inspection import LayerRow, inspect

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
        ((math.nan, 2.0), 2, 1.0, ("nan",)),
    ],
)
def test_flags(tmp_path: Path, sigma: tuple[float, ...], rank: int, alpha: float, flags: tuple[str, ...]) -> None:
    assert row(tmp_path, *planted(*sigma, rank=rank), alpha).flags == flags


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
    both = inspect([adapter, broken])
    assert len(both.files) == 1
    assert list(both.failed) == [str(broken)]


def test_headers_are_enough_for_the_header_view_and_torch_is_not_needed(adapter: Path, base: Path) -> None:
    code = (
        "import sys; from lorashrink.inspection import inspect; "
        f"table = inspect({str(adapter)!r}, base={str(base)!r}, header=True).files[0]; "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; "
        "print(len(table.layers), table.layers[0].rank, len(table.layers[0].base_keys), table.layers[0].fro)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["178", "8", "1", "None"]
