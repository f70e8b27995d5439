"""Quantised bases: the numbers behind packed weights, and a clear no to what cannot be read."""

import json
import os
import sys

import fixtures
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorashrink.bases import norms, open_base, views_id, views_shape
from lorashrink.bases.norms import BaseNorms
from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.header import header_bytes, read_header
from lorashrink.files.store import TensorInfo

FP8 = torch.float8_e4m3fn


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def saved(folder, tensors, metadata=None):
    """A file with these tensors and one more weight, so that any of them is a base."""
    path = folder / "model.safetensors"
    save_file({"plain.weight": torch.ones(4, 2), **tensors}, path, metadata)
    return path


def weight_of(path, name="lora_unet_x"):
    with open_base(path) as base:
        return base.weight(base.find(name))


def check_rows(path, key="x.weight"):
    """Any rows that are read alone are those of the whole."""
    with open_base(path) as base:
        weight = base.store.read(key)
        for start, stop in ((0, 1), (1, 3), (2, weight.shape[0]), (0, weight.shape[0])):
            assert torch.equal(base.store.read(key, (start, stop)), weight[start:stop])


# --- 8-bit floats -------------------------------------------------------------------------------


def test_plain_8_bit_floats_are_read_without_a_scale(tmp_path):
    stored = noise(6, 32).to(FP8)
    path = saved(tmp_path, {"x.weight": stored})
    assert torch.equal(weight_of(path), stored.float())


SCALES = {
    "one number, older": ({"x.scale_weight": torch.tensor(0.03), "scaled_fp8": torch.zeros(2).to(FP8)}, 0.03),
    "one number, newer": (
        {"x.weight_scale": torch.tensor(0.03), "x.comfy_quant": text({"format": "float8_e4m3fn"})},
        0.03,
    ),
    "a list of one": ({"x.weight_scale": torch.tensor([0.03])}, 0.03),
    "one per row": ({"x.weight_scale": torch.arange(1.0, 7) / 100}, torch.arange(1.0, 7)[:, None] / 100),
    "a column": ({"x.weight_scale": torch.arange(1.0, 7)[:, None] / 100}, torch.arange(1.0, 7)[:, None] / 100),
    "in half precision": ({"x.weight_scale": torch.tensor(0.03125).half()}, 0.03125),
    "and one for inputs": ({"x.scale_weight": torch.tensor(0.03), "x.scale_input": torch.tensor(5.0)}, 0.03),
}


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize(("companions", "scale"), SCALES.values(), ids=SCALES)
def test_8_bit_floats_are_scaled(tmp_path, companions, scale, dtype):
    stored = noise(6, 32).to(dtype)
    path = saved(tmp_path, {"x.weight": stored, **companions})
    assert torch.equal(weight_of(path), stored.float() * scale)
    check_rows(path)


def test_companions_are_no_weights(tmp_path):
    companions = {"x.weight_scale": torch.ones(6, 1), "x.input_scale": torch.ones(1, 1)}
    path = saved(tmp_path, {"x.weight": noise(6, 32).to(FP8), **companions, "y.weight": torch.ones(2, 2)})
    with open_base(path) as base:
        assert {views_id(views) for views in base.all_views} == {"plain.weight", "x.weight", "y.weight"}


def test_a_scaled_convolution_keeps_its_shape(tmp_path):
    stored = noise(6, 4, 3, 3).to(FP8)
    path = saved(tmp_path, {"x.weight": stored, "x.weight_scale": torch.arange(1.0, 7)})
    with open_base(path) as base:
        assert views_shape(base.find("lora_unet_x")) == (6, 4, 3, 3)
    assert torch.equal(weight_of(path), stored.float().flatten(1) * torch.arange(1.0, 7)[:, None])
    check_rows(path)


