"""A new family of adapters or of models is one row of a table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import write_tensors
from torch.testing import assert_close

import lorashrink
from lorashrink.adapters import families as adapter_families
from lorashrink.adapters import open_adapter
from lorashrink.adapters.family import Family
from lorashrink.bases import BaseFamily, open_base, views_id
from lorashrink.bases import families as base_families
from lorashrink.bases.family import marks
from lorashrink.bases.rules import Rules, rule
from lorashrink.engine.delta import Delta

# ΔW = scale · U · diag(s) · V
SVD = Family(
    name="svd",
    suffixes={"u": r"\.svd_u", "s": r"\.svd_s", "v": r"\.svd_v"},
    required=(frozenset({"u", "s", "v"}),),
    check=lambda infos: None if infos["u"].shape[1:] == infos["s"].shape else "U and s have other ranks",
    shape=lambda infos: (infos["u"].shape[0], infos["v"].shape[1]),
    rank=lambda infos: infos["s"].shape[0],
    delta=lambda stored: Delta(
        stored.tensors["u"] * stored.tensors["s"], stored.tensors["v"], stored.scale, stored.shape
    ),
)
TOY = BaseFamily(
    "toy",
    "Toy",
    {"": "unet", "transformer.": "unet"},
    marks(("stack.0.gate.weight",), ("blocks.0.gate_proj.weight",)),
    Rules((rule("stack.{}.gate", "blocks.{}.gate_proj"),)),
)


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).Q


def test_a_row_adds_a_family_of_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_families, "FAMILIES", (*adapter_families.FAMILIES, SVD))
    u, s, v = orthonormal(12, 3, 0), torch.tensor([3.0, 2.0, 0.5]), orthonormal(8, 3, 1).mT
    tensors = {"x.svd_u": u, "x.svd_s": s, "x.svd_v": v, "x.alpha": torch.tensor(6.0)}
    path = write_tensors(tmp_path / "a.safetensors", tensors)
    with open_adapter(path) as adapter:
        (layer,) = adapter
        assert (layer.algo, layer.shape, layer.rank, layer.scale) == ("svd", (12, 8), 3, 2.0)
        assert_close(layer.delta.dense(), 2 * (u * s) @ v)
    (table,) = lorashrink.inspect(path).files
    assert (table.algo, table.layers[0].rank) == ("svd", 3)
    assert table.layers[0].spectral == pytest.approx(6, rel=1e-5)
    (result,) = lorashrink.resize(path, recipes="rank=2", dtype="fp32", output=tmp_path / "out").results
    assert [row.rank_after for row in result.layers] == [2]
    with open_adapter(result.output) as small:
        assert small.layers[0].algo == "lora"
        assert_close(small.layers[0].delta.dense(), 2 * (u[:, :2] * s[:2]) @ v[:2])


def test_a_row_adds_a_family_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_families, "FAMILIES", (TOY, *base_families.FAMILIES))
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    base = write_tensors(tmp_path / "base.safetensors", {"stack.0.gate.weight": weight})
    name = "transformer.blocks.0.gate_proj"
    factors = {f"{name}.lora_B.weight": orthonormal(12, 3, 3), f"{name}.lora_A.weight": orthonormal(8, 3, 4).mT}
    adapter = write_tensors(tmp_path / "a.safetensors", factors)
    with open_base(base) as opened:
        assert opened.info.family == "toy"
        assert views_id(opened.find(name)) == "stack.0.gate.weight"
        assert ("unet", "blocks.0.gate_proj") in opened.modules("diffusers")
    (table,) = lorashrink.inspect(adapter, base=base).files
    assert table.layers[0].base_keys == ("stack.0.gate.weight",)
    (result,) = lorashrink.resize(adapter, base=base, recipes="rank=2", output=tmp_path / "out").results
    assert result.layers[0].rle_ckpt == pytest.approx(1 / float(weight.norm()), rel=1e-2)
