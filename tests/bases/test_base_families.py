"""Every family of models: its bases in all layouts, against diffusers' own conversions and against looking by hand.

Conversions are followed row by row: a tensor of one column that holds the numbers of its rows is put through
diffusers, and comes out under another name, in parts, or with its halves exchanged.
"""

from collections import Counter
from functools import cache

import diffusers
import fixtures
import pytest
import torch
from diffusers.loaders import single_file_utils as convert

from lorashrink.adapters import adapter_family, open_adapter
from lorashrink.adapters.model_family import family_of
from lorashrink.bases import FAMILIES, open_base, recognise, views_id, views_shape
from lorashrink.bases.rules import LAYOUTS
from lorashrink.errors import NotABase, NotAnAdapter
from lorashrink.linking.loaders import loads
from lorashrink.linking.matching import fits, match
from lorashrink.names import address, flat

QUANTISED = ("base_flux_dev_fp8_scaled_new_excerpt", "base_llama32_1b_bnb_nf4_excerpt")  # see test_quantised.py
READABLE = [name for name in fixtures.ALL_BASES if name not in QUANTISED]
# What the lists call a family, where the program has another name for it.
FAMILY_NAMES = {
    "wan21": "wan",
    "wan22": "wan",
    "llm-llama": "llm",
    "llm-qwen": "llm",
    "qwen-vl-te": "llm",
    "llm-gpt2": "gpt2",
    "t5xxl": "t5",
}


module_names = cache(fixtures.module_names)


def family_of_list(name):
    family = fixtures.about(name)["family"]
    return FAMILY_NAMES.get(family, family)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """Opens bases, headers only: by the name of a list, or under another name with a dictionary of shapes."""
    folder = tmp_path_factory.mktemp("bases")

    def opener(name, shapes=None):
        shapes = fixtures.shapes(name) if shapes is None else shapes
        return open_base(fixtures.write_header(folder / f"{name}.safetensors", shapes))

    with fixtures.opened_once(opener) as get:
        yield get


# --- recognition --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fixtures.ALL_BASES)
def test_the_family_of_a_listed_base_is_recognised(name):
    assert recognise(fixtures.shapes(name)).name == family_of_list(name)


@pytest.mark.parametrize("name", fixtures.ALL_ADAPTERS)
def test_an_adapter_is_no_base(name):
    assert recognise(fixtures.shapes(name)) is None


def test_names_and_titles_of_families_are_unique():
    assert len({family.name for family in FAMILIES}) == len({family.title for family in FAMILIES}) == len(FAMILIES)


DIFFUSERS_CLASSES = {
    "minimax-h3": "MiniMaxH3Transformer3DModel",
    "ideogram4": "Ideogram4Transformer2DModel",
    "flux3": "Flux3Transformer2DModel",
    "ernie-image": "ErnieImageTransformer2DModel",
    "ace-step": "AceStepTransformer1DModel",
    "ltxv": "LTX2VideoTransformer3DModel",
    "krea2": "Krea2Transformer2DModel",
    "qwen-image": "QwenImageTransformer2DModel",
    "z-image": "ZImageTransformer2DModel",
    "wan": "WanTransformer3DModel",
}


@pytest.mark.parametrize("family", DIFFUSERS_CLASSES)
def test_a_model_of_diffusers_and_its_adapters_are_recognised(family, base_of, tmp_path):
    """In the sizes that diffusers itself gives it; every linear layer is found under its own name."""
    with torch.device("meta"):
        model = getattr(diffusers, DIFFUSERS_CLASSES[family])()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    factors = {}
    for name in linear:
        out, inner = shapes[f"{name}.weight"]
        factors |= {f"transformer.{name}.lora_A.weight": (4, inner), f"transformer.{name}.lora_B.weight": (out, 4)}
    base = base_of(f"diffusers_{family}", shapes)
    assert base.family.name == family
    with open_adapter(fixtures.write_header(tmp_path / "a.safetensors", factors)) as adapter:
        assert adapter_family(adapter) == family
        assert [[view.key for view in views] for views in match(adapter, base)] == [
            [f"{layer.name.removeprefix('transformer.')}.weight"] for layer in adapter
        ]
        assert "diffusers" in loads(adapter).loads_in


PLACES = {
    ("sd15", "unet"): ("unet", "diffusion_model."),
    ("sd15", "te1"): ("text_encoder", "text_encoders.clip_l.transformer."),
    ("sdxl", "te2"): ("text_encoder_2", "text_encoders.clip_g.transformer."),
    ("sdxl-refiner", "te1"): ("text_encoder_2", "text_encoders.clip_g.transformer."),
    ("flux", "unet"): ("transformer", "diffusion_model."),
    ("flux", "te1"): ("text_encoder", "text_encoders.clip_l.transformer."),
    ("flux", "te3"): ("text_encoder_2", "text_encoders.t5xxl.transformer."),
    ("sd3", "te3"): ("text_encoder_3", "text_encoders.t5xxl.transformer."),
    ("hidream", "te4"): ("text_encoder_4", "text_encoders.llama.transformer."),
    ("cascade", "unet"): ("prior", "diffusion_model."),
    ("llm", "unet"): ("", "diffusion_model."),
    ("sd15", "te2"): ("", ""),
}


@pytest.mark.parametrize(("family", "part"), PLACES)
def test_a_family_says_where_programs_put_its_parts(family, part):
    row = next(candidate for candidate in FAMILIES if candidate.name == family)
    assert (row.folder(part), row.in_one_file(part)) == PLACES[family, part]