def test_thirds_of_a_scaled_weight_are_scaled(tmp_path):
    """FLUX in names of BFL, read by the names of diffusers."""
    shapes = {"double_blocks.0.img_attn.qkv.weight": (24, 8), "double_blocks.0.img_mlp.0.weight": (32, 8)}
    tensors = {key: noise(*shape, seed=len(key)).to(FP8) for key, shape in shapes.items()}
    scale = torch.arange(1.0, 25)
    path = tmp_path / "flux.safetensors"
    save_file({**tensors, "double_blocks.0.img_attn.qkv.weight_scale": scale}, path)
    fused = tensors["double_blocks.0.img_attn.qkv.weight"].float() * scale[:, None]
    for number, name in enumerate(("to_q", "to_k", "to_v")):
        weight = weight_of(path, f"transformer.transformer_blocks.0.attn.{name}")
        assert torch.equal(weight, fused[8 * number : 8 * number + 8])


@pytest.mark.parametrize("rows", [None, (8, 16)])
def test_norms_are_those_of_the_scaled_weight(tmp_path, rows):
    stored, scale = noise(24, 8).to(FP8), torch.arange(1.0, 25)
    path = tmp_path / "flux.safetensors"
    tensors = {"double_blocks.0.img_attn.qkv.weight": stored, "double_blocks.0.img_mlp.0.weight": noise(32, 8).to(FP8)}
    save_file({**tensors, "double_blocks.0.img_attn.qkv.weight_scale": scale}, path)
    weight = (stored.double() * scale[:, None])[slice(*rows) if rows else slice(None)]
    name = "transformer.transformer_blocks.0.attn.to_k" if rows else "lora_unet_double_blocks_0_img_attn_qkv"
    with open_base(path) as base:
        views = base.find(name)
        values = BaseNorms(base, cache=False).look_up([views], ("fro", "spn"))[views_id(views)]
    assert values["fro"] == pytest.approx(float(weight.norm()), rel=1e-6)
    assert values["spn"] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-6)


def test_a_quantised_base_has_a_norm_table(tmp_path):
    path = saved(tmp_path, {"x.weight": noise(6, 32).to(FP8), "x.weight_scale": torch.tensor(0.5)})
    norms.norms(path, tmp_path / "table.json")
    with open_base(path) as full, open_base(tmp_path / "table.json") as table:
        assert full.weights == table.weights
        assert table.norms["x.weight"]["fro"] == pytest.approx(float(weight_of(path).norm()), rel=1e-6)


def test_parts_of_a_folder_are_quantised_each_for_itself(tmp_path):
    stored = noise(24, 8).to(FP8)
    unet = {"double_blocks.0.img_attn.qkv.weight": stored, "double_blocks.0.img_mlp.0.weight": noise(32, 8)}
    unet["double_blocks.0.img_attn.qkv.weight_scale"] = torch.tensor(2.0)
    fixtures.write_tensors(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", unet)
    encoder = {"text_model.encoder.layers.0.mlp.fc1.weight": noise(8, 8), "text_model.embeddings.x.weight": noise(2, 2)}
    fixtures.write_tensors(tmp_path / "text_encoder" / "model.safetensors", encoder)
    with open_base(tmp_path) as base:
        assert base.family.name == "flux"
        assert torch.equal(base.weight(base.find("lora_unet_double_blocks_0_img_attn_qkv")), stored.float() * 2)
        first = base.find("lora_te1_text_model_encoder_layers_0_mlp_fc1")
        assert torch.equal(base.weight(first), encoder["text_model.encoder.layers.0.mlp.fc1.weight"])


# --- listed files, headers only -----------------------------------------------------------------


def write_listed(folder, name, texts):
    """A listed file with its own dtypes, full of zeros but for the texts (ending of the key -> JSON)."""
    listing = fixtures.about(name)
    infos = {}
    for key, shape in fixtures.shapes(name).items():
        kind = listing.get("dtypes", {}).get(key, listing.get("dtype", "F16"))
        size = {"F32": 4, "BF16": 2, "F16": 2}.get(kind, 1)
        infos[key] = TensorInfo(kind, shape, int(np.prod(shape, dtype=np.int64)) * size)
    path = folder / f"{name}.safetensors"
    header = header_bytes(infos, {})
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(info.nbytes for info in infos.values()))
    with open(path, "r+b") as file:
        for key, info in read_header(path)[0].items():
            for ending, value in texts.items():
                if key.endswith(ending):
                    file.seek(info.offset)
                    file.write(json.dumps(value(key)).encode().ljust(info.nbytes))
    return path


