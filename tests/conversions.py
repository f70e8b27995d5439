"""Small bases in every layout, adapters of every family for them, and what an adapter adds to a base."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import fixtures
import pytest
import torch
from fixtures import scaled, shapes, write_header
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import lorashrink
from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.making.conversion import convert
from lorashrink.results.shrinking import ConversionReport, Converted

NAMINGS = ("kohya", "diffusers", "comfy", "peft")
KINDS = ("native", "diffusers", "norms")


def encoders(*names: str) -> dict[str, fixtures.Shapes]:
    folders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return {folder: shapes(f"base_{name}_transformers") for folder, name in zip(folders, names, strict=False)}


# family -> (the file in its native layout, the parts of the folder in diffusers' layout)
LAYOUTS = {
    "sd15": ("sd15_ldm", lambda: {"unet": shapes("base_sd15_diffusers_unet"), **encoders("clip_l")}),
    "sdxl": ("sdxl_ldm", lambda: {"unet": shapes("base_sdxl_diffusers_unet"), **encoders("clip_l", "clip_g")}),
    "flux": (
        "flux_dev_comfy_full",
        lambda: {"transformer": shapes("base_flux_dev_diffusers"), **encoders("clip_l", "t5xxl")},
    ),
    "sd3": ("sd35_medium_native", lambda: {"transformer": shapes("base_sd35_medium_diffusers")}),
    "wan": ("wan21_1_3b_native", lambda: {"transformer": shapes("base_wan21_1_3b_diffusers")}),
    "qwen-image": ("qwen_image_native", lambda: {"transformer": shapes("base_qwen_image_diffusers")}),
    "z-image": ("z_image_comfy_excerpt", lambda: {"transformer": shapes("base_z_image_diffusers")}),
    "sd2": (
        "sd2_ldm",
        lambda: {"unet": shapes("base_sd2_diffusers_unet"), "text_encoder": fixtures.clip_h()},
    ),
    "sdxl-refiner": (
        "sdxl_refiner_ldm",
        lambda: {
            "unet": shapes("base_sdxl_refiner_diffusers_unet"),
            "text_encoder_2": shapes("base_clip_g_transformers"),
        },
    ),
    "auraflow": ("auraflow_native", lambda: {"transformer": shapes("base_auraflow_diffusers")}),
    "hunyuan-video": ("hunyuan_video_native", lambda: {"transformer": shapes("base_hunyuan_video_diffusers")}),
    "ltxv": ("ltxv_2b_native", lambda: {"transformer": shapes("base_ltxv_2b_diffusers")}),
    "hidream": ("hidream_diffusers", lambda: {"transformer": shapes("base_hidream_diffusers")}),
    "krea2": ("krea2_diffusers", lambda: {"transformer": shapes("base_krea2_diffusers")}),
    "pixart": ("pixart_sigma_diffusers", lambda: {"transformer": shapes("base_pixart_sigma_diffusers")}),
    "flux2": ("flux2_klein4b_diffusers", lambda: {"transformer": shapes("base_flux2_klein4b_diffusers")}),
    "llm": ("llama32_1b", lambda: {"": shapes("base_llama32_1b")}),
}
# adapter -> (family, which of its layers are enough)
ADAPTERS = {
    "sd15_lora_kohya": ("sd15", "te_|down_blocks_[03]|mid_|up_blocks_1"),
    "sd15_locon_kohya": ("sd15", "down_blocks_[03]|mid_|up_blocks_1"),
    "sd15_lora_diffusers_processor": ("sd15", r"text|\.(?:down|mid)_block"),
    "sdxl_lora_kohya_te1_te2": ("sdxl", "te._|input_blocks_[47]|middle_block_1_proj|output_blocks_2"),
    "sdxl_lora_diffusers_peft": ("sdxl", ""),
    "flux_lora_kohya_te1": ("flux", ""),
    "flux_lora_kohya_t5": ("flux", ""),
    "flux_lora_diffusers": ("flux", ""),
    "flux_lora_diffusers_no_proj_mlp": ("flux", ""),
    "flux_lora_aitoolkit_bfl": ("flux", ""),
    "flux_lora_xlabs": ("flux", ""),
    "sd35_medium_lora_kohya": ("sd3", "unet"),
    "sd35_medium_lora_diffusers": ("sd3", ""),
    "wan21_1_3b_lora_comfy": ("wan", ""),
    "wan21_1_3b_lora_fun_double_underscore": ("wan", ""),
    "wan21_1_3b_lora_diffusers": ("wan", ""),
    "qwen_image_lora_diffusers": ("qwen-image", ""),
    "qwen_image_lora_musubi": ("qwen-image", ""),
    "z_image_lora_aitoolkit": ("z-image", r"layers\.0\."),
    "qwen_image_lora_peft_default": ("qwen-image", r"blocks\.[01]\."),
    "sd2_lora_kohya": ("sd2", "te_|down_blocks_[03]|mid_|up_blocks_1"),
    "sdxl_refiner_lora": ("sdxl-refiner", "te_|te2_|down_blocks_[03]|mid_|up_blocks_1"),
    "auraflow_lora_diffusers": ("auraflow", ""),
    "hunyuan_video_lora_diffusion_pipe": ("hunyuan-video", ""),
    "ltxv_lora_comfy": ("ltxv", ""),
    "hidream_lora_aitoolkit": ("hidream", ""),
    "krea2_lora_diffusers": ("krea2", ""),
    "pixart_lora_peft": ("pixart", ""),
    "flux2_klein4b_lora_diffusers": ("flux2", ""),
    "llama_peft_lora": ("llm", ""),
}

_BLOCK = re.compile(
    r"(.*?(?:^|[._])(?:(?:double|single|joint|single_transformer|joint_transformer|transformer|double_stream|single_stream)_blocks"
    r"|(?:double|single)_layers|layers|block"
    r"|(?<!input_)(?<!output_)(?<!down_)(?<!up_)blocks)[._])(\d+)"
)
_MIDDLE = (7, 10)  # the last blocks of adapters that have but some


def few(tensors: Mapping[str, tuple[int, ...]]) -> fixtures.Shapes:
    """Small widths, some blocks of each kind with the last one, and all that is outside of blocks."""
    blocks = {key: (match[1], int(match[2])) if (match := _BLOCK.match(key)) else ("", 0) for key in tensors}
    last: dict[str, int] = {}
    for kind, number in blocks.values():
        last[kind] = max(number, last.get(kind, 0))
    return scaled(
        {
            key: shape
            for key, shape in tensors.items()
            if blocks[key][1] in (0, 1, *_MIDDLE, last[blocks[key][0]]) and not key.startswith("first_stage_model.")
        }
    )


@functools.cache
def base(folder: Path, family: str, kind: str) -> Path:
    """A base with small widths and no numbers: a file, a diffusers folder, or the norm table of the file."""
    name, parts = LAYOUTS[family]
    if kind == "native":
        return write_header(folder / f"{family}.safetensors", few(shapes(f"base_{name}")))
    if kind == "norms":
        table = folder / f"{family}.json"
        lorashrink.norms(base(folder, family, "native"), table)
        return table
    for part, tensors in parts().items():
        write_header(folder / family / part / fixtures.WEIGHTS.get(part, fixtures.WEIGHTS["unet"]), few(tensors))
    return folder / family


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory):
    return functools.partial(base, tmp_path_factory.mktemp("bases"))


ALPHAS = (4.0, 1.0, 16.0, 0.3)


def numbers(tensors: Mapping[str, tuple[int, ...]], seed: int = 0, alphas: tuple[float, ...] = ALPHAS) -> dict:
    """Float32 noise of these shapes; alphas that differ from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.tensor(alphas[index % len(alphas)])
        if key.endswith(".alpha")
        else torch.randn(shape, generator=generator)
        for index, (key, shape) in enumerate(tensors.items())
    }


