"""Makes the example pair of `lorashrink demo`: a small base of SDXL's architecture and a LoCon for it.

The names are SDXL's own, the widths and depths are small, and the numbers are random: weights as after an
initialisation, and a ΔW whose spectrum falls off to a floor of noise, as after training. The convolutions have
the oversized rank that training guides give them.

Run from the repository's root:  python tests/data/make_example.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[2] / "example" / "lorashrink_example"
CHANNELS, DEPTHS, CONTEXT, EMBEDDING = (12, 20, 32), (0, 1, 2), 40, 48
TE1, TE2 = (16, 2), (24, 2)  # width and layers; SDXL reads the last but one layer, so TE1's last is never trained
RANK, ALPHA, CONV_RANK, CONV_ALPHA = 8, 4.0, 24, 4.0


def transformer(at: str, width: int, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.proj_in", (width, width)
    for number in range(depth):
        block = f"{at}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", CONTEXT)):
            for letter, columns in (("q", width), ("k", context), ("v", context)):
                yield f"{block}.{attention}.to_{letter}", (width, columns)
            yield f"{block}.{attention}.to_out.0", (width, width)
        yield f"{block}.ff.net.0.proj", (8 * width, width)
        yield f"{block}.ff.net.2", (width, 4 * width)
    yield f"{at}.proj_out", (width, width)


def resnet(at: str, before: int, after: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{at}.in_layers.2", (after, before, 3, 3)
    yield f"{at}.emb_layers.1", (after, EMBEDDING)
    yield f"{at}.out_layers.3", (after, after, 3, 3)
    if before != after:
        yield f"{at}.skip_connection", (after, before, 1, 1)


def unet() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "input_blocks.0.0", (CHANNELS[0], 4, 3, 3)
    skips, width, number = [CHANNELS[0]], CHANNELS[0], 1
    for level, (channels, depth) in enumerate(zip(CHANNELS, DEPTHS, strict=True)):
        for _ in range(2):
            yield from resnet(f"input_blocks.{number}.0", width, channels)
            if depth:
                yield from transformer(f"input_blocks.{number}.1", channels, depth)
            width, number = channels, number + 1
            skips.append(width)
        if level < 2:
            yield f"input_blocks.{number}.0.op", (width, width, 3, 3)
            skips.append(width)
            number += 1
    yield from resnet("middle_block.0", width, width)
    yield from transformer("middle_block.1", width, DEPTHS[-1])
    yield from resnet("middle_block.2", width, width)
    number = 0
    for level in (2, 1, 0):
        for _ in range(3):
            yield from resnet(f"output_blocks.{number}.0", width + skips.pop(), CHANNELS[level])
            width = CHANNELS[level]
            if DEPTHS[level]:
                yield from transformer(f"output_blocks.{number}.1", width, DEPTHS[level])
            number += 1
        if level:
            index = 2 if DEPTHS[level] else 1
            yield f"output_blocks.{number - 1}.{index}.conv", (width, width, 3, 3)
    yield "time_embed.0", (EMBEDDING, CHANNELS[0])
    yield "label_emb.0.0", (EMBEDDING, 96)
    yield "out.2", (4, CHANNELS[0], 3, 3)


def encoder(width: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number in range(layers):
        layer = f"text_model.encoder.layers.{number}"
        for letter in ("q", "k", "v", "out"):
            yield f"{layer}.self_attn.{letter}_proj", (width, width)
        yield f"{layer}.mlp.fc1", (4 * width, width)
        yield f"{layer}.mlp.fc2", (width, 4 * width)


def weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * shape[1] ** -0.5 * (0.5 + torch.rand((), generator=generator))


def base_tensors(generator: torch.Generator) -> dict[str, torch.Tensor]:
    tensors = {f"model.diffusion_model.{name}.weight": weight(shape, generator) for name, shape in unet()}
    for name, shape in encoder(*TE1):
        tensors[f"conditioner.embedders.0.transformer.{name}.weight"] = weight(shape, generator)
    at = "conditioner.embedders.1.model.transformer.resblocks"
    width = TE2[0]
    for number in range(TE2[1]):
        tensors[f"{at}.{number}.attn.in_proj_weight"] = weight((3 * width, width), generator)
        tensors[f"{at}.{number}.attn.out_proj.weight"] = weight((width, width), generator)
        tensors[f"{at}.{number}.mlp.c_fc.weight"] = weight((4 * width, width), generator)
        tensors[f"{at}.{number}.mlp.c_proj.weight"] = weight((width, 4 * width), generator)
    return {name: tensor.half() for name, tensor in tensors.items()}


def factors(
    shape: tuple[int, ...], rank: int, strength: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """up, down with σ_i = strength · (10^(-i/decay) + noise floor), in random directions."""
    out, columns = shape[0], math.prod(shape[1:])
    real = min(rank, out, columns)
    left = torch.linalg.qr(torch.randn(out, real, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, real, generator=generator)).Q
    mix = torch.linalg.qr(torch.randn(rank, real, generator=generator)).Q
    decay = 2 + 3 * torch.rand((), generator=generator)
    half = (strength * (10 ** (-torch.arange(real) / decay) + 0.004)).sqrt()
    return (left * half) @ mix.T, mix @ (right * half).T


def layer_tensors(
    name: str, shape: tuple[int, ...], strength: float, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    kernel = any(side > 1 for side in shape[2:])
    rank, alpha = (CONV_RANK, CONV_ALPHA) if kernel else (RANK, ALPHA)
    up, down = factors(shape, rank, strength * rank / alpha, generator)
    yield f"{name}.lora_up.weight", up.reshape(shape[0], rank, *(1 for _ in shape[2:])).half()
    yield f"{name}.lora_down.weight", down.reshape(rank, *shape[1:]).half()
    yield f"{name}.alpha", torch.tensor(alpha).half()


def adapter_tensors(base: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    layers = [(f"lora_unet_{name.replace('.', '_')}", shape) for name, shape in unet() if name.count(".") > 1]
    layers += [(f"lora_te1_{name.replace('.', '_')}", shape) for name, shape in encoder(*TE1)]
    layers += [(f"lora_te2_{name.replace('.', '_')}", shape) for name, shape in encoder(*TE2)]
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in layers:
        # What training moves most differs from block to block; text encoders move little.
        weight = 0.3 if "_te" in name else 1.5 if "output_blocks" in name else 1.0
        strength = 0.02 * weight * 10 ** float(torch.rand((), generator=generator) - 0.5) * shape[0] ** 0.5
        tensors |= dict(layer_tensors(name, shape, strength, generator))
    for key in tensors:
        if key.startswith(f"lora_te1_text_model_encoder_layers_{TE1[1] - 1}_") and "lora_up" in key:
            tensors[key] = torch.zeros_like(tensors[key])
    return tensors


METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_alpha": str(ALPHA),
    "ss_network_args": '{"algo": "locon", "preset": "full", "conv_dim": "32", "conv_alpha": "4"}',
    "ss_network_dim": str(RANK),
    "ss_network_module": "lycoris.kohya",
    "ss_output_name": "example",
    "ss_training_comment": "random numbers, made by tests/data/make_example.py",
}


def main() -> None:
    generator = torch.Generator().manual_seed(7)
    FOLDER.mkdir(exist_ok=True)
    base = base_tensors(generator)
    save_file(base, FOLDER / "base.safetensors")
    save_file(adapter_tensors(base, generator), FOLDER / "adapter.safetensors", METADATA)


if __name__ == "__main__":
    main()
