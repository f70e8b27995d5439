"""Names and shapes of real checkpoints and adapters, and files made from them.

`data/names` holds key lists with shapes. Headers alone can be had in full size: the files are sparse.
Files with numbers in them are made from `scaled` shapes.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorashrink.adapters import layer_name
from lorashrink.bases import View, unet
from lorashrink.bases.rules import spell
from lorashrink.files.header import header_bytes
from lorashrink.files.store import DTYPES, TensorInfo

NAMES = Path(__file__).parent / "data" / "names"
LISTED = tuple(sorted(path.name.removesuffix(".json.gz") for path in NAMES.glob("*.json.gz")))
ALL_ADAPTERS = tuple(name for name in LISTED if not name.startswith("base_"))
ALL_BASES = tuple(name for name in LISTED if name.startswith("base_"))
Shapes = dict[str, tuple[int, ...]]

# The Stable Diffusion adapters among them, which many tests read in full.
ADAPTERS = (
    "sdxl_lora_kohya_te1_te2",
    "sdxl_locon_kohya",
    "sdxl_locon_tucker_kohya",
    "sdxl_lora_diffusers_peft",
    "sdxl_dora_kohya_out",
    "sdxl_loha_kohya",
    "sd15_lora_kohya",
    "sd15_locon_kohya",
    "sd15_locon_norm_kohya",
    "sd15_lora_diffusers_processor",
    "sd2_lora_kohya",
)


@cache
def _listing(name: str) -> dict:
    return json.loads(gzip.decompress((NAMES / f"{name}.json.gz").read_bytes()))


def shapes(name: str) -> Shapes:
    """Key -> shape of a listed file."""
    return {key: tuple(shape) for key, shape in _listing(name)["tensors"].items()}


def metadata(name: str) -> dict[str, str]:
    """The header's strings of a listed file."""
    return dict(_listing(name).get("metadata", {}))


def about(name: str) -> dict:
    """What is known of a listed file beside its tensors: family, algo, naming, provenance, complete, config, ..."""
    return {key: value for key, value in _listing(name).items() if key != "tensors"}


def module_names(adapter: str) -> list[str]:
    """What the adapter's layers are called, whatever their family: keys without the family's ending."""
    return list(dict.fromkeys(map(layer_name, shapes(adapter))))


