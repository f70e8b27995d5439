"""SDXL's parts, loaded from a folder or a single file, frozen, and set up for training. Nothing is ever downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorashrink.adapters import looks_like_adapter
from lorashrink.bases import Base, open_base
from lorashrink.errors import InputError, NotABase, UsageError
from lorashrink.files.reading import PICKLE_SUFFIXES, open_tensors
from lorashrink.pictures.pipelines import (
    check_filled,
    clip_tokenizers,
    first_sentence,
    tokenizer_folder,
    weights_variant,
)
from lorashrink.train.flags.options import Options

LATENT_SCALE = 0.13025  # brings SDXL's latents to about unit variance (vae/config.json of SDXL 1.0)

_KINDS = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
SETTINGS = Path(__file__).parents[1] / "sdxl"  # the published settings of SDXL 1.0, for files without any
_DOUBT = "The file is damaged, or of a model with other settings (--model_config gives those of a single file)"
_EXAMPLE = "stabilityai/stable-diffusion-xl-base-1.0"
# Folder of a part -> what its tensors begin with in a single file.
_PARTS = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
    "vae": "first_stage_model.",
}


@dataclass(slots=True)
class Model:
    """The parts of SDXL, none of whose weights are trained."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """UNet, VAE and both text encoders."""
        return (self.unet, self.vae, *self.encoders)


def weight_dtype(options: Options) -> torch.dtype:
    """The dtype of the frozen weights."""
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]


# --- loading ------------------------------------------------------------------------------------


def load_model(options: Options, device: torch.device) -> Model:
    """The base, frozen, in `weight_dtype` (the VAE in float32 with --no_half_vae).

    It stays on the CPU, except with --lowram, which puts each part on the device as soon as it is read.

    Raises:
        UsageError: no such file or folder, or no tokenizers.
        InputError: not SDXL, damaged, or a part or a tensor of it is missing.
    """
    path = _existing(options.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
    config = _existing(options.model_config, "--model_config") if options.model_config else None
    settings = config or (path if path.is_dir() else SETTINGS)
    target = device if options.lowram else torch.device("cpu")
    dtype = weight_dtype(options)

    _check_base(path, needs_vae=options.vae is None)
    folders = [folder for folder in (path, config) if folder and folder.is_dir()]
    if options.tokenizer_cache_dir:
        folders.append(Path(options.tokenizer_cache_dir))
    tokenizers = _load_tokenizers(folders)
    vae_path = _existing(options.vae, "--vae") if options.vae else path
    vae = _load_vae(vae_path, settings, torch.float32 if options.no_half_vae else dtype).to(target)
    if path.is_dir():
        unet, *encoders = (_load_part(kind, path / part, dtype).to(target) for part, kind in _KINDS.items())
    else:
        unet, *encoders = (part.to(target) for part in _load_file(path, settings, dtype))
    model = Model(unet, vae, (encoders[0], encoders[1]), tokenizers)
    _check_fit(path, model)
    # Old settings have a wrong number here, with which the pooled vector would not be that at EOS.
    model.encoders[1].text_model.eos_token_id = tokenizers[1].eos_token_id
    for module in model.modules:
        module.requires_grad_(False).eval()
    return model


def _existing(name: str | None, flag: str) -> Path:
    if not name:
        raise UsageError(f"{flag} is missing: a diffusers folder, a .safetensors or a .ckpt file")
    path = Path(name)
    if path.exists():
        return path
    repository = name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else _EXAMPLE
    raise UsageError(
        f"{flag} {name}: no such file or folder, and lorashrink downloads nothing by itself. "
        f"`hf download {repository} --local-dir FOLDER` gets a model; then give FOLDER here"
    )


def _check_base(path: Path, *, needs_vae: bool) -> None:
    """That this is SDXL with all its parts, as far as headers tell.

    Raises:
        InputError: it is not.
    """
    if path.is_file() and path.suffix.lower() not in {".safetensors", *PICKLE_SUFFIXES}:
        raise NotABase(f"{path}: not a model that can be trained on; give a diffusers folder, .safetensors or .ckpt")
    with _open_base(path) as base:
        if base.family.name != "sdxl":
            raise NotABase(f"{path}: this is {base.family.title}, and lorashrink trains on SDXL only")
        parts = [part for part in _PARTS if part != "vae" or needs_vae]
        if path.is_dir():
            missing = [part for part in parts if not (path / part / "config.json").is_file()]
        else:
            assert base.store is not None
            missing = [part for part in parts if not any(name.startswith(_PARTS[part]) for name in base.store.tensors)]
    if missing:
        hint = "--vae can give another one" if missing == ["vae"] else "give the whole model"
        raise InputError(f"{path}: holds no {' and no '.join(missing)}; {hint}")


def _open_base(path: Path) -> Base:
    try:
        return open_base(path)
    except NotABase:
        if path.is_file():
            with open_tensors(path) as store:
                if looks_like_adapter(store.tensors):
                    raise NotABase(
                        f"{path}: this is an adapter, not a base. "
                        "Give the model here, and the adapter to --network_weights or --base_weights"
                    ) from None
        raise NotABase(f"{path}: no SDXL model was found in it. Give a diffusers folder or one file") from None


def _load_tokenizers(folders: Sequence[Path]) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Both tokenizers, from the first of these folders that has one.

    Raises:
        UsageError: there is none.
        InputError: it cannot be read.
    """
    folder = tokenizer_folder(folders)
    if folder is None:
        searched = f"in {' or '.join(map(str, folders))}" if folders else "in a single file"
        raise UsageError(
            f"no tokenizer {searched}; give --tokenizer_cache_dir, "
            "a folder that holds the folder tokenizer of any SDXL model"
        )
    with _reading(folder, "tokenizer"):
        return clip_tokenizers(folder)


