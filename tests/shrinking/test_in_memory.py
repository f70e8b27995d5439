"""Adapters in memory, and prepared ones: the same answers as files give."""

import dataclasses
import shutil
import types

import fixtures
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorashrink as ls
from lorashrink.adapters import layer_name
from lorashrink.errors import InputError, LorashrinkError, OutputError, RecipeError, UsageError
from lorashrink_example import path as example

RECIPES = ("fro_ckpt,bytes,size=0.02", "fro_ckpt=1,thr=-3.55", "rank=3", "energy=0.9,multiple=2", "bytes,size=0.03")


def metadata_of(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def assert_same_tensors(tensors, path):
    expected = load_file(path)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == tensors[key].dtype, key
        assert tensor.equal(tensors[key]), key


@pytest.fixture
def state(adapter):
    return ls.Tensors(load_file(adapter), metadata_of(adapter))


# --- resize, inspect, compare -------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", ["same", "fp32"])
def test_a_state_dict_shrinks_to_the_tensors_of_the_file(adapter, base, state, recipe, dtype, tmp_path):
    written = ls.resize(adapter, base=base, recipes=recipe, dtype=dtype, output=tmp_path / "out.safetensors")
    report = ls.resize(state, base=load_file(base), recipes=ls.Recipe.parse(recipe), dtype=dtype)
    assert_same_tensors(report.state_dict, tmp_path / "out.safetensors")
    (result,), (expected,) = report.results, written.results
    for field in ("recipe", "threshold", "bytes_after", "relative_error", "verbatim", "removed", "warnings"):
        assert getattr(result, field) == getattr(expected, field), field
    for row, of_file in zip(result.layers, expected.layers, strict=True):
        assert row.rank_after == of_file.rank_after
        assert row.rle_ckpt == pytest.approx(of_file.rle_ckpt)
    same = {"ss_network_dim", "sshs_model_hash", "sshs_legacy_hash", "lorashrink.energy", "resize_params"}
    in_file = metadata_of(tmp_path / "out.safetensors")
    assert {key: result.metadata.get(key) for key in same} == {key: in_file.get(key) for key in same}


def test_a_mapping_without_metadata_is_an_adapter(adapter):
    report = ls.resize(load_file(adapter), recipes="rank=2")
    assert max(row.rank_after for row in report.results[0].layers) == 2


def test_several_recipes_give_several_results_in_memory(adapter):
    report = ls.resize(load_file(adapter), recipes=["rank=2", ls.Recipe.parse("rank=1")])
    assert [result.recipe for result in report.results] == ["rank=2", "rank=1"]
    with pytest.raises(UsageError, match="results"):
        _ = report.state_dict


@pytest.mark.parametrize("option", ["output", "force", "dry_run", "recursive", "naming"])
def test_options_about_files_are_refused_in_memory(adapter, option):
    with pytest.raises(UsageError, match=option):
        ls.resize(load_file(adapter), recipes="rank=2", **{option: True})


def test_the_tensors_that_went_in_stay_as_they_were(adapter):
    state = load_file(adapter)
    ls.resize(state, recipes="rank=2")
    assert_same_tensors(state, adapter)


def test_an_inspected_state_dict_has_the_numbers_of_the_file(adapter, base, state):
    (of_file,) = ls.inspect(adapter, base=base, recommend=True).files
    (in_memory,) = ls.inspect(state, base=load_file(base), recommend=True).files
    assert dataclasses.replace(in_memory, path=of_file.path) == of_file


def test_a_state_dict_is_compared_with_a_file(adapter, state):
    shrunk = ls.resize(state, recipes="energy=0.9")
    comparison = ls.compare(adapter, shrunk.state_dict)
    assert comparison.total.relative_difference == pytest.approx(shrunk.results[0].relative_error, rel=1e-2)


@pytest.mark.parametrize("call", [ls.inspect, ls.resize, ls.prepare])
def test_a_missing_file_is_an_error(call, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        call(tmp_path / "gone.safetensors")


def test_a_mapping_of_other_things_is_no_adapter():
    with pytest.raises(LorashrinkError, match="no adapter"):
        ls.prepare({"weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match="lora_up"):
        ls.prepare({"a.lora_up.weight": 1})


# --- prepared -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", ["same", "fp32"])
def test_a_prepared_adapter_answers_as_resize_does(adapter, base, recipe, dtype, tmp_path):
    (expected,) = ls.resize(adapter, base=base, recipes=recipe, dtype=dtype, output=tmp_path / "a.safetensors").results
    prepared = ls.prepare(adapter, base=base)
    outcome = prepared.at(recipe, dtype=dtype)
    assert outcome.bytes == expected.bytes_after == (tmp_path / "a.safetensors").stat().st_size
    assert (outcome.threshold, outcome.recipe) == (expected.threshold, expected.recipe)
    assert outcome.relative_error == pytest.approx(expected.relative_error, rel=1e-9)
    assert outcome.ranks == {row.name: row.rank_after for row in expected.layers}
    assert_same_tensors(prepared.state_dict(recipe, dtype=dtype), tmp_path / "a.safetensors")
    prepared.save(recipe, tmp_path / "b.safetensors", dtype=dtype)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name", ["sdxl_locon_tucker_kohya", "sdxl_dora_kohya_out", "sdxl_loha_kohya", "sd15_locon_norm_kohya"]
)
def test_other_families_are_prepared_as_files_are_shrunk(name, tmp_path):
    layers = fixtures.module_names(name)[:20]
    scaled = fixtures.scaled(fixtures.shapes(name))
    shapes = {key: shape for key, shape in scaled.items() if layer_name(key) in layers}
    path = fixtures.write_tensors(tmp_path / "a.safetensors", fixtures.random_tensors(shapes))
    for recipe in ("energy=0.8", "rank=2"):
        (expected,) = ls.resize(path, recipes=recipe, output=tmp_path / f"{recipe}.safetensors").results
        prepared = ls.prepare(path)
        assert prepared.at(recipe).bytes == expected.bytes_after
        assert prepared.at(recipe).ranks == {row.name: row.rank_after for row in expected.layers}
        assert_same_tensors(prepared.state_dict(recipe), expected.output)


def test_a_calibrated_recipe_is_answered_from_statistics():
    adapter, base = example("loras", "style.safetensors"), example("model")
    table = example("table.safetensors")
    (expected,) = ls.resize(adapter, base=base, calibration=table, recipes="calib,energy=0.9", dry_run=True).results
    prepared = ls.prepare(adapter, base=base, calibration=table)
    assert prepared.at("calib,energy=0.9").relative_error == pytest.approx(expected.relative_error, rel=1e-9)
    assert prepared.at("energy=0.9").relative_error < prepared.at("calib,energy=0.9").relative_error


def test_nothing_is_decomposed_again_for_another_recipe(adapter, base, monkeypatch):
    prepared = ls.prepare(adapter, base=base)

    def refuse(*_):
        raise AssertionError("decomposed again")

    monkeypatch.setattr("lorashrink.engine.spectrum._decompose_chunk", refuse)
    for recipe in RECIPES:
        prepared.state_dict(recipe)
    assert ls.prepare(adapter, base=base) is prepared


def test_an_adapter_with_other_contents_is_prepared_anew(adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    shutil.copy(adapter, path)
    first = ls.prepare(path)
    fixtures.write_tensors(path, {key: 2 * tensor for key, tensor in load_file(adapter).items()})
    second = ls.prepare(path)
    assert second is not first
    assert ls.compare(adapter, first.state_dict("energy=1")).total.relative_difference < 0.01
    assert ls.compare(adapter, second.state_dict("energy=1")).total.relative_difference > 0.5


def test_prepared_adapters_are_forgotten_beyond_the_bound(monkeypatch):
    from lorashrink.shrinking import prepared

    memory = prepared._Memory(2, lambda prepared: 1)
    monkeypatch.setattr(prepared, "_remembered", memory)
    states = [
        {"a.lora_up.weight": torch.full((4, 2), 1.0 + i), "a.lora_down.weight": torch.ones(2, 4)} for i in range(3)
    ]
    first, second, third = map(ls.prepare, states)
    assert ls.prepare(states[2]) is third
    assert ls.prepare(states[1]) is second
    assert ls.prepare(states[0]) is not first


def test_a_weighted_sum_of_files_is_prepared(tmp_path):
    loras = example("loras")
    terms = f"{loras / 'style.safetensors'}:0.7,{loras / 'heart.safetensors'}:-0.5"
    expected = ls.merge(terms, recipes="bytes,size=0.5", output=tmp_path / "sum.safetensors").results[0]
    outcome = ls.prepare(terms).at("bytes,size=0.5")
    assert (outcome.bytes, outcome.threshold) == (expected.bytes_after, expected.threshold)
    assert_same_tensors(ls.prepare(terms).state_dict("bytes,size=0.5"), tmp_path / "sum.safetensors")


def test_the_curve_falls_from_small_files_to_large_ones(adapter, base):
    prepared = ls.prepare(adapter, base=base)
    curve = prepared.curve("fro_ckpt,bytes")
    sizes, errors = zip(*curve.points, strict=True)
    assert sizes == tuple(sorted(sizes))
    assert errors[-1] < 1e-3 < errors[0]
    assert curve.bytes == adapter.stat().st_size
    for outcome in curve.outcomes:
        again = ls.resize(adapter, base=base, recipes=outcome.recipe, dry_run=True).results[0]
        assert (again.bytes_after, again.relative_error) == (outcome.bytes, pytest.approx(outcome.relative_error))


def test_what_a_prepared_adapter_lacks_is_said(adapter):
    prepared = ls.prepare(adapter)
    with pytest.raises(RecipeError, match="base="):
        prepared.at("fro_ckpt,size=1")
    with pytest.raises(RecipeError, match="calibration table"):
        prepared.at("calib,energy=0.9")
    with pytest.raises(RecipeError, match="keeps nothing"):
        prepared.at("thr=30")
    with pytest.raises(RecipeError, match="smallest possible"):
        prepared.at("bytes,size=0.000001")
    with pytest.raises(UsageError, match="dtype"):
        prepared.at("rank=2", dtype="fp3")


def test_a_prepared_adapter_overwrites_only_when_asked(adapter, tmp_path):
    prepared = ls.prepare(adapter)
    prepared.save("rank=2", tmp_path / "a.safetensors")
    with pytest.raises(OutputError):
        prepared.save("rank=1", tmp_path / "a.safetensors")
    prepared.save("rank=1", tmp_path / "a.safetensors", force=True)
    with pytest.raises(OutputError):
        prepared.save("rank=1", adapter, force=True)


def test_numbers_that_do_not_fit_the_dtype_are_an_error_in_memory():
    state = {"a.lora_up.weight": torch.full((4, 2), 1e15), "a.lora_down.weight": torch.ones(2, 4)}
    with pytest.raises(OutputError, match="do not fit"):
        ls.prepare(state).state_dict("rank=1", dtype="fp16")


# --- how results look ---------------------------------------------------------------------------


def test_results_fit_a_screen(adapter, base):
    report = ls.resize(load_file(adapter), recipes="rank=2")
    prepared = ls.prepare(adapter, base=base)
    sweep = ls.sweep(adapter, recipes=["rank=1..4/4"])
    results = [
        report,
        report.results[0],
        ls.inspect(adapter),
        ls.inspect(adapter).files[0],
        ls.compare(adapter, adapter),
    ]
    for result in [*results, prepared, prepared.curve(), prepared.at("rank=2"), sweep]:
        assert len(repr(result)) < 1500, repr(result)


def test_results_become_plain_data_and_tables(adapter, monkeypatch):
    report = ls.resize(load_file(adapter), recipes="rank=2")
    (row,) = report.to_dict()["results"]
    assert "state_dict" not in row
    assert row["bytes_after"] == report.results[0].bytes_after
    table = report.results[0]._repr_html_()
    assert table.count("<tr>") == 1 + min(50, len(report.results[0].layers))
    rows = []
    pandas = types.SimpleNamespace(DataFrame=rows.extend)  # what is under test are the rows
    monkeypatch.setitem(__import__("sys").modules, "pandas", pandas)
    report.results[0].to_pandas()
    assert [row["name"] for row in rows] == [layer.name for layer in report.results[0].layers]


def test_pandas_is_asked_for_only_where_it_is_needed(adapter, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        ls.inspect(adapter).to_pandas()


def test_outcomes_predict_the_quality_of_what_is_written(tmp_path):
    prepared = ls.prepare(example("loras", "style.safetensors"), calibration=example("table.safetensors"))
    sizes = {}
    for dtype in ("auto", "fp16"):
        outcome = prepared.at("calib,bytes,quality=40", dtype=dtype)
        (written,) = ls.resize(
            example("loras", "style.safetensors"),
            calibration=example("table.safetensors"),
            recipes="calib,bytes,quality=40",
            dtype=dtype,
            output=tmp_path / f"{dtype}.safetensors",
        ).results
        assert outcome.predicted_db == written.predicted_db >= 40
        assert outcome.bytes == (tmp_path / f"{dtype}.safetensors").stat().st_size
        sizes[dtype] = outcome.bytes
    assert sizes["auto"] < 0.7 * sizes["fp16"]
    assert prepared.at("energy=0.9").predicted_db is None
