"""The network: which modules it has and what they are called, what it computes, and what is written and read."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fixtures
import pytest
import tiny_sdxl
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from lycoris.config import PRESET
from lycoris.kohya import LycorisNetworkKohya, create_network
from lycoris.logging import logger as lycoris_log
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.adapters import open_adapter
from lorashrink.errors import InputError, UsageError
from lorashrink.making.conversion import convert
from lorashrink.train.flags.network_args import (
    ALGOS,
    KEYS,
    OLD_NAMES,
    OPPOSITES,
    PRESETS,
    read_network_args,
)
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.model.loading import Model, encode, load_model
from lorashrink.train.model.network import Network, build_network, named_modules

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A preset with a few modules of every kind: linear, 1×1, 3×3, normalisation, both text encoders."""
    path = tmp_path_factory.mktemp("preset") / "small.toml"
    path.write_text(
        "unet_target_module = []\n"
        'unet_target_name = ["mid_block.(attentions|resnets.0).*", "down_blocks.1.resnets.0.conv_shortcut"]\n'
        'text_encoder_target_module = ["CLIPMLP"]\n'
    )
    return f"preset={path}"


SMALL = 16 + 2 * 4  # matrices of the UNet and of the text encoders in it


def options(base: Path | None, *network_args: str, **more: object) -> Options:
    settings = {"network_module": "lycoris.kohya", "network_dim": 2, "network_alpha": 1.0, "seed": 1}
    folder = str(base) if base else None
    return Options(**{"pretrained_model_name_or_path": folder, "network_args": network_args, **settings, **more})


@cache
def loaded(base: Path) -> Model:
    return load_model(options(base), CPU)


def load(base: Path) -> Model:
    """A copy of the model, because layers stay applied."""
    model = loaded(base)
    return Model(copy.deepcopy(model.unet), model.vae, copy.deepcopy(model.encoders), model.tokenizers)


def trained(base: Path, *network_args: str, steps: int = 2, **more: object) -> tuple[Model, Network]:
    """A model and its network after a few steps, in which every tensor has left its initial value."""
    chosen = options(base, *network_args, **more)
    model = load(base)
    network = build_network(model, chosen)
    train(model, network, chosen, steps)
    network.train(False)
    return model, network


