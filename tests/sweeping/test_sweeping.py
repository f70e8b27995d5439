"""Ranges of recipes, the front and the knee by hand, and sweeps against `resize`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lorashrink as ls
from lorashrink.cli import app
from lorashrink.errors import InputError, RecipeError, UsageError
from lorashrink.plots.quality import size_and_error
from lorashrink.results.sweep import Point
from lorashrink.sweeping.ranges import curve, expand
from lorashrink.sweeping.sweep import suggest, with_front


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank=4", ["rank=4"]),
        ("fro_ckpt=1,thr=-4..-3/3", ["fro_ckpt=1,thr=-4", "fro_ckpt=1,thr=-3.5", "fro_ckpt=1,thr=-3"]),
        ("rank=1..16/5,uniform", [f"rank={rank},uniform" for rank in (1, 2, 4, 8, 16)]),
        ("bytes,size=4..16/3", ["bytes,size=4", "bytes,size=8", "bytes,size=16"]),
        ("energy=0.9..0.999/3", ["energy=0.9", "energy=0.99", "energy=0.999"]),
        ("energy=0.5..1/2", ["energy=0.5", "energy=1"]),
        ("fro_lora,thr=-1..1/2", ["fro_lora,thr=-1", "fro_lora,thr=1"]),
    ],
)
def test_a_range_is_expanded_to_its_recipes(text: str, expected: list[str]) -> None:
    assert expand(text) == expected


@pytest.mark.parametrize(
    "text", ["rank=1..4", "rank=1..4/1", "thr=-4..-3/3,rescale=1..2/2", "rank=0..4/3", "thr=a..b/3"]
)
def test_a_range_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"range|above 0"):
        expand(text)


def test_a_recipes_curve_lacks_the_number_of_its_selection() -> None:
    assert curve("fro_ckpt=1,bytes=1,size=4") == "fro_ckpt=1,bytes=1,size"
    assert curve("rank=4,multiple=8") == "rank,multiple=8"


def point_of(bytes_: int, error: float) -> Point:
    return Point(f"rank={bytes_}", "rank", bytes_, error, 1 - error**2, 1.0, 1)


def test_no_point_beats_a_point_of_the_front() -> None:
    points = with_front([point_of(*pair) for pair in ((40, 0.1), (10, 0.5), (20, 0.6), (20, 0.3), (50, 0.1))])
    assert [(point.bytes, point.relative_error) for point in points if point.best] == [(10, 0.5), (20, 0.3), (40, 0.1)]
    assert [point.bytes for point in points] == sorted(point.bytes for point in points)


def test_the_smallest_point_that_shrink_would_accept_is_recommended() -> None:
    """By energy or rank 7.1 % of error stands for high quality, compared with the base 10 %."""
    points = with_front([point_of(2**index, error) for index, error in enumerate([1, 0.2, 0.09, 0.07, 0])])
    chosen = suggest(points, 16)
    assert chosen is not None
    assert (chosen.bytes, chosen.relative_error) == (8, 0.07)
    assert chosen.reason == (
        "50.00% of the size; 7.00% error of the weights, where 7.08% stands for high quality; pictures not checked"
    )
    by_base = [replace(point, recipe="fro_ckpt=1,thr=-3") for point in points]
    chosen = suggest(by_base, 16)
    assert chosen is not None
    assert (chosen.bytes, chosen.relative_error) == (4, 0.09)


def test_the_closest_point_is_recommended_if_none_is_close_enough() -> None:
    chosen = suggest(with_front([point_of(4, 0.5), point_of(8, 0.3), point_of(9, 0.3)]), 16)
    assert chosen is not None
    assert chosen.bytes == 8
    assert chosen.reason.startswith("the closest, because no recipe keeps the error of the weights at 7.08%: 50.00%")
    assert suggest([], 16) is None


def test_calibrated_points_are_recommended_by_their_prediction() -> None:
    points = [
        replace(point_of(size, 0.5), recipe="calib,bytes,size=1", calibrated=True, predicted_db=level)
        for size, level in ((1, 35.0), (2, 41.0), (4, 50.0))
    ]
    chosen = suggest(with_front([*points, point_of(8, 0.01)]), 16)
    assert chosen is not None
    assert chosen.bytes == 2
    assert "predicted 41.0 dB" in chosen.reason
    too_small = suggest(with_front(points[:1]), 16)
    assert too_small is not None
    assert "no recipe is predicted to have 40.0 dB: 6.25% of the size; predicted 35.0 dB" in too_small.reason


def test_a_sweep_has_the_numbers_of_resize(adapter: Path, base: Path, tmp_path: Path) -> None:
    result = ls.sweep(adapter, base=base, recipes=["fro_ckpt=1,thr=-2..-1.5/2", "rank=2"])
    assert not list(adapter.parent.glob("0.*"))
    points = {point.recipe: point for point in result.points}
    assert len(points) == 3
    for number, (recipe, point) in enumerate(points.items()):
        (written,) = ls.resize(adapter, base=base, recipes=recipe, output=tmp_path / str(number)).results
        assert (point.bytes, point.relative_error) == (written.bytes_after, pytest.approx(written.relative_error))
        assert point.bytes == Path(written.output).stat().st_size
        assert point.mean_rank == pytest.approx(sum(layer.rank_after for layer in written.layers) / len(written.layers))


def test_sizes_are_reached(adapter: Path, base: Path) -> None:
    half = adapter.stat().st_size / 2**21
    result = ls.sweep(adapter, base=base, sizes=[half, 1.5 * half])
    assert [point.curve for point in result.points] == ["fro_ckpt=1,bytes=1,size"] * 2
    for point, limit in zip(result.points, (half, 1.5 * half), strict=True):
        assert 0.9 * limit * 2**20 < point.bytes <= limit * 2**20


def test_the_usual_recipes_without_a_base_are_some_of_those_with_one(adapter: Path, base: Path) -> None:
    without = {point.curve for point in ls.sweep(adapter).points}
    assert without == {"energy", "rank"}
    assert without < {point.curve for point in ls.sweep(adapter, base=base).points}


def test_wrong_requests_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="compares with the base"):
        ls.sweep(adapter, recipes="fro_ckpt,thr=-3")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(adapter.read_bytes())
    with pytest.raises(UsageError, match="2 adapters"):
        ls.sweep(tmp_path)


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["sweep", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_json_csv_and_figure_hold_the_same_numbers(adapter: Path, base: Path, tmp_path: Path) -> None:
    table, picture = tmp_path / "t.csv", tmp_path / "p.svg"
    document = json.loads(run("--json", "--csv", table, "--plot", picture, "-r", "rank=1..4/3", base, adapter))
    assert {"version", "command", "source", "bytes", "points", "suggestion", "drawn", "read"} == set(document)
    rows = [line.split(",") for line in table.read_text().splitlines()]
    assert [int(row[rows[0].index("bytes")]) for row in rows[1:]] == [point["bytes"] for point in document["points"]]
    assert picture.read_text().startswith("<?xml")
    figure = size_and_error(ls.sweep(adapter, base=base, recipes="rank=1..4/3"))
    line = figure.axes[0].get_lines()[0]
    drawn = [(size * 1e6, error) for size, error in zip(*line.get_data(), strict=True)]
    assert drawn == [
        (pytest.approx(point["bytes"]), pytest.approx(point["relative_error"]))
        for point in document["points"]
        if point["relative_error"] > 0
    ]
    assert line.get_label() == "rank"


def test_the_text_suggests_a_recipe(adapter: Path, base: Path) -> None:
    text = run("-r", "rank=1..8/4", "--base", base, adapter)
    assert "recommended: -r rank=" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--sizes", "4;8"], "commas"), (["-r", "rank=1..4"], "range"), (["--plot", "x.jpg"], ".png or .svg")],
)
def test_bad_options_end_with_one_line(arguments: list[str], message: str, adapter: Path) -> None:
    error = run(*arguments, adapter, status=2)
    assert message in error
    assert error.count("\n") == 1


def test_recipes_that_keep_nothing_have_no_point(adapter: Path) -> None:
    result = ls.sweep(adapter, recipes=["rank=2", "fro_lora,thr=9"])
    assert [point.recipe for point in result.points] == ["rank=2"]
    with pytest.raises(InputError, match="keeps nothing"):
        ls.sweep(adapter, recipes="fro_lora,thr=9")


def test_an_adapter_of_zeros_is_refused(tmp_path: Path) -> None:
    zero = {
        "lora_unet_x.lora_down.weight": torch.zeros(2, 8),
        "lora_unet_x.lora_up.weight": torch.zeros(8, 2),
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    save_file(zero, tmp_path / "z.safetensors")
    with pytest.raises(InputError, match="every layer is zero"):
        ls.sweep(tmp_path / "z.safetensors", recipes="rank=1..2/2")
