"""What a GPU makes of three jobs: the engine beside the CPU, training steps and calibration of the size of SDXL.

    python benchmarks/bench_gpu.py --only resize --rank 64 --files 4
    python benchmarks/bench_gpu.py --only train --batch 1 4 8
    python benchmarks/bench_gpu.py --only calibrate

Ends with 0 and a sentence where there is no GPU, and with 1 if the singular values differ by more than 1e-9. With
--small training and calibration are those of a tiny model, and run without a GPU too: they show that they run, no more.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from rates import cores
from safetensors.torch import save_file
from sdxl_data import factors, shapes
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lorashrink.train
from lorashrink.bases import open_base
from lorashrink.calibration.calibrate import calibrate
from lorashrink.engine.delta import Delta
from lorashrink.engine.devices import worker_pool
from lorashrink.engine.spectrum import Item, Spectrum, decompose, truncate
from lorashrink.train.data.batches import Batch
from lorashrink.train.data.scanning import Data, Draw
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.model.loading import Model, set_attention, set_checkpointing, weight_dtype
from lorashrink.train.model.network import build_network
from lorashrink.train.run.objective import BatchLoss
from lorashrink.train.run.optimizers import make_optimizer, make_scheduler
from lorashrink.train.run.preparing import step_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_sdxl

TOLERANCE = 1e-9  # relative, of singular values down to a thousandth of the layer's largest
_STRENGTH = 1.0  # ‖ΔW‖_F of every layer
_ALPHA = 32.0
JOBS = ["resize", "train", "calibrate"]


# --- shrinking ----------------------------------------------------------------------------------


def deltas(rank: int, files: int, *, small: bool) -> list[Delta]:
    """The layers of several SDXL LoRAs, random fp16 factors in memory."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in [*shapes(small=small)[1].values()] * files:
        up, down = factors(shape, rank, _STRENGTH, generator)
        made.append(Delta(up, down, _ALPHA / rank, shape))
    return made


