"""Which programs load a file: against the programs' own maps of names, for every listed adapter."""

import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import fixtures
import pytest
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import save_file

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.linking.loaders import LOADERS, layouts_of, loads
from lorashrink.linking.renaming import renamed

# Families of the lists that the project calls by another name.
FAMILIES = {"wan21": "wan", "llm-llama": "llm", "llm-qwen": "llm", "llm-gpt2": "gpt2"}

# Tensors that ComfyUI's loader did not take, of how many: measured with its own code (comfy/lora.py, October 2025, with
# the maps of Krea 2, Z-Image, LTX, FLUX.2 and single text encoders of its main branch) on models with the tensors of
# the listed bases. Of every other list it took all.
COMFY_UNREAD = {
    "flux_lora_xlabs": (24, 24),
    "sd15_tlora_kohya": (576, 768),
    "sdxl_ia3_kohya": (700, 700),
    "sdxl_lora_diffusers_peft": (1120, 1472),
    "sdxl_oft_kohya": (1120, 1120),
    "wan21_1_3b_lora_diffusers": (600, 600),
}
PICTURES = tuple(name for name in fixtures.ALL_ADAPTERS if not fixtures.about(name)["family"].startswith("llm"))


def family_of(name):
    family = fixtures.about(name)["family"]
    return FAMILIES.get(family, family)


@contextmanager
def listed(name, folder, dtype="F16"):
    """The listed adapter as a file, or as the folder that PEFT makes."""
    path, config = folder / f"{name}.safetensors", fixtures.about(name).get("config")
    if config:
        path = folder / name
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(config))
    fixtures.write_header(path / "adapter_model.safetensors" if config else path, fixtures.shapes(name))
    with open_adapter(path) as adapter:
        yield adapter


def said(name, folder):
    with listed(name, folder) as adapter:
        return loads(adapter, family_of(name))


@pytest.mark.parametrize("name", PICTURES)
def test_comfyui_reads_what_its_own_map_has(name, tmp_path):
    unread, tensors = COMFY_UNREAD.get(name, (0, 0))
    with listed(name, tmp_path) as adapter:
        result = loads(adapter, family_of(name))
        if not adapter.layers:
            assert result.loads_in is None
            return
        reason = result.loads_not.get("ComfyUI", "")
        assert bool(reason) == bool(unread)
        share = re.search(r"\((\d+) of (\d+) layers\)", reason)
        layers = int(share[1]) if share else len(adapter) * bool(reason)
        assert layers * tensors == unread * len(adapter)