def test_a_family_says_how_kohya_names_its_layers():
    rows = {family.name: family for family in FAMILIES}
    assert {name for name, row in rows.items() if row.kohya == "diffusers"} == {"sd15", "sd2", "sdxl-refiner"}
    assert {name for name, row in rows.items() if row.kohya not in LAYOUTS} == set()
    encoders = {name: row.encoders for name, row in rows.items() if row.encoders != 1}
    assert encoders == {
        **dict.fromkeys(("sdxl", "clip-g", "hunyuan", "hunyuan-image", "hunyuan-dit"), 2),
        **dict.fromkeys(("flux", "sd3", "t5"), 3),
        "hidream": 4,
        "gpt2": 0,
        "llm": 0,
    }


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "net.", "module.", "transformer."])
@pytest.mark.parametrize("name", ["base_wan21_1_3b_native", "base_z_image_diffusers", "base_auraflow_diffusers"])
def test_a_prefix_of_all_names_changes_nothing(base_of, name, prefix):
    plain = base_of(name)
    prefixed = base_of(f"{name} {prefix}", {prefix + key: shape for key, shape in fixtures.shapes(name).items()})
    assert prefixed.family is plain.family
    assert prefixed.weights.keys() == plain.weights.keys()


def test_an_unknown_family_is_searched_by_its_own_names(base_of):
    shapes = {"stack.0.gate.weight": (8, 4), "stack.0.gate.bias": (8,), "stack.0.conv.weight": (8, 4, 3, 3)}
    base = base_of("unknown", shapes)
    assert (base.family.name, base.family.title) == ("unknown", "an unknown family")
    assert views_id(base.find("lora_unet_stack_0_gate")) == "stack.0.gate.weight"
    assert views_id(base.find("diffusion_model.stack.0.conv")) == "stack.0.conv.weight"
    assert base.find("stack.0.missing") == ()


@pytest.mark.parametrize(
    "shapes",
    [{"x.bias": (8,)}, {"norm.weight": (8,)}, {"position_ids": (1, 77)}, {}],
    ids=["a bias", "a vector", "an index", "nothing"],
)
def test_a_file_without_a_matrix_is_no_base(tmp_path, shapes):
    path = fixtures.write_header(tmp_path / "small.safetensors", shapes)
    with pytest.raises(NotABase, match=r"small\.safetensors: (?:no checkpoint of a known family|holds no tensors)"):
        open_base(path)


# --- adapters and what they look like -----------------------------------------------------------


@pytest.fixture(scope="module")
def layers_of(tmp_path_factory):
    """The layers of a listed adapter that are decomposed."""
    folder, opened = tmp_path_factory.mktemp("adapters"), {}

    def get(name):
        if name not in opened:
            try:
                with open_adapter(fixtures.write_adapter(folder, name)) as adapter:
                    opened[name] = adapter.layers
            except NotAnAdapter:
                opened[name] = ()
        return opened[name]

    return get


@pytest.mark.parametrize("name", fixtures.ALL_ADAPTERS)
def test_an_adapter_looks_like_its_family_or_does_not_tell(layers_of, name):
    expected = family_of_list(name)
    with_shapes = family_of((layer.name, layer.shape) for layer in layers_of(name))
    assert with_shapes in (expected, None)
    assert family_of((module, ()) for module in module_names(name)) in (expected, None)
    full = (fixtures.about(name)["complete"], fixtures.about(name)["algo"]) == (True, "lora") and len(
        layers_of(name)
    ) > 100
    assert with_shapes == expected or not full or "te1" in str(expected) or name == "flux_lora_kohya_t5"


def test_a_shape_that_is_not_known_decides_nothing():
    names = ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"]
    assert family_of((name, (640, 2048)) for name in names) == "sdxl"
    assert family_of((name, (640,)) for name in names) is None
    assert family_of((name, ()) for name in names) is None
    assert family_of([]) is None


# --- every layer of every adapter on every layout of its base -----------------------------------

# Bases of another size than the adapter was made for, and lists that hold a part of a model.
_OTHER_SIZE = {
    "flux2_klein4b_lora_diffusers": ("base_flux2_dev_diffusers", "base_flux2_klein9b_bfl_excerpt"),
    "sd35_medium": ("base_sd35_large_diffusers", "base_sd35_large_native", "base_sd3_medium_comfy"),
    "wan21_1_3b": ("base_wan21_14b_i2v_native",),
    "llama": ("base_llama31_8b", "base_llama32_1b_bnb_nf4_excerpt"),
    "qwen3": ("base_qwen25_0_5b",),
}


def fitting_bases(adapter):
    excluded = {base for start, bases in _OTHER_SIZE.items() if adapter.startswith(start) for base in bases}
    family = fixtures.about(adapter)["family"]
    return [
        name
        for name in fixtures.ALL_BASES
        if fixtures.about(name)["family"] == family
        and name not in excluded
        and "excerpt" not in name
        and "original" not in name
    ]


MATCHES = [(adapter, base) for adapter in fixtures.ALL_ADAPTERS for base in fitting_bases(adapter)]
# Tensors of layers that are not weights: norms, replaced vectors, and the parts of T-LoRA and VB-LoRA.
_NOT_WEIGHTS = ("norm", "_layer", "vblora", "vera_", "ln_tuning")


@pytest.mark.parametrize(("adapter", "base"), MATCHES, ids=[f"{a} on {b}" for a, b in MATCHES])
def test_every_layer_changes_one_weight_whatever_the_layout(base_of, layers_of, adapter, base):
    opened = base_of(base)
    parts = {part for part, _ in opened.weights}
    names = [name for name in module_names(adapter) if not any(word in name for word in _NOT_WEIGHTS)]
    names = [name for name in names if name != "base_model" and (address(name)[0] in parts | {""} or opened.find(name))]
    assert [name for name in names if not opened.find(name)] == []
    weights = Counter(views_id(opened.find(name)) for name in names)
    # the head of Llama 3.2 is the embedding itself
    twice = {weight for weight, count in weights.items() if count > 1} - {"model.embed_tokens.weight"}
    assert twice == set()
    if fixtures.about(adapter)["provenance"] == "synthetic":
        return  # its names are real, its shapes are not
    wrong = {
        layer.name: (layer.shape, views_shape(opened.find(layer.name)))
        for layer in layers_of(adapter)
        if opened.find(layer.name) and not fits(layer, opened.find(layer.name))
    }
    # a control adapter doubles the first layer's inputs, and the lists for language models have a small vocabulary
    assert wrong.keys() - {"img_in", "base_model.model.model.embed_tokens", "base_model.model.lm_head"} == set()


