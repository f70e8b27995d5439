"""Layer names: which part of the model they mean, and its module name with dots or without."""

from __future__ import annotations

import re

# Tried in this order, so a longer prefix stands before one that it begins with.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("base_model.model.", ""),
    ("lora_unet__", "unet"),
    ("lora_unet_", "unet"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te3_", "te3"),
    ("lora_te_", "te1"),
    ("unet.", "unet"),
    ("text_encoder.", "te1"),
    ("text_encoder_2.", "te2"),
    ("text_encoder_3.", "te3"),
)

# Old diffusers files name the attention processor instead of the projection, and omit the index
# of the output projection's only layer.
_ALIASES = (
    (re.compile(r"[._]processor(?=[._])"), ""),
    (re.compile(r"([._])to_out$"), r"\1to_out\g<1>0"),
)


def address(name: str) -> tuple[str, str]:
    """(part of the model, module name with `_` for `.`) of an adapter layer.

    Parts are "unet", "te1", "te2", "te3", or "" when the name does not tell. Dots cannot be restored
    from a flattened name, so the base's names are flattened too and compared.
    """
    part, rest = "", name
    while found := next(((prefix, means) for prefix, means in PREFIXES if rest.startswith(prefix)), None):
        prefix, means = found
        if part and means:
            break
        part, rest = part or means, rest.removeprefix(prefix)
    for pattern, replacement in _ALIASES:
        rest = pattern.sub(replacement, rest)
    return part, rest.replace(".", "_")


def naming(names: list[str]) -> str:
    """How the layers are named: "kohya", "diffusers", "peft", or "other"."""
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    if any(name.startswith("lora_") for name in names):
        return "kohya"
    if any(name.startswith(("unet.", "text_encoder")) for name in names):
        return "diffusers"
    return "other"


# What each block of a UNet is called in both of its layouts, as people who weight blocks know them.
_LDM_BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)_(\d+)")
_DIFFUSERS_BLOCK = re.compile(r"^(down_blocks|up_blocks)_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)")
_ENCODER_LAYER = re.compile(r"(?:encoder_layers|resblocks)_(\d+)")
_LDM = {"input_blocks": "IN", "output_blocks": "OUT"}


def block(name: str) -> str:
    """The block that a layer belongs to: "IN04", "MID", "OUT02", "TE1.05", or "other"."""
    part, flat = address(name)
    if found := _LDM_BLOCK.match(flat):
        return "MID" if found[1] == "middle_block" else f"{_LDM[found[1]]}{int(found[2]):02d}"
    if found := _DIFFUSERS_BLOCK.match(flat):
        level, kind, index = int(found[2]), found[3], int(found[4])
        if found[1] == "down_blocks":
            return f"IN{3 * level + (3 if kind == 'downsamplers' else 1 + index):02d}"
        return f"OUT{3 * level + (2 if kind == 'upsamplers' else index):02d}"
    if flat.startswith("mid_block"):
        return "MID"
    if flat == "conv_in":
        return "IN00"
    if part.startswith("te") and (found := _ENCODER_LAYER.search(flat)):
        return f"{part.upper()}.{int(found[1]):02d}"
    return part.upper() if part.startswith("te") else "other"


def kind(name: str, shape: tuple[int, ...]) -> str:
    """What the layer does: "te", "conv", "attn", "mlp", "proj", "time", or "other"."""
    part, flat = address(name)
    if part.startswith("te"):
        return "te"
    if len(shape) > 2 and any(side > 1 for side in shape[2:]):
        return "conv"
    for word, meaning in (("attn", "attn"), ("ff_", "mlp"), ("mlp", "mlp"), ("proj_", "proj"), ("emb", "time")):
        if word in flat:
            return meaning
    return "other"
