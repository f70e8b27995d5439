"""Packing and unpacking: a reader of its own, the error that is reported, sizes, families, and damaged files."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import fixtures
import numpy as np
import pytest
import torch
from conversions import ADAPTERS, few, numbers
from fixtures import shapes, write_tensors
from plain_decoder import read_file, unpacked
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import lorashrink
import lorashrink_example
from lorashrink.adapters import open_adapter
from lorashrink.cli import app
from lorashrink.errors import DamagedFile, InputError, LorashrinkError, UsageError
from lorashrink.files.packed import CODE, INDEX, Form, Index
from lorashrink.packing.encoding import Encoder, rounded
from lorashrink.results.packing import Packed

EXAMPLE = lorashrink_example.path()
GOLDEN = Path(__file__).parents[1] / "data" / "packed"


def small(path: Path, *, seed: int = 0, rank: int = 8, width: int = 48, dora: bool = True) -> Path:
    """A LoRA with falling spectra: linear layers, a convolution, a bias, a DoRA layer and a tensor copied along."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    falling = 2.0 ** -torch.arange(rank)

    def add(name: str, out: int, *fan_in: int) -> None:
        kernel = [1] * (len(fan_in) - 1)
        up = torch.randn(out, rank, generator=generator) * falling
        tensors[f"{name}.lora_up.weight"] = up.reshape(out, rank, *kernel).half()
        tensors[f"{name}.lora_down.weight"] = (torch.randn(rank, *fan_in, generator=generator) / 8).half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)

    for number in range(3):
        add(f"lora_unet_mid_block_attentions_0_transformer_blocks_{number}_attn1_to_q", width, width)
    add("lora_unet_mid_block_resnets_0_conv1", width, width // 2, 3, 3)
    add("lora_unet_mid_block_attentions_0_proj_in", width, width)
    if dora:
        magnitude = torch.rand(width, 1, generator=generator).half()
        tensors["lora_unet_mid_block_attentions_0_proj_in.dora_scale"] = magnitude
    tensors["lora_unet_mid_block_resnets_0_norm1.diff_b"] = torch.randn(width, generator=generator)
    return write_tensors(path, tensors, {"ss_network_dim": str(rank), "note": "é"})


def packed(source: Path, output: Path, **options: object) -> Packed:
    report = lorashrink.pack(source, output=output, **options)
    assert report.failed == ()
    return report.results[0]


def unpacked_file(path: Path, output: Path, **options: object) -> Path:
    report = lorashrink.unpack(path, output=output, **options)
    assert report.failed == ()
    return Path(report.results[0].output)


def deltas(path: Path) -> dict[str, Tensor]:
    """ΔW of each layer in float64, by the definition of LoRA."""
    with open_adapter(path) as adapter:
        return {layer.name: layer.delta.dense().double() for layer in adapter}


def distance(exact: Mapping[str, Tensor], approximate: Mapping[str, Tensor]) -> float:
    """sqrt(Σ‖ΔW - ΔW'‖² / Σ‖ΔW‖²)."""
    lost = sum(float((delta - approximate.get(name, torch.zeros(()))).square().sum()) for name, delta in exact.items())
    return math.sqrt(lost / sum(float(delta.square().sum()) for delta in exact.values()))


# --- the format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [25, 45, 70])
def test_a_reader_written_from_the_documentation_agrees(tmp_path: Path, quality: float) -> None:
    source = small(tmp_path / "a.safetensors")
    packed(source, tmp_path / "p.safetensors", quality=quality)
    ordinary = unpacked_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    expected = unpacked(tmp_path / "p.safetensors")
    header, _, data = read_file(ordinary)
    assert header.keys() == expected.keys()
    for name, (dtype, shape, raw) in expected.items():
        assert (header[name]["dtype"], header[name]["shape"]) == (dtype, shape)
        assert data[slice(*header[name]["data_offsets"])] == raw, name


def test_escapes_and_every_class_survive_the_plain_reader(tmp_path: Path) -> None:
    """One large number needs an escape, and all classes are used."""
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(19, 700, generator=generator) for _ in range(2)]
    factors[0][7, 5] = 4000.0
    factors[1][9, 8] = -9000.0
    form = Form((("up", 1, (700,)), ("down", 0, (700,))), ())
    layer = rounded("layer.", form, factors, np.array([range(-2, 17)] * 2).T)
    encoder = Encoder()
    encoder.add(layer)
    index, code = encoder.finish()
    assert Index.from_bytes(index.to_bytes()) == index
    assert any(table[0] for table in index.tables.values())
    tensors = {
        INDEX: torch.frombuffer(bytearray(index.to_bytes()), dtype=torch.uint8),
        CODE: torch.frombuffer(bytearray(code), dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "p.safetensors", {"lorashrink.packed": '{"version":1}'})
    plain = unpacked(tmp_path / "p.safetensors")
    for name, values in zip(("layer.up", "layer.down"), (layer.values[0].mT, layer.values[1]), strict=True):
        assert plain[name][2] == values.contiguous().numpy().tobytes()


def test_zeros_do_not_make_a_code_that_readers_refuse(tmp_path: Path) -> None:
    """A layer of nearly only zeros takes far less than a bit per number."""
    source = small(tmp_path / "a.safetensors")
    tensors = load_file(source)
    up = torch.zeros(40_000, 4)
    up[7, :] = torch.tensor([1.0, 0.5, 0.2, 0.1])
    down = torch.zeros(4, 64)
    down[range(4), range(4)] = 1.0
    tensors["lora_unet_mid_block_attentions_0_proj_out.lora_up.weight"] = up
    tensors["lora_unet_mid_block_attentions_0_proj_out.lora_down.weight"] = down
    path = write_tensors(tmp_path / "b.safetensors", tensors)
    packed(path, tmp_path / "p.safetensors", quality=50)
    ordinary = unpacked_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    assert distance(deltas(path), deltas(ordinary)) < 0.05


def test_a_published_packed_file_unpacks_to_the_same_bits(tmp_path: Path) -> None:
    """The hash was recorded when the file was packed, on another machine."""
    expected = json.loads((GOLDEN / "expected.json").read_text())
    ordinary = unpacked_file(GOLDEN / "golden.safetensors", tmp_path / "u.safetensors")
    assert hashlib.sha256(ordinary.read_bytes()).hexdigest() == expected["file_sha256"]


def test_the_hash_is_that_of_the_unpacked_numbers(tmp_path: Path) -> None:
    result = packed(small(tmp_path / "a.safetensors"), tmp_path / "p.safetensors")
    ordinary = unpacked_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    _, metadata, data = read_file(ordinary)
    assert hashlib.sha256(data).hexdigest() == result.sha256 == metadata["sshs_model_hash"]
    assert ordinary.stat().st_size == result.bytes_unpacked
    assert "lorashrink.packed" not in metadata
    assert metadata["note"] == "é"
    _, of_packed, of_code = read_file(tmp_path / "p.safetensors")
    assert of_packed["sshs_model_hash"] == hashlib.sha256(of_code).hexdigest()


def test_other_dtypes_are_rounded_from_the_half_precision_file(tmp_path: Path) -> None:
    packed(small(tmp_path / "a.safetensors"), tmp_path / "p.safetensors")
    half, brain, single = (
        load_file(unpacked_file(tmp_path / "p.safetensors", tmp_path / f"{dtype}.safetensors", dtype=dtype))
        for dtype in ("fp16", "bf16", "fp32")
    )
    factors = [name for name in half if "lora_" in name.rpartition(".lora_")[1]]
    assert factors
    for name in half:
        kinds = (torch.bfloat16, torch.float32) if name in factors else (half[name].dtype, half[name].dtype)
        assert torch.equal(brain[name], half[name].to(kinds[0]))
        assert torch.equal(single[name], half[name].to(kinds[1]))


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [20, 35, 60])
def test_the_reported_error_is_that_of_the_weights(tmp_path: Path, quality: float) -> None:
    source = small(tmp_path / "a.safetensors")
    result = packed(source, tmp_path / "p.safetensors", quality=quality)
    ordinary = unpacked_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    assert result.relative_error == pytest.approx(distance(deltas(source), deltas(ordinary)), rel=0.01, abs=1e-4)


