"""Models with a UNet: SD 1.x, SD 2.x, SDXL and its refiner, and relatives; Stable Cascade's prior."""

from __future__ import annotations

from lorashrink.bases.family import BaseFamily, Header, containers, marks
from lorashrink.bases.rules import Rules, below
from lorashrink.bases.unet import RULES

_CLIP_L = ("text_encoder", "clip_l")


def _is_unet(header: Header) -> bool:
    """A UNet, and no autoencoder, whose halves have similar names."""
    ldm, diffusers = "input_blocks.1.0", "down_blocks.0.resnets.0"
    return not header.begins("encoder.", "decoder.") and any(
        header.has(name)
        for name in (
            f"{ldm}.in_layers.2.weight",
            f"{ldm}.emb_layers.1.weight",
            f"{diffusers}.conv1.weight",
            f"{diffusers}.time_emb_proj.weight",
        )
    )


def _has_sizes(header: Header) -> bool:
    """A second embedding carries the picture's size, or an aesthetic score."""
    return header.has("label_emb.0.0.weight") or header.has("add_embedding.linear_1.weight")


def _has_four_levels(header: Header) -> bool:
    return header.has("input_blocks.10.0.in_layers.2.weight") or header.has("down_blocks.3.resnets.0.conv1.weight")


def _first_projection(header: Header) -> tuple[int, ...]:
    return header.shape("input_blocks.1.1.proj_in.weight") or header.shape("down_blocks.0.attentions.0.proj_in.weight")


# The prior of Stable Cascade; its attention is PyTorch's own, which keeps q, k and v in one matrix.
_CASCADE = tuple(
    row
    for block in ("down_blocks.{}.{}.attention", "up_blocks.{}.{}.attention")
    for row in below(
        block,
        block,
        ("attn.in_proj", ("to_q", "to_k", "to_v"), ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("attn.out_proj", "to_out.0"),
    )
)

FAMILIES = (
    BaseFamily(
        "kolors",
        "Kolors",
        containers(te1=("text_encoder",)),
        lambda header: _is_unet(header) and header.has("encoder_hid_proj.weight"),
        RULES,
        denoiser="unet",
    ),
    BaseFamily(
        "sdxl",
        "SDXL",
        {
            **containers(te1=_CLIP_L, te2=("text_encoder_2", "clip_g")),
            "conditioner.embedders.0.transformer.": "te1",
            "conditioner.embedders.1.model.": "te2",
        },
        lambda header: (
            _is_unet(header)
            and not _has_four_levels(header)
            and (header.begins("conditioner.embedders.1.", "text_encoder_2.") or _has_sizes(header))
        ),
        RULES,
        denoiser="unet",
        encoders=2,
    ),
    BaseFamily(
        "sdxl-refiner",
        "the SDXL refiner",
        {**containers(te1=("text_encoder_2", "clip_g")), "conditioner.embedders.0.model.": "te1"},
        # Sizes as in SDXL, levels as in SD, and no attention in the first level, which both have.
        lambda header: (
            _is_unet(header) and _has_four_levels(header) and _has_sizes(header) and not _first_projection(header)
        ),
        RULES,
        kohya="diffusers",
        denoiser="unet",
        instead={"te2": "te1"},
    ),
    BaseFamily(
        "sd2",
        "SD 2.x",
        {**containers(te1=("text_encoder", "clip_h")), "cond_stage_model.model.": "te1"},
        # Linear projections in its transformers; SD 1.x has 1×1 convolutions.
        lambda header: _is_unet(header) and len(_first_projection(header)) == 2,
        RULES,
        kohya="diffusers",
        denoiser="unet",
    ),
    BaseFamily(
        "sd15",
        "SD 1.x",
        {**containers(te1=_CLIP_L), "cond_stage_model.transformer.": "te1"},
        lambda header: _is_unet(header) and not _has_sizes(header),
        RULES,
        kohya="diffusers",
        denoiser="unet",
    ),
    BaseFamily("unet", "another UNet", containers(te1=_CLIP_L), _is_unet, RULES, denoiser="unet"),
    BaseFamily(
        "cascade",
        "Stable Cascade",
        containers(te1=("text_encoder", "clip_g")),
        marks(("down_blocks.0.0.channelwise.0.weight",)),
        Rules(_CASCADE),
        denoiser="prior",
        instead={"te2": "te1"},
    ),
)