def nf4_facts(shapes):
    def facts(key):
        shape = next(shape for name, shape in shapes.items() if f"{name}.weight" in key)
        return {"blocksize": 64, "shape": shape, "nested_blocksize": 256, "nested_offset": 0.1}

    return facts


def test_scaled_files_have_only_the_names_of_the_model(tmp_path):
    comfy = {".comfy_quant": lambda key: {"format": "float8_e4m3fn"}}
    for name in ("base_flux_dev_fp8_scaled_old_excerpt", "base_flux_dev_fp8_scaled_new_excerpt"):
        with open_base(write_listed(tmp_path, name, comfy)) as base:
            assert base.family.name == "flux"
            assert len(base.modules("native")) == 16
            assert {key.rpartition(".")[2] for views in base.all_views for key in [views[0].key]} == {"weight"}
            assert len(base.find("transformer.single_transformer_blocks.0.attn.to_q")) == 1
    with open_base(write_listed(tmp_path, "base_qwen25vl_fp8scaled_excerpt", comfy)) as base:
        assert base.family.name == "llm"
        assert len(base.modules("native")) == 17


def test_a_bitsandbytes_file_has_the_shapes_of_the_model(tmp_path):
    shapes = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048),
        "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    }
    path = write_listed(tmp_path, "base_llama32_1b_bnb_nf4_excerpt", {"bitsandbytes__nf4": nf4_facts(shapes)})
    with open_base(path) as base:
        assert base.family.name == "llm"
        assert len(base.modules("native")) == 8
        for name, shape in shapes.items():
            assert views_shape(base.find(f"base_model.model.model.layers.0.{name}")) == shape


# --- bitsandbytes -------------------------------------------------------------------------------

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
GOLDEN = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af4c06d"
    "18e2a04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05d18e2af4c16d18e3b04c17e29f3b05d17e2af"
    "4c06d18e2a04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f3b05"
)


def four_bits(packed, absmax, shape, kind="nf4", table=NF4, nested=None):
    facts = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(shape)}
    parts = {"": packed, ".absmax": absmax, ".quant_map": torch.tensor(table)}
    if nested:
        block, offset, scales, numbers = nested
        facts |= {"nested_blocksize": block, "nested_offset": offset, "nested_dtype": "float32"}
        parts |= {".nested_absmax": scales, ".nested_quant_map": numbers}
    parts |= {f".quant_state.bitsandbytes__{kind}": text(facts)}
    return {f"x.weight{ending}": tensor for ending, tensor in parts.items()}


def test_nf4_is_read_as_bitsandbytes_reads_it(tmp_path):
    """Packed by bitsandbytes 0.50.2, and the numbers that it unpacks."""
    packed = torch.tensor(list(bytes.fromhex(GOLDEN)), dtype=torch.uint8)[:, None]
    path = saved(tmp_path, four_bits(packed, torch.tensor([1.0, 0.5, 2.0, 0.25]), (4, 64)))
    weight = weight_of(path)
    assert weight[:, :4].tolist() == [
        [-1.0, -0.28444138169288635, 0.44070982933044434, -0.6961928009986877],
        [-0.045525018125772476, 0.28130850195884705, -0.34809640049934387, 0.03979014977812767],
        [1.4459136724472046, -1.0501461029052734, 0.4922246038913727, 2.0],
        [-0.07111034542322159, 0.11017745733261108, -0.25, -0.022762509062886238],
    ]
    assert float(weight.double().norm()) == pytest.approx(10.830317852784754)
    check_rows(path)


