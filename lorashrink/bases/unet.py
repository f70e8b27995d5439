"""UNet of the Stable Diffusion families: the same module names in the LDM and the diffusers layout.

All of them have two resnets in a down level and three in an up level, so that block numbers convert by
arithmetic; how many levels and how deep the transformers are does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator

from lorashrink.bases.rules import Rule, Rules, below, rule

_LEVELS = 4  # SD 1.x, SD 2.x and the SDXL refiner; SDXL has 3

# Inside a resnet, LDM name and diffusers name.
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_OUTER = (
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
)


def _level(number: int) -> Iterator[Rule]:
    down, up = f"down_blocks.{number}", f"up_blocks.{number}"
    yield rule(f"input_blocks.{3 * number + 3}.0.op", f"{down}.downsamplers.0.conv")
    # The upsampler comes after the attention, if the level has one.
    last = f"output_blocks.{3 * number + 2}"
    yield rule(f"{last}.2.conv", f"{up}.upsamplers.0.conv", beside=f"{up}.attentions.")
    yield rule(f"{last}.1.conv", f"{up}.upsamplers.0.conv")
    for count, side, start, first in ((2, down, "input_blocks", 1), (3, up, "output_blocks", 0)):
        for i in range(count):
            block = f"{start}.{first + 3 * number + i}"
            yield from below(f"{block}.0", f"{side}.resnets.{i}", *_RESNET)
            yield rule(f"{block}.1.{{}}", f"{side}.attentions.{i}.{{}}")


RULES = Rules(
    (
        *(rule(ldm, diffusers) for ldm, diffusers in _OUTER),
        *below("middle_block.0", "mid_block.resnets.0", *_RESNET),
        *below("middle_block.2", "mid_block.resnets.1", *_RESNET),
        rule("middle_block.1.{}", "mid_block.attentions.0.{}"),
        *(row for number in range(_LEVELS) for row in _level(number)),
    )
)
