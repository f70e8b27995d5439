"""Nodes for models of other families: ComfyUI's own classes at small widths, with random weights."""

import comfy.latent_formats
import comfy.lora
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch
from safetensors.torch import save_file

CPU = torch.device("cpu")
RANK, LEAST_SIDE = 8, 16

# family -> (ComfyUI's class, the settings of its network)
FAMILIES = {
    "sd15": (
        comfy.supported_models.SD15,
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1] * 9 + [0] * 3,
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "context_dim": 48,
            "num_heads": 8,
            "num_head_channels": -1,
            "use_temporal_attention": False,
            "legacy": False,
        },
    ),
    "flux": (
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": 32,
            "context_in_dim": 48,
            "hidden_size": 64,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [8, 12, 12],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
            "guidance_embed": True,
        },
    ),
    "wan": (
        comfy.supported_models.WAN21_T2V,
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "in_dim": 16,
            "out_dim": 16,
            "dim": 96,
            "ffn_dim": 192,
            "freq_dim": 32,
            "text_dim": 48,
            "num_heads": 4,
            "num_layers": 2,
        },
    ),
    "qwen": (
        comfy.supported_models.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
}


class RandomModelLoader:
    """A model of a family with random weights, the same ones each time."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION, CATEGORY = "load", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (list(FAMILIES),)}}

    def load(self, family):
        kind, settings = FAMILIES[family]
        config = kind(settings | {"dtype": torch.float32})
        config.unet_config |= settings
        model = config.get_model({}, device="cpu")
        generator = torch.Generator().manual_seed(0)
        for weight in model.diffusion_model.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
        return (comfy.model_patcher.ModelPatcher(model, CPU, CPU),)


class WriteLora:
    """A random LoRA in models/loras, for the matrices whose names in ComfyUI's key map begin with a prefix."""

    RETURN_TYPES, OUTPUT_NODE = (), True
    FUNCTION, CATEGORY = "write", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "prefix": ("STRING",), "name": ("STRING",)}}

    def write(self, model, prefix, name):
        weights = model.model.state_dict()
        generator = torch.Generator().manual_seed(1)
        tensors, layers = {}, 0
        for layer, target in sorted(comfy.lora.model_lora_keys_unet(model.model, {}).items()):
            key, rows, *reordered = (*target, None)[:3] if isinstance(target, tuple) else (target, None)
            weight = weights.get(key)  # the map also names weights that this model lacks
            if not layer.startswith(prefix) or any(reordered) or weight is None:
                continue
            if weight.ndim != 2 or min(weight.shape) < LEAST_SIDE:
                continue
            out, width = (rows[2] if rows else weight.shape[0]), weight.shape[1]
            up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, width, generator=generator)
            up = (up * 0.01 * 0.5 ** torch.arange(RANK)).half()
            if "." in layer:
                tensors |= {f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down.half()}
            else:
                tensors |= {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down.half()}
                tensors[f"{layer}.alpha"] = torch.tensor(float(RANK))
            layers += 1
        save_file(tensors, f"{folder_paths.get_folder_paths('loras')[0]}/{name}")
        return {"ui": {"text": [str(layers)]}}


class SaveWeights:
    """The weights of a model with its LoRAs, as a file that the test reads."""

    RETURN_TYPES, OUTPUT_NODE = (), True
    FUNCTION, CATEGORY = "save", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "path": ("STRING",)}}

    def save(self, model, path):
        model.patch_model(CPU)
        weights = {key: weight.clone() for key, weight in model.model.state_dict().items()}
        model.unpatch_model(CPU)
        torch.save(weights, path)
        return {}


NODE_CLASS_MAPPINGS = {"RandomModelLoader": RandomModelLoader, "WriteLora": WriteLora, "SaveWeights": SaveWeights}