def shrink(layers: Sequence[Delta], device: str, pool: Executor) -> tuple[float, list[Spectrum]]:
    """(seconds, spectra) of decomposing all layers and forming the factors of half of their dimensions."""
    start = time.perf_counter()
    items = [Item(partial(_same, layer), layer.rank) for layer in layers]
    spectra = [future.result() for future in decompose(items, pool, device=device)]

    def form(index: int) -> None:
        truncate(layers[index], spectra[index], range(layers[index].rank // 2), device=device)

    for _ in pool.map(form, range(len(layers))):
        pass
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, spectra


def _same(layer: Delta) -> Delta:
    return layer


def largest_difference(ours: Sequence[Spectrum], reference: Sequence[Spectrum]) -> float:
    """Largest relative difference of singular values over all layers; infinite if one is not a number."""
    worst = 0.0
    for one, other in zip(ours, reference, strict=True):
        counted = other.sigma > 1e-3 * other.sigma[0]
        difference = float(((one.sigma - other.sigma)[counted].abs() / other.sigma[counted]).max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def compare(layers: Sequence[Delta], repeats: int) -> float:
    """Time both in turn, print the ratio, and return the largest relative difference."""
    times: dict[str, float] = {"cpu": math.inf, "cuda": math.inf}
    spectra: dict[str, list[Spectrum]] = {}
    with worker_pool() as pool:
        shrink(layers[:64], "cuda", pool)  # starts the libraries
        torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            for device in times:
                taken, spectra[device] = shrink(layers, device, pool)
                times[device] = min(times[device], taken)
    difference = largest_difference(spectra["cuda"], spectra["cpu"])
    print(
        f"{times['cpu'] / times['cuda']:.1f}x  GPU {times['cuda']:.2f} s  CPU {times['cpu']:.2f} s  "
        f"{torch.cuda.get_device_name()}, {cores()} cores, torch {torch.__version__}, {len(layers)} layers "
        f"r{layers[0].rank}"
    )
    print(f"      peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    print(f"      largest relative difference of σ {difference:.1e}, at most {TOLERANCE:g} is right")
    return difference


# --- training -----------------------------------------------------------------------------------

WARM_UP = 2  # steps that are not counted
MOST_SKIPPED = 12  # steps with infinite gradients, after each of which fp16's loss scale is halved
GIB = 2**30


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


def ready(options: Options, size: Size) -> Callable[[Batch], tuple[torch.Tensor, bool]]:
    """The trainer's own step on that model: it gives the loss, and whether the parameters were changed."""
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    model = random_model(options, size, accelerator.device)
    network = build_network(model, options).to(accelerator.device)
    set_attention(model, options)
    set_checkpointing(model, options)
    groups, rates = network.groups(options)
    trains_text = any("textencoder" in rate for rate in rates)
    batch_loss = BatchLoss(options, Data((), (), ()), model, network, seed=1, trains_text=trains_text)
    optimizer, _ = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, options.max_train_steps)
    batch_loss, optimizer, scheduler = accelerator.prepare(batch_loss, optimizer, scheduler)
    trained = [parameter for group in groups for parameter in group["params"]]

    def step(batch: Batch) -> tuple[torch.Tensor, bool]:
        loss = batch_loss(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), not accelerator.optimizer_step_was_skipped

    return step


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


def train(options: Options, size: Size, steps: int) -> float:
    """Seconds per step, the median; infinite where memory is too small. Steps that fp16 skips do not count.

    The peak of memory is left in torch's statistics.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    laps: list[float] = []
    try:
        take_step = ready(options, size)
        for step in range(WARM_UP + steps + MOST_SKIPPED):
            batch = random_batch(options, size, step)
            start = time.perf_counter()
            loss, changed = take_step(batch)
            loss.item()  # waits for the GPU
            if changed:
                laps.append(time.perf_counter() - start)
            if len(laps) == WARM_UP + steps:
                return median(laps[WARM_UP:])
    except torch.OutOfMemoryError:
        return math.inf
    raise SystemExit(f"{MOST_SKIPPED + 1} steps had gradients that are not finite in {options.mixed_precision}")


def report_training(size: Size, precision: str, batches: Sequence[int], steps: int) -> None:
    """Step time and peak memory for each batch size, beside what was estimated; then both ways LyCORIS can compute."""
    taken = {}
    for batch, bypass in [*((batch, True) for batch in batches), (batches[0], False)]:
        options = guide_options(precision, size, batch, bypass)
        expected = estimate(options, size)
        taken[batch, bypass] = train(options, size, steps)
        measured = f"{torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if torch.cuda.is_available() else "not known"
        print(
            f"      {taken[batch, bypass]:.3f} s per step  peak memory {measured}, estimated {expected / GIB:.2f} GiB  "
            f"| batch {batch}, bypass_mode={bypass}",
            flush=True,
        )
    ours, other = taken[batches[0], True], taken[batches[0], False]
    print(
        f"{other / ours:.2f}x  bypass_mode=True {ours:.3f} s  False {other:.3f} s  {_machine()}, {precision}, "
        f"{size.pixels}x{size.pixels}, batch {batches[0]}"
    )


def _machine() -> str:
    if not torch.cuda.is_available():
        return f"no GPU, {cores()} cores, torch {torch.__version__}"
    gpu = torch.cuda.get_device_properties(0)
    capability = f"{gpu.major}.{gpu.minor}"
    return f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB sm {capability}, {cores()} cores, torch {torch.__version__}"


# --- calibration --------------------------------------------------------------------------------


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
    """A LoRA of every weight, in diffusers' names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    with open_base(model) as base:
        for (part, name), views in base.modules("diffusers").items():
            shape = views[0].shape
            up, down = factors(shape, rank, _STRENGTH, generator)
            key = f"{base.family.folder(part)}.{name}"
            tensors[f"{key}.lora_A.weight"] = down.reshape(rank, *shape[1:])
            tensors[f"{key}.lora_B.weight"] = up.reshape(shape[0], rank, *(1,) * len(shape[2:]))
    save_file(tensors, path)


def report_calibration(size: Size, rank: int) -> None:
    """Seconds and peak memory of `calibrate`, for an adapter and for a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        model, adapter, prompts = (Path(place) / name for name in ("model", "lora.safetensors", "prompts.txt"))
        write_pipeline(model, size, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write_adapter(adapter, model, rank)
        prompts.write_text(f"a cat --w {size.pixels} --h {size.pixels} --s 10 --l 7 --d 1\n")
        for what, adapters in ((f"a LoRA of rank {rank}", [adapter]), ("a table", [])):
            done = calibrate(adapters, model=model, output=Path(place) / "s.safetensors", prompts=prompts, force=True)
            peak = f"{done.peak_bytes / GIB:.1f} GiB at most" if done.peak_bytes else "no GPU memory"
            print(
                f"calibrate for {what}: {done.layers} layers, {done.seconds / done.passes:.2f} s per pass of two "
                f"pictures of {size.pixels} px (loading included), {peak}, file of {done.bytes / 1e6:.0f} MB; "
                f"{_machine()}"
            )


# --- all ----------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and measure, or say that there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--rank", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--files", type=int, default=1, help="LoRAs whose layers are decomposed together")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the fastest counts (default 3)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="pictures per training step")
    parser.add_argument("--steps", type=int, default=8, help="training steps that count (default 8)")
    parser.add_argument("--precision", choices=["fp16", "bf16"], default="fp16", help="of training (default fp16)")
    parser.add_argument("--small", action="store_true", help="widths divided by 8, a tiny model: a quick look")
    options = parser.parse_args(arguments)
    there = torch.cuda.is_available()
    if not there:
        print("no GPU: torch finds no CUDA device on this machine, nothing was compared")
    differences = [0.0]
    if there and "resize" in options.only:
        made = (deltas(rank, options.files, small=options.small) for rank in options.rank)
        differences = [compare(layers, options.repeats) for layers in made]
    if (there or options.small) and "train" in options.only:
        report_training(TINY if options.small else SDXL, options.precision, options.batch, options.steps)
    if (there or options.small) and "calibrate" in options.only:
        report_calibration(TINY if options.small else SDXL, 8 if options.small else 64)
    return int(max(differences) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
