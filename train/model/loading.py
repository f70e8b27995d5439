"""SDXL's parts: loaded from a folder or a single file, frozen, and set up for training. Nothing is ever downloaded.

Captions and pictures are encoded as SDXL does it, long captions in sd-scripts' chunks of tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorashrink.adapters import looks_like_adapter
from lorashrink.bases import open_base
from lorashrink.errors import InputError, NotABase, UsageError
from lorashrink.files.reading import PICKLE_SUFFIXES, open_tensors
from lorashrink.files.store import is_file, read_text
from lorashrink.pictures import pipelines
from lorashrink.train.flags.options import Options

_log = logging.getLogger(__name__)

LATENT_SCALE = 0.13025  # brings SDXL's latents to about unit variance (vae/config.json of SDXL 1.0)
CHUNK = 75  # tokens of text in the 77 positions of a CLIP encoder; the others are BOS and EOS
SETTINGS = Path(__file__).parents[1] / "sdxl"  # the published settings of SDXL 1.0, for files without any

CLASSES = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_DOUBT = " The file is damaged, or of a model with other settings (--model_config gives those of a single file)"
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


def load_model(options: Options, device: torch.device) -> Model:
    """The base, frozen, in `weight_dtype` (the VAE in float32 with --no_half_vae).

    It stays on the CPU, except with --lowram, which puts each part on the device as soon as it is read. Raises
    UsageError (no tokenizers) and InputError (not SDXL, damaged, or a part or a tensor of it is missing).
    """
    path = Path(options.pretrained_model_name_or_path or "")
    config = Path(options.model_config) if options.model_config else None
    settings = config or (path if path.is_dir() else SETTINGS)
    target = device if options.lowram else torch.device("cpu")
    dtype = weight_dtype(options)
    _check_base(path, options)
    folders = [folder for folder in (path, config) if folder and folder.is_dir()]
    folders += [Path(options.tokenizer_cache_dir)] if options.tokenizer_cache_dir else []
    folder = pipelines.tokenizer_folder(folders)
    if folder is None:
        raise UsageError(
            f"no tokenizer in {' or '.join(map(str, folders)) or 'a single file'}; give --tokenizer_cache_dir, "
            "a folder that holds the folder tokenizer of any SDXL model"
        )
    with pipelines.loading(folder):
        tokenizers = pipelines.clip_tokenizers(folder)
    vae: Any
    vae_path, vae_dtype = Path(options.vae or path), torch.float32 if options.no_half_vae else dtype
    if vae_path.is_dir():
        inner = vae_path / "vae"
        vae = pipelines.load_part(AutoencoderKL, inner if inner.is_dir() else vae_path, vae_dtype, _DOUBT)
    else:
        open_tensors(vae_path).close()
        more = {"config": str(settings), "torch_dtype": vae_dtype, "local_files_only": True}
        with pipelines.loading(vae_path, _DOUBT):
            vae = AutoencoderKL.from_single_file(str(vae_path), subfolder="vae", **more)
        pipelines.check_filled(vae_path, "vae", vae)
    vae = vae.to(target)
    if path.is_dir():
        parts = (pipelines.load_part(kind, path / part, dtype, _DOUBT) for part, kind in CLASSES.items())
        unet, first, second = (part.to(target) for part in parts)
    else:
        absent = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler"))
        with pipelines.loading(path, _DOUBT):
            pipeline = pipelines.read_file(path, "StableDiffusionXLPipeline", dtype, settings, **absent)
        unet, first, second = (getattr(pipeline, part).to(target) for part in CLASSES)
    model = Model(unet, vae, (first, second), tokenizers)
    _check_fit(path, model)
    # Old settings have a wrong number here, with which the pooled vector would not be that at EOS.
    model.encoders[1].text_model.eos_token_id = tokenizers[1].eos_token_id
    for module in model.modules:
        module.requires_grad_(False).eval()
    return model


def _check_base(path: Path, options: Options) -> None:
    """That this is SDXL with all its parts, and predicts what training predicts, noise or v, as far as headers tell.

    A folder tells what it predicts by scheduler/scheduler_config.json, a single file by keys and metadata.
    """
    advice = "Give a diffusers folder, .safetensors or .ckpt"
    if path.is_file() and path.suffix.lower() not in {".safetensors", *PICKLE_SUFFIXES}:
        raise NotABase(f"{path}: not a model that can be trained on. {advice}")
    try:
        base = open_base(path)
    except NotABase:
        if path.is_file():
            with open_tensors(path) as store:
                if looks_like_adapter(store.tensors):
                    advice = "Give the model here, and the adapter to --network_weights or --base_weights"
                    raise NotABase(f"{path}: this is an adapter, not a base. {advice}") from None
        raise NotABase(f"{path}: no SDXL model was found in it. {advice}") from None
    with base:
        if base.family.name != "sdxl":
            raise NotABase(f"{path}: this is {base.family.title}, and lorashrink trains on SDXL only")
        names = base.store.tensors if base.store else ()
        prediction, zero_signal = pipelines.prediction_of_file(base)
        parts = [part for part in _PARTS if part != "vae" or options.vae is None]
        if path.is_dir():
            missing = [part for part in parts if not (path / part / "config.json").is_file()]
        else:
            missing = [part for part in parts if not any(name.startswith(_PARTS[part]) for name in names)]
    if missing:
        hint = "--vae can give another one" if missing == ["vae"] else "give the whole model"
        raise InputError(f"{path}: holds no {' and no '.join(missing)}; {hint}")
    if path.is_dir():
        file = path / "scheduler" / "scheduler_config.json"
        try:
            config = json.loads(read_text(file)) if is_file(file) else {}
            prediction, zero_signal = config.get("prediction_type", ""), config.get("rescale_betas_zero_snr", False)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: cannot be read ({error}). Copy it again") from error
    if prediction not in ("", "epsilon", "v_prediction"):
        raise UsageError(f"{path}: this model predicts {prediction!r}, and training knows noise (epsilon) and v alone")
    if prediction == "v_prediction" and not options.v_parameterization:
        more = " and --zero_terminal_snr" if zero_signal else ""
        raise UsageError(
            f"{path}: this model predicts v and not noise; add --v_parameterization{more}. Adapters trained without it "
            "spoil every picture"
        )
    if prediction == "epsilon" and options.v_parameterization:
        _log.warning("%s predicts noise, and --v_parameterization trains the adapter for a model that predicts v", path)


def _check_fit(path: Path, model: Model) -> None:
    takes, width = (model.unet.config[key] for key in ("in_channels", "cross_attention_dim"))
    channels = model.vae.config["latent_channels"]
    widths = [encoder.config.hidden_size for encoder in model.encoders]
    words = len(model.tokenizers[0])
    wrong = ""
    if takes != channels:  # models for inpainting or editing
        wrong = f"UNet takes {takes} channels, and its VAE makes {channels}"
    elif width != sum(widths):
        wrong = f"UNet takes text of width {width}, and its text encoders make {' + '.join(map(str, widths))}"
    elif any(encoder.config.vocab_size < words for encoder in model.encoders):
        wrong = f"text encoders know fewer than the {words} words of its tokenizer"
    if wrong:
        raise InputError(f"{path}: its {wrong}. Give the whole plain model, whose parts belong together")


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


def encode_pixels(vae: AutoencoderKL, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Latents drawn from the VAE's posterior: float32 [b, 4, H/8, W/8] on the CPU, not multiplied by LATENT_SCALE.

    `pixels` are float32 [b, 3, H, W] in -1..1; picture i draws from `generators[i]`, a generator of the CPU.
    """
    with torch.no_grad(), torch.autocast(vae.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    mean, deviation = posterior.mean.float().cpu(), posterior.std.float().cpu()
    noise = [torch.randn(mean.shape[1:], generator=generator) for generator in generators]
    latents: Tensor = mean + deviation * torch.stack(noise)
    return latents


class Encoded(NamedTuple):
    """Encoded captions; n = 75 k + 2 positions for captions of k chunks."""

    hidden1: Tensor  # [b, n, c1], the penultimate layer of the first encoder
    hidden2: Tensor  # [b, n, c2], that of the second
    pooled: Tensor  # [b, c2], the projection at the first EOS of the first chunk

    @property
    def context(self) -> Tensor:
        """What cross attention attends to: [b, n, c1 + c2]."""
        return torch.cat([self.hidden1, self.hidden2], dim=-1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Encoded:
        """The same on this device, in this dtype."""
        return Encoded(*(tensor.to(device, dtype) for tensor in self))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], max_token_length: int | None) -> Tensor:
    """int64 [b, k, 77]; longer captions are cut off after max_token_length (75, if None) = 75 k tokens.

    Each chunk begins with BOS. The first EOS of a chunk is behind its text, and the rest is padding. The layout is that
    of sd-scripts: a chunk that the text fills ends with EOS, and a chunk without text begins BOS EOS.
    """
    limit = max_token_length or CHUNK
    tokens = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=limit + 2, return_tensors="pt"
    ).input_ids  # [b, 75 k + 2]
    parts = tokens[:, 1:-1].reshape(len(tokens), -1, CHUNK)
    count = parts.shape[1]
    begin, end = (tokens[:, index, None, None].expand(-1, count, 1) for index in (0, -1))
    chunks = torch.cat([begin, parts, end], dim=2)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if count > 1 and pad != eos:
        chunks[..., -1][(parts[..., -1] != eos) & (parts[..., -1] != pad)] = eos
        chunks[..., 1][parts[..., 0] == pad] = eos
    return chunks