_opened = functools.cache(open_base)


def effect(adapter: Path, base: Path) -> dict[str, Tensor]:
    """Tensor of the base -> what the adapter adds to it, as a matrix."""
    added: dict[str, Tensor] = {}
    opened = _opened(base)
    with open_adapter(adapter) as layers:
        for layer in layers:
            views = opened.find(layer.name)
            delta, row = layer.delta.dense().flatten(1), 0
            for view in views:
                start, stop = view.rows or (0, view.shape[0])
                weight = added.setdefault(view.key, torch.zeros(opened.shapes[view.key][0], delta.shape[1]))
                weight[start:stop] += delta[row : row + stop - start]
                row += stop - start
            assert row == len(delta), layer.name
    return added


def assert_same_effect(adapter: Path, expected: dict[str, Tensor], base: Path, tolerance: float = 1e-5) -> None:
    actual = effect(adapter, base)
    for key in expected.keys() | actual.keys():
        shape = (expected if key in expected else actual)[key].shape
        before, after = (added.get(key, torch.zeros(shape)) for added in (expected, actual))
        assert float((before - after).abs().max()) <= tolerance * float(before.abs().max()), key


def only(report: ConversionReport) -> Converted:
    assert report.failed == ()
    (result,) = report.results
    return result


def converted(adapter: Path, base: Path | None, naming: str | None, folder: Path, **more: object) -> Converted:
    return only(convert(adapter, base=base, naming=naming, output=folder, **more))


def tensors_of(result: Converted) -> dict[str, Tensor]:
    path = Path(result.output)
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


def metadata_of(path: str | Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}
