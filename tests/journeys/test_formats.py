"""Every listed adapter, on every listed base, is read, shrunk and written without a loss."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fixtures
import pytest
import torch
from formats_samples import ADAPTERS, BASES, EXCEPTIONS, LAYOUTS, SYNTHETIC, Formats, Shrunk, family_of
from formats_table import DOCUMENT, MODELS, QUANTISED, WHAT, containers, document
from torch import Tensor

from lorashrink.adapters import Adapter, Layer, layer_name, open_adapter
from lorashrink.adapters.peft import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE
from lorashrink.bases import recognise
from lorashrink.engine.delta import AnyDelta, Delta
from lorashrink.linking import matching
from lorashrink.linking.loaders import loads
from lorashrink.names import address
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.run import resize

# --- what is compared ---------------------------------------------------------------------------


def distance(a: AnyDelta, b: AnyDelta) -> tuple[float, float]:
    """(‖a - b‖_F, ‖a‖_F)."""
    if isinstance(a, Delta) and isinstance(b, Delta) and math.prod(a.shape) > 1 << 20:
        up, down = a.scale * a.up.double(), a.down.double()
        up2, down2 = -b.scale * b.up.double(), b.down.double()
        return norm_of(torch.cat([up, up2], 1), torch.cat([down, down2])), norm_of(up, down)
    dense = a.dense().double()
    return float((dense - b.dense().double().reshape(dense.shape)).norm()), float(dense.norm())


def norm_of(up: Tensor, down: Tensor) -> float:
    """‖up · down‖_F without the product; differences are exact to about 1e-8 of what is subtracted."""
    return math.sqrt(max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum())))


def by_address(adapter: Adapter) -> dict[tuple[str, str], Layer]:
    """The layers by the weights that they change, whatever stands before their names."""
    return {address(layer.name): layer for layer in adapter}


def explained(shrunk: Shrunk, form: str, recipe: str) -> dict[str, str]:
    """Key -> why the output has no tensor of this name, for all that are reported as gone."""
    removed = {layer.name: layer.reason for layer in shrunk.results[form, recipe].removed}
    keys = {key: reason for key, reason in removed.items() if key in shrunk.before.store.tensors}
    with shrunk.after(form, recipe) as after:
        written = by_address(after)
        for layer in shrunk.before:
            new = written.get(address(layer.name))
            if layer.name in removed:
                keys |= dict.fromkeys(layer.keys.values(), removed[layer.name])
            elif new and new.family is not layer.family:
                keys |= dict.fromkeys(layer.keys.values(), "written as LoRA")
    return keys


def scale_by(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a LoRA layer with. Its rank, by the settings, must be the one that is stored."""

    def value(patterns: Mapping[str, float], default: float) -> float:
        return next((number for name, number in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), default)

    assert value(config.get("rank_pattern", {}), config["r"]) == rank
    alpha = value(config.get("alpha_pattern", {}), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


# --- tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formats() -> Iterator[Formats]:
    with tempfile.TemporaryDirectory() as folder, Formats(Path(folder)) as files:  # too large to be kept by pytest
        yield files


def outputs(shrunk: Shrunk, *recipes: str) -> Iterator[tuple[str, str, FileResult]]:
    """(form, recipe, result) of the outputs by these recipes, or all."""
    for (form, recipe), result in shrunk.results.items():
        if not recipes or recipe in recipes:
            yield form, recipe, result


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_tensor_is_in_a_layer_or_has_a_reason_to_stay(formats: Formats, name: str) -> None:
    adapter = formats.adapter(name)
    of_layers = Counter(key for layer in adapter for key in layer.keys.values())
    assert not any(count > 1 for count in of_layers.values())
    assert of_layers.keys() | adapter.common | adapter.others.keys() == fixtures.shapes(name).keys()
    assert not (of_layers.keys() | adapter.common) & adapter.others.keys()
    assert all(adapter.others.values())
    modules = {layer_name(key) for key in fixtures.shapes(name).keys() - adapter.others.keys() - adapter.common}
    assert {layer.name for layer in adapter} == modules


PAIRS = [(name, layout) for name in ADAPTERS for layout in LAYOUTS[family_of(name)]]


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=[f"{name}-{layout}" for name, layout in PAIRS])
def test_every_layer_changes_a_weight_of_its_base(formats: Formats, name: str, layout: str) -> None:
    adapter, base = formats.adapter(name), formats.base(family_of(name), layout)
    weights = [base.find(layer.name) for layer in adapter] if name in SYNTHETIC else matching.match(adapter, base)
    missing = {layer.name for layer, views in zip(adapter, weights, strict=True) if not views}
    assert missing == {layer for listed, layer in EXCEPTIONS if listed == name}