def predict(model: Model) -> Tensor:
    """What the UNet says of fixed latents and a fixed text, through both encoders."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (1, 1, 77), generator=generator)
    tokens[..., 0], tokens[..., 20:] = 512, 513  # the tiny tokenizers' BOS and EOS
    text = encode(model.encoders, tokens, tokens)
    added = {"text_embeds": text.pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    return model.unet(latents, 500, text.context, added_cond_kwargs=added).sample


def train(model: Model, network: Network, chosen: Options, steps: int, rate: float = 5e-3) -> list[float]:
    """Losses of AdamW on one batch, whose target is noise."""
    groups, _ = network.groups(chosen)
    optimizer = torch.optim.AdamW(
        [parameter for group in groups for parameter in group["params"]], lr=rate, weight_decay=0
    )
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    losses = []
    network.train()
    for _ in range(steps):
        loss = (predict(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def output(model: Model) -> Tensor:
    return predict(model)


def write(network: Network, path: Path) -> Path:
    save_file(network.state(), path)
    return path


# --- names --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl() -> Model:
    """SDXL 1.0 in full size, without memory for its weights."""
    settings = Path(inspect.getfile(Model)).parents[1] / "sdxl"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(settings / "unet"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(settings / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(settings / "text_encoder_2"))
    return Model(unet, None, (first, second), (None, None))


def on_meta(sdxl: Model, *network_args: str, **more: object) -> Network:
    """A network that was taken off the model again."""
    network = build_network(sdxl, options(None, *network_args, **more))
    network.module.restore()
    return network


def kohya_names(model: Model) -> dict[str, str]:
    return {module.lycoris: module.kohya for module in named_modules(model)}


def test_unet_matrices_have_the_names_of_single_files(sdxl: Model) -> None:
    weights = {
        "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_"): shape
        for key, shape in fixtures.shapes("base_sdxl_ldm").items()
        if key.startswith("model.diffusion_model.") and key.endswith(".weight")
    }
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    shapes = {
        e.kohya: tuple(e.module.weight.shape)
        for e in named_modules(sdxl)
        if isinstance(e.module, kinds) and e.kohya.startswith("lora_unet_")
    }
    assert len(shapes) == 794  # Linear and Conv2d of SDXL's UNet
    assert shapes == {name: shape for name, shape in weights.items() if len(shape) > 1}


def test_normalisation_layers_have_single_file_names_too(sdxl: Model) -> None:
    names = set(kohya_names(sdxl).values())
    assert {"lora_unet_input_blocks_1_0_in_layers_0", "lora_unet_out_0"} <= names


def test_text_encoder_names_have_text_model_in_all_transformers(sdxl: Model) -> None:
    class Old(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.text_model = inner

    first, second = sdxl.encoders
    flat = first if not hasattr(first, "text_model") else first.text_model
    new, old = (kohya_names(replace(sdxl, encoders=(encoder, second))) for encoder in (flat, Old(flat)))
    assert set(new.values()) == set(old.values())
    assert len(set(new.values())) == len(new)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in new.values()
    assert "lora_te2_text_projection" in new.values()


# --- modules of presets, in full size -----------------------------------------------------------

# UNet and text encoder modules of sd-scripts with LyCORIS 4.1.3 on SDXL.
COUNTS = {
    "full": (788, 264),
    "full-lin": (750, 264),
    "attn-mlp": (722, 264),
    "attn-only": (560, 176),
    "unet-only": (788, 0),
    "unet-transformer-only": (722, 0),
    "unet-convblock-only": (66, 0),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_presets_have_the_modules_that_they_have_in_sd_scripts(sdxl: Model, preset: str) -> None:
    names = [layer.lora_name for layer in on_meta(sdxl, f"preset={preset}").layers]
    unet = sum(name.startswith("lora_unet_") for name in names)
    assert (unet, len(names) - unet) == COUNTS[preset]


def test_names_of_a_network_are_those_of_files_that_sd_scripts_wrote(sdxl: Model) -> None:
    unet = fixtures.module_names("sdxl_locon_kohya")
    encoders = [name for name in fixtures.module_names("sdxl_lora_kohya_te1_te2") if name.startswith("lora_te")]
    assert {layer.lora_name for layer in on_meta(sdxl).layers} == {*unet, *encoders}


GUIDE = ("preset=full", "conv_dim=256", "conv_alpha=4", "use_tucker=False", "algo=locon", "train_norm=False")


def test_the_guides_network_is_mostly_convolutions(sdxl: Model) -> None:
    network = on_meta(sdxl, *GUIDE, network_dim=8, network_alpha=4.0)
    sizes = network.sizes
    assert sum(map(sum, sizes.values())) == 120_067_584
    assert len(sizes["UNet convolutions"]) == 38
    assert round(sum(sizes["UNet convolutions"]) / 120_067_584, 2) == 0.76
    assert len(sizes["text encoder 1"]) + len(sizes["text encoder 2"]) == 264
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.mark.parametrize("algo", ["loha", "full", "locon dora_wd=True"])  # those that look at the base's numbers
def test_other_algos_have_a_size_without_memory_for_weights(sdxl: Model, algo: str) -> None:
    network = on_meta(sdxl, *f"algo={algo}".split(), "preset=attn-only", network_train_unet_only=True)
    [(part, sizes)] = network.sizes.items()
    assert (part, len(sizes)) == ("UNet linear and 1×1", 560)
    assert sum(sizes) > 0


def test_networks_lora_trains_convolutions_only_if_asked_to(sdxl: Model) -> None:
    without = on_meta(sdxl, network_module="networks.lora")
    with_them = on_meta(sdxl, "conv_dim=4", network_module="networks.lora", network_alpha=2.0)
    assert {layer.lora_name for layer in without.layers} == set(fixtures.module_names("sdxl_lora_kohya_te1_te2"))
    assert len(with_them.layers) == 788 + 264
    assert {float(layer.alpha) for layer in with_them.layers if layer.shape[2:] == (3, 3)} == {1.0}


def test_only_one_half_is_trained_when_asked(base: Path) -> None:
    def kinds(**more: object) -> set[str]:
        return {key[:8] for key in build_network(load(base), options(base, **more)).state()}

    assert kinds(network_train_unet_only=True) == {"lora_une"}
    assert kinds(network_train_text_encoder_only=True) == {"lora_te1", "lora_te2"}


def test_presets_leave_nothing_behind_in_lycoris(base: Path, tmp_path: Path) -> None:
    before = {name: copy.deepcopy(value) for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    names = set(PRESET)
    preset_path = tmp_path / "one.toml"
    preset_path.write_text(
        "unet_target_module = []\ntext_encoder_target_module = []\n"
        'unet_target_name = ["mid_block.attentions.0.proj_in"]\n'
        '[name_algo_map."mid_block.attentions.0.proj_in"]\nalgo = "loha"\ndim = 3\n'
    )
    network = build_network(load(base), options(base, f"preset={preset_path}"))
    assert {key: tuple(value.shape) for key, value in network.state().items() if key.endswith("w1_b")} == {
        "lora_unet_middle_block_1_proj_in.hada_w1_b": (3, 32)
    }
    assert len(network.layers) == 1
    assert {name: getattr(LycorisNetworkKohya, name) for name in before} == before
    assert set(PRESET) == names
    assert len(build_network(load(base), options(base)).layers) == 197 + 24


def test_a_preset_in_a_file_may_speak_of_sd_scripts_classes(base: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(
        'unet_target_module = ["CrossAttention", "TimestepEmbedding"]\nunet_target_name = ["time_embedding.linear_1"]\n'
        "text_encoder_target_module = []\nenable_conv = false\n"
    )
    names = {layer.lora_name for layer in build_network(load(base), options(base, f"preset={preset}")).layers}
    assert "lora_unet_time_embed_0" in names
    assert all("attn" in name for name in names - {"lora_unet_time_embed_0"})


def test_a_preset_file_with_unknown_settings_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "preset.toml").write_text("unet_modules = []\n")
    with pytest.raises(InputError, match="unet_modules"):
        build_network(load(base), options(base, f"preset={tmp_path / 'preset.toml'}"))


def test_a_network_without_modules_is_refused(base: Path) -> None:
    with pytest.raises(UsageError, match="matches no module"):
        build_network(load(base), options(base, "preset=unet-only", network_train_text_encoder_only=True))


def test_what_lycoris_cannot_build_is_told_with_its_reason(base: Path) -> None:
    with pytest.raises(UsageError, match="impossible to decompose 24"):
        build_network(load(base), options(base, "algo=boft"))


def test_building_says_nothing_on_the_terminal(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, level = load(base), lycoris_log.level
    capfd.readouterr()
    build_network(model, options(base, "algo=loha", "dropout=0.1", "bypass_mode=True"))
    assert capfd.readouterr() == ("", "")
    assert lycoris_log.level == level


# --- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("algo", sorted(ALGOS))
def test_an_untrained_network_changes_no_bit(base: Path, algo: str) -> None:
    model = load(base)
    before = output(model)
    build_network(model, options(base, f"algo={algo}", network_dim=6))
    assert torch.equal(output(model), before)


def test_an_untrained_network_changes_no_bit_of_a_half_precision_base(base: Path) -> None:
    model = load_model(options(base, mixed_precision="bf16"), CPU)
    with torch.autocast("cpu", torch.bfloat16):
        before = output(model)
        network = build_network(model, options(base))
        assert torch.equal(output(model), before)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_the_seed_alone_decides_the_first_weights(base: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    states = [build_network(load(base), options(base, seed=seed)).state() for seed in (1, 1)]
    assert torch.equal(torch.rand(1), expected)
    different = build_network(load(base), options(base, seed=2)).state()
    key = "lora_unet_middle_block_1_proj_in.lora_down.weight"
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], different[key])


def test_loss_falls_on_a_fixed_batch(base: Path) -> None:
    model, chosen = load(base), options(base)
    losses = train(model, build_network(model, chosen), chosen, 10, rate=1e-2)
    assert losses[-1] < 0.8 * losses[0]


def test_bypass_and_rebuilding_are_the_same_in_float32(base: Path, tmp_path: Path) -> None:
    model, network = trained(base)
    path = write(network, tmp_path / "lora.safetensors")
    rebuilt = load(base)
    different = build_network(rebuilt, options(base, "bypass_mode=False", network_weights=str(path)))
    assert {layer.bypass_mode for layer in network.layers} == {True}
    assert {layer.bypass_mode for layer in different.layers} == {False}
    assert distance(output(model), output(load(base))) > 1e-2
    assert distance(output(rebuilt), output(model)) < 1e-5


def test_dropout_works_while_training_only(base: Path) -> None:
    model, network = trained(base, network_dropout=0.5)
    still = output(model)
    assert torch.equal(output(model), still)
    network.train()
    assert not torch.equal(output(model), still)
    network.train(False)
    assert torch.equal(output(model), still)


def test_of_the_first_encoders_last_layer_nothing_is_trained(base: Path) -> None:
    # SDXL reads the layer before it.
    state = trained(base)[1].state()
    ups = {key: value.abs().max() for key, value in state.items() if key.endswith("lora_up.weight")}
    still = {key for key, value in ups.items() if value == 0}
    assert still == {key for key in ups if key.startswith("lora_te1_text_model_encoder_layers_1_")}


# --- learning rates -----------------------------------------------------------------------------


def rates(network: Network, chosen: Options) -> dict[str, float]:
    groups, names = network.groups(chosen)
    return dict(zip(names, [group["lr"] for group in groups], strict=True))


def test_learning_rates_go_to_the_parts_they_are_given_for(base: Path) -> None:
    network = build_network(load(base), options(base))
    assert rates(network, options(base, learning_rate=1.0)) == {"textencoder": 1.0, "unet": 1.0}
    chosen = options(base, learning_rate=1.0, unet_lr=2.0, text_encoder_lr=(3.0, 4.0))
    assert rates(network, chosen) == {"textencoder": 3.0, "unet": 2.0}
    assert any("text_encoder_lr" in line and "3 is used" in line for line in read_network_args(chosen).warnings)


def test_what_has_a_rate_of_0_is_not_trained_but_written(base: Path) -> None:
    _, network = trained(base, text_encoder_lr=(0.0,))
    assert all(not layer.lora_up.weight.requires_grad for layer in network.module.text_encoder_loras)
    state = network.state()
    assert {key for key in state if key.startswith("lora_te")}
    assert all(not value.any() for key, value in state.items() if key.startswith("lora_te") and "lora_up" in key)
    with pytest.raises(UsageError, match="rate of 0"):
        network.groups(options(base, learning_rate=0.0))


def test_lora_plus_trains_one_factor_faster(base: Path) -> None:
    chosen = options(base, "loraplus_lr_ratio=4", learning_rate=1.0)
    network = build_network(load(base), chosen)
    assert rates(network, chosen) == {"textencoder": 1.0, "textencoder plus": 4.0, "unet": 1.0, "unet plus": 4.0}


# --- norms --------------------------------------------------------------------------------------


def changes(network: Network, tmp_path: Path) -> dict[str, float]:
    """‖ΔW‖_F of each layer as the written file says it."""
    with open_adapter(write(network, tmp_path / "norms.safetensors")) as adapter:
        return {layer.name: layer.delta.dense().norm().item() for layer in adapter.layers}


@pytest.mark.parametrize("args", [(), ("use_scalar=True",), ("algo=loha",), ("algo=lokr",)])
def test_no_layer_is_longer_than_the_limit_and_shorter_ones_stay(
    base: Path, tmp_path: Path, small: str, args: tuple[str, ...]
) -> None:
    _, network = trained(base, *args, small, "rank_dropout=0.5", steps=3)
    before = changes(network, tmp_path)
    limit = sorted(before.values())[len(before) // 2]
    network.train()
    report = network.limit_norms(limit)
    after = changes(network, tmp_path)
    assert network.module.training
    assert max(after.values()) <= limit * (1 + 1e-5)
    assert {name: after[name] for name in after if before[name] < 0.99 * limit} == {
        name: before[name] for name in before if before[name] < 0.99 * limit
    }
    assert report.largest == pytest.approx(max(after.values()), rel=1e-4)
    assert report.average == pytest.approx(sum(after.values()) / len(after), rel=1e-3)
    assert abs(report.scaled - sum(value > limit for value in before.values())) <= 1


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "diag-oft", "boft"])
def test_norms_are_limited_as_lycoris_limits_them(base: Path, small: str, algo: str) -> None:
    (our_model, ours), (their_model, theirs) = (trained(base, f"algo={algo}", small, network_dim=6) for _ in range(2))
    before = output(our_model)
    ours.limit_norms(1e-3)
    theirs.module.apply_max_norm_regularization(1e-3, CPU)
    assert distance(output(our_model), before) > 1e-3
    assert distance(output(our_model), output(their_model)) < 1e-5


class Operations(TorchDispatchMode):
    """Counts what is computed; a GPU starts a kernel or more for each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_limiting_norms_takes_few_operations_for_many_layers(base: Path) -> None:
    network = build_network(load(base), options(base, "preset=full"))
    with Operations() as counted:
        report = network.limit_norms(1e-3)
    assert len(network.layers) > 200
    assert counted.count <= 100
    assert report.scaled == 0  # a new network changes nothing


