"""Calibrated truncation against the dense formula, files of statistics, and recipes with `calib`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures import write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.adapters import open_adapter
from lorashrink.bases import View, open_base
from lorashrink.calibration.statistics import (
    Side,
    Sides,
    adapter_key,
    open_statistics,
    write_adapters,
    write_table,
)
from lorashrink.cli import app
from lorashrink.engine.delta import Delta, Dense
from lorashrink.engine.gram import Grams
from lorashrink.engine.spectrum import spectrum, truncate
from lorashrink.errors import FamilyMismatch, InputError, RecipeError

MODEL, STYLE = lorashrink_example.path("model"), lorashrink_example.path("loras", "style.safetensors")


def covariance(size: int, rank: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    root = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return root @ root.T / rank + shift * torch.eye(size, dtype=torch.float64)


def root_of(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def random_delta(out: int, fan_in: int, rank: int, generator: torch.Generator) -> Delta:
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, fan_in, generator=generator, dtype=torch.float64)
    return Delta(up, down, 0.7, (out, fan_in))


def measured(delta: Delta, inputs: Tensor, outputs: Tensor) -> Grams:
    return Grams(delta.down @ inputs @ delta.down.T, delta.up.T @ outputs @ delta.up)


# --- the engine ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 20),
    fan_in=st.integers(1, 20),
    rank=st.integers(1, 8),
    ranks=st.tuples(st.integers(1, 20), st.integers(1, 20)),  # of the statistics, which may be singular
    seed=st.integers(0, 2**31),
)
def test_calibrated_singular_values_and_truncation_match_dense_math(
    out: int, fan_in: int, rank: int, ranks: tuple[int, int], seed: int
) -> None:
    """SVD(G^½ ΔW C^½), and Eckart and Young's theorem in that norm."""
    generator = torch.Generator().manual_seed(seed)
    delta = random_delta(out, fan_in, rank, generator)
    inputs, outputs = covariance(fan_in, ranks[0], generator), covariance(out, ranks[1], generator)
    left, right = root_of(outputs), root_of(inputs)
    dense = delta.scale * delta.up @ delta.down
    truth = torch.linalg.svdvals(left @ dense @ right)
    calibrated = spectrum(delta, measured(delta, inputs, outputs))
    count = min(len(truth), rank)
    torch.testing.assert_close(calibrated.sigma[:count], truth[:count], rtol=1e-4, atol=3e-4 * float(truth[0]))
    plain = spectrum(delta)
    for kept in range(rank + 1):
        errors = []
        for result in (calibrated, plain):
            dimensions = range(min(kept, result.rank))
            up, down = truncate(delta, result, dimensions)
            rest = dense - up.double() @ down.double()
            errors.append(float((left @ rest @ right).norm()))
            assert result.lost(dimensions) == pytest.approx(
                float(rest.norm()) if kept < result.rank else 0.0, rel=1e-3, abs=1e-4 * float(dense.norm())
            )
        assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-4 * float(truth[0])
        assert errors[0] == pytest.approx(float(truth[kept:].norm()), rel=1e-3, abs=5e-4 * float(truth[0]))


def test_a_change_without_effect_on_outputs_has_rank_0() -> None:
    generator = torch.Generator().manual_seed(1)
    delta = random_delta(6, 5, 3, generator)
    result = spectrum(delta, measured(delta, covariance(5, 5, generator), torch.zeros(6, 6, dtype=torch.float64)))
    assert result.rank == 0
    assert result.total == pytest.approx(float((0.7 * delta.up @ delta.down).norm()) ** 2)