def test_more_quality_takes_more_bytes_and_leaves_less_error(tmp_path: Path) -> None:
    source = small(tmp_path / "a.safetensors", width=96)
    results = [packed(source, tmp_path / f"{quality}.safetensors", quality=quality) for quality in (20, 30, 40, 50, 60)]
    sizes, errors = ([getattr(result, name) for result in results] for name in ("bytes_after", "relative_error"))
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("options", [{}, {"calibration": EXAMPLE / "table.safetensors"}])
def test_a_quality_is_what_the_result_predicts(tmp_path: Path, options: dict[str, Path]) -> None:
    source = EXAMPLE / "loras" / "heart.safetensors"
    for quality in (30, 40):
        result = packed(source, tmp_path / f"{quality}.safetensors", quality=quality, **options)
        assert quality <= result.predicted_db < quality + 0.1


@pytest.mark.parametrize("share", [0.12, 0.25, 0.4])
def test_no_file_is_larger_than_its_size(tmp_path: Path, share: float) -> None:
    source = EXAMPLE / "adapter.safetensors"
    size = int(share * source.stat().st_size)
    result = packed(source, tmp_path / "p.safetensors", size=size)
    assert 0.97 * size <= result.bytes_after == (tmp_path / "p.safetensors").stat().st_size <= size