# --- files and states ---------------------------------------------------------------------------

MATRIX = (
    ("algo=locon", "use_tucker=True", "conv_dim=3", "train_norm=True"),
    ("algo=lora", "use_scalar=True", "rs_lora=True"),
    ("algo=loha", "use_tucker=True"),
    ("algo=lokr", "decompose_both=True", "factor=4"),
    ("algo=lokr", "full_matrix=True", "use_scalar=True"),
    ("algo=full",),
    ("algo=glora",),
    ("algo=diag-oft", "rescaled=True"),
    ("algo=boft", "constraint=0.1"),
    ("algo=locon", "dora_wd=True"),
    ("algo=locon", "dora_wd=True", "wd_on_output=False"),
)


@pytest.mark.parametrize("args", MATRIX, ids=" ".join)
def test_every_algo_trains_resumes_and_is_read_again(
    base: Path, tmp_path: Path, small: str, args: tuple[str, ...]
) -> None:
    args = (*args, small)
    model, network = trained(base, *args, network_dim=6, network_alpha=3.0)
    network.limit_norms(0.5)
    result = output(model)
    assert distance(result, output(load(base))) > 1e-4

    resumed = load(base)
    build_network(resumed, options(base, *args, network_dim=6, network_alpha=3.0, seed=9)).load_raw(network.raw_state())
    assert torch.equal(output(resumed), result)

    path = write(network, tmp_path / "lora.safetensors")
    again = load(base)
    build_network(again, options(base, *args, network_dim=6, network_alpha=3.0, seed=9, network_weights=str(path)))
    # a scalar that is folded into a factor, or a difference to the base, is rounded once
    assert distance(output(again), result) < 2e-5

    taken = load(base)
    dims = options(base, *args, network_dim=1, dim_from_weights=True, network_weights=str(path))
    build_network(taken, dims)
    assert distance(output(taken), result) < 2e-5

    with open_adapter(path) as adapter:
        layers = len(adapter.layers)
        assert layers == SMALL
        assert all(re.search(r"\.(w_norm|b_norm|diff_b)$", key) for key in adapter.others)