def test_a_matrix_is_calibrated_as_factors() -> None:
    generator = torch.Generator().manual_seed(2)
    for out, fan_in in ((4, 9), (9, 4)):
        matrix = torch.randn(out, fan_in, generator=generator, dtype=torch.float64)
        dense = Dense(matrix, -0.5, (out, fan_in))
        inputs, outputs = covariance(fan_in, 9, generator), covariance(out, 9, generator)
        result = spectrum(dense, measured(dense.factored(), inputs, outputs))
        truth = torch.linalg.svdvals(root_of(outputs) @ (-0.5 * matrix) @ root_of(inputs))
        torch.testing.assert_close(result.sigma, truth[: len(result.sigma)], rtol=1e-6, atol=1e-8)
        up, down = truncate(dense, result, range(4))
        torch.testing.assert_close(up @ down, -0.5 * matrix, rtol=1e-5, atol=1e-5)


def test_a_side_is_diagonal_plus_columns_times_a_convolutions_taps() -> None:
    generator = torch.Generator().manual_seed(3)
    side = Side(torch.rand(5, generator=generator), torch.randn(5, 2, generator=generator))
    dense = (torch.diag(side.diagonal) + side.low @ side.low.T).double()
    factor = torch.randn(3, 5, generator=generator)
    torch.testing.assert_close(side.gram(factor), factor.double() @ dense @ factor.double().T)
    taps = covariance(4, 4, generator).float()
    wide = torch.randn(3, 5 * 4, generator=generator)
    truth = wide.double() @ torch.kron(dense, taps.double()) @ wide.double().T
    torch.testing.assert_close(Side(side.diagonal, side.low, taps).gram(wide), truth, rtol=1e-6, atol=1e-5)


# --- files and recipes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up statistics of every weight of the example model."""
    path = tmp_path_factory.mktemp("table") / "table.safetensors"
    generator = torch.Generator().manual_seed(4)

    def side(size: int, taps: int = 1) -> Side:
        spread = covariance(taps, taps, generator, 0.1).float() if taps > 1 else None
        low = torch.randn(size, 2, generator=generator).bfloat16().float()
        return Side(torch.rand(size, generator=generator).bfloat16().float(), low, spread)

    with open_base(MODEL) as base:
        views: set[View] = {view for views in base.all_views for view in views}
        statistics = {
            view: Sides(side(view.shape[1], view.shape[2:].numel() if view.shape[2:] else 1), side(view.shape[0]))
            for view in ((View(view.key, torch.Size(view.shape))) for view in sorted(views, key=str))
        }
        write_table(path, statistics, base, {})
    return path


def test_a_table_gives_every_layer_the_grams_of_its_weight(table: Path) -> None:
    with open_statistics(table) as statistics, open_adapter(STYLE) as adapter:
        makers = statistics.of_layers(adapter)
        for layer, maker in zip(adapter.layers[::37], makers[::37], strict=True):
            assert maker
            (view,) = statistics.base.find(layer.name)
            sides = statistics.sides(str(view))
            grams = maker.grams(layer.delta)
            torch.testing.assert_close(grams.down, sides.inputs.gram(layer.delta.down))
            torch.testing.assert_close(grams.up, sides.outputs.gram(layer.delta.up.mT))


def test_fused_and_split_weights_share_statistics(table: Path, tmp_path: Path) -> None:
    """A fused q, k, v has the mean of inputs and the rows of outputs."""
    generator = torch.Generator().manual_seed(5)
    name = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    with open_statistics(table) as statistics:
        parts = [statistics.sides(f"{name}.{part}_proj.weight") for part in "qkv"]
        up, down = torch.randn(3 * 48, 4, generator=generator), torch.randn(4, 48, generator=generator)
        views = tuple(View(f"{name}.{part}_proj.weight", (48, 48)) for part in "qkv")
        fused = statistics.of_views(views)
        assert fused
        grams = fused.grams(Delta(up, down, 1.0, (3 * 48, 48)))
        torch.testing.assert_close(grams.down, sum(sides.inputs.gram(down) for sides in parts) / 3)
        truth = sum(sides.outputs.gram(rows.mT) for sides, rows in zip(parts, up.split(48), strict=True))
        torch.testing.assert_close(grams.up, truth)
        of_up, of_down = fused.energies()
        torch.testing.assert_close(of_up(up.mT), grams.up.diagonal().float(), rtol=1e-4, atol=0)
        torch.testing.assert_close(of_down(down), grams.down.diagonal().float(), rtol=1e-4, atol=0)
        some = statistics.of_views((View(views[1].key, (20, 48), (10, 30)),))
        assert some
        grams = some.grams(Delta(up[:20], down, 1.0, (20, 48)))
        torch.testing.assert_close(grams.up, parts[1].outputs.rows(10, 30).gram(up[:20].mT))


