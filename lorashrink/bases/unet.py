"""UNet of the Stable Diffusion families: the same module names in the LDM and the diffusers layout.

All of them have two resnets in a down level and three in an up level, so that block numbers convert by
arithmetic; how many levels and how deep the transformers are does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

_LEVELS = 4  # SD 1.x, SD 2.x and the SDXL refiner; SDXL has 3

# Inside a resnet, LDM name -> diffusers name.
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "middle_block.1": "mid_block.attentions.0",
}


def _resnet(ldm: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for inner, name in _RESNET.items():
        yield f"{ldm}.{inner}", f"{diffusers}.{name}"


def _pairs() -> Iterator[tuple[str, str]]:
    yield from _OUTER.items()
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(_LEVELS):
        for i in range(2):
            block = f"input_blocks.{1 + 3 * level + i}"
            yield from _resnet(f"{block}.0", f"down_blocks.{level}.resnets.{i}")
            yield f"{block}.1", f"down_blocks.{level}.attentions.{i}"
        yield f"input_blocks.{3 * level + 3}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        for i in range(3):
            block = f"output_blocks.{3 * level + i}"
            yield from _resnet(f"{block}.0", f"up_blocks.{level}.resnets.{i}")
            yield f"{block}.1", f"up_blocks.{level}.attentions.{i}"
        # The upsampler comes after the attention, if the level has one.
        for place in (1, 2):
            yield f"output_blocks.{3 * level + 2}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"


_OTHER: dict[str, list[str]] = {}  # the start of a module name -> the same start in the other layout
for _ldm, _diffusers in _pairs():
    _OTHER.setdefault(_ldm, []).append(_diffusers)
    _OTHER.setdefault(_diffusers, []).append(_ldm)


def aliases(module: str) -> Iterator[str]:
    """Every name that the module may have, in either layout, its own first.

    `module` is a dotted name such as "input_blocks.4.1.proj_in" or "down_blocks.1.attentions.0.proj_in".
    """
    yield module
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        for start in _OTHER.get(".".join(parts[:length]), ()):
            yield ".".join([start, *parts[length:]])
