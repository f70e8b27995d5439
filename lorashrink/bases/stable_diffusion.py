"""SD 1.x, SD 2.x and SDXL: single files in LDM layout and diffusers folders."""

from __future__ import annotations

from collections.abc import Mapping

from lorashrink.bases.family import BaseFamily, has

Shapes = Mapping[str, tuple[int, ...]]

_UNET = {"model.diffusion_model.": "unet", "diffusion_model.": "unet", "unet.": "unet", "": "unet"}
_CLIP_L = {"text_encoder.": "te1"}


def _is_unet(shapes: Shapes) -> bool:
    return has(
        shapes,
        "input_blocks.1.0.in_layers.2.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "down_blocks.0.resnets.0.time_emb_proj.weight",
    )


def _is_sdxl(shapes: Shapes) -> bool:
    """Two text encoders, or the second embedding that carries sizes, and three levels where the refiner has four."""
    if has(shapes, "input_blocks.10.0.in_layers.2.weight", "down_blocks.3.resnets.0.conv1.weight"):
        return False
    two_encoders = any(name.startswith(("conditioner.embedders.1.", "text_encoder_2.")) for name in shapes)
    sizes = has(shapes, "label_emb.0.0.weight", "add_embedding.linear_1.weight")
    return _is_unet(shapes) and (two_encoders or sizes)


def _is_sd2(shapes: Shapes) -> bool:
    """SD 2.x has linear projections in its transformers, SD 1.x has 1×1 convolutions."""
    if not _is_unet(shapes) or has(shapes, "label_emb.0.0.weight", "add_embedding.linear_1.weight"):
        return False
    projections = [
        shape
        for name, shape in shapes.items()
        if name.endswith(("input_blocks.1.1.proj_in.weight", "down_blocks.0.attentions.0.proj_in.weight"))
    ]
    return any(len(shape) == 2 for shape in projections)


def _is_sd1(shapes: Shapes) -> bool:
    sizes = has(shapes, "label_emb.0.0.weight", "add_embedding.linear_1.weight")
    return _is_unet(shapes) and not sizes and not _is_sd2(shapes) and not _is_sdxl(shapes)


FAMILIES = (
    BaseFamily(
        "sdxl",
        "SDXL",
        {
            **_UNET,
            **_CLIP_L,
            "conditioner.embedders.0.transformer.": "te1",
            "conditioner.embedders.1.model.": "te2",
            "text_encoder_2.": "te2",
        },
        _is_sdxl,
    ),
    BaseFamily("sd2", "SD 2.x", {**_UNET, **_CLIP_L, "cond_stage_model.model.": "te1"}, _is_sd2),
    BaseFamily("sd15", "SD 1.x", {**_UNET, **_CLIP_L, "cond_stage_model.transformer.": "te1"}, _is_sd1),
)
