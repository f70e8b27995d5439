"""Which family of models an adapter was made for, by the names and widths of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lorashrink.names import DENOISERS, address

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Mark:
    """A layer whose name fits the pattern, and which has so many outputs and inputs (None: any number).

    `at_least` is the least number of the block, where the pattern has a group for it: smaller models lack such blocks.
    """

    name: re.Pattern[str]
    outputs: int | None = None
    inputs: int | None = None
    at_least: int = 0

    def fits(self, module: str, shape: Shape) -> bool:
        match = self.name.match(module)
        if not match or (self.at_least and int(match[1]) < self.at_least):
            return False
        return self.outputs in (None, *shape[:1]) and self.inputs in (None, *shape[1:2])


def _mark(name: str, outputs: int | None = None, inputs: int | None = None, at_least: int = 0) -> _Mark:
    return _Mark(re.compile(name), outputs, inputs, at_least)


# In both layouts of a UNet, up to the name inside of a transformer block.
_UNET = (
    r"(?:input_blocks_\d+_1|middle_block_1|output_blocks_\d+_1"
    r"|(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_0)"
)
_CROSS = rf"{_UNET}_transformer_blocks_\d+_attn2_to_[kv]$"
_DEPTH = rf"{_UNET}_transformer_blocks_(\d+)_"
_BLOCK = r"transformer_blocks_\d+"
_DOUBLE, _SINGLE = r"double_blocks_(\d+)", r"single_(?:transformer_)?blocks_(\d+)"

# The first row that has a layer for each of its marks decides.
_MARKS: tuple[tuple[str, tuple[_Mark, ...]], ...] = (
    # UNets: by the width of what the text encoder gives, or the depth
    ("sdxl", (_mark(_CROSS, inputs=2048),)),
    ("sdxl-refiner", (_mark(_CROSS, inputs=1280), _mark(rf"{_UNET}_", outputs=1536))),
    ("sd2", (_mark(_CROSS, inputs=1024),)),
    ("sd15", (_mark(_CROSS, inputs=768),)),
    ("sdxl", (_mark(_DEPTH, at_least=4),)),
    ("cascade", (_mark(r"(?:down|up)_blocks_\d+_\d+_(?:attention|channelwise|kv_mapper|mapper)"),)),
    # names that one family has alone
    ("minimax-h3", (_mark(rf"{_BLOCK}_adaln_proj_linear$"),)),
    ("minimax-h3", (_mark(rf"{_BLOCK}_(?:attn_to_[qkv]|ff_net_0_proj)$", inputs=5376),)),
    ("ideogram4", (_mark(r"layers_\d+_(?:attention_to_[qkv]|feed_forward_w[13])$", inputs=4608),)),
    ("flux3", (_mark(r"(?:txt_)?mode_blocks_|single_transformer_blocks_\d+_ff_linear_(?:in|out)$"),)),
    ("ernie-image", (_mark(r"layers_\d+_(?:self_attention_to_|mlp_linear_fc2$)"),)),
    ("ace-step", (_mark(r"layers_\d+_(?:self|cross)_attn_to_"),)),
    ("hidream", (_mark(r"(?:double|single)_stream_blocks_\d+_block"),)),
    ("auraflow", (_mark(r"joint_transformer_blocks_\d+|(?:double|single)_layers_\d+_(?:attn_w[12]|mlp|mod)"),)),
    ("sd3", (_mark(r"joint_blocks_\d+_"),)),
    ("chroma", (_mark(r"distilled_guidance_layer_"),)),
    ("krea2", (_mark(r"(?:txtfusion|text_fusion)_|(?:transformer_)?blocks_\d+_attn_(?:wq|to_gate)$"),)),
    ("anima", (_mark(r"blocks_\d+_(?:adaln_modulation_|(?:self|cross)_attn_(?:[qkv]|output)_proj$|mlp_layer[12]$)"),)),
    ("anima", (_mark(rf"{_BLOCK}_norm[123]_linear_[12]$"),)),
    ("hunyuan-dit", (_mark(r"blocks_\d+_(?:attn1_Wqkv|attn2_kv_proj|default_modulation)"),)),
    ("hunyuan-dit", (_mark(r"blocks_\d+_attn[12]_to_", inputs=1408),)),
    ("wan", (_mark(r"(?:vace_)?blocks_\d+_(?:(?:self|cross)_attn_[qkvo](?:_img)?$|ffn_|attn[12]_(?:to|add)_)"),)),
    ("sana", (_mark(rf"{_BLOCK}_ff_conv_|blocks_\d+_mlp_(?:inverted|depth|point)_conv"),)),
    ("sana", (_mark(rf"{_BLOCK}_attn[12]_to_", inputs=2240),)),
    ("pixart", (_mark(r"blocks_\d+_cross_attn_(?:kv|q)_linear"),)),
    ("pixart", (_mark(rf"{_BLOCK}_attn1_to_", inputs=1152),)),
    ("anima", (_mark(rf"{_BLOCK}_attn2_to_[kv]$", outputs=2048, inputs=1024),)),
    ("ltxv", (_mark(rf"{_BLOCK}_attn1_to_", inputs=2048), _mark(rf"{_BLOCK}_attn2_to_[kv]$", inputs=2048))),
    ("ltxv", (_mark(rf"{_BLOCK}_attn1_to_", inputs=4096), _mark(rf"{_BLOCK}_attn2_to_[kv]$", inputs=4096))),
    ("qwen-image", (_mark(rf"{_BLOCK}_(?:img|txt)_(?:mod|mlp)_"),)),
    ("lumina2", (_mark(r"(?:layers|noise_refiner|context_refiner)_\d+_att(?:n|ention)_", inputs=2304),)),
    ("z-image", (_mark(r"(?:layers|noise_refiner|context_refiner)_\d+_attention_", inputs=3840),)),
    ("z-image", (_mark(r"layers_\d+_attention_to_[qkv]$"),)),
    # blocks of two streams and of one
    ("flux2", (_mark(r"(?:double|single)_stream_modulation_|single_transformer_blocks_\d+_attn_to_qkv_mlp_proj$"),)),
    ("flux2", (_mark(rf"{_BLOCK}_ff(?:_context)?_linear_(?:in|out)$"),)),
    *(
        ("flux2", (_mark(r"single_blocks_\d+_linear1$", outputs=9 * width, inputs=width),))
        for width in (3072, 4096, 6144)
    ),
    ("flux2", (_mark(r"double_blocks_\d+_(?:img|txt)_attn_proj$", inputs=4096),)),
    ("flux2", (_mark(r"double_blocks_\d+_(?:img|txt)_attn_proj$", inputs=6144),)),
    ("hunyuan-image", (_mark(rf"{_DOUBLE}|{_SINGLE}|{_BLOCK}_attn_", inputs=3584),)),
    ("hunyuan", (_mark(r"double_blocks_\d+_(?:(?:img|txt)_mlp_fc[12]|(?:img|txt)_mod_linear)$"),)),
    ("hunyuan", (_mark(_DOUBLE, at_least=19),)),
    ("hunyuan", (_mark(_SINGLE, inputs=3072, at_least=38),)),
    ("flux", (_mark(rf"{_DOUBLE}_(?:(?:img|txt)_(?:attn|mlp|mod)|(?:qkv|proj)_lora)"),)),
    ("flux", (_mark(rf"{_SINGLE}_", inputs=3072),)),
    ("sd3", (_mark(rf"{_BLOCK}_attn2?_(?:to|add)_", inputs=1536),)),
    ("sd3", (_mark(rf"{_BLOCK}_attn_(?:to|add)_", inputs=2432),)),
    ("qwen-image", (_mark(r"transformer_blocks_(\d+)_attn_add_", inputs=3072, at_least=20),)),
    # language models
    ("gpt2", (_mark(r"h_\d+_(?:attn_c_attn|mlp_c_fc)"),)),
    ("llm", (_mark(r"(?:model_)?(?:language_model_)?(?:model_)?layers_\d+_(?:self_attn|mlp|block_sparse_moe)_"),)),
)
_OF_CLIP = re.compile(r"(?:text_model_)?encoder_layers_\d+")
_BLOCK_OF_TRANSFORMER = re.compile(r"(?!input|output|down|up)[a-z_]*(?:blocks|layers)_\d+")


def family_of(layers: Iterable[tuple[str, Shape]]) -> str | None:
    """The name of the family that layers of these names and shapes belong to, None if they do not tell.

    Shapes may be shorter than those of the weights, down to (): what is not known decides nothing.
    """
    addressed = [(*address(name), shape) for name, shape in layers]
    denoiser = [(module, shape) for part, module, shape in addressed if part in (*DENOISERS, "")]
    for family, marks in _MARKS:
        if all(any(mark.fits(module, shape) for module, shape in denoiser) for mark in marks):
            return family
    # SDXL is the usual model with two CLIP encoders, and the only one of them with a UNet
    second_clip = any(part == "te2" and _OF_CLIP.match(module) for part, module, _ in addressed)
    transformer = any(_BLOCK_OF_TRANSFORMER.match(module) for module, _ in denoiser)
    return "sdxl" if second_clip and not transformer else None