@pytest.mark.parametrize(
    "recipe",
    [
        "calib,thr=-2",
        "calib,bytes,size=0.5",
        "calib,energy=0.9",
        "calib,bytes,energy=0.99,max_rank=6",
        "calib,thr=-2,multiple=4",
        "calib,thr=-2,uniform",
        "calib,rank=4",
    ],
)
def test_calibrated_recipes_keep_what_they_ask_for(table: Path, tmp_path: Path, recipe: str) -> None:
    result = ls.resize(STYLE, recipes=recipe, calibration=table, output=tmp_path / "out.safetensors").results[0]
    compared = ls.compare(STYLE, tmp_path / "out.safetensors").total
    assert compared.relative_difference == pytest.approx(result.relative_error, abs=2e-3)
    ranks = [row.rank_after for row in result.layers]
    assert 0 < sum(ranks) < sum(row.rank_before for row in result.layers)
    if "size" in recipe:
        assert 0.48 * 2**20 < result.bytes_after <= 0.5 * 2**20
    if "max_rank" in recipe:
        assert max(ranks) <= 6
    if "multiple" in recipe:
        assert {rank % 4 for rank in ranks if rank < 8} == {0}
    if "uniform" in recipe:
        assert len(set(ranks) - {0}) <= 2  # layers of fewer dimensions than the widest are filled up with zeros


def test_energy_counts_the_squares_of_all_layers_together(table: Path, tmp_path: Path) -> None:
    """The best dimensions of all layers that hold 90 % of the squares."""
    with open_statistics(table) as statistics, open_adapter(STYLE) as adapter:
        makers = statistics.of_layers(adapter)
        sigmas = [
            spectrum(layer.delta, maker.grams(layer.delta)).sigma
            for layer, maker in zip(adapter, makers, strict=True)
            if maker
        ]
    squares = torch.cat(sigmas).square().sort(descending=True).values
    count = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
    result = ls.resize(STYLE, recipes="calib,energy=0.9", calibration=table, dry_run=True).results[0]
    # Each of the two text encoders may keep a dimension of an out_proj more, which diffusers needs.
    assert count <= sum(row.rank_after for row in result.layers) <= count + 2


