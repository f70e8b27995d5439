"""The plan of a run: numbers of the guide's run on SDXL in full size, tiny ones by hand, and activations as counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest
import tiny_sdxl
import torch
import training
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from lorashrink.errors import InputError
from lorashrink.train.data.scanning import batch_count, scan
from lorashrink.train.memory import Activations, count_activations, optimizer_bytes
from lorashrink.train.model.loading import Model, load_model, set_checkpointing
from lorashrink.train.model.network import Network, build_network
from lorashrink.train.options import Options, parse
from lorashrink.train.output.saving import run_length
from lorashrink.train.plan import describe, empty_model, plan
from lorashrink.train.run.optimizers import OPTIMIZERS, make_optimizer
from lorashrink.train.text import encode

CPU = torch.device("cpu")
GIB = 2**30

# The guide's command, without what neither size nor memory depends on.
GUIDE = parse(
    [
        *["--pretrained_model_name_or_path=/no/base/here", "--train_data_dir=/no/pictures/here"],
        *["--resolution=1024,1024", "--output_dir=/no/output/here", "--enable_bucket"],
        *["--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=4", "--network_args", "preset=full"],
        *["conv_dim=256", "conv_alpha=4", "algo=locon", "--learning_rate=0.0001", "--no_half_vae"],
        *["--mixed_precision=fp16", "--save_precision=fp16", "--cache_latents", "--optimizer_type=AdamW"],
        *["--gradient_accumulation_steps=6", "--gradient_checkpointing", "--train_batch_size=8"],
        *["--max_train_steps=400"],
    ]
)


@pytest.fixture(scope="module")
def guide() -> str:
    return plan(GUIDE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_data(tmp_path_factory.mktemp("pictures"))


def options(base: Path, **more: object) -> Options:
    settings = {"network_module": "lycoris.kohya", "network_dim": 2, "resolution": "64", "learning_rate": 1e-4}
    return Options(pretrained_model_name_or_path=str(base), **{**settings, **more})


def rows(text: str) -> dict[str, list[str]]:
    """The lines of both tables, by what stands on their left; columns are two spaces apart or more."""
    cells = (re.split(r" {2,}", line) for line in text.splitlines())
    return {first: rest for first, *rest in cells if rest}


# --- SDXL in full size --------------------------------------------------------------------------


def test_the_guides_run_has_the_modules_and_parameters_of_its_command(guide: str) -> None:
    # Counted on real SDXL: 788 + 264 modules, 120.1 million parameters, 229 MiB in fp16, 76 % of it in the convolutions
    table = rows(guide)
    assert table["UNet linear and 1×1"] == ["750", "21,747,200", "43.5", "18%"]
    assert table["UNet convolutions"] == ["38", "91,095,040", "182.2", "76%"]
    assert table["text encoder 1"] == ["72", "1,327,104", "2.7", "1%"]
    assert table["text encoder 2"] == ["192", "5,898,240", "11.8", "5%"]
    assert "network: 1052 modules, 120.1 million parameters; a file has 240.1 MB in fp16" in guide
    assert round(240.1e6 / 2**20) == 229


def test_a_step_of_the_guides_run_sees_48_pictures(guide: str) -> None:
    assert "batch: 8 × 6 accumulated × 1 process = 48 pictures per step" in guide


def test_convolutions_of_a_rank_out_of_proportion_are_pointed_out(guide: str) -> None:
    assert "76% of the file are 38 convolutions of rank 256 (conv_dim), while all else has rank 8" in guide
    # (120,067,584 - 91,095,040 · 248 / 256) · 2 bytes
    assert "With conv_dim=8 it would have 63.6 MB" in guide


def test_what_is_not_there_is_said_and_planned_for_sdxl(guide: str) -> None:
    assert "base: /no/base/here, which is not there; planned for SDXL 1.0" in guide
    assert "pictures: none in /no/pictures/here" in guide
    assert "length: 400 steps; without pictures it is not known how many steps an epoch has" in guide
    assert "for 8 pictures of 1024×1024" in guide


def test_lasting_memory_is_bytes_of_weights_adapter_gradients_and_states(guide: str) -> None:
    table = {name: cells[-1] for name, cells in rows(guide).items()}
    # Parameters of SDXL 1.0: UNet 2,567,463,684; text encoders 123,060,480 and 694,659,840
    assert table["UNet, float16"] == f"{2 * 2_567_463_684 / GIB:.2f}" == "4.78"
    assert table["text encoders, float16"] == f"{2 * (123_060_480 + 694_659_840) / GIB:.2f}" == "1.52"
    assert table["adapter, float32"] == table["its gradients"] == f"{4 * 120_067_584 / GIB:.2f}"
    assert table["states of AdamW"] == f"{8 * 120_067_584 / GIB:.2f}"
    assert not any(name.startswith("VAE") for name in table)  # latents are cached


def test_the_total_is_that_of_the_rows_and_names_a_gpu(guide: str) -> None:
    memory = rows(guide[guide.index("GPU memory") :])
    *parts, total = (float(cells[-1]) for cells in memory.values())
    assert total == pytest.approx(sum(parts), abs=0.05)
    assert 16 < total < 24 * 0.95
    assert "As an estimate, a GPU with 24 GB is enough." in guide


def test_one_picture_at_a_time_takes_what_the_field_knows_for_sdxl(guide: str) -> None:
    memory = rows(guide[guide.index("GPU memory") :])
    total, kept = (float(memory[name][-1]) for name in ("in all", "activations, with checkpointing"))
    without = float(re.search(r"Without --gradient_checkpointing it would be ([\d.]+) GiB", guide)[1])
    lasting = total - kept
    assert 9 < lasting + kept / 8 < 12  # reports of sd-scripts' users: 10 to 12 GB with checkpointing
    assert 16 < lasting + (without - lasting) / 8 < 24  # and about 20 GB without


# --- pictures, batches, length ------------------------------------------------------------------


def of_pictures(base: Path, pictures: Path, **more: object) -> Options:
    buckets = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
    found = {"train_data_dir": str(pictures), "caption_extension": ".txt"}
    return options(base, **{**found, **buckets, "gradient_accumulation_steps": 4, "max_train_steps": 5, **more})


PICTURES = "pictures: 3 in 1 folder and 2 buckets, 6 showings per epoch"
# 6 showings of batches of 1 are 6 batches, hence ceil(6 / 4) steps; ceil(5 / 2) epochs
LENGTH = "length: 6 batches or 2 steps per epoch, 3 epochs, 5 steps"


def test_pictures_and_length_are_those_of_the_folder(base: Path, pictures: Path) -> None:
    lines = plan(of_pictures(base, pictures)).splitlines()
    assert lines[:2] == [f"base: {base}", PICTURES]
    assert "batch: 1 × 4 accumulated × 1 process = 4 pictures per step" in lines
    assert LENGTH in lines


def test_processes_share_the_batches(base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = plan(of_pictures(base, pictures))
    assert "batch: 1 × 4 accumulated × 2 processes = 8 pictures per step" in text
    assert "length: 3 batches or 1 step per epoch, 5 epochs, 5 steps" in text


def test_memory_is_that_of_the_batch_with_the_most_pixels(base: Path, pictures: Path) -> None:
    # Two pictures, twice each, are 64×64; the third, twice, is of another shape.
    assert "for 4 pictures of 64×64" in plan(of_pictures(base, pictures, train_batch_size=8))
    assert "for 3 pictures of 64×64" in plan(of_pictures(base, pictures, train_batch_size=3))


def test_a_run_begins_with_the_same_numbers(base: Path, pictures: Path) -> None:
    chosen = of_pictures(base, pictures, network_args=("preset=attn-mlp",), save_precision="bf16")
    data, network = scan(chosen), build_network(load_model(chosen, CPU), chosen)
    lines = describe(chosen, data, network, run_length(chosen, batch_count(data)), 1).splitlines()
    assert lines[0] == PICTURES
    assert lines[-1] == LENGTH
    # Four projections of rank 2 and two layers of double width, in each of two layers of width 16, or 24
    assert f"  text encoder 1: 12 modules, {2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32))} parameters" in lines
    assert f"  text encoder 2: 12 modules, {2 * (4 * 2 * (24 + 24) + 2 * 2 * (24 + 48)):,} parameters" in lines
    planned = plan(chosen).splitlines()
    assert set(lines) - set(planned) == {line for line in lines if line.startswith("  ")}


def test_ranks_can_come_from_a_file(base: Path, tmp_path: Path) -> None:
    chosen = options(base, network_dim=3, network_alpha=3.0)
    save_file(build_network(load_model(chosen, CPU), chosen).state(), tmp_path / "x.safetensors")
    again = options(base, network_weights=str(tmp_path / "x.safetensors"), dim_from_weights=True)
    assert plan(again) == plan(chosen)


def test_parts_that_are_cached_or_not_trained_take_nothing(base: Path) -> None:
    whole = plan(options(base, mixed_precision="fp16", no_half_vae=True))
    assert {"VAE, float32", "text encoders, float16", "text encoder 1"} <= rows(whole).keys()
    unet = plan(options(base, cache_latents=True, cache_text_encoder_outputs=True, network_train_unet_only=True))
    assert not any(name.startswith(("VAE", "text encoder")) for name in rows(unet))


def test_an_optimizer_that_is_not_known_is_taken_for_adam(base: Path) -> None:
    assert "states of torch.optim.Rprop, taken for two float32" in plan(
        options(base, optimizer_type="torch.optim.Rprop")
    )


def test_a_single_file_is_planned_with_the_settings_given_for_it(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    text = plan(options(file, model_config=str(base)))
    assert f"base: {file}, with the settings in {base}" in text
    assert rows(text).keys() == rows(plan(options(base))).keys()


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="settings of the base cannot be read"):
        plan(options(tmp_path))


# --- optimizers ---------------------------------------------------------------------------------

MEASURED = sorted(name for name, known in OPTIMIZERS.items() if known.package != "bitsandbytes" and name != "Adafactor")


@pytest.mark.parametrize("name", [*MEASURED, "Adam", "Adagrad", "NAdam", "RAdam", "RMSprop", "SGD"])
def test_an_optimizer_keeps_as_many_bytes_as_planned(name: str) -> None:
    chosen = Options(optimizer_type=name, learning_rate=1.0)
    assert kept_bytes(chosen) == optimizer_bytes(chosen)


def test_momentum_and_factors_are_planned_too() -> None:
    momentum = Options(optimizer_type="SGD", learning_rate=1.0, optimizer_args=("momentum=0.9",))
    assert kept_bytes(momentum) == optimizer_bytes(momentum) == 4
    factors = Options(optimizer_type="Adafactor", optimizer_args=("relative_step=False",), learning_rate=1.0)
    assert 0 < kept_bytes(factors) <= (optimizer_bytes(factors) or 0)


def test_numbers_of_8_bits_take_one_byte() -> None:
    # bitsandbytes' names, which run on GPUs only: two numbers for AdamW, one for Lion and SGD with momentum
    names = ("AdamW8bit", "PagedAdamW8bit", "Lion8bit", "SGDNesterov8bit", "PagedAdamW32bit")
    assert [optimizer_bytes(Options(optimizer_type=name)) for name in names] == [2, 2, 1, 1, 8]


def kept_bytes(chosen: Options) -> float:
    """What the optimizer keeps per parameter of a matrix, but for single numbers."""
    weight = torch.nn.Parameter(torch.ones(32, 32))
    optimizer, _ = make_optimizer(chosen, [{"params": [weight], "lr": 1.0}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [each for each in optimizer.state[weight].values() if isinstance(each, Tensor) and each.numel() > 1]
    return sum(each.numel() * each.element_size() for each in states) / weight.numel()


# --- activations --------------------------------------------------------------------------------

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, CLIPEncoderLayer)  # what is checkpointed in SDXL


@cache
def count(base: Path, batch: int = 2, side: int = 64, *, real: bool = False, **more: object) -> Activations:
    chosen = options(base, **more)
    model = load_model(chosen, CPU) if real else empty_model(base, chosen)
    network = build_network(model, chosen)
    network.groups(chosen)
    return count_activations(model, network, chosen, batch, (side, side))


class Seen:
    """Bytes of distinct storages of real tensors, but for those of a model."""

    def __init__(self, model: Model, network: Network) -> None:
        modules = (model.unet, *model.encoders, network.module)
        tensors = [each for module in modules for each in (*module.parameters(), *module.buffers())]
        self.lasting = {each.untyped_storage().data_ptr() for each in tensors}
        self.tensors: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self.lasting:
            self.tensors.setdefault(place, tensor)
        return tensor

    def bytes(self, without: dict[int, Tensor] | None = None) -> int:
        chosen = [each for place, each in self.tensors.items() if place not in (without or {})]
        return sum(each.untyped_storage().nbytes() for each in chosen)


@contextmanager
def saved(*seen: Seen) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        for each in seen:
            each.add(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def compute(model: Model) -> Tensor:
    """Two pictures of 64×64 through the model."""
    tokens = torch.zeros(2, 1, 77, dtype=torch.long)
    text = encode(model.encoders, tokens, tokens)
    added = {"text_embeds": text.pooled, "time_ids": torch.zeros(2, 6)}
    return model.unet(torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), text.context, added_cond_kwargs=added).sample


def test_activations_are_what_autograd_saves(base: Path) -> None:
    chosen = options(base, gradient_checkpointing=True)
    model = load_model(chosen, CPU)
    network = build_network(model, chosen)
    set_checkpointing(model, chosen)  # for the gradients of embeddings, which transformers turns on with it
    everything, outside = Seen(model, network), Seen(model, network)
    blocks: list[Seen] = []
    open_blocks = ExitStack()

    def enter(module: torch.nn.Module, inputs: tuple[object, ...], more: dict[str, object]) -> None:
        for each in (*inputs, more.get("encoder_hidden_states")):
            if isinstance(each, Tensor):
                outside.add(each)
        blocks.append(Seen(model, network))
        open_blocks.enter_context(saved(blocks[-1], everything))

    def leave(module: torch.nn.Module, inputs: object, output: object) -> None:
        open_blocks.close()

    for module in (module for part in (model.unet, *model.encoders) for module in part.modules()):
        module.gradient_checkpointing = False
        # diffusers does not checkpoint the first block in the middle.
        if isinstance(module, BLOCKS) and module is not model.unet.mid_block.resnets[0]:
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)
    with saved(outside, everything):
        compute(model)
    assert len(blocks) == 16 + 11 + 2 + 2  # ResNet and transformer blocks of the UNet, layers of the text encoders
    block = max(each.bytes(without=outside.tensors) for each in blocks)
    assert count(base, real=True) == Activations(everything.bytes(), outside.bytes(), block)


def test_checkpointing_keeps_what_torch_keeps_for_it(base: Path) -> None:
    chosen = options(base, gradient_checkpointing=True)
    model = load_model(chosen, CPU)
    network = build_network(model, chosen)
    set_checkpointing(model, chosen)
    outside = Seen(model, network)
    with saved(outside):
        compute(model)
    counted = count(base, real=True)
    assert counted.outside == outside.bytes()
    assert counted.checkpointed == counted.outside + counted.block < counted.full


def test_shapes_alone_give_the_numbers_of_a_real_run(base: Path) -> None:
    shapes, real = count(base), count(base, real=True)
    # CUDA's kernel keeps three numbers of 8 bytes more, in 11 blocks with two attentions each, and in 4 text layers.
    assert shapes.full - 24 * (2 * 11 + 4) == real.full
    assert shapes.outside == real.outside
    assert shapes.block - 24 == real.block


def test_activations_grow_with_pictures_and_not_with_pairs_of_pixels(base: Path) -> None:
    two, three, four = count(base).full, count(base, 3).full, count(base, 4).full
    assert four - three == three - two
    assert count(base, 2, 512).full < 64 * two  # 64 times the pixels, and 4096 times the pairs


def test_half_precision_halves_all_but_normalisation(base: Path) -> None:
    single, half = count(base), count(base, mixed_precision="bf16")
    on_cpu = count(base, real=True, mixed_precision="bf16")  # where autocast normalises in half precision too
    assert single.full / 2 < on_cpu.full < half.full < 0.9 * single.full


def test_text_encoders_that_are_not_trained_keep_nothing(base: Path) -> None:
    unet_only = count(base, network_train_unet_only=True)
    assert unet_only == count(base, text_encoder_lr=(0.0,))
    assert unet_only.full < count(base).full < count(base, max_token_length=225).full
