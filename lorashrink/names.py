"""Layer names: which part of the model they mean, and its module name with dots or without."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

# The second denoiser of Wan 2.2.
SECOND_DENOISER = "transformer_2"
DENOISERS = ("unet", SECOND_DENOISER)

# Parts beside the denoiser that diffusers alone has names for: the second one, and what leads from the text encoder of
# LTX-2 to its transformer.
DIFFUSERS_PARTS = (SECOND_DENOISER, "connectors")

# diffusers' folder of a part -> the part.
FOLDERS: Mapping[str, str] = {
    "unet": "unet",
    "transformer": "unet",
    **{part: part for part in DIFFUSERS_PARTS},
    "prior": "unet",
    "text_encoder": "te1",
    "text_encoder_2": "te2",
    "text_encoder_3": "te3",
    "text_encoder_4": "te4",
}

# Tried in this order, so a longer prefix stands before one that it begins with.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("base_model.model.", ""),
    ("module.", ""),
    ("_orig_mod.", ""),
    ("lycoris_", ""),
    ("lora_unet__", "unet"),
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lora_prior_unet_", "unet"),
    ("lora_prior_te_", "te1"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te4_", "te4"),
    ("lora_te_", "te1"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    *((f"{folder}.", part) for folder, part in FOLDERS.items()),
    ("text_encoders.clip_l.transformer.", "te1"),
    ("text_encoders.clip_l.", "te1"),
    ("text_encoders.clip_g.transformer.", "te2"),
    ("text_encoders.clip_g.", "te2"),
    ("text_encoders.t5xxl.transformer.", "te3"),
    ("text_encoders.t5xxl.", "te3"),
)
_MEANINGS = dict(PREFIXES)
# Any other text encoder that ComfyUI knows is the only one of its model.
_PREFIX = re.compile("|".join([*map(re.escape, _MEANINGS), r"text_encoders\.[^.]+\.(?:transformer\.)?"]))

# Old diffusers files name the attention processor instead of the projection, and omit the index
# of the output projection's only layer; torch.compile adds a level. The last is a misspelling in published files.
# Few names have the word, which is looked for first.
_ALIASES = (
    ("processor", re.compile(r"[._]processor(?=[._])"), ""),
    ("to_out", re.compile(r"([._])to_out$"), r"\1to_out\g<1>0"),
    ("orig_mod", re.compile(r"(?:(?<=[._])_|^)orig_mod[._]"), ""),  # of torch.compile
    ("sformer_blocks", re.compile(r"^sformer_blocks(?=[._])"), "transformer_blocks"),
)


@lru_cache(1 << 14)  # every step asks for the names of the same layers
def address(name: str) -> tuple[str, str]:
    """(part of the model, module name with `_` for `.`) of an adapter layer.

    Parts are "unet" (any denoiser), "transformer_2" (the second one of Wan 2.2), "connectors" (of LTX-2), "te1" to
    "te4", or "" when the name does not tell. Dots cannot be restored from a flattened name, so the base's names are
    flattened too and compared.
    """
    part, rest = "", name
    while prefix := _PREFIX.match(rest):
        meaning = _MEANINGS.get(prefix[0], "te1")
        if part and meaning:
            break
        part, rest = part or meaning, rest[prefix.end() :]
    return part, flat(rest)


def flat(module: str) -> str:
    """A module name with `_` for `.`, in the one spelling that all its aliases share."""
    for word, pattern, replacement in _ALIASES:
        if word in module:
            module = pattern.sub(replacement, module)
    return module.replace(".", "_")


# Naming -> how its names begin; the first that fits one of the names decides.
_NAMINGS = (
    ("peft", ("base_model.model.",)),
    ("kohya", ("lora_", "oft_unet_")),
    ("comfy", ("diffusion_model.", "model.diffusion_model.", "text_encoders.")),
    ("diffusers", (*(f"{folder}." for folder in FOLDERS), "text_encoder_")),
)


def naming(names: list[str]) -> str:
    """How the layers are named: "kohya", "diffusers", "peft", "comfy", or "other"."""
    for kind, prefixes in _NAMINGS:
        if any(name.startswith(prefixes) for name in names):
            return kind
    return "other"


# What each block of a UNet is called in both of its layouts, as people who weight blocks know them.
_LDM_BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)_(\d+)")
_DIFFUSERS_BLOCK = re.compile(r"^(down_blocks|up_blocks)_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)")
_ENCODER_LAYER = re.compile(r"(?:encoder_layers|resblocks|encoder_block|^(?:model_)?(?:language_model_)?layers)_(\d+)")
_LDM = {"input_blocks": "IN", "output_blocks": "OUT"}
# Transformers: blocks of two streams, of one, and of models that have but one kind (or do not tell).
_TRANSFORMER_BLOCKS = (
    (
        "D",
        re.compile(
            r"^(?:double_blocks|double_layers|double_stream_blocks|joint_blocks|joint_transformer_blocks)_(\d+)"
        ),
    ),
    ("S", re.compile(r"^(?:single_blocks|single_layers|single_stream_blocks|single_transformer_blocks)_(\d+)")),
    ("L", re.compile(r"^(?:(?:model_)?(?:language_model_)?(?:model_)?layers|(?:transformer_)?blocks|h)_(\d+)")),
)


def block(name: str) -> str:
    """The block that a layer belongs to: "IN04", "MID", "OUT02", "D07", "S12", "L05", "TE1.05", or "other"."""
    part, module = address(name)
    if part.startswith("te"):
        match = _ENCODER_LAYER.search(module)
        return f"{part.upper()}.{int(match[1]):02d}" if match else part.upper()
    if match := _LDM_BLOCK.match(module):
        return "MID" if match[1] == "middle_block" else f"{_LDM[match[1]]}{int(match[2]):02d}"
    if match := _DIFFUSERS_BLOCK.match(module):
        level, kind, index = int(match[2]), match[3], int(match[4])
        if match[1] == "down_blocks":
            return f"IN{3 * level + (3 if kind == 'downsamplers' else 1 + index):02d}"
        return f"OUT{3 * level + (2 if kind == 'upsamplers' else index):02d}"
    if module.startswith("mid_block"):
        return "MID"
    if module == "conv_in":
        return "IN00"
    for letter, pattern in _TRANSFORMER_BLOCKS:
        if match := pattern.match(module):
            return f"{letter}{int(match[1]):02d}"
    return "other"


# The first word that a name contains tells what its layer does.
_KINDS = (
    (re.compile(r"embed_tokens|lm_head"), "other"),
    (
        re.compile(
            r"(?:^|_)(?:img_mod|txt_mod|modulation|adaLN|adaln|mod[XCF]+)(?:_|$)|norm\d?(?:_context|_out)?_linear"
        ),
        "mod",
    ),
    (re.compile(r"proj_mlp"), "mlp"),
    (re.compile(r"attn|attention_|linear1|qkv_"), "attn"),
    (re.compile(r"ff_|ffn_|mlp|feed_forward"), "mlp"),
    (re.compile(r"proj_|linear2"), "proj"),
    (re.compile(r"emb|time_in|vector_in|guidance_in|time_proj"), "time"),
)


def kind(name: str, shape: tuple[int, ...]) -> str:
    """What the layer does: "te", "conv", "attn", "mlp", "mod", "proj", "time", or "other"."""
    part, module = address(name)
    if part.startswith("te"):
        return "te"
    if len(shape) > 2 and any(side > 1 for side in shape[2:]):
        return "conv"
    return next((meaning for pattern, meaning in _KINDS if pattern.search(module)), "other")