def test_packing_beats_half_precision_at_the_same_error(tmp_path: Path) -> None:
    source = EXAMPLE / "loras" / "style.safetensors"
    result = packed(source, tmp_path / "p.safetensors", quality=35)
    ordinary = lorashrink.resize(source, recipes=f"energy={1 - result.relative_error**2}", dtype="fp16", dry_run=True)
    assert result.bytes_after < 0.3 * ordinary.results[0].bytes_after


def test_statistics_keep_what_the_model_needs(tmp_path: Path) -> None:
    """Judged at one size by the dense form of the norm, tr(G·E·C·Eᵀ)."""
    from lorashrink.calibration.statistics import open_statistics

    source, table = EXAMPLE / "loras" / "heart.safetensors", EXAMPLE / "table.safetensors"
    exact = deltas(source)
    harms = []
    for name, options in {"calibrated": {"calibration": table}, "plain": {}}.items():
        packed(source, tmp_path / f"{name}.safetensors", size=110_000, **options)
        kept = deltas(tmp_path / f"{name}.safetensors")
        harm = 0.0
        with open_statistics(table) as statistics, open_adapter(source) as adapter:
            for layer, of_layer in list(zip(adapter, statistics.of_layers(adapter), strict=True))[::6]:
                error = exact[layer.name] - kept.get(layer.name, torch.zeros_like(exact[layer.name]))
                flat = error.flatten(1).float()
                delta = type(layer.delta)(flat, torch.eye(flat.shape[1]), 1.0, layer.shape)
                grams = of_layer.grams(delta)
                harm += float((grams.up * grams.down).sum())
        harms.append(harm)
    assert harms[0] < 0.5 * harms[1]


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_family_is_packed(tmp_path: Path, name: str) -> None:
    """Layers keep their effect, and what is no layer keeps its bits."""
    import re

    _, pattern = ADAPTERS[name]
    listed = {key: shape for key, shape in few(shapes(name)).items() if re.search(pattern, key)}
    source = write_tensors(tmp_path / "a.safetensors", numbers(listed), fixtures.metadata(name))
    result = packed(source, tmp_path / "p.safetensors", quality=60)
    ordinary = unpacked_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    before, after = load_file(source), load_file(ordinary)
    assert distance(deltas(source), deltas(ordinary)) == pytest.approx(result.relative_error, rel=0.02, abs=1e-3)
    assert result.relative_error < 0.05
    for tensor in result.verbatim:
        assert torch.equal(before[tensor.key].view(torch.uint8), after[tensor.key].view(torch.uint8))