def test_a_file_without_scalars_gives_the_very_same_output(base: Path, tmp_path: Path) -> None:
    model, network = trained(base)
    again = load(base)
    build_network(again, options(base, network_weights=str(write(network, tmp_path / "lora.safetensors"))))
    assert torch.equal(output(again), output(model))


def test_the_state_of_a_file_is_a_copy_in_float32_on_the_cpu(base: Path) -> None:
    _, network = trained(base)
    state = network.state()
    before = {key: value.clone() for key, value in state.items()}
    network.limit_norms(1e-3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert {(value.dtype, value.device, value.requires_grad) for value in state.values()} == {
        (torch.float32, CPU, False)
    }
    assert {value.ndim for key, value in state.items() if key.endswith(".alpha")} == {0}
    assert all(value.is_contiguous() for value in state.values())


def test_training_goes_on_bit_by_bit_also_after_norms_were_limited(base: Path) -> None:
    chosen = options(base, "use_scalar=True")

    def go_on(network: Network, model: Model) -> Tensor:
        train(model, network, chosen, 1)
        return output(model)

    model, network = trained(base, "use_scalar=True")
    network.limit_norms(0.01)
    saved = network.raw_state()
    different = load(base)
    resumed = build_network(different, chosen)
    resumed.load_raw(saved)
    assert all(torch.equal(value, saved[key]) for key, value in resumed.raw_state().items())
    assert torch.equal(go_on(network, model), go_on(resumed, different))


def test_a_state_of_another_network_is_refused(base: Path) -> None:
    network = build_network(load(base), options(base))
    different = build_network(load(base), options(base, network_dim=3))
    with pytest.raises(InputError, match="another network"):
        network.load_raw(different.raw_state())
    with pytest.raises(InputError, match="another network"):
        network.load_raw({})


def test_diffusers_computes_from_the_file_what_was_trained(base: Path, tmp_path: Path) -> None:
    model, network = trained(base, "conv_dim=3", "conv_alpha=2", steps=4)
    network.limit_norms(0.3)
    path = write(network, tmp_path / "lora.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    different = Model(pipeline.unet, pipeline.vae, encoders, (pipeline.tokenizer, pipeline.tokenizer_2))
    before = output(different)
    pipeline.load_lora_weights(path)
    assert distance(output(different), before) > 1e-2
    assert distance(output(different), output(model)) < 1e-5


# --- starting from files ------------------------------------------------------------------------


def test_a_start_may_be_in_diffusers_names_and_in_any_order(base: Path, tmp_path: Path) -> None:
    model, network = trained(base, network_alpha=2.0)  # diffusers' files have no alpha: it is the rank
    path = write(network, tmp_path / "lora.safetensors")
    convert(path, base=base, naming="diffusers", output=tmp_path / "out")
    (diffusers,) = (tmp_path / "out").iterdir()
    lycoris = {kohya: name for name, kohya in kohya_names(model).items()}
    spelled = {lycoris[key.split(".", 1)[0]] + "." + key.split(".", 1)[1]: v for key, v in network.state().items()}
    save_file(dict(reversed(spelled.items())), tmp_path / "lycoris.safetensors")
    for file in (diffusers, tmp_path / "lycoris.safetensors"):
        again = load(base)
        build_network(again, options(base, network_alpha=2.0, network_weights=str(file)))
        assert distance(output(again), output(model)) < 1e-5


@pytest.mark.parametrize(
    ("saved", "changes", "message"),
    [
        ({"network_dim": 3}, {}, "another rank.*--dim_from_weights"),
        ({"network_alpha": 2.0}, {}, "alpha is 2.0, and 1.0 in this network.*--network_alpha"),
        ({}, {"network_train_unet_only": True}, "not in the network: lora_te1_text_model"),
        ({"network_train_unet_only": True}, {}, "not in the file: lora_te1_text_model"),
        ({"network_args": ("algo=loha",)}, {}, "not in the network"),
        ({"network_args": ("algo=loha",)}, {"dim_from_weights": True}, "holds loha, and"),
        ({"network_args": ("dora_wd=True",)}, {"dim_from_weights": True}, "with DoRA, and .*dora_wd=False"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_with_names(
    base: Path, tmp_path: Path, small: str, saved: dict, changes: dict, message: str
) -> None:
    arguments = (small, *saved.get("network_args", ()))
    chosen = options(base, **{**saved, "network_args": arguments})
    path = write(build_network(load(base), chosen), tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match=message):
        build_network(load(base), options(base, small, network_weights=str(path), **changes))


def test_ranks_come_from_the_file_and_dropout_from_the_options(base: Path, tmp_path: Path) -> None:
    first = build_network(load(base), options(base, "conv_dim=5", "conv_alpha=3", "preset=unet-only"))
    path = write(first, tmp_path / "lora.safetensors")
    chosen = options(base, network_weights=str(path), dim_from_weights=True, network_dropout=0.25)
    network = build_network(load(base), chosen)
    assert {key: (value.shape, float(value)) for key, value in network.state().items() if value.ndim == 0} == {
        key: (value.shape, float(value)) for key, value in first.state().items() if value.ndim == 0
    }
    assert {layer.lora_dim for layer in network.layers} == {2, 5}
    assert {layer.dropout.p for layer in network.layers} == {0.25}
    assert {layer.bypass_mode for layer in network.layers} == {True}


@pytest.mark.parametrize("naming", ["kohya", "diffusers", "comfy"])
def test_base_weights_are_in_the_base_before_training(base: Path, tmp_path: Path, small: str, naming: str) -> None:
    model, network = trained(base, small)
    write(network, tmp_path / "lora.safetensors")
    report = convert(tmp_path / "lora.safetensors", base=base, naming=naming, output=tmp_path / "out")
    merged = load(base)
    start = build_network(merged, options(base, small, base_weights=(report.results[0].output,)))
    assert distance(output(merged), output(model)) < 1e-5
    assert not any(layer.lora_up.weight.any() for layer in start.layers)


def test_base_weights_of_opposite_strengths_cancel_out(base: Path, tmp_path: Path, small: str) -> None:
    path = str(write(trained(base, small, "algo=lokr")[1], tmp_path / "lora.safetensors"))
    merged = load(base)
    build_network(merged, options(base, small, base_weights=(path, path), base_weights_multiplier=(-1.0,)))
    assert distance(output(merged), output(load(base))) < 1e-5


def test_what_of_base_weights_is_no_change_of_a_weight_is_counted(
    base: Path, tmp_path: Path, small: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(trained(base, small, "train_norm=True", steps=1)[1], tmp_path / "lora.safetensors")
    build_network(load(base), options(base, small, base_weights=(str(path),)))
    assert "are no change of SDXL's weights" in caplog.text


# --- network_args -------------------------------------------------------------------------------


def test_the_keys_are_those_that_lycoris_reads() -> None:
    read = set(re.findall(r'kwargs\.get\(\s*"(\w+)"', inspect.getsource(create_network)))
    assert read == KEYS | {"use_cp", "use_conv_cp", "disable_conv_cp"}
    assert OLD_NAMES.keys() | OPPOSITES.keys() == {"use_cp", "use_conv_cp", "disable_conv_cp", "constrain"}


def test_the_presets_are_those_of_lycoris_except_an_empty_one() -> None:
    assert {name: preset["enable_conv"] for name, preset in PRESET.items() if name != "ia3"} == PRESETS


GUIDE_ARGS = (*GUIDE, "use_scalar=False", "rank_dropout_scale=False", "block_dims=8,8", "block_alphas=0.0625,0.0625")


def test_the_guides_keys_that_do_nothing_are_named_once_each() -> None:
    lines = read_network_args(
        options(None, *GUIDE_ARGS, network_dim=8, network_alpha=4.0, network_dropout=0.0)
    ).warnings
    assert [line.split()[1] for line in lines] == ["rank_dropout_scale", "block_dims", "block_alphas"]
    assert "23 values" in lines[1]


@pytest.mark.parametrize(
    ("args", "more", "expected"),
    [
        (("weight_decompose=True",), {}, "dora_wd=True"),
        (("conv_dims=4",), {}, "did you mean conv_dim?"),
        (("use_reentrant=False",), {}, "never re-entrant"),
        (("zzz=1",), {}, "knows no such key"),
        (("factor=8",), {}, "factor has no effect with algo=lora"),
        (("preset=attn-mlp", "conv_dim=8"), {}, "conv_dim has no effect with preset=attn-mlp"),
        (("algo=diag-oft",), {}, "experimental"),
        (("dora_wd=True",), {}, "experimental"),
        (("algo=lokr", "dropout=0.1"), {}, "no effect with algo=lokr without bypass_mode=True"),
        ((), {"network_alpha": 16.0, "network_dim": 8}, "16 / 8 = 2"),
        (("conv_dim=1", "conv_alpha=2"), {}, "conv_alpha / conv_dim is 2 / 1 = 2"),
        (("bypass_mode=False",), {"mixed_precision": "bf16"}, "rounds"),
        (("algo=loha",), {"network_module": "networks.lora"}, "no effect with networks.lora"),
    ],
)
def test_what_does_nothing_or_surprises_is_said_in_one_line(args: tuple, more: dict, expected: str) -> None:
    (line,) = read_network_args(options(None, *args, **more)).warnings
    assert expected in line


@pytest.mark.parametrize(
    ("args", "more", "expected"),
    [
        (("conv_dim",), {}, "no key=value pair"),
        (("conv_dim=many",), {}, "whole number"),
        (("conv_dim=-1",), {}, "0 or more"),
        (("rank_dropout=1.5",), {}, "share"),
        (("use_tucker=0",), {}, "True or False"),
        (("conv_alpha=nan",), {}, "0 or more"),
        (("algo=lo",), {}, "one of boft, diag-oft"),
        (("algo=dylora",), {}, "nothing can load"),
        (("algo=ia3",), {}, "matches no layer"),
        (("algo=tlora",), {}, "time step"),
        (("preset=ia3",), {}, "matches no layer"),
        (("preset=fill",), {}, "neither a TOML file nor one of full"),
        (("algo=full", "bypass_mode=True"), {}, "no bypass_mode"),
        (("dora_wd=True", "bypass_mode=True"), {}, "dora_wd=True"),
        (("block_dims=8,8",), {"network_module": "networks.lora"}, "not supported"),
        ((), {"network_module": None}, "missing"),
        ((), {"network_module": "networks.oft"}, "trains with lycoris.kohya"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(args: tuple, more: dict, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        read_network_args(options(None, *args, **more))


def test_algos_inside_a_preset_file_are_checked_too(tmp_path: Path) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text('[module_algo_map.Attention]\nalgo = "ia3"\n')
    with pytest.raises(UsageError, match="algo=ia3"):
        read_network_args(options(None, f"preset={preset}"))


def test_old_names_of_keys_mean_what_they_meant() -> None:
    values = read_network_args(options(None, "use_cp=True", "constrain=0.5")).values
    assert (values["use_tucker"], values["constraint"]) == (True, "0.5")
    assert read_network_args(options(None, "disable_conv_cp=True")).values["use_tucker"] is False


def test_false_is_false_where_lycoris_would_take_it_for_true(base: Path) -> None:
    network = build_network(load(base), options(base, "algo=lokr", "decompose_both=False", network_dim=1))
    assert not any("lokr_w1_a" in key for key in network.state())


def test_a_conv_dim_of_0_leaves_convolutions_out(base: Path) -> None:
    network = build_network(load(base), options(base, "conv_dim=0"))
    assert "UNet convolutions" not in network.sizes


def test_an_alpha_of_0_means_a_scale_of_1(base: Path) -> None:
    network = build_network(load(base), options(base, "conv_dim=3", "conv_alpha=0", network_alpha=0.0))
    assert {layer.scale for layer in network.layers} == {1.0}


def test_a_dropout_among_the_keys_wins_over_the_flag() -> None:
    assert read_network_args(options(None, network_dropout=0.2)).values["dropout"] == "0.2"
    assert read_network_args(options(None, "dropout=0.1", network_dropout=0.2)).values["dropout"] == "0.1"


def test_checks_of_the_command_line_need_no_heavy_imports() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import lorashrink.train.flags.network_args; "
        "sys.exit(bool({'torch', 'lycoris', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_of_a_command_line_reach_the_network(base: Path) -> None:
    flags = "--network_module=lycoris.kohya --network_dim=8 --network_alpha=4 --network_args"
    chosen = parse([*flags.split(), *GUIDE_ARGS])
    network = build_network(load(base), chosen)
    assert {(layer.lora_dim, layer.scale) for layer in network.layers} == {(8, 0.5), (256, 4 / 256)}
