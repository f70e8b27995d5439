"""Which weight of a base a layer changes, in every layout of the base."""

import json
import math
import re
from collections import Counter
from types import SimpleNamespace

import fixtures
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base, recognise, views_id, views_shape
from lorashrink.bases.norms import norms
from lorashrink.errors import DamagedFile, FamilyMismatch, InputError, NotABase, ShapeError
from lorashrink.linking.matching import fits, match
from lorashrink.names import address

UNET_FILE = "model.diffusion_model."
L_FILE = "conditioner.embedders.0.transformer.text_model.encoder.layers."
G_FILE = "conditioner.embedders.1.model.transformer.resblocks."
H_FILE = "cond_stage_model.model.transformer.resblocks."
SD1_L_FILE = "cond_stage_model.transformer.text_model.encoder.layers."
ALL_LAYOUTS = [layout for layouts in fixtures.LAYOUTS.values() for layout in layouts]
# Listed convolutions and linear layers of the UNets.
UNET_WEIGHTS = {"sdxl": 794, "sd15": 282, "sd2": 282}


@pytest.fixture(scope="module")
def base_in(tmp_path_factory):
    """Opens bases by the name of their layout."""
    folder = tmp_path_factory.mktemp("bases")
    with fixtures.opened_once(lambda layout: open_base(fixtures.write_base(folder, layout))) as get:
        yield get


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    """Opens listed adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    with fixtures.opened_once(lambda name: open_adapter(fixtures.write_adapter(folder, name))) as get:
        yield get


def family_of(name):
    return name.partition("_")[0]


# --- every layer of every adapter ---------------------------------------------------------------


PAIRS = [(name, layout) for name in fixtures.ADAPTERS for layout in fixtures.LAYOUTS[family_of(name)]]


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=[f"{name} on {layout}" for name, layout in PAIRS])
def test_every_adapter_layer_changes_one_weight_of_its_base(adapter_of, base_in, name, layout):
    layers = adapter_of(name).layers
    views = match(adapter_of(name), base_in(layout))
    assert [layer.name for layer, weight in zip(layers, views, strict=True) if not weight] == []
    wrong = [
        (layer.name, layer.shape, views_shape(weight))
        for layer, weight in zip(layers, views, strict=True)
        if not fits(layer, weight)
    ]
    assert wrong == []
    changed = Counter(views_id(weight) for weight in views)
    assert {weight: count for weight, count in changed.items() if count > 1} == {}


def test_norms_of_an_adapter_are_no_weights_of_the_base(base_in):
    unknown = [name for name in fixtures.module_names("sd15_locon_norm_kohya") if not base_in("sd15 folder").find(name)]
    assert unknown
    assert {"norm" in name for name in unknown} == {True}


@pytest.mark.parametrize("layout", fixtures.LAYOUTS["sdxl"])
def test_the_two_text_encoders_never_mix(base_in, layout):
    base = base_in(layout)
    keys = {
        part: {view.key for (p, _), views in base.weights.items() if p == part for view in views}
        for part in ("unet", "te1", "te2")
    }
    assert not keys["te1"] & keys["te2"]
    assert not keys["unet"] & (keys["te1"] | keys["te2"])
    widths = {
        part: views_shape(base.find(f"lora_{part}_text_model_encoder_layers_0_mlp_fc1")) for part in ("te1", "te2")
    }
    assert widths == {"te1": (3072, 768), "te2": (5120, 1280)}


# --- by hand ------------------------------------------------------------------------------------

D = "unet."
BY_HAND = [
    # the three thirds of open_clip's attention, in the order q, k, v
    ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "sdxl file", f"{G_FILE}0.attn.in_proj_weight[0:1280]"),
    ("lora_te2_text_model_encoder_layers_0_self_attn_k_proj", "sdxl file", f"{G_FILE}0.attn.in_proj_weight[1280:2560]"),
    ("lora_te2_text_model_encoder_layers_0_self_attn_v_proj", "sdxl file", f"{G_FILE}0.attn.in_proj_weight[2560:3840]"),
    ("text_encoder_2.text_model.encoder.layers.31.self_attn.v_proj", "sdxl file",
     f"{G_FILE}31.attn.in_proj_weight[2560:3840]"),
    ("lora_te2_text_model_encoder_layers_11_self_attn_out_proj", "sdxl file", f"{G_FILE}11.attn.out_proj.weight"),
    ("lora_te2_text_model_encoder_layers_11_mlp_fc1", "sdxl file", f"{G_FILE}11.mlp.c_fc.weight"),
    ("lora_te2_text_model_encoder_layers_11_mlp_fc2", "sdxl file", f"{G_FILE}11.mlp.c_proj.weight"),
    ("text_encoder_2.text_projection", "sdxl file", "conditioner.embedders.1.model.text_projection"),
    ("lora_te_text_model_encoder_layers_22_self_attn_k_proj", "sd2 file", f"{H_FILE}22.attn.in_proj_weight[1024:2048]"),
    ("lora_te_text_model_encoder_layers_22_mlp_fc2", "sd2 file with 24 blocks", f"{H_FILE}22.mlp.c_proj.weight"),
    # text encoders in Hugging Face names
    ("lora_te1_text_model_encoder_layers_11_self_attn_k_proj", "sdxl file", f"{L_FILE}11.self_attn.k_proj.weight"),
    ("lora_te_text_model_encoder_layers_11_self_attn_k_proj", "sdxl file", f"{L_FILE}11.self_attn.k_proj.weight"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", "sd15 file", f"{SD1_L_FILE}0.mlp.fc1.weight"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", "sd15 file without text_model",
     "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "sdxl folder",
     "text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "sdxl folder without text_model",
     "text_encoder.encoder.layers.0.mlp.fc1.weight"),
    ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "sdxl folder",
     "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.weight"),
    # as diffusers names the layers of a CLIPTextModel of transformers >= 5
    ("text_encoder.encoder.layers.3.mlp.fc1", "sdxl file", f"{L_FILE}3.mlp.fc1.weight"),
    ("text_encoder.encoder.layers.3.self_attn.q_proj", "sd15 file", f"{SD1_L_FILE}3.self_attn.q_proj.weight"),
    ("text_encoder.encoder.layers.3.self_attn.k_proj", "sd2 file", f"{H_FILE}3.attn.in_proj_weight[1024:2048]"),
    ("text_encoder.encoder.layers.3.mlp.fc1", "sdxl folder", "text_encoder.text_model.encoder.layers.3.mlp.fc1.weight"),
    ("text_encoder.encoder.layers.3.mlp.fc1", "sdxl folder without text_model",
     "text_encoder.encoder.layers.3.mlp.fc1.weight"),
    # samplers: the upsampler stands behind the attention where a level has one
    ("lora_unet_output_blocks_2_2_conv", "sdxl file", f"{UNET_FILE}output_blocks.2.2.conv.weight"),
    ("lora_unet_output_blocks_2_2_conv", "sdxl folder", f"{D}up_blocks.0.upsamplers.0.conv.weight"),
    ("unet.up_blocks.0.upsamplers.0.conv", "sdxl file", f"{UNET_FILE}output_blocks.2.2.conv.weight"),
    ("lora_unet_up_blocks_1_upsamplers_0_conv", "sdxl file", f"{UNET_FILE}output_blocks.5.2.conv.weight"),
    ("lora_unet_up_blocks_0_upsamplers_0_conv", "sd15 file", f"{UNET_FILE}output_blocks.2.1.conv.weight"),
    ("lora_unet_up_blocks_1_upsamplers_0_conv", "sd15 file", f"{UNET_FILE}output_blocks.5.2.conv.weight"),
    ("lora_unet_output_blocks_2_1_conv", "sd15 folder", f"{D}up_blocks.0.upsamplers.0.conv.weight"),
    ("lora_unet_input_blocks_3_0_op", "sdxl folder", f"{D}down_blocks.0.downsamplers.0.conv.weight"),
    ("lora_unet_down_blocks_1_downsamplers_0_conv", "sdxl file", f"{UNET_FILE}input_blocks.6.0.op.weight"),
    # attention
    ("lora_unet_input_blocks_4_1_proj_in", "sdxl folder", f"{D}down_blocks.1.attentions.0.proj_in.weight"),
    ("lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_k", "sdxl folder",
     f"{D}down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"),
    ("unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj", "sdxl file",
     f"{UNET_FILE}output_blocks.5.1.transformer_blocks.1.ff.net.0.proj.weight"),
    ("lora_unet_down_blocks_2_attentions_1_proj_in", "sd15 file", f"{UNET_FILE}input_blocks.8.1.proj_in.weight"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q", "sd15 file",
     f"{UNET_FILE}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out", "sd15 folder",
     f"{D}down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out", "sdxl file",
     f"{UNET_FILE}middle_block.1.transformer_blocks.0.attn2.to_out.0.weight"),
    ("lora_unet__middle_block_1_transformer_blocks_3_attn1_to_v", "sdxl folder",
     f"{D}mid_block.attentions.0.transformer_blocks.3.attn1.to_v.weight"),
    # resnets
    ("lora_unet_input_blocks_1_0_emb_layers_1", "sdxl folder", f"{D}down_blocks.0.resnets.0.time_emb_proj.weight"),
    ("lora_unet_input_blocks_4_0_skip_connection", "sdxl folder", f"{D}down_blocks.1.resnets.0.conv_shortcut.weight"),
    ("lora_unet_up_blocks_2_resnets_2_conv_shortcut", "sdxl file",
     f"{UNET_FILE}output_blocks.8.0.skip_connection.weight"),
    ("lora_unet_middle_block_0_in_layers_2", "sdxl folder", f"{D}mid_block.resnets.0.conv1.weight"),
    ("lora_unet_middle_block_2_out_layers_3", "sdxl folder", f"{D}mid_block.resnets.1.conv2.weight"),
    ("lora_unet_mid_block_resnets_1_time_emb_proj", "sd15 file", f"{UNET_FILE}middle_block.2.emb_layers.1.weight"),
    ("lora_unet_down_blocks_3_resnets_1_conv2", "sd15 file", f"{UNET_FILE}input_blocks.11.0.out_layers.3.weight"),
    # outside of the blocks
    ("lora_unet_input_blocks_0_0", "sdxl folder", f"{D}conv_in.weight"),
    ("unet.conv_out", "sdxl file", f"{UNET_FILE}out.2.weight"),
    ("lora_unet_time_embed_2", "sd2 folder", f"{D}time_embedding.linear_2.weight"),
    ("unet.add_embedding.linear_1", "sdxl file", f"{UNET_FILE}label_emb.0.0.weight"),
    # a file that holds the UNet alone
    ("lora_unet_input_blocks_7_1_proj_out", "sdxl UNet in LDM names", "input_blocks.7.1.proj_out.weight"),
    ("lora_unet_input_blocks_7_1_proj_out", "sdxl UNet in diffusers names",
     "down_blocks.2.attentions.0.proj_out.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout", "weight"), BY_HAND, ids=[f"{name} in {layout}" for name, layout, _ in BY_HAND]
)
def test_layers_change_the_weights_looked_up_by_hand(base_in, name, layout, weight):
    assert views_id(base_in(layout).find(name)) == weight


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("lora_te2_text_model_encoder_layers_12_mlp_fc1", "sd15 folder"),
        ("lora_te1_text_model_encoder_layers_12_mlp_fc1", "sdxl file"),
        ("lora_te2_text_model_encoder_layers_32_mlp_fc1", "sdxl file"),
        ("lora_unet_output_blocks_2_1_conv", "sdxl file"),
        ("lora_unet_input_blocks_9_0_in_layers_2", "sdxl file"),
        ("lora_unet_encoder_down_0_block_0_conv1", "sdxl file"),
        ("lora_unet_input_blocks_1_0_in_layers_0", "sdxl file"),
        ("text_model.encoder.layers.0.mlp.fc1", "sdxl file"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", "sdxl folder"),
    ],
    ids=[
        "second encoder of SD 1.5",
        "layer after the last of CLIP-L",
        "layer after the last of CLIP-G",
        "sampler where the attention stands",
        "block after the last",
        "VAE",
        "norm",
        "name without a part",
        "other model",
    ],
)
def test_a_layer_without_a_weight_in_the_base_is_not_found(base_in, name, layout):
    assert base_in(layout).find(name) == ()


# --- the two layouts of one base ----------------------------------------------------------------


def converted_unet(shapes, family):
    """The UNet of a single file as diffusers converts it: diffusers key -> key in the file."""
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if family == "sdxl" else None}
    return convert_ldm_unet_checkpoint({key: key for key in shapes}, config)


@pytest.mark.parametrize("family", ["sdxl", "sd15", "sd2"])
def test_unet_layouts_are_aliases_as_diffusers_converts_them(base_in, family):
    file, folder = base_in(f"{family} file"), base_in(f"{family} folder")
    expected = {
        key.removesuffix(".weight"): source
        for key, source in converted_unet(fixtures.shapes(f"base_{family}_ldm"), family).items()
        if key.endswith(".weight") and len(fixtures.shapes(f"base_{family}_ldm")[source]) > 1
    }
    assert len(expected) == UNET_WEIGHTS[family]
    by_diffusers_name = {name: views_id(file.find(f"unet.{name}")) for name in expected}
    assert by_diffusers_name == expected
    by_ldm_name = {
        name: views_id(folder.find("lora_unet_" + flat(source.removeprefix(UNET_FILE).removesuffix(".weight"))))
        for name, source in expected.items()
    }
    assert by_ldm_name == {name: f"unet.{name}.weight" for name in expected}
    shapes = {name: (file.find(f"unet.{name}"), folder.find(f"unet.{name}")) for name in expected}
    assert {name for name, (a, b) in shapes.items() if views_shape(a) != views_shape(b)} == set()


def flat(name):
    return name.replace(".", "_")


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """One SDXL model with numbers, narrow, as a single file and as the folder that diffusers makes of it."""
    shapes = {
        key: shape for key, shape in fixtures.shapes("base_sdxl_ldm").items() if not key.startswith("first_stage")
    }
    tensors = fixtures.random_tensors(fixtures.scaled(shapes))
    projection = "conditioner.embedders.1.model.text_projection"
    # not square, or a missing transposition would go unnoticed
    second = convert_open_clip_checkpoint(SimpleNamespace(), tensors, "conditioner.embedders.1.model.")
    tensors[projection] = tensors[projection][:, :24].clone()
    second["text_projection.weight"] = tensors[projection].T
    first = "conditioner.embedders.0.transformer."
    parts = {
        "unet": convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 2, "addition_embed_type": "text_time"}),
        "text_encoder": {key.removeprefix(first): value for key, value in tensors.items() if key.startswith(first)},
        "text_encoder_2": second,
    }
    folder = tmp_path_factory.mktemp("twins")
    file = fixtures.write_tensors(folder / "model.safetensors", tensors)
    with open_base(file) as a, open_base(fixtures.write_folder(folder / "model", parts)) as b:
        yield a, b


@pytest.mark.parametrize("name", ["sdxl_lora_kohya_te1_te2", "sdxl_locon_kohya", "sdxl_lora_diffusers_peft"])
def test_a_file_and_its_folder_hold_the_same_numbers(twins, name):
    file, folder = twins
    names = fixtures.module_names(name)
    assert all(file.find(module) and folder.find(module) for module in names)
    different = [
        module
        for module in names
        if not torch.equal(file.weight(file.find(module)), folder.weight(folder.find(module)))
    ]
    assert different == []


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder_2.text_projection",
        "lora_te2_transformer_resblocks_0_attn_in_proj",
        "lora_te2_transformer_resblocks_31_attn_out_proj",
        "lora_te2_transformer_resblocks_31_mlp_c_proj",
        "text_encoder_2.text_model.embeddings.token_embedding",
        "text_encoder_2.text_model.embeddings.position_embedding",
    ],
)
def test_open_clip_weights_have_the_same_numbers_under_every_name(twins, name):
    file, folder = twins
    assert torch.equal(file.weight(file.find(name)), folder.weight(folder.find(name)))


def test_a_bare_projection_is_seen_transposed(twins):
    file, folder = twins
    views = file.find("text_encoder_2.text_projection")
    assert views_shape(views) == (24, 40) == views_shape(folder.find("text_encoder_2.text_projection"))
    assert torch.equal(file.weight(views), file.store.read(views[0].key).T.float())


def test_a_fused_attention_is_stacked_from_a_split_one(twins):
    _, folder = twins
    views = folder.find("lora_te2_transformer_resblocks_5_attn_in_proj")
    start = "text_encoder_2.text_model.encoder.layers.5.self_attn."
    assert views_id(views) == f"{start}q_proj.weight + {start}k_proj.weight + {start}v_proj.weight"
    assert views_shape(views) == (120, 40)


def test_a_weight_is_read_as_a_matrix_in_float32(twins):
    file, _ = twins
    views = file.find("lora_unet_input_blocks_1_0_in_layers_2")
    assert views_shape(views) == (10, 10, 3, 3)
    weight = file.weight(views)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, file.store.read(views[0].key).float().reshape(10, 90))


# --- tables of names ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*ALL_LAYOUTS, *fixtures.UNET_LAYOUTS])
def test_every_unet_weight_is_found_by_its_own_flattened_name(base_in, layout):
    base = base_in(layout)
    start = re.compile(r"^(?:model\.diffusion_model\.|unet\.)?")
    keys = [
        key
        for key, info in base.store.tensors.items()
        if re.match(
            r"^(?:model\.diffusion_model\.|unet\.|(?:down|mid|up|conv|time|add|input|middle|output|out|label))", key
        )
        and key.endswith(".weight")
        and len(info.shape) > 1
    ]
    assert len(keys) == UNET_WEIGHTS[layout.partition(" ")[0]]
    own = {key: "lora_unet_" + flat(start.sub("", key).removesuffix(".weight")) for key in keys}
    assert len(set(own.values())) == len(keys)
    assert {key: views_id(base.find(name)) for key, name in own.items()} == {key: key for key in keys}


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_views_of_a_weight_cover_it_once(base_in, layout):
    """Parts neither overlap nor leave rows out, and names are unique."""
    base = base_in(layout)
    single = {views for views in base.weights.values() if len(views) == 1}
    by_key = {}
    for (view,) in single:
        by_key.setdefault(view.key, set()).add(view)
    assert len(by_key) > 280
    for key, views in by_key.items():
        rows = base.store.tensors[key].shape[0]
        parts = sorted(view.rows for view in views if view.rows)
        assert parts in ([], [(0, rows // 3), (rows // 3, 2 * rows // 3), (2 * rows // 3, rows)]), key
        sizes = {math.prod(view.shape) for view in views if not view.rows}
        assert sizes == {math.prod(base.store.tensors[key].shape)}, key


@pytest.mark.parametrize("layout", [*ALL_LAYOUTS, *fixtures.UNET_LAYOUTS])
def test_the_vae_and_averaged_weights_are_not_mapped(base_in, layout):
    base = base_in(layout)
    used = {view.key for views in base.weights.values() for view in views}
    assert len(used) >= UNET_WEIGHTS[layout.partition(" ")[0]]
    assert not [key for key in used if key.startswith(("first_stage_model.", "vae.", "model_ema."))]
    assert not [key for key in used if key.endswith("bias") or len(base.store.tensors[key].shape) < 2]


@pytest.mark.parametrize("layout", [*ALL_LAYOUTS, *fixtures.UNET_LAYOUTS])
def test_buffers_of_integers_are_no_weights(base_in, layout):
    """They would be measured for a norm table, and listed in it."""
    base = base_in(layout)
    kinds = {view.key: base.store.tensors[view.key].dtype for views in base.weights.values() for view in views}
    assert {key for key, dtype in kinds.items() if dtype != "F16"} == set()


def test_listed_single_files_hold_a_vae_and_averaged_weights():
    assert any(key.startswith("first_stage_model.") for key in fixtures.shapes("base_sdxl_ldm"))
    assert sum(key.startswith("model_ema.") for key in fixtures.shapes("base_sd15_ldm")) > 600


# --- families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*ALL_LAYOUTS, *fixtures.UNET_LAYOUTS])
def test_the_family_and_kind_of_a_base_are_recognised(base_in, layout):
    assert base_in(layout).family.name == layout.partition(" ")[0]
    assert base_in(layout).kind == ("folder" if "folder" in layout else "file")


SDXL, UNET = fixtures.shapes("base_sdxl_ldm"), fixtures.shapes("base_sdxl_diffusers_unet")
RELATIVES = {
    "SDXL with a fourth level": ({**SDXL, f"{UNET_FILE}input_blocks.10.0.in_layers.2.weight": (8, 8)}, "sdxl-refiner"),
    "its UNet with a fourth level": ({**UNET, "down_blocks.3.resnets.0.conv1.weight": (8, 8)}, "sdxl-refiner"),
    "Kolors": ({**UNET, "encoder_hid_proj.weight": (2048, 4096)}, "kolors"),
    "SSD-1B": ({key: shape for key, shape in UNET.items() if "mid_block.attentions" not in key}, "sdxl"),
    "SD 2.x with sizes": (
        {**fixtures.shapes("base_sd2_diffusers_unet"), "add_embedding.linear_1.weight": (1280, 2048)},
        "sd2",
    ),
    "inpainting": (fixtures.shapes("base_sd15_inpaint_diffusers_unet"), "sd15"),
    "a UNet that is none of these": (
        {"down_blocks.0.resnets.0.time_emb_proj.weight": (8, 8), "add_embedding.linear_1.weight": (8, 8)}
        | {"down_blocks.3.resnets.0.conv1.weight": (8, 8), "down_blocks.0.attentions.0.proj_in.weight": (8, 8, 1, 1)},
        "unet",
    ),
    "an autoencoder": (
        {"encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)},
        "unknown",
    ),
    "an adapter": (fixtures.shapes("sdxl_lora_kohya_te1_te2"), None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("shapes", "expected"), RELATIVES.values(), ids=RELATIVES)
def test_relatives_are_told_apart(shapes, expected):
    family = recognise(shapes)
    assert (family and family.name) == expected


def test_an_adapter_is_refused_as_a_base(tmp_path):
    path = fixtures.write_adapter(tmp_path, "sd15_lora_kohya")
    with pytest.raises(NotABase, match=r"sd15_lora_kohya\.safetensors: no checkpoint of a known family among its 792"):
        open_base(path)


# --- files and folders --------------------------------------------------------------------------

TRANSFORMER = {"double_blocks.0.img_attn.qkv.weight": (24, 8), "double_blocks.0.img_mlp.0.weight": (32, 8)}
CLIP = {"text_model.encoder.layers.0.mlp.fc1.weight": (32, 8), "text_model.final_layer_norm.weight": (8,)}
T5 = {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}
IN_PARTS = {"lora_unet_double_blocks_0_img_mlp_0", "lora_te1_text_model_encoder_layers_0_mlp_fc1"}
FOLDERS = {
    "parts": ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"],
    "parts in half precision": [
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    ],
}


@pytest.mark.parametrize("names", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_is_joined_from_its_parts(tmp_path, names):
    for name, shapes in zip(names, (TRANSFORMER, CLIP), strict=True):
        fixtures.write_header(tmp_path / name, shapes)
    fixtures.write_header(tmp_path / "text_encoder_2" / "model.safetensors", T5)
    fixtures.write_header(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.x.weight": (8, 8)})
    with open_base(tmp_path) as base:
        assert (base.kind, base.family.name) == ("folder", "flux")
        assert all(base.find(name) for name in IN_PARTS)
        assert views_id(base.find("lora_te3_encoder_block_0_layer_0_SelfAttention_q")).startswith("text_encoder_2.")
        assert not [key for key in base.shapes if key.startswith("vae.")]


def test_all_four_encoders_of_a_folder_are_found(tmp_path):
    hidream = {"double_stream_blocks.0.block.attn1.to_q.weight": (8, 8)}
    fixtures.write_header(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", hidream)
    llama = {"model.layers.0.self_attn.q_proj.weight": (8, 8)}
    for folder, shapes in (("", CLIP), ("_2", CLIP), ("_3", T5), ("_4", llama)):
        fixtures.write_header(tmp_path / f"text_encoder{folder}" / "model.safetensors", shapes)
    with open_base(tmp_path) as base:
        assert base.family.name == "hidream"
        folders = [
            views_id(base.find(name)).partition(".")[0]
            for name in (
                "text_encoder.text_model.encoder.layers.0.mlp.fc1",
                "lora_te2_text_model_encoder_layers_0_mlp_fc1",
                "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
                "text_encoder_4.model.layers.0.self_attn.q_proj",
            )
        ]
        assert folders == ["text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"]


def write_shards(folder, stem, tensors, index=None):
    names = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    keys = sorted(tensors)
    shards = dict(zip(names, (keys[:1], keys[1:]), strict=True))
    for name, held in shards.items():
        fixtures.write_header(folder / name, {key: tensors[key] for key in held})
    weight_map = {key: name for name, held in shards.items() for key in held}
    path = folder / (index or f"{stem}.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("index", [None, "diffusion_pytorch_model.safetensors.index.fp16.json"])
def test_shards_open_by_their_index_and_by_their_folder(tmp_path, index):
    index_file = write_shards(tmp_path / "transformer", "diffusion_pytorch_model", TRANSFORMER, index)
    with open_base(index_file) as base:
        assert (base.kind, base.family.name) == ("shards", "flux")
    for folder in (tmp_path, tmp_path / "transformer"):
        with open_base(folder) as base:
            assert (base.kind, base.family.name) == ("folder", "flux")
            assert base.find("transformer.transformer_blocks.0.attn.to_v")


def test_a_folder_of_transformers_is_a_base(tmp_path):
    llama = {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.embed_tokens.weight": (16, 8)}
    write_shards(tmp_path / "shards", "model", llama)
    fixtures.write_header(tmp_path / "file" / "model.safetensors", llama)
    (tmp_path / "pickle").mkdir()
    torch.save({key: torch.ones(shape) for key, shape in llama.items()}, tmp_path / "pickle" / "pytorch_model.bin")
    for name in ("shards", "file", "pickle"):
        with open_base(tmp_path / name) as base:
            assert (base.kind, base.family.name) == ("folder", "llm")
            assert views_shape(base.find("base_model.model.model.layers.0.self_attn.q_proj")) == (8, 8)
            assert base.weight(base.find("base_model.model.lm_head")).shape == (16, 8)


def test_a_pickle_among_the_parts_is_refused(tmp_path):
    fixtures.write_header(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", TRANSFORMER)
    (tmp_path / "text_encoder").mkdir()
    torch.save({"x.weight": torch.ones(2, 2)}, tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: weights of a folder must be safetensors"):
        open_base(tmp_path)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path):
    torch.save({"x.weight": torch.ones(2, 2), "run": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DamagedFile, match="could run code"):
        open_base(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(NotABase, match=r"no unet/, transformer/ or text_encoder/ with .*Give the folder of the model"):
        open_base(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    index_file = write_shards(tmp_path / "transformer", "diffusion_pytorch_model", TRANSFORMER)
    (tmp_path / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"00002-of-00002\.safetensors: no such file"):
        open_base(index_file)


@pytest.mark.parametrize(("version", "message"), [(1, "it has version 1, this program reads 2"), (3, "version 3")])
def test_a_norm_table_of_another_version_is_refused(tmp_path, version, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": "lorashrink-norms", "version": version, "weights": {}}))
    with pytest.raises(NotABase, match=rf"table\.json: .*{message}.*lorashrink base-norms BASE"):
        open_base(path)


def test_a_norm_table_knows_the_modules_of_both_layouts(tmp_path):
    path = fixtures.write_header(tmp_path / "flux.safetensors", TRANSFORMER)
    norms(path, tmp_path / "table.json")
    with open_base(path) as full, open_base(tmp_path / "table.json") as table:
        assert (table.kind, table.family) == ("norms", full.family)
        assert table.weights == full.weights
        for layout in ("native", "diffusers"):
            assert table.modules(layout) == full.modules(layout)
        assert len(full.modules("native")) == 2
        assert len(full.modules("diffusers")) == 4


def test_weights_without_norms_in_a_table_are_not_found(tmp_path):
    """Older tables lack weights whose names a later version knows."""
    path = fixtures.write_header(tmp_path / "flux.safetensors", TRANSFORMER)
    norms(path, tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    del table["norms"]["double_blocks.0.img_attn.qkv.weight[0:8]"]
    (tmp_path / "table.json").write_text(json.dumps(table))
    with open_base(tmp_path / "table.json") as base:
        assert base.find("transformer.transformer_blocks.0.attn.to_q") == ()
        assert base.find("transformer.transformer_blocks.0.attn.to_k")
        assert ("unet", "transformer_blocks.0.attn.to_q") not in base.modules("diffusers")


def test_a_missing_base_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_base(tmp_path / "absent.safetensors")


def test_a_folder_without_text_encoders_maps_the_unet_alone(adapter_of, tmp_path):
    unet = fixtures.shapes("base_sdxl_diffusers_unet")
    fixtures.write_header(tmp_path / "unet" / fixtures.WEIGHTS["unet"], unet)
    with open_base(tmp_path) as base:
        views = match(adapter_of("sdxl_lora_kohya_te1_te2"), base)
    layers = adapter_of("sdxl_lora_kohya_te1_te2").layers
    unmapped = [address(layer.name)[0] for layer, weight in zip(layers, views, strict=True) if not weight]
    assert Counter(unmapped) == {"te1": 72, "te2": 192}


MISMATCHES = [
    ("sd15_lora_kohya", "sdxl file", "SD 1.x, but .* is SDXL"),
    ("sd15_lora_kohya", "sd2 folder", "SD 1.x, but .* is SD 2.x"),
    ("sdxl_lora_kohya_te1_te2", "sd15 file", "SDXL, but .* is SD 1.x"),
    ("sdxl_lora_diffusers_peft", "sd15 folder", "SDXL, but .* is SD 1.x"),
    ("sd2_lora_kohya", "sd15 file", "SD 2.x, but .* is SD 1.x"),
    ("sd2_lora_kohya", "sdxl folder", "SD 2.x, but .* is SDXL"),
]


@pytest.mark.parametrize(("name", "layout", "message"), MISMATCHES, ids=[f"{a} on {b}" for a, b, _ in MISMATCHES])
def test_an_adapter_for_another_family_is_refused(adapter_of, base_in, name, layout, message):
    with pytest.raises(FamilyMismatch, match=message):
        match(adapter_of(name), base_in(layout))


def test_a_misfit_of_unknown_family_is_refused_with_both_shapes(base_in, tmp_path):
    name = "lora_unet_input_blocks_1_0_in_layers_2"
    shapes = {f"{name}.lora_up.weight": (384, 4, 1, 1), f"{name}.lora_down.weight": (4, 384, 3, 3)}
    with (
        open_adapter(fixtures.write_header(tmp_path / "a.safetensors", shapes)) as wide,
        pytest.raises(ShapeError, match=r"\[384, 384, 3, 3\].*\[320, 320, 3, 3\]"),
    ):
        match(wide, base_in("sdxl file"))