@pytest.mark.parametrize("shape", [(6, 130), (5, 7), (3, 64), (4, 6, 3, 3)])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_looked_up_and_scaled_per_block(tmp_path, shape, nested):
    """Compared number by number; blocks cross rows, the last is not full."""
    generator = torch.Generator().manual_seed(1)
    count = int(np.prod(shape))
    blocks = -(-count // 64)
    packed = torch.randint(0, 256, (-(-count // 2), 1), generator=generator, dtype=torch.uint8)
    table = torch.linspace(-1, 1, 16).tolist()
    if nested:
        codes = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        outer = torch.rand(-(-blocks // 4), generator=generator)
        inner = torch.linspace(-1, 1, 256)
        absmax = [float(inner[int(code)] * outer[index // 4]) + 0.75 for index, code in enumerate(codes)]
        tensors = four_bits(packed, codes, shape, "fp4", table, (4, 0.75, outer, inner))
    else:
        scales = torch.rand(blocks, generator=generator)
        absmax = scales.tolist()
        tensors = four_bits(packed, scales, shape, "fp4", table)
    halves = [half for byte in packed.flatten().tolist() for half in (byte // 16, byte % 16)]
    expected = torch.tensor([table[half] * absmax[index // 64] for index, half in enumerate(halves[:count])])
    path = saved(tmp_path, tensors)
    torch.testing.assert_close(weight_of(path), expected.reshape(shape).flatten(1), rtol=1e-6, atol=1e-7)
    check_rows(path)


def test_int8_is_scaled_by_row(tmp_path):
    """As bitsandbytes makes it of rows with the largest numbers 1 and 0.49."""
    stored = torch.tensor([[-127, -33, 61, -102], [-13, 83, -83, 127]], dtype=torch.int8)
    scales = torch.tensor([1.0, 0.489990234375])
    path = saved(tmp_path, {"x.weight": stored, "x.SCB": scales, "x.weight_format": torch.tensor(0, dtype=torch.uint8)})
    expected = stored.double() * scales.double()[:, None] / 127
    torch.testing.assert_close(weight_of(path).double(), expected, rtol=1e-6, atol=0)
    assert weight_of(path)[1, 3] == pytest.approx(0.489990234375)


BROKEN = {
    "no scales": (lambda tensors: tensors.pop("x.weight.absmax"), r"x\.weight\.absmax should have 4 numbers.*has 0"),
    "too few bytes": (
        lambda tensors: tensors.update({"x.weight": torch.zeros(100, 1, dtype=torch.uint8)}),
        r"x\.weight should have 128 numbers for a weight of \[4, 64\], it has 100",
    ),
    "facts that are no JSON": (
        lambda tensors: tensors.update({"x.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}),
        "bitsandbytes__nf4 should be JSON",
    ),
    "facts that are a list": (
        lambda tensors: tensors.update({"x.weight.quant_state.bitsandbytes__nf4": text([1])}),
        "bitsandbytes__nf4 should be JSON",
    ),
    "facts without a shape": (
        lambda tensors: tensors.update({"x.weight.quant_state.bitsandbytes__nf4": text({"blocksize": 64})}),
        r"bitsandbytes__nf4 is broken \('shape'\)",
    ),
    "blocks of nothing": (
        lambda tensors: tensors.update(
            {"x.weight.quant_state.bitsandbytes__nf4": text({"blocksize": 0, "shape": [4, 64]})}
        ),
        "should have",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_inconsistent_four_bit_tensors_are_refused(tmp_path, damage, message):
    packed = torch.zeros(128, 1, dtype=torch.uint8)
    tensors = four_bits(packed, torch.ones(4), (4, 64))
    damage(tensors)
    with pytest.raises(DamagedFile, match=rf"model\.safetensors: .*{message}"):
        open_base(saved(tmp_path, tensors))


# --- what is not read ---------------------------------------------------------------------------

BYTES = torch.zeros(4, 4, dtype=torch.uint8)
REFUSED = {
    "GPTQ": ({"x.qweight": BYTES.int(), "x.scales": torch.ones(4)}, "GPTQ or AWQ"),
    "nvfp4": (
        {"x.weight": BYTES, "x.weight_scale": torch.ones(4, 1), "x.weight_scale_2": torch.ones(1)},
        "quantised as nvfp4",
    ),
    "nvfp4 by its text": ({"x.weight": BYTES, "x.comfy_quant": text({"format": "nvfp4"})}, "quantised as nvfp4"),
    "mxfp8": ({"x.weight": noise(4, 64).to(FP8), "x.comfy_quant": text({"format": "mxfp8"})}, "quantised as mxfp8"),
    "a text without a format": ({"x.weight": BYTES, "x.comfy_quant": text({})}, "quantised as None"),
    "int8 of ComfyUI": ({"x.weight": BYTES.char(), "x.weight_scale": torch.tensor(1.0)}, "x.weight is stored as I8"),
    "scales per block": (
        {"x.weight": noise(4, 64).to(FP8), "x.weight_scale": torch.ones(4, 2)},
        r"x\.weight_scale is \[4, 2\] for a weight of \[4, 64\]",
    ),
    "scales for inputs": (
        {"x.weight": noise(8, 4).to(FP8), "x.weight_scale": torch.ones(1, 4)},
        r"x\.weight_scale is \[1, 4\]",
    ),
    "DeepSeek": ({"x.weight": noise(4, 64).to(FP8), "x.weight_scale_inv": torch.ones(1, 1)}, "a scale per block"),
    "compressed-tensors": ({"x.weight_packed": BYTES.int(), "x.weight_scale": torch.ones(4)}, "compressed-tensors"),
    "HQQ": ({"x.W_q": BYTES}, "HQQ"),
    "quanto": ({"x.weight._data": BYTES.char(), "x.weight._scale": torch.ones(4)}, "quanto"),
    "Nunchaku": ({"x.qweight": BYTES.char(), "x.wscales": torch.ones(4)}, "quantised as"),
    "bytes of unknown meaning": ({"x.weight": BYTES}, "x.weight is stored as U8"),
}


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_other_quantised_files_are_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(InputError, match=rf"model\.safetensors: .*{message}.*Give the model in bf16 or fp16"):
        open_base(saved(tmp_path, tensors))


def test_formats_named_in_the_header_count(tmp_path):
    entry = json.dumps({"layers": {"x": {"format": "nvfp4"}}})
    with pytest.raises(InputError, match="quantised as nvfp4, which cannot be read \\(x\\)"):
        open_base(saved(tmp_path, {"x.weight": BYTES.float()}, {"_quantization_metadata": entry}))
    entry = json.dumps({"layers": {"x": {"format": "float8_e4m3fn"}}})
    assert weight_of(saved(tmp_path, {"x.weight": BYTES.float()}, {"_quantization_metadata": entry})).shape == (4, 4)
    with pytest.raises(DamagedFile, match="_quantization_metadata is broken"):
        open_base(saved(tmp_path, {"x.weight": BYTES.float()}, {"_quantization_metadata": "{"}))


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf():
    return pytest.importorskip("gguf")


def write_gguf(gguf, path, tensors, architecture="flux", kind="F32", numbers=()):
    """A GGUF file; `tensors` maps names to arrays, `numbers` holds more facts for the header."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in dict(numbers).items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(name, value)
    quantisation = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        array = np.ascontiguousarray(array, dtype=np.float32)
        if kind == "F32" or array.ndim < 2:
            writer.add_tensor(name, array)
        elif kind == "F16":
            writer.add_tensor(name, array.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def block_of_flux():
    return {
        "double_blocks.0.img_attn.qkv.weight": noise(192, 64, seed=1).numpy(),
        "double_blocks.0.img_mlp.0.weight": noise(256, 64, seed=2).numpy(),
        "double_blocks.0.img_attn.norm.key_norm.scale": noise(64, seed=3).numpy(),
    }


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0"])
def test_a_gguf_file_holds_what_the_package_unpacks(gguf, tmp_path, kind):
    tensors = block_of_flux()
    if kind == "TQ1_0":  # its blocks have 256 numbers
        tensors = {key: np.repeat(value, 4, axis=-1) for key, value in tensors.items()}
    path = write_gguf(gguf, tmp_path / "flux.gguf", tensors, kind=kind)
    quantisation = gguf.GGMLQuantizationType[kind]
    with open_base(path) as base:
        assert (base.family.name, base.kind) == ("flux", "file")
        for name in ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"):
            array = tensors[f"{name}.weight"]
            expected = gguf.quants.dequantize(gguf.quants.quantize(array, quantisation), quantisation)
            weight = base.weight(base.find(f"diffusion_model.{name}"))
            assert torch.equal(weight, torch.tensor(expected))
        third = base.weight(base.find("transformer.transformer_blocks.0.attn.to_k"))
        fused = base.weight(base.find("diffusion_model.double_blocks.0.img_attn.qkv"))
        assert torch.equal(third, fused[64:128])
    check_rows(path, "double_blocks.0.img_mlp.0.weight")


def test_a_gguf_file_is_known_by_its_first_bytes(gguf, tmp_path):
    path = write_gguf(gguf, tmp_path / "model.bin", block_of_flux())
    with open_base(path) as base:
        assert base.family.name == "flux"


def test_a_flattened_convolution_gets_its_shape_back(gguf, tmp_path):
    array = noise(8, 4, 3, 3).numpy()
    name = "input_blocks.1.0.in_layers.2.weight"
    path = write_gguf(
        gguf,
        tmp_path / "sd.gguf",
        {name: array.reshape(-1, 32), "input_blocks.1.1.proj_in.weight": noise(8, 8).numpy()},
        "sdxl",
        numbers={f"comfy.gguf.orig_shape.{name}": [8, 4, 3, 3]},
    )
    with open_base(path) as base:
        views = base.find("lora_unet_input_blocks_1_0_in_layers_2")
        assert views_shape(views) == (8, 4, 3, 3)
        assert torch.equal(base.weight(views), torch.tensor(array).flatten(1))
    check_rows(path, name)


def paired(array, heads):
    """The order of rows that llama.cpp wants: the halves of each head, row by row in turns."""
    halves = array.reshape(heads, 2, -1, array.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_language_models_have_names_and_rows_of_transformers(gguf, tmp_path, architecture):
    q, k, v = noise(32, 32, seed=1).numpy(), noise(16, 32, seed=2).numpy(), noise(16, 32, seed=3).numpy()
    heads, heads_kv = (4, 2) if architecture == "llama" else (0, 0)
    tensors = {
        "token_embd.weight": noise(96, 32, seed=4).numpy(),
        "blk.0.attn_q.weight": paired(q, heads) if heads else q,
        "blk.0.attn_k.weight": paired(k, heads_kv) if heads else k,
        "blk.0.attn_v.weight": v,
        "blk.0.attn_output.weight": noise(32, 32, seed=5).numpy(),
        "blk.0.ffn_down.weight": noise(32, 64, seed=6).numpy(),
        "blk.0.ffn_gate_exps.weight": noise(2, 64, 32, seed=7).numpy(),
        "output.weight": noise(96, 32, seed=8).numpy(),
    }
    numbers = {f"{architecture}.attention.head_count": 4, f"{architecture}.attention.head_count_kv": 2}
    path = write_gguf(gguf, tmp_path / "llm.gguf", tensors, architecture, numbers=numbers)
    prefix = "base_model.model.model.layers.0."
    expected = {
        "base_model.model.model.embed_tokens": tensors["token_embd.weight"],
        f"{prefix}self_attn.q_proj": q,
        f"{prefix}self_attn.k_proj": k,
        f"{prefix}self_attn.v_proj": v,
        f"{prefix}self_attn.o_proj": tensors["blk.0.attn_output.weight"],
        f"{prefix}mlp.down_proj": tensors["blk.0.ffn_down.weight"],
        "base_model.model.lm_head": tensors["output.weight"],
    }
    with open_base(path) as base:
        assert base.family.name == "llm"
        for name, array in expected.items():
            assert torch.equal(base.weight(base.find(name)), torch.tensor(array)), name
    check_rows(path, "model.layers.0.self_attn.q_proj.weight")


def test_other_architectures_have_names_of_their_own(gguf, tmp_path):
    gpt2 = {
        "token_embd.weight": noise(96, 32).numpy(),
        "position_embd.weight": noise(16, 32).numpy(),
        "blk.0.attn_qkv.weight": noise(96, 32, seed=1).numpy(),
        "blk.0.ffn_up.weight": noise(128, 32, seed=2).numpy(),
    }
    with open_base(write_gguf(gguf, tmp_path / "gpt2.gguf", gpt2, "gpt2")) as base:
        # here its matrices are stored the usual way round
        weight = base.weight(base.find("base_model.model.transformer.h.0.attn.c_attn"))
        assert torch.equal(weight, torch.tensor(gpt2["blk.0.attn_qkv.weight"]))
        assert base.find("base_model.model.transformer.wpe")
        assert base.find("base_model.model.transformer.h.0.mlp.c_fc")
    t5 = {
        "token_embd.weight": noise(96, 32).numpy(),
        "enc.blk.0.attn_q.weight": noise(32, 32, seed=1).numpy(),
        "enc.blk.0.ffn_up.weight": noise(64, 32, seed=2).numpy(),
    }
    with open_base(write_gguf(gguf, tmp_path / "t5.gguf", t5, "t5encoder")) as base:
        assert base.family.name == "t5"
        weight = base.weight(base.find("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1"))
        assert torch.equal(weight, torch.tensor(t5["enc.blk.0.ffn_up.weight"]))
    phi3 = {"blk.0.attn_qkv.weight": noise(96, 32).numpy(), "blk.0.ffn_up.weight": noise(64, 32, seed=2).numpy()}
    with open_base(write_gguf(gguf, tmp_path / "phi3.gguf", phi3, "phi3")) as base:
        assert base.find("base_model.model.model.layers.0.self_attn.qkv_proj")
        assert base.find("base_model.model.model.layers.0.mlp.gate_up_proj")


def test_a_gguf_base_is_identified_by_its_contents(gguf, tmp_path):
    first = write_gguf(gguf, tmp_path / "a.gguf", block_of_flux())
    changed = write_gguf(gguf, tmp_path / "b.gguf", {**block_of_flux(), "x.weight": noise(2, 2).numpy()})
    with open_base(first) as a, open_base(changed) as b:
        assert a.fingerprint != b.fingerprint
        assert set(BaseNorms(a, cache=False).look_up(a.all_views, ("fro",)))


def test_gguf_needs_its_package_and_says_so(gguf, tmp_path, monkeypatch):
    path = write_gguf(gguf, tmp_path / "flux.gguf", block_of_flux())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"flux\.gguf: .*pip install gguf"):
        open_base(path)


@pytest.mark.parametrize("length", [0, 3, 20, 60, 100, 1000, -1, -4096])
def test_a_gguf_file_that_is_cut_short_is_refused(gguf, tmp_path, length):
    contents = write_gguf(gguf, tmp_path / "flux.gguf", block_of_flux()).read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(contents[:length])
    with pytest.raises(DamagedFile, match=r"short\.gguf: .*Download or copy it again"):
        open_base(path)


def test_one_of_several_gguf_files_is_refused(gguf, tmp_path):
    path = write_gguf(gguf, tmp_path / "flux.gguf", block_of_flux(), numbers={"split.count": 3})
    with pytest.raises(InputError, match=r"flux\.gguf: is one of 3 parts of a model.*--merge"):
        open_base(path)


def test_heads_that_do_not_divide_the_rows_are_refused(gguf, tmp_path):
    tensors = {"blk.0.attn_q.weight": noise(30, 32).numpy(), "blk.0.ffn_down.weight": noise(8, 32).numpy()}
    path = write_gguf(gguf, tmp_path / "llm.gguf", tensors, "llama", numbers={"llama.attention.head_count": 4})
    with pytest.raises(DamagedFile, match=r"attn_q\.weight has 30 rows, which are no 4 heads"):
        open_base(path)


def test_a_file_named_gguf_with_other_contents_is_refused(gguf, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"something else entirely" * 10)
    with pytest.raises(DamagedFile, match="no GGUF file"):
        open_base(path)


def test_reading_an_unsupported_gguf_type_names_it(gguf, tmp_path):
    path = tmp_path / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    kind = gguf.GGMLQuantizationType.Q8_1
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name in ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mlp.0.weight"):
        writer.add_tensor(name, np.zeros((6, 64 // block * size), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_base(path) as base, pytest.raises(InputError, match="packed as Q8_1, which cannot be unpacked"):
        base.weight(base.find("diffusion_model.double_blocks.0.img_mlp.0"))