def test_enough_pairs_of_adapters_and_bases_are_tested():
    assert len(MATCHES) > 100
    assert len({family_of_list(adapter) for adapter, _ in MATCHES}) == 18


# --- by hand ------------------------------------------------------------------------------------

FLUX, SD3 = "model.diffusion_model.", "model.diffusion_model.joint_blocks."
BY_HAND = [
    # FLUX: q, k and v are thirds; linear1 holds the MLP too; XLabs' names; halves of the last modulation
    ("transformer.transformer_blocks.7.attn.to_k", "base_flux_dev_comfy_full",
     f"{FLUX}double_blocks.7.img_attn.qkv.weight[3072:6144]"),
    ("lora_transformer_transformer_blocks_7_attn_add_v_proj", "base_flux_dev_comfy_full",
     f"{FLUX}double_blocks.7.txt_attn.qkv.weight[6144:9216]"),
    ("lycoris_single_transformer_blocks_37_attn_to_q", "base_flux_dev_comfy_full",
     f"{FLUX}single_blocks.37.linear1.weight[0:3072]"),
    ("transformer.single_transformer_blocks.0.proj_mlp", "base_flux_dev_comfy_full",
     f"{FLUX}single_blocks.0.linear1.weight[9216:21504]"),
    ("transformer.single_transformer_blocks.0.proj_out", "base_flux_dev_comfy_full",
     f"{FLUX}single_blocks.0.linear2.weight"),
    ("transformer.proj_out", "base_flux_dev_comfy_full", f"{FLUX}final_layer.linear.weight"),
    ("transformer.norm_out.linear", "base_flux_dev_comfy_full",
     f"{FLUX}final_layer.adaLN_modulation.1.weight[3072:6144] + "
     f"{FLUX}final_layer.adaLN_modulation.1.weight[0:3072]"),
    ("lora_unet_final_layer_adaLN_modulation_1", "base_flux_dev_diffusers",
     "norm_out.linear.weight[3072:6144] + norm_out.linear.weight[0:3072]"),
    ("double_blocks.3.processor.qkv_lora1", "base_flux_dev_comfy_full", f"{FLUX}double_blocks.3.img_attn.qkv.weight"),
    ("double_blocks.3.processor.proj_lora2", "base_flux_dev_diffusers", "transformer_blocks.3.attn.to_add_out.weight"),
    ("double_blocks.3.processor.qkv_lora2", "base_flux_dev_diffusers",
     " + ".join(f"transformer_blocks.3.attn.add_{letter}_proj.weight" for letter in "qkv")),
    ("single_blocks.3.processor.qkv_lora", "base_flux_dev_comfy_full", f"{FLUX}single_blocks.3.linear1.weight[0:9216]"),
    ("single_blocks.3.processor.qkv_lora", "base_flux_dev_diffusers",
     " + ".join(f"single_transformer_blocks.3.attn.to_{letter}.weight" for letter in "qkv")),
    ("diffusion_model.single_blocks.3.linear1", "base_flux_dev_diffusers",
     " + ".join(f"single_transformer_blocks.3.{name}.weight"
                for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))),
    ("transformer.transformer_blocks.0.attn.to_added_qkv", "base_flux_dev_comfy_full",
     f"{FLUX}double_blocks.0.txt_attn.qkv.weight"),
    ("sformer_blocks.0.ff.net.2", "base_flux_dev_diffusers", "transformer_blocks.0.ff.net.2.weight"),
    # FLUX: T5 is the third encoder for some and the second for others, CLIP the first
    ("lora_te3_encoder_block_5_layer_0_SelfAttention_q", "base_flux_dev_comfy_full",
     "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.q.weight"),
    ("lora_te2_encoder_block_5_layer_1_DenseReluDense_wo", "base_flux_dev_comfy_full",
     "text_encoders.t5xxl.transformer.encoder.block.5.layer.1.DenseReluDense.wo.weight"),
    ("text_encoder_2.encoder.block.5.layer.0.SelfAttention.v", "base_flux_dev_comfy_full",
     "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.v.weight"),
    ("text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.o", "base_flux_dev_comfy_full",
     "text_encoders.t5xxl.transformer.encoder.block.5.layer.0.SelfAttention.o.weight"),
    ("lora_te1_text_model_encoder_layers_3_mlp_fc2", "base_flux_dev_comfy_full",
     "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc2.weight"),
    ("text_encoder.encoder.layers.3.mlp.fc2", "base_flux_dev_comfy_full",
     "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc2.weight"),
    # FLUX.2: the single blocks stay fused
    ("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", "base_flux2_klein9b_bfl_excerpt",
     "single_blocks.0.linear1.weight"),
    ("transformer.single_transformer_blocks.0.attn.to_out", "base_flux2_klein9b_bfl_excerpt",
     "single_blocks.0.linear2.weight"),
    ("lora_unet_single_blocks_19_linear2", "base_flux2_klein4b_diffusers",
     "single_transformer_blocks.19.attn.to_out.weight"),
    ("transformer.transformer_blocks.0.ff_context.linear_in", "base_flux2_klein9b_bfl_excerpt",
     "double_blocks.0.txt_mlp.0.weight"),
    # SD 3: the last block's context has two parts of modulation, in the other order
    ("transformer.transformer_blocks.22.norm1_context.linear", "base_sd35_medium_native",
     f"{SD3}22.context_block.adaLN_modulation.1.weight"),
    ("transformer.transformer_blocks.23.norm1_context.linear", "base_sd35_medium_native",
     f"{SD3}23.context_block.adaLN_modulation.1.weight[1536:3072] + "
     f"{SD3}23.context_block.adaLN_modulation.1.weight[0:1536]"),
    ("lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", "base_sd35_medium_diffusers",
     "transformer_blocks.23.norm1_context.linear.weight[1536:3072] + "
     "transformer_blocks.23.norm1_context.linear.weight[0:1536]"),
    ("transformer.transformer_blocks.12.attn2.to_v", "base_sd35_medium_native",
     f"{SD3}12.x_block.attn2.qkv.weight[3072:4608]"),
    ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "base_sd3_medium_comfy",
     "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1.weight"),
    ("lora_te3_encoder_block_3_layer_0_SelfAttention_k", "base_sd3_medium_comfy",
     "text_encoders.t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.k.weight"),
    # HunyuanVideo, in its three spellings
    ("transformer.double_blocks.3.txt_mlp.fc2", "base_hunyuan_video_native", "double_blocks.3.txt_mlp.2.weight"),
    ("lora_unet_double_blocks_3_img_mod_linear", "base_hunyuan_video_native", "double_blocks.3.img_mod.lin.weight"),
    ("lora_unet_double_blocks_3_img_mod_lin", "base_hunyuan_video_original_blocks",
     "double_blocks.3.img_mod.linear.weight"),
    ("diffusion_model.double_blocks.3.img_attn.qkv", "base_hunyuan_video_original_blocks",
     "double_blocks.3.img_attn_qkv.weight"),
    ("transformer.transformer_blocks.3.attn.add_k_proj", "base_hunyuan_video_original_blocks",
     "double_blocks.3.txt_attn_qkv.weight[3072:6144]"),
    ("transformer.txt_in.individual_token_refiner.blocks.1.self_attn_qkv", "base_hunyuan_video_native",
     "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight"),
    ("transformer.context_embedder.token_refiner.refiner_blocks.1.attn.to_v", "base_hunyuan_video_native",
     "txt_in.individual_token_refiner.blocks.1.self_attn.qkv.weight[6144:9216]"),
    ("diffusion_model.txt_in.c_embedder.in_layer", "base_hunyuan_video_diffusers",
     "context_embedder.time_text_embed.text_embedder.linear_1.weight"),
    # HunyuanImage, fused and split
    ("lora_unet_single_blocks_3_linear1_mlp", "base_hunyuan_image21_diffusers",
     "single_transformer_blocks.3.proj_mlp.weight"),
    ("lora_unet_double_blocks_3_img_attn_k", "base_hunyuan_image21_diffusers", "transformer_blocks.3.attn.to_k.weight"),
    ("lora_unet_double_blocks_3_txt_attn_qkv", "base_hunyuan_image21_diffusers",
     " + ".join(f"transformer_blocks.3.attn.add_{letter}_proj.weight" for letter in "qkv")),
    ("lora_unet_final_layer_adaLN_modulation_1", "base_hunyuan_image21_diffusers",
     "norm_out.linear.weight[3584:7168] + norm_out.linear.weight[0:3584]"),
    # HunyuanDiT: k and v of the cross attention are fused, q is not
    ("transformer.blocks.3.attn1.to_k", "base_hunyuan_dit_native", "blocks.3.attn1.Wqkv.weight[1408:2816]"),
    ("transformer.blocks.3.attn2.to_v", "base_hunyuan_dit_native", "blocks.3.attn2.kv_proj.weight[1408:2816]"),
    ("transformer.blocks.3.attn2.to_out.0", "base_hunyuan_dit_native", "blocks.3.attn2.out_proj.weight"),
    ("transformer.blocks.3.norm1.linear", "base_hunyuan_dit_native", "blocks.3.default_modulation.1.weight"),
    ("transformer.time_extra_emb.pooler.c_proj", "base_hunyuan_dit_native", "pooler.c_proj.weight"),
    ("transformer.text_embedder.linear_2", "base_hunyuan_dit_native", "mlp_t5.2.weight"),
    ("transformer.norm_out.linear", "base_hunyuan_dit_native",
     "final_layer.adaLN_modulation.1.weight[1408:2816] + final_layer.adaLN_modulation.1.weight[0:1408]"),
    # Wan
    ("transformer.blocks.3.attn2.add_k_proj", "base_wan21_14b_i2v_native", "blocks.3.cross_attn.k_img.weight"),
    ("lora_unet__blocks_3_ffn_2", "base_wan22_ti2v_5b_diffusers", "blocks.3.ffn.net.2.weight"),
    ("lora_unet_head_head", "base_wan22_ti2v_5b_diffusers", "proj_out.weight"),
    ("transformer.condition_embedder.text_embedder.linear_2", "base_wan21_1_3b_native", "text_embedding.2.weight"),
    ("diffusion_model.patch_embedding", "base_wan21_1_3b_diffusers", "patch_embedding.weight"),
    # fewer heads for k and v than for q
    ("transformer.layers.3.attn.to_k", "base_lumina2_native", "layers.3.attention.qkv.weight[2304:3072]"),
    ("transformer.layers.3.attn.to_v", "base_lumina2_native", "layers.3.attention.qkv.weight[3072:3840]"),
    ("lora_unet_layers_3_attention_qkv", "base_lumina2_diffusers",
     " + ".join(f"layers.3.attn.to_{letter}.weight" for letter in "qkv")),
    ("lora_unet_noise_refiner_1_feed_forward_w3", "base_lumina2_diffusers",
     "noise_refiner.1.feed_forward.linear_3.weight"),
    ("diffusion_model.layers.0.attention.to_v", "base_z_image_comfy_excerpt",
     "layers.0.attention.qkv.weight[7680:11520]"),
    ("transformer.layers.0.attention.to_out.0", "base_z_image_comfy_excerpt", "layers.0.attention.out.weight"),
    ("transformer.all_final_layer.2-1.adaLN_modulation.1", "base_z_image_comfy_excerpt",
     "final_layer.adaLN_modulation.1.weight"),
    # PixArt and Sana, as trainers of the original code would name them
    ("lora_unet_blocks_3_cross_attn_kv_linear", "base_pixart_sigma_diffusers",
     "transformer_blocks.3.attn2.to_k.weight + transformer_blocks.3.attn2.to_v.weight"),
    ("lora_unet_blocks_3_mlp_fc2", "base_pixart_sigma_diffusers", "transformer_blocks.3.ff.net.2.weight"),
    ("lora_unet_t_block_1", "base_pixart_sigma_diffusers", "adaln_single.linear.weight"),
    ("lora_unet_t_block_1", "base_sana_1600m_diffusers", "time_embed.linear.weight"),
    ("lora_unet_blocks_3_mlp_point_conv_conv", "base_sana_1600m_diffusers",
     "transformer_blocks.3.ff.conv_point.weight"),
    # the text's stream has number 1, but where there is one stream it has number 1 too
    ("transformer.joint_transformer_blocks.3.attn.to_out.0", "base_auraflow_native",
     "model.double_layers.3.attn.w2o.weight"),
    ("transformer.joint_transformer_blocks.3.attn.add_q_proj", "base_auraflow_native",
     "model.double_layers.3.attn.w1q.weight"),
    ("transformer.single_transformer_blocks.3.attn.to_q", "base_auraflow_native",
     "model.single_layers.3.attn.w1q.weight"),
    ("lora_unet_txtfusion_refiner_blocks_1_attn_wo", "base_krea2_diffusers",
     "text_fusion.refiner_blocks.1.attn.to_out.0.weight"),
    ("transformer.transformer_blocks.0.norm2.linear_2", "base_anima_net_excerpt",
     "net.blocks.0.adaln_modulation_cross_attn.2.weight"),
    ("text_conditioner.blocks.3.cross_attn.k_proj", "base_anima_net_excerpt",
     "net.llm_adapter.blocks.3.cross_attn.k_proj.weight"),
    ("diffusion_model.double_stream_blocks.3.block.attn1.to_out", "base_hidream_diffusers",
     "double_stream_blocks.3.block.attn1.to_out.weight"),
    ("transformer.double_stream_blocks.3.block.ff_i.experts.2.w1", "base_hidream_diffusers",
     "double_stream_blocks.3.block.ff_i.experts.2.w1.weight"),
    # the refiner has the larger CLIP alone
    ("lora_te_text_model_encoder_layers_31_self_attn_k_proj", "base_sdxl_refiner_ldm",
     "conditioner.embedders.0.model.transformer.resblocks.31.attn.in_proj_weight[1280:2560]"),
    ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "base_sdxl_refiner_ldm",
     "conditioner.embedders.0.model.transformer.resblocks.31.mlp.c_fc.weight"),
    ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "base_sdxl_refiner_ldm",
     "conditioner.embedders.0.model.transformer.resblocks.31.mlp.c_fc.weight"),
    ("lora_unet_output_blocks_2_1_conv", "base_sdxl_refiner_diffusers_unet", "up_blocks.0.upsamplers.0.conv.weight"),
    # language models; GPT-2's own names begin like those of a denoiser
    ("base_model.model.transformer.h.3.attn.c_attn", "base_gpt2", "transformer.h.3.attn.c_attn.weight"),
    ("base_model.model.h.3.attn.c_attn", "base_gpt2", "transformer.h.3.attn.c_attn.weight"),
    ("base_model.model.lm_head", "base_gpt2", "transformer.wte.weight"),
    ("base_model.model.model.layers.3.mlp.up_proj", "base_llama31_8b", "model.layers.3.mlp.up_proj.weight"),
    ("base_model.model.model.language_model.layers.3.mlp.up_proj", "base_llama31_8b",
     "model.layers.3.mlp.up_proj.weight"),
    ("base_model.model.layers.3.mlp.up_proj", "base_llama31_8b", "model.layers.3.mlp.up_proj.weight"),
    ("lora_te_layers_3_mlp_up_proj", "base_qwen3_0_6b", "model.layers.3.mlp.up_proj.weight"),
    ("base_model.model.lm_head", "base_llama31_8b", "lm_head.weight"),
    ("base_model.model.lm_head", "base_llama32_1b", "model.embed_tokens.weight"),
    ("base_model.model.model.visual.blocks.0.attn.qkv", "base_qwen25vl_fp8scaled_excerpt",
     "visual.blocks.0.attn.qkv.weight"),
    # a text encoder on its own
    ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "base_clip_l_transformers",
     "text_model.encoder.layers.3.mlp.fc1.weight"),
    ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "base_clip_g_transformers",
     "text_model.encoder.layers.3.mlp.fc1.weight"),
    ("lora_te2_encoder_block_3_layer_0_SelfAttention_q", "base_t5xxl_transformers",
     "encoder.block.3.layer.0.SelfAttention.q.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "base", "weight"), BY_HAND, ids=[f"{name} in {base}" for name, base, _ in BY_HAND])
def test_layers_change_the_weights_looked_up_by_hand(base_of, name, base, weight):
    assert views_id(base_of(base).find(name)) == weight


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "base_clip_g_transformers"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "base_clip_l_transformers"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "base_flux_dev_comfy_full"),
        ("lora_te1_encoder_block_0_layer_0_SelfAttention_q", "base_flux_dev_comfy_full"),
        ("lora_te3_text_model_encoder_layers_0_mlp_fc1", "base_sd3_medium_comfy"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "base_sd15_ldm"),
        ("text_model.encoder.layers.0.mlp.fc1", "base_sd3_medium_comfy"),
        ("transformer.transformer_blocks.13.attn2.to_q", "base_sd35_medium_native"),
        ("transformer.transformer_blocks.0.norm1.linear", "base_chroma_native"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "base_flux2_klein4b_diffusers"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "base_flux_dev_comfy_full"),
        ("vae.decoder.conv_in", "base_flux_dev_comfy_full"),
    ],
)
def test_a_layer_of_another_part_or_model_is_not_found(base_of, name, base):
    assert base_of(base).find(name) == ()


