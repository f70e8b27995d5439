"""The trainer as people start it: whole programs, from the command line to the files."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fixtures
import pytest
import tiny_sdxl
import tiny_single_file
import torch
import training
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from training import equal, flags

from lorashrink.adapters import open_adapter
from lorashrink.making.conversion import convert
from lorashrink.train.flags.options import parse
from lorashrink.train.model.loading import load_model
from lorashrink.train.model.network import build_network

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
PATIENCE = 300  # seconds, on a machine that others use

LAUNCH = (str(PROGRAMS / "accelerate"), "launch", "--num_cpu_threads_per_process=2")
PROGRAM = (str(PROGRAMS / "lorashrink"), "train")
SHRINK = (str(PROGRAMS / "lorashrink"), "resize")
MODULE = (sys.executable, "-m", "lorashrink.train")

# As the guide has it, but for the backslashes.
GUIDE = """
accelerate launch --num_cpu_threads_per_process=2 "./sdxl_train_network.py"
--lowram
--pretrained_model_name_or_path="/models/base-diffusers/"
--train_data_dir="/training_dir"
--resolution="1024,1024"
--output_dir="/output_dir"
--enable_bucket
--min_bucket_reso=256
--max_bucket_reso=1024
--network_alpha=4
--save_model_as="safetensors"
--network_module="lycoris.kohya"
--network_args
    "preset=full"
    "conv_dim=256"
    "conv_alpha=4"
    "use_tucker=False"
    "use_scalar=False"
    "rank_dropout_scale=False"
    "algo=locon"
    "train_norm=False"
    "block_dims=8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8,8"
    "block_alphas=0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625,0.0625"
--network_dropout=0
--lr_scheduler="cosine"
--learning_rate=0.0001
--unet_lr=0.0001
--text_encoder_lr=0.0001
--network_dim=8
--output_name="mylora"
--scale_weight_norms=1
--no_half_vae
--save_every_n_epochs=50
--mixed_precision="fp16"
--save_precision="fp16"
--caption_extension=".txt"
--cache_latents
--cache_latents_to_disk
--optimizer_type="AdamW"
--max_grad_norm=1
--keep_tokens=1
--max_data_loader_n_workers=8
--bucket_reso_steps=32
--multires_noise_iterations=10
--multires_noise_discount=0.1
--log_prefix=xl-locon
--gradient_accumulation_steps=6
--gradient_checkpointing
--train_batch_size=8
--dataset_repeats=0
--max_train_steps=400
--shuffle_caption
--sdpa
--sample_prompts=/training_dir/sample-prompts.txt
--sample_sampler="euler_a"
--sample_every_n_steps=100
"""
PROMPTS = """a cat on a mat --n ugly, blurred --w 64 --h 64 --d 1 --l 6.0 --s 2
a dog --n ugly, blurred --w 64 --h 64 --d 2 --l 6.0 --s 2
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return training.write_data(tmp_path / "data")


