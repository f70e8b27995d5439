"""A diffusers folder of SDXL or SD 1 as one file in the original names, .safetensors or .ckpt.

SDXL's text encoders are named as in the published file: the first as transformers has it, the second as open_clip has
it, with q, k and v in one matrix and the projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorashrink.bases import View, unet
from lorashrink.bases.rules import spell

Tensors = Mapping[str, torch.Tensor]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
SD1_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}

_VAE = (
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{3 - int(match[1])}.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{3 - int(match[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_OPEN_CLIP = (
    (r"^text_model\.", ""),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"final_layer_norm", "ln_final"),
)


def _renamed(name: str, rules: tuple) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def ldm_unet(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A UNet's tensors in the original names, without a prefix."""
    modules = {name.rpartition(".")[0]: None for name in tensors}
    native = spell({name: (View(name, (1, 1)),) for name in modules}, unet.RULES).layouts["native"]
    original = {views[0].key: module for module, views in native.items()}
    split = {name: name.rpartition(".") for name in tensors}
    return {f"{original[split[name][0]]}.{split[name][2]}": tensor for name, tensor in tensors.items()}


def ldm_vae(tensors: Tensors) -> dict[str, torch.Tensor]:
    """A VAE's tensors in the original names, without a prefix; attention is made of 1×1 convolutions there."""
    named = {_renamed(name, _VAE): tensor for name, tensor in tensors.items()}
    return {
        name: tensor[:, :, None, None] if re.search(r"attn_1\.\w+\.weight", name) and tensor.ndim == 2 else tensor
        for name, tensor in named.items()
    }


def _first_encoder(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _second_encoder(tensors: Tensors) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {"text_projection": tensors["text_projection.weight"].T}
    for name, tensor in tensors.items():
        if match := re.search(r"self_attn\.q_proj\.(weight|bias)$", name):
            thirds = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            module = _renamed(name[: match.start()], _OPEN_CLIP)
            named[f"{module}attn.in_proj_{match[1]}"] = torch.cat(thirds)
        elif not re.search(r"self_attn\.[kv]_proj|text_projection", name):
            named[_renamed(name, _OPEN_CLIP)] = tensor
    return named


_PARTS = {"unet": ldm_unet, "vae": ldm_vae, "text_encoder": _first_encoder, "text_encoder_2": _second_encoder}


def single_file(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """All tensors of SDXL in one file; parts: each part's tensors in diffusers' names."""
    return {
        PREFIXES[part] + name: tensor
        for part, tensors in parts.items()
        for name, tensor in _PARTS[part](tensors).items()
    }


def sd1_single_file(parts: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """All tensors of SD 1 in one file; parts: each part's tensors in diffusers' names."""
    named = {
        "unet": ldm_unet(parts["unet"]),
        "vae": ldm_vae(parts["vae"]),
        "text_encoder": {
            f"transformer.text_model.{name}": tensor for name, tensor in _first_encoder(parts["text_encoder"]).items()
        },
    }
    return {SD1_PREFIXES[part] + name: tensor for part, tensors in named.items() for name, tensor in tensors.items()}


def folder_tensors(folder: Path, parts: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> tensors of a diffusers folder."""
    return {part: load_file(next((folder / part).glob("*.safetensors"))) for part in parts}


def write_tensors(tensors: Tensors, target: Path) -> Path:
    """Write these tensors into a file, whose suffix says its kind."""
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if target.suffix == ".safetensors":
        save_file(state, target)
    else:
        torch.save({"state_dict": state}, target)
    return target


def write_single_file(folder: Path, target: Path) -> Path:
    """Write the SDXL model of a diffusers folder as one file, .safetensors or .ckpt."""
    return write_tensors(single_file(folder_tensors(folder, PREFIXES)), target)


def write_sd1_single_file(folder: Path, target: Path) -> Path:
    """Write the SD 1 model of a diffusers folder as one file, .safetensors or .ckpt."""
    return write_tensors(sd1_single_file(folder_tensors(folder, SD1_PREFIXES)), target)