def scaled(original: Mapping[str, tuple[int, ...]], by: int = 32) -> Shapes:
    """The same with every width divided; a side's new length depends on its old one alone, so that all still fit.

    Ranks, kernels and numbers of positions stay.
    """
    return {
        key: tuple(side // by if side >= 64 and side % by == 0 else side for side in shape)
        for key, shape in original.items()
    }


def write_header(path: Path, tensors: Mapping[str, tuple[int, ...]], entries: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of float16 zeros that takes no room, whatever the shapes."""
    infos = {
        key: TensorInfo(kind, shape, torch.Size(shape).numel() * DTYPES[kind][0])
        for key, shape in tensors.items()
        for kind in ["I64" if key.endswith("position_ids") else "F16"]
    }
    header = header_bytes(infos, entries or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header)
    os.truncate(path, len(header) + sum(info.nbytes for info in infos.values()))
    return path


def random_tensors(tensors: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Float16 noise of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).half() for key, shape in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with these tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, dict(entries or {}))
    return path


def write_adapter(folder: Path, name: str) -> Path:
    """The listed adapter, header only, in full size."""
    return write_header(folder / f"{name}.safetensors", shapes(name), metadata(name))


def write_listed(folder: Path, name: str) -> Path:
    """The same, but as a PEFT folder where the list has its settings."""
    if "config" not in about(name):
        return write_adapter(folder, name)
    write_header(folder / name / "adapter_model.safetensors", shapes(name), metadata(name))
    (folder / name / "adapter_config.json").write_text(json.dumps(about(name)["config"]))
    return folder / name


@contextmanager
def opened_once(opener: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function that opens files by their names, each name once; all are closed in the end."""
    opened: dict[str, Any] = {}

    def get(name: str, *details: object) -> Any:
        if name not in opened:
            opened[name] = opener(name, *details)
        return opened[name]

    yield get
    for item in opened.values():
        item.close()


# --- bases --------------------------------------------------------------------------------------

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}


def clip_h() -> Shapes:
    """CLIP-H of SD 2.x as a diffusers folder holds it: 23 of its 24 layers, no projection."""
    widths = {1280: 1024, 5120: 4096}
    return {
        key: tuple(widths.get(side, side) for side in shape)
        for key, shape in shapes("base_clip_g_transformers").items()
        if key != "text_projection.weight" and int((re.findall(r"layers\.(\d+)", key) or [0])[0]) < 23
    }


def without_text_model(encoder: Mapping[str, tuple[int, ...]]) -> Shapes:
    """As transformers >= 5 saves a CLIPTextModel."""
    return {key.removeprefix("text_model."): shape for key, shape in encoder.items()}


def _with_last_block(single_file: Shapes) -> Shapes:
    """The published SD 2.x files hold all 24 blocks of CLIP-H."""
    start = "cond_stage_model.model.transformer.resblocks."
    last = {
        key.replace(f"{start}22.", f"{start}23."): shape
        for key, shape in single_file.items()
        if key.startswith(f"{start}22.")
    }
    return single_file | last


def _folder(family: str, *encoders: Shapes) -> dict[str, Shapes]:
    names = ("text_encoder", "text_encoder_2")
    return {"unet": shapes(f"base_{family}_diffusers_unet"), **dict(zip(names, encoders, strict=False))}


def _layout(name: str) -> Shapes | dict[str, Shapes]:
    family, _, variant = name.partition(" ")
    clip_l, clip_g = shapes("base_clip_l_transformers"), shapes("base_clip_g_transformers")
    encoders = {"sdxl": [clip_l, clip_g], "sd15": [clip_l], "sd2": [clip_h()]}[family]
    single_file = shapes(f"base_{family}_ldm")
    match variant:
        case "file":
            return single_file
        case "file with 24 blocks":
            return _with_last_block(single_file)
        case "file without text_model":
            return {key.replace("transformer.text_model.", "transformer."): v for key, v in single_file.items()}
        case "folder":
            return _folder(family, *encoders)
        case "folder without text_model":
            return _folder(family, without_text_model(encoders[0]), *encoders[1:])
        case "UNet in LDM names":
            start = "model.diffusion_model."
            return {key.removeprefix(start): v for key, v in single_file.items() if key.startswith(start)}
        case "UNet in diffusers names":
            return shapes(f"base_{family}_diffusers_unet")
    raise KeyError(name)


# Bases with all their parts, in every layout that is in use.
LAYOUTS = {
    "sdxl": ("sdxl file", "sdxl folder", "sdxl folder without text_model"),
    "sd15": ("sd15 file", "sd15 file without text_model", "sd15 folder", "sd15 folder without text_model"),
    "sd2": ("sd2 file", "sd2 file with 24 blocks", "sd2 folder", "sd2 folder without text_model"),
}
UNET_LAYOUTS = tuple(
    f"{family} UNet in {names} names" for family in ("sdxl", "sd15", "sd2") for names in ("LDM", "diffusers")
)


def parts(layout: str) -> dict[str, Shapes]:
    """Folder -> tensors of a base in one of the layouts; the folder of a single file is ""."""
    contents = _layout(layout)
    return contents if "unet" in contents else {"": contents}


def write_parts(folder: Path, name: str, contents: Mapping[str, Shapes], entries: Mapping[str, str]) -> Path:
    """A base of these parts, headers only: a file, or a diffusers folder."""
    if set(contents) == {""}:
        return write_header(folder / f"{name}.safetensors", contents[""], entries)
    for part, tensors in contents.items():
        write_header(folder / name / part / WEIGHTS[part], tensors, entries)
    return folder / name


def write_base(folder: Path, layout: str) -> Path:
    """A base, headers only, in full size: a file, or a diffusers folder."""
    return write_parts(folder, layout.replace(" ", "-"), parts(layout), {})


def write_folder(folder: Path, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A diffusers folder with these weights."""
    for part, tensors in parts.items():
        write_tensors(folder / part / WEIGHTS[part], tensors)
    return folder


def ldm_module(name: str) -> str:
    """The LDM name of a module of a diffusers UNet that has attention in every level."""
    weight, elsewhere = (View(name, (1, 1)),), (View("", (1, 1)),)
    modules = {f"up_blocks.{number}.attentions.0": elsewhere for number in range(4)} | {name: weight}
    native = spell(modules, unet.RULES).layouts["native"]
    return next(module for module, views in native.items() if views == weight)


def write_styles(folder: Path, count: int, *, layers: int = 12, seed: int = 0) -> list[Path]:
    """Adapters style000, style001, ... with different numbers and the names of an SDXL file."""
    generator = torch.Generator().manual_seed(seed)
    paths = []
    for number in range(count):
        tensors = {}
        for layer in range(layers):
            name = f"lora_unet_input_blocks_4_1_transformer_blocks_{layer}_attn1_to_q"
            tensors[f"{name}.lora_up.weight"] = torch.randn(48, 8, generator=generator)
            tensors[f"{name}.lora_down.weight"] = torch.randn(8, 64, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
        paths.append(write_tensors(folder / f"style{number:03}.safetensors", tensors))
    return paths