def _load_vae(path: Path, settings: Path, dtype: torch.dtype) -> Any:
    """The VAE of a model folder, of a folder of its own, or of a file in either kind of names."""
    if path.is_dir():
        return _load_part(AutoencoderKL, path / "vae" if (path / "vae").is_dir() else path, dtype)
    open_tensors(path).close()
    with _reading(path, "vae"):
        vae = AutoencoderKL.from_single_file(
            str(path), config=str(settings), subfolder="vae", torch_dtype=dtype, local_files_only=True
        )
    check_filled(path, "vae", vae)
    return vae


def _load_part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    with _reading(folder.parent, folder.name):
        part, info = kind.from_pretrained(
            folder,
            variant=weights_variant(folder, half=dtype == torch.float16),
            local_files_only=True,
            output_loading_info=True,
            **{"torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype": dtype},
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder.parent}: its {folder.name} lacks {len(missing)} tensors, such as {missing[0]}. {_DOUBT}"
        )
    return part


def _load_file(path: Path, settings: Path, dtype: torch.dtype) -> list[Any]:
    """UNet and text encoders of a single file in the original names."""
    # Its import says things that `quiet_libraries` must come before.
    from diffusers.pipelines import StableDiffusionXLPipeline

    with _reading(path, "model"):
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(path),
            config=str(settings),
            torch_dtype=dtype,
            local_files_only=True,
            add_watermarker=False,
            **dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler")),
        )
    for part in _KINDS:
        check_filled(path, part, getattr(pipeline, part))
    return [getattr(pipeline, part) for part in _KINDS]


@contextmanager
def _reading(path: Path, part: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except NotImplementedError as error:  # that a tensor without data cannot be copied
        raise InputError(f"{path}: its {part} lacks tensors. {_DOUBT}") from error
    except Exception as error:
        raise InputError(f"{path}: its {part} cannot be loaded: {first_sentence(error)}. {_DOUBT}") from error


def _check_fit(path: Path, model: Model) -> None:
    unet, vae = model.unet.config, model.vae.config
    if unet["in_channels"] != vae["latent_channels"]:
        raise InputError(
            f"{path}: its UNet takes {unet['in_channels']} channels, and its VAE makes {vae['latent_channels']}. "
            "Models for inpainting or editing cannot be trained on; give the plain model"
        )
    widths = [encoder.config.hidden_size for encoder in model.encoders]
    if unet["cross_attention_dim"] != sum(widths):
        raise InputError(
            f"{path}: its UNet takes text of width {unet['cross_attention_dim']}, and its text encoders make "
            f"{' + '.join(map(str, widths))}. These parts are not of one model"
        )
    words = len(model.tokenizers[0])
    if any(encoder.config.vocab_size < words for encoder in model.encoders):
        raise InputError(f"{path}: its text encoders know fewer than the {words} words of its tokenizer")


# --- setting up ---------------------------------------------------------------------------------


class _MemoryEfficient(AttnProcessor2_0):  # type: ignore[misc]
    """torch's attention without its flash and cuDNN kernels; where the third does not run, plain arithmetic does."""

    def __call__(self, *args: Any, **more: Any) -> Any:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return super().__call__(*args, **more)


def set_attention(model: Model, options: Options) -> None:
    """Choose the kernel of the UNet's attention; the result differs by rounding only.

    torch's own choice is the default, so that --sdpa changes nothing. --mem_eff_attn wins over --xformers.

    Raises:
        UsageError: xformers is not installed, or does not run here.
    """
    if options.mem_eff_attn:
        model.unet.set_attn_processor(_MemoryEfficient())
    elif options.xformers:
        try:
            model.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"--xformers: it does not run here ({first_sentence(error)}). Install xformers, or give --sdpa instead"
            ) from error


def set_checkpointing(model: Model, options: Options) -> None:
    """With --gradient_checkpointing, recompute activations instead of keeping them; gradients stay the same.

    Both libraries do so in training mode only, in which SDXL's parts compute the same: none of them has dropout.
    """
    if not options.gradient_checkpointing:
        return
    model.unet.enable_gradient_checkpointing()
    model.unet.train()
    for encoder in model.encoders:
        # transformers changed the name in the course of version 5, and warns of the old one.
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable()
        encoder.train()


def vae_stride(vae: AutoencoderKL) -> int:
    """Pixels per latent along each side; 8 for SDXL."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def encode_pixels(vae: AutoencoderKL, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Latents drawn from the VAE's posterior: float32 [b, 4, H/8, W/8] on the CPU, not multiplied by LATENT_SCALE.

    8 is SDXL's `vae_stride`. `pixels` are float32 [b, 3, H, W] in -1..1; picture i draws from `generators[i]`, a
    generator of the CPU.
    """
    with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, deviation = posterior.mean.float().cpu(), posterior.std.float().cpu()
    noise = [torch.randn(mean.shape[1:], generator=generator) for generator in generators]
    latents: Tensor = mean + deviation * torch.stack(noise)
    return latents