@pytest.mark.parametrize("name", ADAPTERS)
def test_layers_at_full_energy_are_unchanged(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    for form, recipe, result in outputs(shrunk, "all"):
        assert result.relative_error < 1e-6
        with shrunk.after(form, recipe) as after:
            written = by_address(after)
            for layer in shrunk.before:
                if form == "lora" or layer.family.written:
                    new = written[address(layer.name)]
                    lost, norm = distance(layer.delta, new.delta)
                    assert lost <= 1e-5 * norm, layer.name
                    assert new.shape == layer.shape


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_reported_error_is_that_of_the_weights(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    for form, recipe, result in outputs(shrunk, "most", "few"):
        rows = {row.name: row for row in result.layers}
        assert len(rows) == len(shrunk.before) or form != "lora"
        squares = [0.0, 0.0]
        with shrunk.after(form, recipe) as after:
            written = by_address(after)
            for layer in shrunk.before:
                if row := rows.get(layer.name):
                    new = written[address(layer.name)]
                    stays = new.family is layer.family and not layer.family.written
                    lost = 0.0 if stays else distance(layer.delta, new.delta)[0]
                    norm = distance(layer.delta, layer.delta)[1]
                    squares = [squares[0] + lost**2, squares[1] + norm**2]
                    assert row.rle_lora == pytest.approx(lost / norm, abs=1e-4), layer.name
                    assert row.energy >= 0.9 - 1e-6 or recipe == "few"
                    assert row.rank_after == new.rank
                    if row.rle_ckpt is not None and shrunk.base:
                        weight = shrunk.base.weight(shrunk.base.find(layer.name))
                        assert row.rle_ckpt == pytest.approx(lost / float(weight.norm()), rel=1e-3, abs=1e-6)
        if rows:
            assert result.relative_error == pytest.approx(math.sqrt(squares[0] / squares[1]), abs=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_lost_or_changed_tensor_is_reported(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    before = shrunk.before.store
    for form, recipe, result in outputs(shrunk):
        with shrunk.after(form, recipe) as after:
            gone = explained(shrunk, form, recipe)
            assert before.tensors.keys() - after.store.tensors.keys() == gone.keys() - after.store.tensors.keys()
            assert all(gone.values())
            stay = {tensor.key: tensor.reason for tensor in result.verbatim}
            assert all(stay.values())
            for key in stay:
                assert after.store.tensors[key].dtype == before.tensors[key].dtype
                assert torch.equal(after.store.read(key), before.read(key)), key
            new = {layer.keys[role] for layer in after for role in layer.keys if layer.keys[role] not in stay}
            assert after.store.tensors.keys() == stay.keys() | new
            assert shrunk.before.others.keys() <= stay.keys()
            assert {layer.keys["magnitude"] for layer in shrunk.before if "magnitude" in layer.keys} <= stay.keys()
            if form == "same":
                others = [layer for layer in shrunk.before if not layer.family.written]
                assert {key for layer in others for key in layer.keys.values()} <= stay.keys()
            if form == "lora":
                assert {layer.family.name for layer in after} <= {"lora", "embedding"}
            # A core stays where folding it into a factor would make the file larger.
            folded = [layer for layer in after if form == "lora" or not set(layer.keys.values()) <= stay.keys()]
            assert not any("mid" in layer.keys for layer in folded)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_output_has_the_names_and_container_of_its_input(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    for form, recipe, result in outputs(shrunk):
        output = Path(result.output)
        files = [output] if output.is_file() else sorted(output.iterdir())
        folder = "config" in fixtures.about(name)
        assert [path.name for path in files] == ([CONFIG_FILE, WEIGHTS_FILE] if folder else [output.name])
        assert files[-1].stat().st_size == result.bytes_after
        with shrunk.after(form, recipe) as after:
            assert by_address(after).keys() == by_address(shrunk.before).keys()
            if folder:
                check_settings(shrunk, after, json.loads((output / CONFIG_FILE).read_text()))
            if METADATA_KEY in after.store.metadata:
                settings = json.loads(after.store.metadata[METADATA_KEY])
                for part_of in ("unet", "text_encoder", "text_encoder_2"):
                    ranks = [layer.rank for layer in after if layer.name.startswith(f"{part_of}.")]
                    assert settings[f"{part_of}.r"] == max(ranks)
            for old, new in zip(shrunk.before, after, strict=True):
                if "bias" in old.keys:
                    before = old.scale * shrunk.before.store.read(old.keys["bias"]).float()
                    bias = new.scale * after.store.read(new.keys["bias"]).float()
                    assert torch.allclose(bias, before, rtol=1e-5, atol=1e-7)


def check_settings(shrunk: Shrunk, after: Adapter, config: Mapping[str, Any]) -> None:
    """Whether the settings of a PEFT folder are those of its tensors."""
    old = shrunk.before.settings[""]
    as_lora = any(a.family is not b.family for a, b in zip(shrunk.before, after, strict=True))
    assert config["peft_type"] == ("LORA" if as_lora else old["peft_type"])
    assert config["target_modules"] == old["target_modules"]
    if config["peft_type"] == "LORA":
        for layer in after:
            expected = scale_by(config, layer.name.removeprefix("base_model.model."), layer.rank)
            assert layer.scale == pytest.approx(expected), layer.name
    else:
        assert config == old


# --- the table ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(formats: Formats, tmp_path_factory: pytest.TempPathFactory) -> str:
    return document(formats, tmp_path_factory.mktemp("containers"))


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_read_from_files_shards_and_folders(formats: Formats, tmp_path: Path, name: str) -> None:
    read = set(containers(formats, tmp_path, name))
    folder = {"folder"} if fixtures.about(name)["naming"] in ("diffusers", "transformers") else set()
    assert recognise(fixtures.shapes(name)) is not None
    assert read <= set(QUANTISED.values()) or read - {"file", "all-in-one file"} == {"shards"} | folder


def test_every_list_is_in_the_table() -> None:
    assert set(WHAT) == set(ADAPTERS)
    assert {family_of(name) for name in fixtures.LISTED} == set(MODELS)


def test_the_documented_table_is_up_to_date(page: str) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page, "run: make formats"


@pytest.mark.parametrize("name", ADAPTERS)
def test_auto_keeps_every_program_that_loads_the_file(formats: Formats, name: str, tmp_path: Path) -> None:
    source = formats.shrunk(name).before.path
    with open_adapter(source) as adapter:
        before = loads(adapter)
    report = resize(source, recipes="rank=2", dtype="auto", output=tmp_path)
    (after,) = report.results
    assert set(before.loads_in or ()) <= set(after.loads.loads_in or ())
    if before.loads_in is None:  # nobody can say who would read fp8
        with open_adapter(after.output) as adapter:
            assert not any(layer.dtype.startswith("F8") for layer in adapter)
