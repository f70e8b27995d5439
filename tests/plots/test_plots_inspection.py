"""The figures of `inspect`: the numbers in their axes, against numbers that were planted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorashrink.insight.inspection import inspect
from lorashrink.plots.blocks import grouped, order
from lorashrink.plots.heat import norms_by_kind
from lorashrink.plots.spectra import quartiles, spectra_per_block
from lorashrink.plots.style import save
from lorashrink.results.inspection import AdapterTable, LayerRow


def row(block: str, kind: str, *sigma: float, base_fro: float | None = None) -> LayerRow:
    return LayerRow(
        f"{block}.{kind}", block, kind, (8, 8), "lora", max(1, len(sigma)), "F16",
        fro=math.hypot(*sigma), base_fro=base_fro, singular_values=sigma,
    )  # fmt: skip


def table(*rows: LayerRow) -> AdapterTable:
    return AdapterTable(
        path="a.safetensors", bytes=2_000_000, family="sdxl", algo="lora", naming="kohya", dtype="F16", fro=None,
        fro_ratio=None, metadata={}, notes={}, health=(), layers=rows, blocks=(), others={},
    )  # fmt: skip


def test_blocks_are_sorted_in_the_order_of_drawing() -> None:
    blocks = ["other", "OUT00", "MID", "IN10", "IN02", "TE2.00", "TE1.01", "TE1.00"]
    assert sorted(blocks, key=order) == ["TE1.00", "TE1.01", "TE2.00", "IN02", "IN10", "MID", "OUT00", "other"]


def test_text_encoders_and_runs_of_blocks_are_grouped() -> None:
    unet = ["TE1.00", "TE1.11", "TE2.00", "IN01", "IN02", "MID"]
    assert list(grouped(unet, 24)) == ["text encoder 1", "text encoder 2", "IN01", "IN02", "MID"]
    flux = [f"D{number:02d}" for number in range(19)] + [f"S{number:02d}" for number in range(38)]
    groups = grouped(flux, 24)
    assert list(groups)[:2] == ["D00–02", "D03–05"]
    assert len(groups) <= 24
    assert [block for members in groups.values() for block in members] == flux
    assert grouped([], 24) == {}


def test_quartiles_leave_out_layers_without_the_dimension() -> None:
    rows = [row("MID", "attn", 4.0, 2.0), row("MID", "attn", 8.0, 1.0, 0.5), row("MID", "attn", 6.0, 0.0)]
    low, middle, high = quartiles(rows)
    assert middle.tolist() == [6, 1.5, 0.5]
    assert (low[0], high[0]) == (5, 7)


def test_spectra_show_the_median_and_the_middle_half_of_each_block() -> None:
    figure = spectra_per_block(
        table(
            *[row("OUT01", "attn", value, value / 2) for value in (4.0, 8.0, 6.0)],
            row("OUT01", "conv", 3.0, 2.0, 1.0),
            row("TE1.03", "te", 0.5),
            row("TE1.04", "te", 0.0),
        )
    )
    encoder, out = figure.axes
    assert (encoder.get_title(loc="left"), out.get_title(loc="left")) == (
        "text encoder 1  ·  1 layer",
        "OUT01  ·  4 layers",
    )
    lines = {line.get_label(): line for line in out.get_lines()}
    assert lines["other layers"].get_xydata().tolist() == [[1, 6], [2, 3]]
    assert lines["convolutions"].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    band = out.collections[1].get_paths()[0].vertices
    assert {5.0, 7.0, 2.5, 3.5} <= set(band[:, 1].tolist())
    assert (out.get_xscale(), out.get_yscale()) == ("log", "log")
    assert encoder.get_lines()[0].get_xydata().tolist() == [[1, 0.5]]


def test_heat_map_holds_the_norm_of_each_kind_in_each_block() -> None:
    rows = (
        row("MID", "attn", 3.0, base_fro=30.0),
        row("MID", "attn", 4.0, base_fro=40.0),
        row("MID", "conv", 1.0, base_fro=4.0),
        row("IN01", "conv", 0.0, base_fro=4.0),
        row("IN01", "attn", 1.0),
    )
    axes = norms_by_kind(table(*rows)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["IN01", "MID"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["attention", "convolution"]
    shown = axes.get_images()[0].get_array()
    assert shown.filled(np.nan)[1].tolist() == pytest.approx([10, 25])
    assert shown.mask[0].all()
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(1, 0): "0", (0, 1): "10", (1, 1): "25"}


def test_figures_show_the_numbers_of_the_table(adapter: Path, base: Path) -> None:
    (adapter_table,) = inspect(adapter, base=base, spectrum=True).files
    middle = next(block for block in adapter_table.blocks if block.block == "MID")
    kinds = {"attn", "conv"}
    alone = replace(
        adapter_table, layers=tuple(row for row in adapter_table.layers if row.block == "MID" and row.kind in kinds)
    )
    shown = norms_by_kind(alone).axes[0].get_images()[0].get_array().filled(np.nan)
    for column, kind in enumerate(("attn", "conv")):
        rows = [row for row in alone.layers if row.kind == kind]
        expected = math.hypot(*(row.fro for row in rows)) / math.hypot(*(row.base_fro for row in rows))
        assert shown[0, column] == pytest.approx(100 * expected)
    titles = [axes.get_title(loc="left") for axes in spectra_per_block(adapter_table).axes]
    assert f"MID  ·  {middle.layers} layers" in titles


@pytest.mark.parametrize("rows", [(), (row("MID", "attn", 0.0, base_fro=1.0),)], ids=["none", "zero"])
@pytest.mark.parametrize("draw", [spectra_per_block, norms_by_kind])
def test_figures_are_drawn_without_layers_or_with_zeros(rows: tuple[LayerRow, ...], draw, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save(draw(table(*rows)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
