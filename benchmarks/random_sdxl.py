"""A model of SDXL's size with random weights, made on its device: training steps, and a pipeline in a folder."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from sdxl_data import factors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lorashrink.train
from lorashrink.bases import open_base
from lorashrink.train.data.batches import Batch
from lorashrink.train.data.scanning import Data, Draw
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.model.loading import Model, set_checkpointing, weight_dtype
from lorashrink.train.model.network import Network, build_network
from lorashrink.train.run.objective import BatchLoss
from lorashrink.train.run.optimizers import make_optimizer, make_scheduler
from lorashrink.train.run.preparing import step_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_sdxl

_STRENGTH = 1.0  # ‖ΔW‖_F of every layer


@dataclass(frozen=True, slots=True)
class Size:
    """The model and the pictures; what is given here takes the place of SDXL's settings."""

    pixels: int
    unet: dict[str, Any]
    encoders: tuple[dict[str, Any], dict[str, Any]]


def _encoder(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


SDXL = Size(1024, {}, ({}, {}))
TINY = Size(
    128,
    {
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 16 + 24,
        "projection_class_embeddings_input_dim": 24 + 6 * 256,
    },
    (_encoder(16), _encoder(24)),
)


def guide_options(precision: str, size: Size, batch: int, bypass: bool) -> Options:
    """The guide's command as far as it matters for a step; no step accumulates gradients."""
    network = ["preset=full", "conv_dim=256", "conv_alpha=4", "algo=locon", f"bypass_mode={bypass}"]
    return parse(
        [
            *["--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=4", "--network_args", *network],
            *["--learning_rate=0.0001", "--optimizer_type=AdamW", "--max_grad_norm=1", "--scale_weight_norms=1"],
            *["--multires_noise_iterations=10", "--multires_noise_discount=0.1", "--gradient_checkpointing", "--sdpa"],
            *[f"--mixed_precision={precision}", f"--train_batch_size={batch}", f"--resolution={size.pixels}"],
            *["--cache_latents", "--no_half_vae", "--seed=1"],
        ]
    )


def random_model(options: Options, size: Size, device: torch.device) -> Model:
    """SDXL with random weights, made on the device. Its VAE has none: with latents at hand no step runs it."""
    settings = Path(lorashrink.train.__file__).parent / "sdxl"
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = [tiny_sdxl.write_tokenizer(Path(folder) / pad, pad) for pad in (tiny_sdxl.EOS, "!")]
    torch.manual_seed(0)
    with _dtype(weight_dtype(options)), device:
        unet = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(settings / "unet"), **size.unet})
        encoders = [
            kind(CLIPTextConfig.from_pretrained(settings / name, **narrower))
            for (name, kind), narrower in zip(kinds.items(), size.encoders, strict=True)
        ]
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(settings / "vae"))
    model = Model(unet, vae, (encoders[0], encoders[1]), (tokenizers[0], tokenizers[1]))
    model.encoders[1].text_model.eos_token_id = tokenizers[1].eos_token_id
    for module in model.modules:
        module.requires_grad_(False).eval()
    return model


@contextmanager
def _dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Steps:
    """The trainer's own steps on that model, with a clock around each of their parts."""

    def __init__(self, options: Options, size: Size) -> None:
        self.options, self.size = options, size
        self.accelerator = Accelerator(mixed_precision=options.mixed_precision)
        model = random_model(options, size, self.accelerator.device)
        self.network: Network = build_network(model, options).to(self.accelerator.device)
        set_checkpointing(model, options)
        groups, rates = self.network.groups(options)
        trains_text = any("textencoder" in rate for rate in rates)
        batch_loss = BatchLoss(options, Data((), ()), model, self.network, seed=1, trains_text=trains_text)
        optimizer, _ = make_optimizer(options, groups)
        scheduler = make_scheduler(options, optimizer, options.max_train_steps)
        self.batch_loss, self.optimizer, self.scheduler = self.accelerator.prepare(batch_loss, optimizer, scheduler)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.number = 0

    def take(self) -> dict[str, float]:
        """Seconds of the parts of one step, after each of which the device is waited for."""
        batch = random_batch(self.options, self.size, self.number)
        self.number += 1
        laps: dict[str, float] = {}
        loss = _timed(laps, "forward", lambda: self.batch_loss(batch))
        _timed(laps, "backward", lambda: self.accelerator.backward(loss))
        _timed(laps, "clip", lambda: self.accelerator.clip_grad_norm_(self.trained, self.options.max_grad_norm))

        def update() -> None:
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)

        _timed(laps, "optimizer", update)
        _timed(laps, "limit norms", lambda: self.network.limit_norms(self.options.scale_weight_norms or 1.0))
        return laps


def _timed(laps: dict[str, float], name: str, function: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    laps[name] = time.perf_counter() - start
    return result


def random_batch(options: Options, size: Size, step: int) -> Batch:
    """Pictures that do not exist, with their latents; their captions are longer than what the encoders read."""
    count, side = options.train_batch_size, size.pixels // 8
    numbers = torch.Generator().manual_seed(step)
    return Batch(
        draws=tuple(Draw(0, number, step, 1) for number in range(count)),
        captions=("what a picture shows, and how it looks, " * 4,) * count,
        flipped=(False,) * count,
        time_ids=torch.tensor([[size.pixels, size.pixels, 0, 0, size.pixels, size.pixels]] * count).float(),
        weights=torch.ones(count),
        latents=torch.randn((count, 4, side, side), generator=numbers) / 0.13025,
        pixels=None,
        text=None,
    )


def estimate(options: Options, size: Size) -> float:
    """The peak that `lorashrink train --plan` would count on, in bytes."""
    model = random_model(options, size, torch.device("meta"))
    pixels = (size.pixels, size.pixels)
    return sum(step_memory(model, build_network(model, options), options, options.train_batch_size, pixels).values())


def write_pipeline(folder: Path, size: Size, device: torch.device) -> None:
    """SDXL with random weights as diffusers saves it, in half precision."""
    options = guide_options("bf16", size, 1, bypass=True)
    model = random_model(options, size, device)
    settings = Path(lorashrink.train.__file__).parent / "sdxl"
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(settings / "vae")).to(torch.float16),
        unet=model.unet.to(torch.float16),
        text_encoder=model.encoders[0].to(torch.float16),
        text_encoder_2=model.encoders[1].to(torch.float16),
        tokenizer=model.tokenizers[0],
        tokenizer_2=model.tokenizers[1],
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(folder)


def write_adapter(path: Path, model: Path, rank: int) -> None:
    """A LoRA of every linear layer and convolution, in diffusers' names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    with open_base(model) as base:
        for (part, name), views in base.modules("diffusers").items():
            if name.startswith("text_model.embeddings."):  # tables of words, which are no matrix products
                continue
            shape = views[0].shape
            up, down = factors(shape, rank, _STRENGTH, generator)
            key = f"{base.family.folder(part)}.{name}"
            tensors[f"{key}.lora_A.weight"] = down.reshape(rank, *shape[1:])
            tensors[f"{key}.lora_B.weight"] = up.reshape(shape[0], rank, *(1,) * len(shape[2:]))
    save_file(tensors, path)
