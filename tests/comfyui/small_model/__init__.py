"""A node that loads the example model of lorashrink into ComfyUI's own classes.

ComfyUI recognises models by their widths, and does not take this one for SDXL: here its classes get the widths from the
model's configuration, and its weights by ComfyUI's own table of diffusers' names.
"""

import json
import os
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from .families import NODE_CLASS_MAPPINGS as OTHER_FAMILIES

FOLDER = Path(os.environ["LORASHRINK_EXAMPLE_MODEL"])


class Groups(comfy.ops.disable_weight_init):
    """Layers whose norms have as many groups as the example model, and not 32."""

    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups, num_channels, **options):
            super().__init__(8, num_channels, **options)


class Times:
    """A channel multiplier that need not be whole."""

    def __init__(self, factor):
        self.factor = factor

    def __mul__(self, channels):
        return round(self.factor * channels)

    __rmul__ = __mul__


def settings(part):
    return json.loads((FOLDER / part / "config.json").read_text())


def unet():
    config = settings("unet")
    widths, depths = config["block_out_channels"], config["transformer_layers_per_block"]
    with_attention = ["CrossAttn" in kind for kind in config["down_block_types"]]
    depths = [depth if attention else 0 for depth, attention in zip(depths, with_attention, strict=True)]
    options = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": widths[0],
        "channel_mult": [Times(width / widths[0]) for width in widths],
        "num_res_blocks": [2, 2, 2],
        "transformer_depth": [depth for depth in depths for _ in range(2)],
        "transformer_depth_output": [depth for depth in depths for _ in range(3)],
        "transformer_depth_middle": depths[-1],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": True,
        "context_dim": config["cross_attention_dim"],
        "num_classes": "sequential",
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    model_config = comfy.supported_models.SDXL(options)
    model_config.unet_config |= {"num_heads": -1, "num_head_channels": widths[1] // config["attention_head_dim"][1]}
    model_config.custom_operations = Groups
    model_config.latent_format = comfy.latent_formats.SDXL()
    model_config.latent_format.scale_factor = settings("vae")["scaling_factor"]
    model = comfy.model_base.SDXL(model_config, device="cpu")
    model.embedder = Timestep(config["addition_time_embed_dim"])
    weights = load_file(FOLDER / "unet" / "diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(model_config.unet_config)
    model.diffusion_model.load_state_dict({names[name]: weight.float() for name, weight in weights.items()})
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class Encoders(comfy.sdxl_clip.SDXLClipModel):
    """Both text encoders at the widths of the example model."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        torch.nn.Module.__init__(self)
        self.clip_l = self.encoder("text_encoder", {"start": 793, "end": 794, "pad": 794})
        self.clip_g = self.encoder("text_encoder_2", {"start": 793, "end": 794, "pad": 0})
        self.dtypes = {torch.float32}

    @staticmethod
    def encoder(part, special_tokens):
        config = settings(part) | {"eos_token_id": special_tokens["end"]}
        encoder = comfy.sd1_clip.SDClipModel(
            textmodel_json_config=config,
            dtype=torch.float32,
            special_tokens=special_tokens,
            layer_norm_hidden_state=False,
        )
        encoder.set_clip_options({"layer": -2})
        encoder.options_default = ("hidden", -2, True)
        encoder.layer, encoder.layer_idx = "hidden", -2
        weights = load_file(FOLDER / part / "model.safetensors")
        weights = {(key if key.startswith("text_") else f"text_model.{key}"): w.float() for key, w in weights.items()}
        table = "text_model.embeddings.token_embedding.weight"
        rows = len(encoder.transformer.get_input_embeddings().weight)  # ComfyUI's tables have room for all of CLIP's
        weights[table] = torch.nn.functional.pad(weights[table], (0, 0, 0, rows - len(weights[table])))
        weights.setdefault("text_projection.weight", torch.eye(config["hidden_size"]))
        missing, unexpected = encoder.transformer.load_state_dict(weights, strict=False)
        assert not missing, missing
        assert all("position_ids" in name for name in unexpected), unexpected
        return encoder


class Tokenizer(comfy.sdxl_clip.SDXLTokenizer):
    """The tokenizers of the example model."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        self.clip_l = comfy.sd1_clip.SDTokenizer(str(FOLDER / "tokenizer"))
        self.clip_g = comfy.sdxl_clip.SDXLClipGTokenizer(str(FOLDER / "tokenizer_2"))


class Target:
    params, clip, tokenizer = {}, Encoders, Tokenizer


class Decoder:
    """diffusers' decoder with the face of ComfyUI's."""

    def __init__(self):
        self.vae = AutoencoderKL.from_pretrained(FOLDER / "vae").float().eval()

    @torch.no_grad()
    def decode(self, samples):
        return (self.vae.decode(samples.float()).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class SmallModelLoader:
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION, CATEGORY = "load", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return unet(), comfy.sd.CLIP(Target(), model_options={"dtype": torch.float32}), Decoder()


class SaveTensors:
    """Latents as a file that the test reads."""

    RETURN_TYPES, OUTPUT_NODE = (), True
    FUNCTION, CATEGORY = "save", "latent"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "path": ("STRING", {"default": ""})}}

    def save(self, samples, path):
        torch.save(samples["samples"], path)
        return {}


NODE_CLASS_MAPPINGS = {"SmallModelLoader": SmallModelLoader, "SaveTensors": SaveTensors, **OTHER_FAMILIES}