# Family -> diffusers' class for the pipelines, and what the lists have of its models.
CLIP_L, CLIP_G = "base_clip_l_transformers", "base_clip_g_transformers"
MIXINS = {
    "sd15": ("StableDiffusion", {"unet": "base_sd15_diffusers_unet", "text_encoder": CLIP_L}),
    "sd2": ("StableDiffusion", {"unet": "base_sd2_diffusers_unet", "text_encoder": "clip_h"}),
    "sdxl": (
        "StableDiffusionXL",
        {"unet": "base_sdxl_diffusers_unet", "text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    ),
    "sdxl-refiner": (
        "StableDiffusionXL",
        {"unet": "base_sdxl_refiner_diffusers_unet", "text_encoder": CLIP_G},
    ),
    "flux": ("Flux", {"transformer": "base_flux_dev_diffusers", "text_encoder": CLIP_L}),
    "flux2": ("Flux2", {"transformer": "base_flux2_klein4b_diffusers"}),
    "sd3": ("SD3", {"transformer": "base_sd35_medium_diffusers"}),
    "auraflow": ("AuraFlow", {"transformer": "base_auraflow_diffusers"}),
    "wan": ("Wan", {"transformer": "base_wan21_1_3b_diffusers"}),
    "hunyuan": ("HunyuanVideo", {"transformer": "base_hunyuan_video_diffusers"}),
    "qwen-image": ("QwenImage", {"transformer": "base_qwen_image_diffusers"}),
    "z-image": ("ZImage", {"transformer": "base_z_image_diffusers"}),
    "ltxv": ("LTXVideo", {"transformer": "base_ltxv_2b_diffusers"}),
    "hidream": ("HiDreamImage", {"transformer": "base_hidream_diffusers"}),
    "krea2": ("Krea2", {"transformer": "base_krea2_diffusers"}),
}
ENDING = re.compile(
    r"(?:\.(?:lora_[AB]|lora\.(?:up|down)|lora_linear_layer\.(?:up|down)|lora_magnitude_vector|lokr_w\w+|oft_blocks|alpha)"
    r"|\.lora_(?:up|down)|_lora\.(?:up|down)).*$"
)


def read_by_diffusers(name):
    """Whether diffusers' own conversion maps every layer to a module of the model, and none of its tensors is lost."""
    mixin, folders = MIXINS[family_of(name)]
    shapes = fixtures.shapes(name)
    tensors = {key: torch.zeros(1).expand(shape) if shape else torch.tensor(1.0) for key, shape in shapes.items()}
    extra = {"unet_config": SimpleNamespace(layers_per_block=2)} if mixin == "StableDiffusionXL" else {}
    try:
        converted = getattr(lora_pipeline, f"{mixin}LoraLoaderMixin").lora_state_dict(tensors, **extra)
    except (ValueError, KeyError):
        return False
    converted = converted[0] if isinstance(converted, tuple) else converted
    modules = set()
    for folder, base in folders.items():
        keys = fixtures.clip_h() if base == "clip_h" else fixtures.shapes(base)
        modules |= {f"{folder}.{key.rpartition('.')[0]}" for key in keys}
    names = {module_of(key) for key in converted if not key.endswith("_norm.weight")}
    magnitudes = any("dora_scale" in key for key in shapes)  # filtered out with a warning
    return not magnitudes and all(name in modules or f"{name}.0" in modules for name in names)


def module_of(key):
    """The module that diffusers' loader means by a converted key."""
    module = ENDING.sub("", key).replace(".processor.", ".")
    return re.sub(r"self_attn\.to_(q|k|v|out)$", r"self_attn.\1_proj", module)


# PyTorch cannot write into the expanded zeros that stand for these; the file without text encoders is checked.
NOT_EXPANDED = {"flux_lora_kohya_te1", "flux_lora_kohya_t5", "flux_control_lora_bfl"}


@pytest.mark.parametrize("name", [name for name in PICTURES if family_of(name) in MIXINS and name not in NOT_EXPANDED])
def test_diffusers_reads_what_its_own_conversion_maps(name, tmp_path):
    result = said(name, tmp_path)
    if result.loads_in is not None:
        assert ("diffusers" in result.loads_in) == read_by_diffusers(name)


def test_commands_that_are_said_to_help_do_help(tmp_path):
    base = tmp_path / "base.safetensors"
    fixtures.write_header(base, fixtures.shapes("base_wan21_1_3b_native"))
    source = tmp_path / "a.safetensors"
    fixtures.write_header(source, fixtures.shapes("wan21_1_3b_lora_diffusers"))
    with open_adapter(source) as adapter, open_base(base) as opened:
        before = loads(adapter)
        assert before.loads_in == ("diffusers", "InvokeAI")
        assert before.loads_after["ComfyUI"] == "lorashrink convert --naming comfy MODEL FILE"
        assert before.lines[0] == "loads in: diffusers, InvokeAI"
        for program, command in before.loads_after.items():
            naming = command.split()[3]
            assert program in loads(renamed(adapter, naming, opened).adapter).loads_in


# What A1111's loader does with the name of a layer: read in version 1.10 of its source, extensions-builtin/Lora.
A1111 = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": {"sd15", "sd2", "sdxl"},
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": {"sd15", "sd2", "sdxl"},
    "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": {"sd15", "sd2", "sdxl"},
    "oft_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": set(),
    "lora_unet_time_embedding_linear_1": {"sd15", "sd2", "sdxl"},
    "lora_unet_add_embedding_linear_1": set(),
    "lora_unet_up_blocks_1_upsamplers_0_conv": {"sd15", "sd2", "sdxl"},
    "lora_unet_up_blocks_0_upsamplers_0_conv": {"sd15", "sd2"},  # in SDXL it stands one further
    "lora_te_text_model_encoder_layers_0_mlp_fc1": {"sd15", "sd2"},
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": {"sd15", "sdxl"},
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": {"sdxl"},
    "lora_te2_text_projection": set(),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": set(),
    "transformer.transformer_blocks.0.attn.to_q": {"sd3"},
    "transformer.transformer_blocks.0.attn.to_out.0": {"sd3"},
    "transformer.transformer_blocks.0.attn.add_q_proj": set(),
}


@pytest.mark.parametrize("name", A1111)
@pytest.mark.parametrize("ends", [("lora_up", "lora_down"), ("lora_B", "lora_A")])
def test_a1111_reads_what_its_source_says(name, ends, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.{ends[0]}.weight": torch.ones(8, 2), f"{name}.{ends[1]}.weight": torch.ones(2, 8)}, path)
    with open_adapter(path) as adapter:
        reads = {family for family in ("sd15", "sd2", "sdxl", "sd3") if "A1111" in loads(adapter, family).loads_in}
    assert reads == A1111[name]


def test_8_bit_factors_with_alpha_do_not_load_where_alpha_is_multiplied_in(tmp_path):
    name, small = "lora_unet_double_blocks_0_img_attn_proj", torch.float8_e4m3fn
    factors = {"lora_up.weight": torch.ones(8, 2).to(small), "lora_down.weight": torch.ones(2, 8).to(small)}
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.{end}": tensor for end, tensor in (factors | {"alpha": torch.tensor(1.0)}).items()}, path)
    with open_adapter(path) as adapter:
        result = loads(adapter)
    assert result.loads_not == {"diffusers": "fp8 factors multiplied at loading, which fails"}
    assert "ComfyUI" in result.loads_in


def test_a_layout_is_told_by_the_rules_of_the_family():
    assert layouts_of("wan", "blocks.3.attn1.to_q") == {"diffusers"}
    assert layouts_of("wan", "blocks_3_self_attn_q") == {"native"}
    assert layouts_of("qwen-image", "transformer_blocks.0.attn.to_q") == {"native", "diffusers", "other"}


def test_every_program_names_where_its_rules_come_from():
    assert all(loader.source and loader.names and loader.namings for loader in LOADERS)