def test_layers_of_every_family_are_calibrated(table: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(6)
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    kronecker = name.replace("to_q", "to_k")
    tensors = {
        f"{name}.hada_w1_a": torch.randn(48, 3, generator=generator),
        f"{name}.hada_w1_b": torch.randn(3, 48, generator=generator),
        f"{name}.hada_w2_a": torch.randn(48, 3, generator=generator),
        f"{name}.hada_w2_b": torch.randn(3, 48, generator=generator),
        f"{name}.alpha": torch.tensor(3.0),
        f"{kronecker}.lokr_w1": torch.randn(6, 6, generator=generator),
        f"{kronecker}.lokr_w2": torch.randn(8, 8, generator=generator),
        f"{kronecker}.alpha": torch.tensor(1.0),
        f"{name.replace('to_q', 'to_v')}.diff": torch.randn(48, 48, generator=generator),
    }
    adapter = write_tensors(tmp_path / "mixed.safetensors", tensors)
    report = ls.resize(
        adapter, recipes="calib,rank=5", form="lora", calibration=table, output=tmp_path / "out.safetensors"
    )
    assert not report.failed
    assert [row.rank_after for row in report.results[0].layers] == [5, 5, 5]
    compared = ls.compare(adapter, tmp_path / "out.safetensors").total
    assert compared.relative_difference == pytest.approx(report.results[0].relative_error, abs=1e-3)


def test_weights_without_statistics_stay_and_weights_without_effect_go(tmp_path: Path) -> None:
    with open_base(MODEL) as base, open_adapter(STYLE) as adapter:
        grams = {}
        for index, layer in enumerate(adapter.layers[:-1]):
            up, down = layer.delta.up.double(), layer.delta.down.double()
            sensitive = up.T @ up * (index > 0)
            grams[f"{adapter_key(adapter)}/{layer.name}"] = Grams(down @ down.T, sensitive)
        write_adapters(tmp_path / "s.safetensors", grams, {adapter_key(adapter): "style"}, base, {})
        names = [layer.name for layer in adapter.layers]
    report = ls.resize(STYLE, recipes="calib,rank=2", calibration=tmp_path / "s.safetensors", output=tmp_path)
    result = report.results[0]
    assert [(layer.name, layer.reason) for layer in result.removed if layer.name == names[0]] == [
        (names[0], "it does not change the model's output")
    ]
    kept = {tensor.key.partition(".")[0]: tensor.reason for tensor in result.verbatim}
    assert kept == {names[-1]: "the calibration has no statistics of its weight"}


def test_missing_wrong_and_damaged_statistics_are_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--calibration"):
        ls.resize(STYLE, recipes="calib,rank=2", output=tmp_path)
    with pytest.raises(RecipeError, match="calib goes with no other score"):
        ls.resize(STYLE, recipes="calib,fro_lora,thr=-2", calibration=table, output=tmp_path)
    with pytest.raises(InputError, match="no calibration statistics"):
        ls.resize(STYLE, recipes="calib,rank=2", calibration=STYLE, output=tmp_path)
    with open_base(MODEL) as base:
        write_adapters(
            tmp_path / "s.safetensors",
            {"00/x": Grams(torch.eye(2), torch.eye(2))},
            {"00": "other.safetensors"},
            base,
            {},
        )
    failed = ls.resize(STYLE, recipes="calib,rank=2", calibration=tmp_path / "s.safetensors", output=tmp_path).failed
    assert "statistics of other.safetensors, not of" in failed[0].error
    alien = write_tensors(
        tmp_path / "alien.safetensors",
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(9216, 1),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(1, 3072),
        },
    )
    with (
        open_statistics(table) as statistics,
        open_adapter(alien) as adapter,
        pytest.raises(FamilyMismatch, match="FLUX"),
    ):
        statistics.of_layers(adapter)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(table.read_bytes().replace(b'"kind"', b'"kinf"', 1))
    with pytest.raises(InputError, match="damaged statistics"):
        open_statistics(broken)


def test_sweeps_and_repeated_runs_use_the_statistics(table: Path, tmp_path: Path) -> None:
    points = ls.sweep(STYLE, recipes=["calib,bytes", "rank=2"], sizes=[0.4], calibration=table).points
    assert {point.curve for point in points} == {"calib=1,bytes=1,size", "rank"}
    command = ["resize", "-r", "calib,rank=2", "--calibration", str(table), "-o", str(tmp_path), str(STYLE), "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    again = CliRunner().invoke(app, [*command, "--skip-existing"])
    assert json.loads(again.stdout)["results"][0]["skipped"]
    second_table = tmp_path / "second.safetensors"
    with open_base(MODEL) as base, open_adapter(STYLE) as adapter:
        key = adapter_key(adapter)
        grams = {f"{key}/{layer.name}": Grams(torch.eye(layer.rank), torch.eye(layer.rank)) for layer in adapter}
        write_adapters(second_table, grams, {key: "style"}, base, {})
    command[command.index(str(table))] = str(second_table)
    refused = CliRunner().invoke(app, [*command, "--skip-existing"])
    assert refused.exit_code == 2
    assert "was made from another" in refused.stderr