def test_names_of_the_first_cosmos_are_known(base_of):
    """By hand: diffusers' conversion takes it for its successor."""
    block = "blocks.block3.blocks"
    shapes = {f"net.{block}.{name}.weight": (8, 4) for name in ("0.block.attn.to_q.0", "2.block.layer1")}
    shapes |= {f"net.{name}.weight": (8, 4) for name in ("blocks.block0.blocks.0.block.attn.to_q.0",)}
    shapes |= {f"net.{block}.1.adaLN_modulation.2.weight": (8, 4), f"net.{block}.1.block.attn.to_out.0.weight": (8, 8)}
    base = base_of("cosmos 1", shapes)
    expected = {
        "attn1.to_q": "0.block.attn.to_q.0",
        "ff.net.0.proj": "2.block.layer1",
        "norm2.linear_2": "1.adaLN_modulation.2",
        "attn2.to_out.0": "1.block.attn.to_out.0",
    }
    weights = {name: views_id(base.find(f"transformer.transformer_blocks.3.{name}")) for name in expected}
    assert weights == {name: f"net.{block}.{theirs}.weight" for name, theirs in expected.items()}


def test_matrices_of_gpt2_are_transposed(base_of):
    shapes = {
        name: views_shape(base_of("base_gpt2").find(f"base_model.model.transformer.h.0.{name}"))
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert shapes == {
        "attn.c_attn": (2304, 768),
        "attn.c_proj": (768, 768),
        "mlp.c_fc": (3072, 768),
        "mlp.c_proj": (768, 3072),
    }
    assert views_shape(base_of("base_gpt2").find("base_model.model.transformer.wte")) == (50257, 768)


def test_reading_a_weight_swaps_halves_and_transposes(tmp_path):
    modulation, attention = torch.arange(24.0).reshape(8, 3)[:6], torch.arange(12.0).reshape(2, 6)
    flux = {
        "double_blocks.0.img_attn.qkv.weight": torch.ones(9, 3),
        "double_blocks.0.img_mlp.0.weight": torch.ones(4, 3),
    }
    flux["final_layer.adaLN_modulation.1.weight"] = modulation
    with open_base(fixtures.write_tensors(tmp_path / "flux.safetensors", flux)) as base:
        weight = base.weight(base.find("transformer.norm_out.linear"))
        assert torch.equal(weight, torch.cat([modulation[3:], modulation[:3]]))
        assert torch.equal(base.weight(base.find("lora_unet_final_layer_adaLN_modulation_1")), modulation)
    gpt2 = {"transformer.h.0.attn.c_attn.weight": attention, "transformer.wte.weight": attention.clone()}
    with open_base(fixtures.write_tensors(tmp_path / "gpt2.safetensors", gpt2)) as base:
        assert torch.equal(base.weight(base.find("base_model.model.transformer.h.0.attn.c_attn")), attention.T)
        assert torch.equal(base.weight(base.find("base_model.model.transformer.wte")), attention)


# --- tables of names ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", READABLE)
def test_a_flattened_name_means_one_weight_the_own_one_first(base_of, name):
    """Compared with all names of all weights; ambiguous names mean nothing."""
    base = base_of(name)
    own = {}
    for key, shape in base.shapes.items():
        if len(shape) > 1:
            own.setdefault(address(module_of(key).removesuffix("_weight"))[1], set()).add(key)
    for (_, flattened), views in base.weights.items():
        keys = {view.key for view in views}
        assert flattened not in own or keys <= own[flattened] or not own[flattened] & keys
    for layout in LAYOUTS:
        names = Counter((part, flat(module)) for part, module in base.modules(layout))
        assert {name for name, count in names.items() if count > 1} == set()
        wrong = [
            (part, module)
            for (part, module), views in base.modules(layout).items()
            if base.weights[part, flat(module)] != views
        ]
        assert wrong == []


def test_a_flattened_name_of_two_modules_is_ambiguous(base_of):
    base = base_of("ambiguous", {"a.b_c.weight": (8, 4), "a_b.c.weight": (8, 4), "a.d.weight": (8, 4)})
    assert base.find("lora_unet_a_b_c") == ()
    assert views_id(base.find("lora_unet_a_d")) == "a.d.weight"


@pytest.mark.parametrize("name", READABLE)
def test_each_layout_names_every_row_once(base_of, name):
    base = base_of(name)
    everything = {
        key: shape for key, shape in base.shapes.items() if len(shape) > 1 and not key.endswith("position_ids")
    }
    for layout in LAYOUTS:
        rows = {}
        for views in base.modules(layout).values():
            for view in views:
                span = view.rows or (0, everything[view.key][1 if view.transposed else 0])
                rows.setdefault(view.key, []).append(span if not view.transposed else (0, everything[view.key][0]))
        assert rows.keys() == everything.keys()
        for key, spans in rows.items():
            ends = sorted(spans)
            assert ends[0][0] == 0
            assert ends[-1][1] == everything[key][0]
            assert [stop for _, stop in ends[:-1]] == [start for start, _ in ends[1:]]


# --- against diffusers --------------------------------------------------------------------------

STEP = 1_000_000
PREFIX = "model.diffusion_model."


def denoiser(name):
    """Names of the denoiser in a listed file, without what stands before them."""
    shapes = fixtures.shapes(name)
    for prefix in (PREFIX, "model.", "net."):
        if any(key.startswith(prefix) for key in shapes):
            return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return shapes


def rows_of(shapes):
    """Each tensor as the numbers of its rows, which no other tensor has."""
    return {
        key: (number * STEP + torch.arange(shape[0])).reshape(-1, *[1] * (len(shape) - 1))
        for number, (key, shape) in enumerate(shapes.items())
        if shape
    }


def looked_up(rows, views):
    return torch.cat([rows[view.key][slice(*view.rows) if view.rows else slice(None)].flatten() for view in views])


def module_of(key):
    return key.removesuffix(".weight")


def native_names_of(name):
    """The file with native names, biases included, that a listed file with diffusers names would come from."""

    def shapes(base_of):
        tensors = {}
        for (_, module), views in base_of(name).modules("native").items():
            bare = not views[0].key.endswith(".weight")
            tensors[module if bare else f"{module}.weight"] = views_shape(views)
            if not bare:
                tensors[f"{module}.bias"] = views_shape(views)[:1]
        return tensors

    return shapes


def native_list(name, *left_out):
    return lambda base_of: {key: shape for key, shape in denoiser(name).items() if not key.startswith(left_out)}


def given(shapes):
    return lambda base_of: shapes


def with_extra(shapes, *keys):
    """With vectors that a conversion wants to see."""
    return lambda base_of: {**shapes(base_of), **dict.fromkeys(keys, (1,))}


def under_net(function):
    """The conversion takes off what stands before the names of Cosmos."""
    return lambda checkpoint: function({f"net.{key}": value for key, value in checkpoint.items()})


CASCADE = {
    "clip_txt_mapper.weight": (48, 40),
    **{
        f"{side}_blocks.{level}.{block}.{name}": shape
        for side in ("down", "up")
        for level in (0, 1)
        for block, name, shape in [
            (0, "channelwise.0.weight", (192, 48)),
            (2, "attention.attn.in_proj_weight", (144, 48)),
            (2, "attention.attn.out_proj.weight", (48, 48)),
            (2, "kv_mapper.1.weight", (48, 48)),
        ]
    },
}
VACE = {
    **{
        f"{stack}.0.{name}.weight": (48, 48)
        for stack in ("blocks", "vace_blocks")
        for name in [f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"]
    },
    "blocks.0.ffn.0.weight": (96, 48),
    "vace_blocks.0.before_proj.weight": (48, 48),
    "vace_blocks.0.after_proj.weight": (48, 48),
    "head.head.weight": (64, 48),
}
LTX2 = {
    "patchify_proj.weight": (48, 128),
    "audio_patchify_proj.weight": (32, 128),
    "adaln_single.linear.weight": (288, 48),
    "adaln_single.emb.timestep_embedder.linear_1.weight": (48, 256),
    "audio_adaln_single.linear.weight": (192, 32),
    "av_ca_a2v_gate_adaln_single.linear.weight": (48, 48),
    "transformer_blocks.0.attn1.to_q.weight": (48, 48),
    "transformer_blocks.0.audio_attn1.to_q.weight": (32, 32),
    "transformer_blocks.0.scale_shift_table_a2v_ca_video": (5, 48),
}
# What is converted, by which function, and how many matrices at least come out.
CONVERSIONS = {
    "FLUX.1": (native_list("base_flux_dev_comfy_full"), convert.convert_flux_transformer_checkpoint_to_diffusers, 504),
    "Chroma": (native_list("base_chroma_native"), convert.convert_chroma_transformer_checkpoint_to_diffusers, 433),
    "FLUX.2": (
        native_names_of("base_flux2_klein4b_diffusers"),
        convert.convert_flux2_transformer_checkpoint_to_diffusers,
        109,
    ),
    "FLUX.2 9B": (
        native_list("base_flux2_klein9b_bfl_excerpt"),
        convert.convert_flux2_transformer_checkpoint_to_diffusers,
        23,
    ),
    "SD 3": (native_list("base_sd3_medium_comfy"), convert.convert_sd3_transformer_checkpoint_to_diffusers, 340),
    "SD 3.5 large": (
        native_list("base_sd35_large_native"),
        convert.convert_sd3_transformer_checkpoint_to_diffusers,
        538,
    ),
    "SD 3.5 medium": (
        native_list("base_sd35_medium_native"),
        convert.convert_sd3_transformer_checkpoint_to_diffusers,
        394,
    ),
    "AuraFlow": (
        native_list("base_auraflow_native"),
        convert.convert_auraflow_transformer_checkpoint_to_diffusers,
        326,
    ),
    "LTX-Video": (native_list("base_ltxv_2b_native"), convert.convert_ltx_transformer_checkpoint_to_diffusers, 316),
    "LTX-2": (given(LTX2), convert.convert_ltx2_transformer_to_diffusers, 8),
    "HunyuanVideo": (
        native_names_of("base_hunyuan_video_diffusers"),
        convert.convert_hunyuan_video_transformer_to_diffusers,
        548,
    ),
    "Lumina 2": (native_list("base_lumina2_native"), convert.convert_lumina2_to_diffusers, 244),
    "Z-Image": (
        native_names_of("base_z_image_diffusers"),
        convert.convert_z_image_transformer_checkpoint_to_diffusers,
        276,
    ),
    "Z-Image excerpt": (
        native_list("base_z_image_comfy_excerpt"),
        convert.convert_z_image_transformer_checkpoint_to_diffusers,
        31,
    ),
    "Wan": (native_list("base_wan21_1_3b_native"), convert.convert_wan_transformer_to_diffusers, 338),
    "Wan for pictures": (native_list("base_wan21_14b_i2v_native"), convert.convert_wan_transformer_to_diffusers, 530),
    "Wan VACE": (given(VACE), convert.convert_wan_transformer_to_diffusers, 20),
    "Sana": (
        with_extra(
            native_names_of("base_sana_1600m_diffusers"),
            "pos_embed",
            "y_embedder.y_embedding",
            "attention_y_norm.weight",
        ),
        convert.convert_sana_transformer_to_diffusers,
        248,
    ),
    "Krea 2": (native_names_of("base_krea2_diffusers"), convert.convert_krea2_transformer_checkpoint_to_diffusers, 293),
    "Anima": (
        native_list("base_anima_net_excerpt", "llm_adapter."),
        under_net(convert.convert_cosmos_transformer_checkpoint_to_diffusers),
        22,
    ),
    "HiDream": (native_list("base_hidream_diffusers"), convert.convert_hidream_transformer_to_diffusers, 1176),
    "Stable Cascade": (given(CASCADE), convert.convert_stable_cascade_unet_single_file_to_diffusers, 25),
}


@pytest.fixture(scope="module", params=CONVERSIONS)
def conversion(request, base_of):
    """Shapes and rows of a native file, and the rows of what diffusers makes of it, matrices only."""
    source, function, _ = CONVERSIONS[request.param]
    shapes = source(base_of)
    rows = rows_of(shapes)
    names = list(shapes)
    converted, origin = {}, {}
    for key, value in function(dict(rows)).items():
        whence = names[int(value.flatten()[0]) // STEP] if value is not None else ""
        if len(shapes.get(whence, ())) > 1:
            converted[key], origin[key] = value.flatten(), whence
    return request.param, shapes, rows, converted, origin


def test_a_native_base_has_all_diffusers_names_and_rows(conversion, base_of):
    name, shapes, rows, converted, _ = conversion
    base = base_of(f"{name} native", shapes)
    assert len(converted) >= CONVERSIONS[name][2]
    for key, value in converted.items():
        views = base.find(f"{base.family.denoiser}.{module_of(key)}")
        assert views, key
        assert torch.equal(looked_up(rows, views), value), key
        assert base.modules("diffusers")["unet", module_of(key)] == views


def test_a_base_with_diffusers_names_has_all_native_names_and_rows(conversion, base_of):
    name, shapes, rows, converted, origin = conversion
    converted_shapes = {key: (len(value), *shapes[origin[key]][1:]) for key, value in converted.items()}
    base = base_of(f"{name} converted", converted_shapes)
    native = sorted(set(origin.values()))
    for key in native:
        module = module_of(key).removesuffix("_weight")
        views = base.find(f"lora_unet_{flat(module)}")
        assert views, key
        assert torch.equal(looked_up(converted, views), rows[key].flatten()), key
        assert base.modules("native")["unet", module] == views


# Pairs of lists of one model in two layouts.
TWINS = [
    ("base_flux_dev_comfy_full", "base_flux_dev_diffusers"),
    ("base_chroma_native", "base_chroma_diffusers"),
    ("base_sd35_large_native", "base_sd35_large_diffusers"),
    ("base_sd35_medium_native", "base_sd35_medium_diffusers"),
    ("base_hunyuan_video_native", "base_hunyuan_video_diffusers"),
    ("base_auraflow_native", "base_auraflow_diffusers"),
    ("base_ltxv_2b_native", "base_ltxv_2b_diffusers"),
    ("base_lumina2_native", "base_lumina2_diffusers"),
    ("base_qwen_image_native", "base_qwen_image_diffusers"),
    ("base_wan21_1_3b_native", "base_wan21_1_3b_diffusers"),
    ("base_sdxl_ldm", "base_sdxl_diffusers_unet"),
    ("base_sdxl_refiner_ldm", "base_sdxl_refiner_diffusers_unet"),
    ("base_sd15_ldm", "base_sd15_diffusers_unet"),
    ("base_sd2_ldm", "base_sd2_diffusers_unet"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("native", "diffusers"), TWINS, ids=[native for native, _ in TWINS])
def test_both_lists_of_a_model_have_the_same_modules(base_of, native, diffusers, layout):
    first, second = (
        {
            module: views_shape(views)
            for (part, module), views in base_of(name).modules(layout).items()
            if part == "unet"
        }
        for name in (native, diffusers)
    )
    # what differs is how many positions there are, and which text encoder a list was made for
    free = {"pos_embed", "pos_embed.pos_embed", "positional_encoding", "cap_embedder.1"}
    free |= {"time_caption_embed.caption_embedder.1"}
    assert first.keys() - free == second.keys() - free
    assert {name: shape for name, shape in first.items() if name not in free and second[name] != shape} == {}


def test_the_three_spellings_of_hunyuan_video_agree(base_of):
    original = base_of("base_hunyuan_video_original_blocks")
    for layout in LAYOUTS:
        blocks = {name: views_shape(views) for name, views in original.modules(layout).items()}
        for listing in ("base_hunyuan_video_native", "base_hunyuan_video_diffusers"):
            modules = base_of(listing).modules(layout)
            assert {name: views_shape(modules[name]) for name in blocks} == blocks
    assert {module for _, module in original.modules("native")} == {
        module_of(key) for key, shape in original.shapes.items() if len(shape) > 1
    }