def test_a_folder_of_peft_unpacks_to_a_folder(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48))
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=4, target_modules=["0", "1"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "source")
    packed(tmp_path / "source", tmp_path / "p.safetensors", quality=70)
    folder = unpacked_file(tmp_path / "p.safetensors", tmp_path / "out")
    inputs = torch.randn(16, 64)
    with torch.no_grad():
        expected = tuned(inputs)
        bare = tuned.unload()
        without = bare(inputs)
        restored = PeftModel.from_pretrained(bare, folder)(inputs)
    assert float((restored - expected).norm() / (expected - without).norm()) < 0.02


# --- other commands -----------------------------------------------------------------------------


def test_factors_of_experts_are_copied_and_named(tmp_path: Path) -> None:
    experts, query = (f"base_model.model.model.layers.0.{name}" for name in ("mlp.experts", "self_attn.q_proj"))
    copied = {f"{experts}.lora_A.weight": torch.randn(4 * 8, 48), f"{experts}.lora_B.weight": torch.randn(40, 8 * 4)}
    lora = {f"{query}.lora_A.weight": torch.randn(8, 48), f"{query}.lora_B.weight": torch.randn(48, 8)}
    source = tmp_path / "moe"
    source.mkdir()
    save_file({**copied, **lora}, source / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_parameters": ["mlp.experts.down_proj"]}
    (source / "adapter_config.json").write_text(json.dumps(settings))
    result = packed(source, tmp_path / "packed.safetensors")
    assert [warning for warning in result.warnings if "not packed: 1 layer, first " + experts in warning]
    (weights,) = unpacked_file(Path(result.output), tmp_path / "out").rglob("*.safetensors")
    tensors = load_file(weights)
    for key, tensor in copied.items():
        assert torch.equal(tensors[key], tensor)


def test_other_commands_read_packed_files(tmp_path: Path) -> None:
    """Each gives for the packed file what it gives for the unpacked one."""
    packed(small(tmp_path / "a.safetensors", dora=False), tmp_path / "p.safetensors")
    unpacked_file(tmp_path / "p.safetensors", tmp_path / "u.safetensors")
    pair = [tmp_path / "p.safetensors", tmp_path / "u.safetensors"]

    def both(run: Callable[[Path], object]) -> None:
        first, second = map(run, pair)
        assert first == second

    both(lambda path: [(layer.name, layer.fro) for layer in lorashrink.inspect(path).files[0].layers])
    both(lambda path: lorashrink.compare(path, tmp_path / "a.safetensors").blocks)
    both(lambda path: [point.relative_error for point in lorashrink.sweep(path).points])
    for number, make in enumerate(
        (
            lambda path, output: lorashrink.resize(path, recipes="rank=2", output=output),
            lambda path, output: lorashrink.convert(path, dtype="bf16", output=output),
            lambda path, output: lorashrink.merge([f"{path}:0.5"], output=output),
        )
    ):
        outputs = [tmp_path / f"{number}{path.name}" for path in pair]
        for path, output in zip(pair, outputs, strict=True):
            assert make(path, output).failed == (), path
        first, second = map(load_file, outputs)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_packed_file_in_a_folder_is_an_adapter_and_no_base(tmp_path: Path) -> None:
    packed(small(tmp_path / "a.safetensors"), tmp_path / "in" / "p.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "in"), "--json"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["unpack", str(tmp_path / "in"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "p_unpacked.safetensors").is_file()


# --- refusals -----------------------------------------------------------------------------------


def damaged(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """The packed file with other tensors or metadata."""
    _, metadata, _ = read_file(path)
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path.with_name("damaged.safetensors"), metadata)
    return path.with_name("damaged.safetensors")


def with_index(change: Callable[[dict], None]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def apply(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        index = json.loads(zlib.decompress(tensors[INDEX].numpy().tobytes()))
        change(index)
        tensors[INDEX] = torch.frombuffer(bytearray(zlib.compress(json.dumps(index).encode())), dtype=torch.uint8)

    return apply


def flip_code(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[CODE][len(tensors[CODE]) // 2] ^= 1


def short_code(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[CODE] = tensors[CODE][:-4].clone()


def bomb(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[INDEX] = torch.frombuffer(bytearray(zlib.compress(b" " * 60_000_000)), dtype=torch.uint8)


def no_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["lorashrink.packed"]


def other_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    entry = json.loads(metadata["lorashrink.packed"])
    metadata["lorashrink.packed"] = json.dumps({**entry, "sha256": "0" * 64})


def other_tensor(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["lora_unet_mid_block_resnets_0_norm1.diff_b"] *= 2


def newer(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["lorashrink.packed"] = '{"version": 2}'


DAMAGES = {
    "flipped bit": flip_code,
    "short code": short_code,
    "bomb": bomb,
    "no metadata": no_metadata,
    "other hash": other_hash,
    "other tensor": other_tensor,
    "huge rank": with_index(lambda index: index["ranks"].__setitem__(0, 2**39)),
    "huge layer": with_index(lambda index: index["forms"][0]["factors"][0].__setitem__(2, [2**39])),
    "no rank": with_index(lambda index: index["ranks"].__setitem__(0, 0)),
    "negative": with_index(lambda index: index["kinds"].__setitem__(0, -1)),
    "no form": with_index(lambda index: index["kinds"].__setitem__(0, 99)),
    "text": with_index(lambda index: index["scales"].__setitem__(0, "1")),
    "scale": with_index(lambda index: index["scales"].__setitem__(0, 10**6)),
    "class": with_index(lambda index: index["classes"].__setitem__(0, 17)),
    "table": with_index(lambda index: next(iter(index["tables"].values())).__setitem__(0, 1)),
    "no table": with_index(lambda index: index["tables"].clear()),
    "names twice": with_index(lambda index: index["names"].__setitem__(1, index["names"][0])),
    "sections": with_index(lambda index: index["sections"].clear()),
    "words": with_index(lambda index: index["sections"][0].__setitem__("words", 2**39)),
    "constant": with_index(lambda index: index["forms"][0]["constants"][0].__setitem__(3, "00")),
    "dtype": with_index(lambda index: index["forms"][0]["constants"][0].__setitem__(1, "F7")),
    "axis": with_index(lambda index: index["forms"][0]["factors"][0].__setitem__(1, 5)),
    "no list": with_index(lambda index: index.__setitem__("names", 5)),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_in_a_moment(tmp_path: Path, kind: str) -> None:
    packed(small(tmp_path / "a.safetensors"), tmp_path / "p.safetensors")
    path = damaged(tmp_path / "p.safetensors", DAMAGES[kind])
    started = time.monotonic()
    report = lorashrink.unpack(path, output=tmp_path / "u.safetensors")
    assert time.monotonic() - started < 20
    assert len(report.failed) == 1
    assert str(path) in report.failed[0].error
    assert "unexpected" not in report.failed[0].error
    assert not (tmp_path / "u.safetensors").exists()


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In the index and in the code."""
    packed(small(tmp_path / "a.safetensors"), tmp_path / "p.safetensors")
    raw = bytearray((tmp_path / "p.safetensors").read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        position = int(torch.randint(start, len(raw), (), generator=generator))
        changed = bytearray(raw)
        changed[position] ^= 1 << int(torch.randint(8, (), generator=generator))
        (tmp_path / "bad.safetensors").write_bytes(changed)
        report = lorashrink.unpack(tmp_path / "bad.safetensors", output=tmp_path / "u.safetensors", force=True)
        assert len(report.failed) == 1, position
        assert "unexpected" not in report.failed[0].error


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    packed(small(tmp_path / "a.safetensors"), tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="version 2 of the format, this program reads 1"):
        open_adapter(damaged(tmp_path / "p.safetensors", newer))


def test_inspecting_a_damaged_code_says_so(tmp_path: Path) -> None:
    packed(small(tmp_path / "a.safetensors"), tmp_path / "p.safetensors")
    with open_adapter(damaged(tmp_path / "p.safetensors", flip_code)) as adapter, pytest.raises(DamagedFile):
        _ = [layer.delta for layer in adapter]


def test_without_the_coder_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path / "a.safetensors")
    packed(source, tmp_path / "p.safetensors")
    monkeypatch.setitem(sys.modules, "constriction", None)
    for run in (
        lambda: lorashrink.pack(source, output=tmp_path / "q.safetensors"),
        lambda: lorashrink.unpack(tmp_path / "p.safetensors", output=tmp_path / "u.safetensors"),
    ):
        with pytest.raises(UsageError, match=r"pip install 'lorashrink\[pack\]'"):
            run()
    with open_adapter(tmp_path / "p.safetensors") as adapter, pytest.raises(UsageError, match=r"lorashrink\[pack\]"):
        _ = adapter.layers[0].delta


def test_not_a_number_and_zero_layers_are_errors(tmp_path: Path) -> None:
    source = small(tmp_path / "a.safetensors")
    tensors = load_file(source)
    broken = {**tensors, (name := next(name for name in tensors if "up" in name)): tensors[name] * math.nan}
    linear = {name: value for name, value in tensors.items() if "attn1" in name}
    zeros = {name: value * 0 if name.endswith("lora_up.weight") else value for name, value in linear.items()}
    for content, message in ((broken, "NaN or infinity"), (zeros, "nothing to shrink")):
        path = write_tensors(tmp_path / "b.safetensors", content)
        report = lorashrink.pack(path, output=tmp_path / "p.safetensors", force=True)
        assert message in report.failed[0].error
        assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize("factor", [1e8, 1e12, 1e25])
def test_numbers_that_one_huge_factor_are_an_error(tmp_path: Path, factor: float) -> None:
    """Such files were written with infinity in them, and with an error of infinity."""
    source = small(tmp_path / "a.safetensors")
    tensors = load_file(source)
    name = next(name for name in tensors if name.endswith("attn1_to_q.lora_up.weight"))
    tensors[name] = tensors[name].float() * 65504 * factor
    path = write_tensors(tmp_path / "b.safetensors", tensors)
    (failure,) = lorashrink.pack(path, output=tmp_path / "p.safetensors").failed
    assert name.removesuffix(".lora_up.weight") in failure.error
    assert "too large for fp16" in failure.error
    assert not (tmp_path / "p.safetensors").exists()


def test_a_size_that_nothing_fits_into_names_the_least(tmp_path: Path) -> None:
    report = lorashrink.pack(small(tmp_path / "a.safetensors"), output=tmp_path / "p.safetensors", size=500)
    assert "the least is" in report.failed[0].error
    assert not (tmp_path / "p.safetensors").exists()


def test_contradicting_options_are_refused(tmp_path: Path) -> None:
    source = small(tmp_path / "a.safetensors")
    for options in ({"quality": 40, "size": 10_000}, {"quality": 5}, {"size": 0}):
        with pytest.raises(UsageError):
            lorashrink.pack(source, output=tmp_path / "p.safetensors", **options)
    with pytest.raises(UsageError):
        lorashrink.unpack(source, output=tmp_path / "u.safetensors", dtype="int8")
    report = lorashrink.unpack(source, output=tmp_path / "u.safetensors")
    assert "is not packed" in report.failed[0].error


def test_inputs_and_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    source = small(tmp_path / "a.safetensors")
    before = source.read_bytes()
    with pytest.raises(LorashrinkError):
        lorashrink.pack(source, output=source, force=True)
    packed(source, tmp_path / "p.safetensors")
    with pytest.raises(LorashrinkError):
        lorashrink.pack(source, output=tmp_path / "p.safetensors")
    assert source.read_bytes() == before


# --- the commands -------------------------------------------------------------------------------


def test_the_commands_print_what_they_did(tmp_path: Path) -> None:
    source = small(tmp_path / "a.safetensors")
    out = tmp_path / "p.safetensors"
    result = CliRunner().invoke(app, ["pack", str(source), "-o", str(out), "--size", "20kB"])
    assert result.exit_code == 0, result.output
    assert "about " in result.stdout
    assert out.stat().st_size <= 20_000
    document = json.loads(CliRunner().invoke(app, ["unpack", str(out), "-o", str(tmp_path / "u"), "--json"]).stdout)
    assert document["command"] == "unpack"
    assert Path(document["results"][0]["output"]).is_file()
    for arguments in (["pack", str(source)], ["pack", str(source), "-o", "x", "--size", "many"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2


def test_a_failed_file_leaves_the_others(tmp_path: Path) -> None:
    small(tmp_path / "in" / "a.safetensors")
    small(tmp_path / "in" / "b.safetensors", seed=1)
    shutil.copy(tmp_path / "in" / "a.safetensors", tmp_path / "in" / "c.safetensors")
    with open(tmp_path / "in" / "c.safetensors", "r+b") as handle:
        handle.truncate(3000)
    files = [str(tmp_path / "in" / f"{name}.safetensors") for name in "acb"]
    result = CliRunner().invoke(app, ["pack", *files, "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert [failure["source"] for failure in document["failed"]] == [files[1]]
    assert len(document["results"]) == 2


@pytest.mark.parametrize(("up", "down"), [(1e-8, 1e-8), (1e-25, 1e-12), (1e5, 1e5), (1e18, 1e18)])
def test_numbers_that_fp16_cannot_hold_are_an_error(tmp_path: Path, up: float, down: float) -> None:
    layer = {"q.lora_up.weight": torch.full((48, 8), up), "q.lora_down.weight": torch.full((8, 48), down)}
    source = write_tensors(tmp_path / "a.safetensors", {f"lora_unet_{key}": value for key, value in layer.items()})
    (failure,) = lorashrink.pack(source, output=tmp_path / "packed.safetensors").failed
    assert f"the numbers of layer lora_unet_q are too {'small' if up < 1 else 'large'} for fp16" in failure.error
    assert not (tmp_path / "packed.safetensors").exists()


@pytest.mark.parametrize(("up", "down"), [(1e-8, 1.0), (1e-15, 1e6), (1e-5, 1e-5)])
def test_factors_are_balanced_before_they_are_packed(tmp_path: Path, up: float, down: float) -> None:
    torch.manual_seed(0)
    layer = {"q.lora_up.weight": torch.randn(48, 8) * up, "q.lora_down.weight": torch.randn(8, 48) * down}
    source = write_tensors(tmp_path / "a.safetensors", {f"lora_unet_{key}": value for key, value in layer.items()})
    (result,) = lorashrink.pack(source, output=tmp_path / "packed.safetensors", quality=60).results
    lorashrink.unpack(result.output, output=tmp_path / "b.safetensors")
    factors = [load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    before, after = (
        file["lora_unet_q.lora_up.weight"].double() @ file["lora_unet_q.lora_down.weight"].double() for file in factors
    )
    assert float((after - before).norm() / before.norm()) < 0.03


def test_a_layer_too_weak_for_fp16_is_said_beside_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    strong, weak = torch.randn(48, 8) / 8, torch.full((48, 8), 1e-9)
    layers = {"q": strong, "k": weak}
    tensors = {f"lora_unet_{name}.lora_up.weight": up for name, up in layers.items()}
    tensors |= {f"lora_unet_{name}.lora_down.weight": up.mT.contiguous() for name, up in layers.items()}
    source = write_tensors(tmp_path / "a.safetensors", tensors)
    (result,) = lorashrink.pack(source, output=tmp_path / "packed.safetensors").results
    said = [item.name for item in result.removed] + [warning for warning in result.warnings if "lora_unet_k" in warning]
    assert said


def test_no_program_is_said_to_load_a_packed_file(tmp_path: Path) -> None:
    packed = tmp_path / "a file.safetensors"
    lorashrink.pack(lorashrink_example.path("loras", "style.safetensors"), output=packed)
    loads = lorashrink.inspect(packed, header=True).files[0].loads
    assert loads.loads_in == ()
    assert list(loads.loads_after.values()) == [f"lorashrink unpack '{packed}' -o FOLDER"]
