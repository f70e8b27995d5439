"""Small pipelines of random weights, adapters for them, and what diffusers makes of both."""

import contextlib
import functools

import fixtures
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
SAME = 1e-4
CHANGED = 0.02


def text_config(width, layers):
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=99,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def small_sdxl():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=8 + 16,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=CLIPTextModel(text_config(8, 2)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, 3)),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


@pytest.fixture(scope="module")
def pipe():
    return small_sdxl()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """The pipeline's weights as a diffusers folder."""
    path = tmp_path_factory.mktemp("pipeline")
    for name in COMPONENTS:
        getattr(pipe, name).save_pretrained(path / name)
    return path


def components(pipe):
    return [name for name in ("unet", "transformer", *COMPONENTS[1:]) if getattr(pipe, name, None) is not None]


@torch.no_grad()
def outputs(pipe):
    """What each component makes of fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    noise = functools.partial(torch.randn, generator=generator)
    words = torch.randint(3, 99, (1, 16), generator=generator)
    words[0, -1] = 2
    calls = {
        StableDiffusionXLPipeline: lambda: pipe.unet(
            noise(1, 4, 8, 8),
            5,
            noise(1, 16, 24),
            added_cond_kwargs={"text_embeds": noise(1, 16), "time_ids": torch.ones(1, 6)},
        ),
        StableDiffusionPipeline: lambda: pipe.unet(noise(1, 4, 8, 8), 5, noise(1, 16, 8)),
        FluxPipeline: lambda: pipe.transformer(
            noise(1, 9, 4),
            noise(1, 5, 12),
            noise(1, 8),
            torch.tensor([0.3]),
            img_ids=noise(9, 3).round(),
            txt_ids=torch.zeros(5, 3),
            guidance=torch.tensor([3.0]),
        ),
        StableDiffusion3Pipeline: lambda: pipe.transformer(
            noise(1, 4, 4, 4), noise(1, 5, 12), noise(1, 8), torch.tensor([300.0])
        ),
    }
    results = {components(pipe)[0]: calls[type(pipe)]().sample}
    if getattr(pipe, "text_encoder", None) is not None:
        results["text_encoder"] = pipe.text_encoder(words).last_hidden_state
    if getattr(pipe, "text_encoder_2", None) is not None:
        results["text_encoder_2"] = pipe.text_encoder_2(words).text_embeds
    return results


def loaded(pipe, path):
    """The outputs with an adapter that diffusers loads, and the number of layers that it changes."""
    try:
        pipe.load_lora_weights(str(path))
        layers = sum(hasattr(module, "lora_A") for name in components(pipe) for module in getattr(pipe, name).modules())
        return outputs(pipe), layers
    finally:
        pipe.unload_lora_weights()


@contextlib.contextmanager
def added(states):
    """Weights that may be changed, and are restored at the end."""
    before = {name: {key: value.clone() for key, value in state.items()} for name, state in states.items()}
    try:
        with torch.no_grad():
            yield states
    finally:
        for name, state in before.items():
            for key, value in state.items():
                states[name][key].copy_(value)


@contextlib.contextmanager
def merged(pipe, folder, path):
    """The pipeline with ΔW of every layer added to the weights that `Base.find` names."""
    states = {name: getattr(pipe, name).state_dict() for name in components(pipe)}
    with added(states), open_base(folder) as base, open_adapter(path) as adapter:
        for layer in adapter:
            delta, row = layer.delta.dense(), 0
            views = base.find(layer.name)
            assert views, layer.name
            for view in views:
                component, _, key = view.key.partition(".")
                weight = states[component][key][slice(*(view.rows or (None,)))]
                weight += delta[row : row + len(weight)].reshape(weight.shape)
                row += len(weight)
        yield pipe


def differences(a, b):
    return {name: float((a[name] - b[name]).norm() / b[name].norm()) for name in b}


# --- adapters -----------------------------------------------------------------------------------


def layers_of(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name != "text_projection"
    }


def factors(weight, rank, decay, generator):
    """Random factors of a weight whose singular values fall off, at their own pace in each layer."""
    out, fan_in, *kernel = weight.shape
    steps = decay ** torch.arange(rank)
    up = 0.2 * torch.randn(out, rank, generator=generator) * steps
    return up.reshape(out, rank, *[1] * len(kernel)), torch.randn(rank, fan_in, *kernel, generator=generator)


def kohya(pipe, path, unet_name):
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for part, component in (("unet", "unet"), ("te1", "text_encoder"), ("te2", "text_encoder_2")):
        for number, (name, module) in enumerate(layers_of(getattr(pipe, component)).items()):
            full = unet_name(name) if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            if full is None:
                continue
            rank = 3 if isinstance(module, nn.Conv2d) else 5
            key = f"lora_{part}_{full.replace('.', '_')}"
            up, down = factors(module.weight, rank, (0.3, 0.6, 0.9)[number % 3], generator)
            alpha = 2.5 if rank == 5 else 1.0
            tensors |= {
                f"{key}.lora_up.weight": up,
                f"{key}.lora_down.weight": down,
                f"{key}.alpha": torch.tensor(alpha),
            }
    return fixtures.write_tensors(path, tensors)


def ldm_name(name):
    """None outside of the blocks, where trainers put nothing."""
    if "blocks" not in name and not name.startswith("mid_block"):
        return None
    return fixtures.ldm_module(name)


def diffusers_name(name):
    """None for the layers whose flattened names diffusers misreads: it leaves them out without an error."""
    return None if name.startswith("add_embedding") else name


def diffusers_file(pipe, path, *, text_model=False):
    """A file as diffusers saves it: no alphas, but PEFT's configuration, with several ranks and strengths.

    With transformers >= 5 the first text encoder's names lack the level `text_model`, which older files have.
    """
    settings = {
        "unet": LoraConfig(
            r=5,
            lora_alpha=4,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj"],
            rank_pattern={"conv1": 3, "attn2.to_k": 6},
            alpha_pattern={"conv1": 6, r"mid_block\.resnets\.\d\.time_emb_proj": 1},
        ),
        # of kohya's names for q, k and v diffusers 0.42 takes notice only beside those for the output
        "text_encoder": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "out_proj", "fc1"]),
        "text_encoder_2": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "out_proj"], use_rslora=True),
    }
    generator = torch.Generator().manual_seed(6)
    for component, config in settings.items():
        model = getattr(pipe, component)
        model.add_adapter(config)
        wrapped = [module for module in model.modules() if hasattr(module, "lora_A")]
        for number, module in enumerate(wrapped):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            up, down = factors(module.get_base_layer().weight, len(a), (0.3, 0.6, 0.9)[number % 3], generator)
            with torch.no_grad():
                a.copy_(down)
                b.copy_(up)
    states = {name: get_peft_model_state_dict(getattr(pipe, name)) for name in COMPONENTS}
    if text_model:
        states["text_encoder"] = {f"text_model.{key}": value for key, value in states["text_encoder"].items()}
    StableDiffusionXLPipeline.save_lora_weights(
        path.parent,
        weight_name=path.name,
        **{f"{name}_lora_layers": state for name, state in states.items()},
        **_collate_lora_metadata({name: getattr(pipe, name) for name in COMPONENTS}),
    )
    pipe.unload_lora_weights()
    return path
