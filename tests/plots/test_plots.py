"""Figures: the numbers in their axes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashrink.plots.ranks import rank_per_block
from lorashrink.results.shrinking import FileResult, LayerResult


def layer(name: str, before: int, after: int) -> LayerResult:
    return LayerResult(name, (8, 8), "lora", before, after, 1.0, 0.0, None)


RESULT = FileResult(
    source="a",
    output="b",
    recipe="rank=4",
    threshold=None,
    bytes_before=2_000_000,
    bytes_after=500_000,
    relative_error=0.125,
    seconds=1.0,
    layers=(
        layer("lora_unet_output_blocks_3_1_proj_in", 16, 4),
        layer("lora_unet_input_blocks_4_1_proj_in", 16, 8),
        layer("lora_unet_input_blocks_4_1_proj_out", 8, 0),
        layer("lora_unet_middle_block_0_in_layers_2", 32, 2),
        layer("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 1),
    ),
)


def test_bars_show_the_mean_rank_of_each_block_in_model_order() -> None:
    (axes,) = rank_per_block(RESULT).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["TE1.00", "IN04", "MID", "OUT03"]
    before, after = ([bar.get_height() for bar in bars] for bars in axes.containers[:2])
    assert before == [8, 12, 32, 16]
    assert after == [1, 4, 2, 4]
    assert "2.0 MB → 500.0 kB,  error 12.50%" in axes.get_title(loc="left")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figures_are_written_as_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ranks.{suffix}"
    rank_per_block(RESULT).savefig(path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