def environment(folder: Path) -> dict[str, str]:
    """One thread, or threads that sleep while they wait where a launcher sets more; no settings of accelerate's."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HOME": str(folder / "empty")}


def start(command: Sequence[str], folder: Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in the project's folder unless said."""
    return subprocess.run(
        command, cwd=cwd, env=environment(folder), capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def lines(stderr: str) -> list[str]:
    """What was written, without what later writing on the same line hid and without progress bars."""
    shown = [line.strip() for line in re.split(r"[\r\n]", stderr)]
    return [line for line in shown if line and not re.match(r"(steps|latents|captions): ", line)]


def folder_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- one program -------------------------------------------------------------------------------


def test_all_ways_to_start_are_one_program(model: Path, data: Path, tmp_path: Path) -> None:
    launch = (*LAUNCH[:2], "--num_cpu_threads_per_process=1")  # as many as the others have: threads change sums
    ways = {
        "path": (*launch, "./train/sdxl_train_network.py"),
        "launched": (*launch, "-m", "lorashrink.train"),
        "program": PROGRAM,
        "module": MODULE,
    }
    results = {}
    for name, way in ways.items():
        done = start([*way, *flags(model, data, tmp_path / name, "--max_train_steps=2")], tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        results[name] = load_file(tmp_path / name / "x.safetensors")
    assert any(value.any() for key, value in results["path"].items() if "lora_up" in key)
    assert all(equal(results["path"], tensors) for tensors in results.values())


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    done = start([sys.executable, "-X", "importtime", "-m", "lorashrink.train", "--help"], tmp_path)
    assert done.returncode == 0
    assert "--pretrained_model_name_or_path" in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "lorashrink.train.flags.options" in imported
    assert not imported & {"torch", "numpy", "PIL", "accelerate", "diffusers", "transformers", "matplotlib"}
    assert start([*PROGRAM, "--help"], tmp_path).stdout.startswith("usage: lorashrink train")


# --- the guide ---------------------------------------------------------------------------------


def guide(model: Path, data: Path, output: Path) -> list[str]:
    """The guide's command on another model, other pictures and for fewer steps; logged as it says further on."""
    changed = {
        "accelerate": str(PROGRAMS / "accelerate"),
        "--pretrained_model_name_or_path": f"{model}/",
        "--train_data_dir": data,
        "--resolution": "32,32",
        "--output_dir": output,
        "--min_bucket_reso": 32,
        "--max_bucket_reso": 32,
        "--save_every_n_epochs": 2,
        "--gradient_accumulation_steps": 2,
        "--train_batch_size": 2,
        "--max_train_steps": 6,
        "--sample_prompts": data / "sample-prompts.txt",
        "--sample_every_n_steps": 4,
    }
    words = []
    for word in shlex.split(GUIDE):
        name, equals, _ = word.partition("=")
        words.append(f"{name}{equals}{changed.pop(name)}" if equals and name in changed else changed.pop(word, word))
    assert not changed
    return [*words, "--log_with=tensorboard", f"--logging_dir={output / 'logs'}", "--save_state_on_train_end"]


@pytest.fixture(scope="module")
def guided(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The folders of pictures and of outputs of a run of the guide's command, and what it wrote to stderr."""
    folder = tmp_path_factory.mktemp("guide")
    data, output = training.write_data(folder / "training_dir"), folder / "output_dir"
    (data / "sample-prompts.txt").write_text(PROMPTS)
    done = start(guide(model, data, output), folder, cwd=ROOT / "train")
    assert done.returncode == 0, done.stderr
    return data, output, done.stderr


def test_the_guides_command_leaves_what_it_names(guided: tuple[Path, Path, str]) -> None:
    """Three batches in an epoch, two in a step: six steps are three epochs."""
    data, output, _ = guided
    assert folder_names(output) == {
        *("mylora.safetensors", "mylora-000002.safetensors", "mylora-state", "sample", "logs")
    }
    pictures = folder_names(output / "sample")
    assert "mylora_000004_sheet.png" in pictures
    drawn = sorted(pictures - {"mylora_000004_sheet.png"})
    assert [re.sub(r"\d{14}", "TIME", name) for name in drawn] == [
        *("mylora_000004_00_TIME_1.png", "mylora_000004_01_TIME_2.png")
    ]
    (log,) = (output / "logs").iterdir()
    assert re.fullmatch(r"xl-locon\d{14}", log.name)
    assert folder_names(log) == {"network_train", "loss.png"}
    assert len(list((log / "network_train").iterdir())) == 1
    assert {name for name in folder_names(data / "2_cat") if name.endswith(".npz")} == {
        f"{name[0]}_{width:04d}x{height:04d}_sdxl.npz" for name, (width, height) in training.SIZES.items()
    }


def test_the_guides_command_says_what_has_no_effect_and_little_else(guided: tuple[Path, Path, str]) -> None:
    messages = lines(guided[2])
    warnings = [line for line in messages if line.startswith("warning: ")]
    for named in ("rank_dropout_scale", "block_dims", "block_alphas", "--max_bucket_reso"):
        assert sum(named in line for line in warnings) == 1
    assert len(warnings) <= 5
    noise = re.compile(
        r"Warning|WARN|INFO|Traceback|\[transformers\]|deprecat|torchvision|token indices", re.IGNORECASE
    )
    ours = [line for line in messages if not line.startswith(("warning: ", "To avoid this warning pass"))]
    assert not [line for line in ours if noise.search(line)]


def test_other_programs_compute_what_was_trained_from_the_files(
    guided: tuple[Path, Path, str], model: Path, tmp_path: Path
) -> None:
    """Within the precision of fp16; the pipeline computes in float32."""
    _, output, _ = guided
    file = output / "mylora.safetensors"
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    plain = computed(pipeline(model))
    trained = computed(in_lycoris(model, file, output / "mylora-state" / "network.safetensors"))
    size = distance(trained, plain)
    assert size > 1e-4
    assert distance(computed(pipeline(model, file)), trained) < 2**-9 * size + 1e-6

    single = tiny_single_file.write_single_file(model, tmp_path / "model.safetensors")
    kept = {}
    for base in (model, single):
        folder = tmp_path / f"kept of {base.stem}"
        done = start([*SHRINK, "-o", str(folder), "-r", "fro_ckpt=1,thr=-3.55", str(base), str(file)], tmp_path)
        assert done.returncode == 0, done.stderr
        (small,) = folder.iterdir()
        assert small.stat().st_size < file.stat().st_size / 2
        (percent,) = re.findall(r"([\d.]+)%", done.stdout)[1:2]  # the first one is the share of the size
        assert left_out(file, small) == pytest.approx(float(percent) / 100, abs=1e-3)
        kept[base] = computed(in_lycoris(model, small))
        assert 0 < distance(kept[base], plain) < 2 * size
        convert(small, base=base, naming="diffusers", output=folder / "renamed")
        (renamed,) = (folder / "renamed").iterdir()
        assert distance(computed(pipeline(model, renamed)), kept[base]) < 1e-5
    assert distance(kept[model], kept[single]) < 1e-6


def pipeline(model: Path, *adapters: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    for adapter in adapters:
        pipeline.load_lora_weights(adapter)
    return pipeline


def in_lycoris(model: Path, adapter: Path, raw: Path | None = None) -> StableDiffusionXLPipeline:
    """The pipeline with an adapter that LyCORIS reads, or with what training left of it in float32."""
    words = ("--network_module=lycoris.kohya", "--dim_from_weights", "--network_args", "preset=full")
    options = parse([f"--pretrained_model_name_or_path={model}", f"--network_weights={adapter}", *words])
    parts = load_model(options, torch.device("cpu"))
    network = build_network(parts, options)
    if raw:
        network.load_raw(load_file(raw))
    network.train(False)
    trained = pipeline(model)
    trained.register_modules(unet=parts.unet, text_encoder=parts.encoders[0], text_encoder_2=parts.encoders[1])
    return trained


@torch.no_grad()
def computed(pipeline: StableDiffusionXLPipeline) -> torch.Tensor:
    """What the UNet predicts for a prompt."""
    hidden, _, pooled, _ = pipeline.encode_prompt("a cat, red", do_classifier_free_guidance=False)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    return pipeline.unet(noise, 500, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes})[0]


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def left_out(full: Path, small: Path) -> float:
    """How far the changes of two adapters are apart, relative to those of the first."""
    with open_adapter(full) as before, open_adapter(small) as after:
        kept = {layer.name: layer.delta.dense() for layer in after}
        changes = {layer.name: layer.delta.dense() for layer in before}
    apart = sum(float((change - kept.get(name, 0)).square().sum()) for name, change in changes.items())
    return (apart / sum(float(change.square().sum()) for change in changes.values())) ** 0.5


# --- mistakes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what is not what an option asks for."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "file").touch()
    (folder / "state").mkdir()
    (folder / "nothing" / "2_cat").mkdir(parents=True)
    (folder / "settings.toml").write_text("[training]\nunet_lrr = 1\n")
    empty = training.write_data(folder / "empty")
    (empty / "2_cat" / "b.txt").write_text("")
    fixtures.write_base(folder, "sd15 folder")
    fixtures.write_adapter(folder, "sdxl_locon_kohya")
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--spda", "--spda (did you mean --sdpa?)"),
        ("--pretrained_model_name_or_path=/no/such/model", "/no/such/model"),
        ("--pretrained_model_name_or_path={}/sd15-folder", "SD 1.x, and lorashrink trains on SDXL"),
        ("--pretrained_model_name_or_path={}/sdxl_locon_kohya.safetensors", "this is an adapter, not a base"),
        ("--pretrained_model_name_or_path=/no/such\x1b[31mmodel", r"/no/such\x1b[31mmodel"),  # not in red
        ("--train_data_dir={}/nothing", "no pictures"),
        ("--train_data_dir={}/empty", "b.txt is empty"),
        ("--config_file={}/settings.toml", "--unet_lrr (did you mean --unet_lr?)"),
        ("--resume={}/state", "only folders that --save_state"),
        ("--output_dir={}/file", "is no folder"),
        ("--output_dir={}/file/below", "is no folder"),
        ("--network_args algo=ia3", "algo=ia3 is not supported"),
        ("--network_args preset=atn-mlp", "preset=atn-mlp"),
        ("--sample_prompts={}/prompts.txt", "no file"),
    ],
)
def test_a_mistake_is_told_in_a_line_or_two(
    more: str, message: str, mistakes: Path, model: Path, tmp_path: Path
) -> None:
    data = training.write_data(tmp_path / "data")
    words = flags(model, data, tmp_path / "o", "--max_train_steps=1", *more.format(mistakes).split())
    done = start([*PROGRAM, *words], tmp_path)
    assert done.returncode == 2, done.stderr
    shown_error = lines(done.stderr)
    assert shown_error[-1].startswith("lorashrink: ")
    assert message in shown_error[-1]
    assert len(shown_error) <= 2
    assert done.stdout == ""
    assert not (tmp_path / "o").exists()


def test_a_damaged_picture_is_named_and_left_out(model: Path, data: Path, tmp_path: Path) -> None:
    (data / "2_cat" / "broken.png").write_bytes(b"no picture")
    done = start([*MODULE, *flags(model, data, tmp_path / "o", "--max_train_steps=1")], tmp_path)
    assert done.returncode == 0, done.stderr
    (shown_error,) = [line for line in lines(done.stderr) if line.startswith("warning: ")]
    assert "broken.png" in shown_error
    assert (tmp_path / "o" / "x.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_a_state_to_resume(
    number: signal.Signals, model: Path, data: Path, tmp_path: Path
) -> None:
    common = ("--save_every_n_steps=2", "--lr_scheduler=constant")
    running = subprocess.Popen(
        [*PROGRAM, *flags(model, data, tmp_path / "o", *common, "--max_train_steps=100000")],
        cwd=ROOT,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of shells begin with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first = tmp_path / "o" / "x-step00000002.safetensors"
    waited = time.monotonic() + PATIENCE
    while not first.exists() and running.poll() is None and time.monotonic() < waited:
        time.sleep(0.05)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130, stderr
    assert "Traceback" not in stderr
    step, state = re.fullmatch(
        r"lorashrink: interrupted after step (\d+); go on with --resume (.*)", lines(stderr)[-1]
    ).groups()
    assert all(load_file(path) for path in (tmp_path / "o").iterdir() if path.is_file())
    longer = (*common, f"--max_train_steps={int(step) + 1}")
    resumed = training.run(flags(model, data, tmp_path / "resumed", *longer, f"--resume={state}"))
    assert equal(resumed, training.run(flags(model, data, tmp_path / "uninterrupted", *longer)))