def token_count(tokenizer: CLIPTokenizer, text: str) -> int:
    """How many tokens a text has, without BOS and EOS and however long it is."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encode_captions(model: Model, captions: Sequence[str], max_token_length: int | None) -> Encoded:
    """Captions through both tokenizers and encoders, as `tokenize` and `encode` do it."""
    tokens = [tokenize(tokenizer, captions, max_token_length) for tokenizer in model.tokenizers]
    return encode(model.encoders, *tokens)


def encode(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], tokens1: Tensor, tokens2: Tensor) -> Encoded:
    """Tokens [b, k, 77] of both tokenizers through both encoders; gradients flow where they are enabled.

    The hidden states are those of the penultimate layer, without the final normalisation (SDXL, Podell et al. 2023,
    section 2.1); the pooled vector is of the last layer, as in OpenCLIP.
    """

    def joined(hidden: Tensor) -> Tensor:
        """[b·k, 77, c] -> [b, 75 k + 2, c]: the text of all chunks between the first BOS and the last position."""
        chunks = hidden.reshape(len(tokens1), -1, *hidden.shape[1:])
        return torch.cat([chunks[:, 0, :1], chunks[:, :, 1:-1].flatten(1, 2), chunks[:, -1, -1:]], dim=1)

    first, second = (
        encoder(tokens.flatten(0, 1).to(encoder.device), output_hidden_states=True)
        for encoder, tokens in zip(encoders, (tokens1, tokens2), strict=True)
    )
    pooled = second.text_embeds[:: tokens2.shape[1]]
    return Encoded(joined(first.hidden_states[-2]), joined(second.hidden_states[-2]), pooled)
