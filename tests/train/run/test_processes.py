"""Training in two processes, which on this machine work on the CPU and speak over gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_sdxl
import training
from safetensors.torch import load_file
from training import equal, flags

ROOT = Path(__file__).parents[3]
PROGRAMS = Path(sys.executable).parent
PATIENCE = 300  # seconds, on a machine that others use

# The guide's line for two GPUs; port 0 is any that is free.
LAUNCH = (
    *(str(PROGRAMS / "accelerate"), "launch", "--num_processes=2", "--multi_gpu", "--num_machines=1", "--gpu_ids=0,1"),
    *("--num_cpu_threads_per_process=2", "--main_process_port=0", "./train/sdxl_train_network.py"),
)
# The same for accelerate, which is also what starts the processes there.
TORCHRUN = (str(PROGRAMS / "torchrun"), "--standalone", "--nproc_per_node=2")
MODULE = ("-m", "lorashrink.train")

# One bucket, two pictures: a batch for each of two processes, or one batch of two.
SIZES = {"a.png": (64, 64), "b.png": (64, 64)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def write_data(folder: Path) -> Path:
    tiny_sdxl.write_pictures(folder / "1_cat", SIZES, {"a.png": "a cat, red", "b.png": "a dog, blue"})
    return folder


def start(
    command: Sequence[str], *, cwd: Path = ROOT, gpus: bool = False, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; without `gpus`, accelerate is told that there are none to be used."""
    chosen = {} if gpus else {"ACCELERATE_USE_CPU": "1"}
    variables = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | chosen | more
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def two(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of two processes, and what they wrote to stderr."""
    folder = tmp_path_factory.mktemp("two")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a cat --w 64 --h 64 --d {seed} --s 1\n" for seed in (1, 2, 3)))
    words = flags(
        model,
        data,
        folder / "o",
        *("--optimizer_type=torch.optim.SGD", "--learning_rate=1", f"--logging_dir={folder / 'o' / 'logs'}"),
        *(f"--sample_prompts={prompts}", "--sample_every_n_steps=4", "--max_train_steps=4"),
    )
    done = start([*LAUNCH, *words], HF_HOME=str(folder / "empty"))
    assert done.returncode == 0, done.stderr
    return folder / "o", done.stderr


def test_two_processes_of_batch_one_equal_one_process_of_batch_two(
    two: tuple[Path, str], model: Path, data: Path, tmp_path: Path
) -> None:
    """But for rounding, and for averaging gradients in another order."""
    more = ("--optimizer_type=torch.optim.SGD", "--learning_rate=1", "--max_train_steps=4", "--train_batch_size=2")
    single = training.run(flags(model, data, tmp_path, *more))
    shared = load_file(two[0] / "x.safetensors")
    size = max(float(value.abs().max()) for key, value in single.items() if "lora_up" in key)
    assert size > 1e-3
    assert single.keys() == shared.keys()
    assert max(float((single[key] - shared[key]).abs().max()) for key in single) < 1e-4 * size


def test_one_process_writes_and_speaks_and_both_draw(two: tuple[Path, str]) -> None:
    folder, messages = two
    assert names(folder) == {"x.safetensors", "sample", "logs"}
    drawn = {re.sub(r"\d{14}", "TIME", name) for name in names(folder / "sample")}
    assert drawn == {"x_000004_sheet.png", *(f"x_000004_{number:02d}_TIME_{number + 1}.png" for number in range(3))}
    (log,) = (folder / "logs").iterdir()
    assert names(log) == {"network_train", "loss.png"}
    assert len(list((log / "network_train").iterdir())) == 1
    for once in ("saved ", "samples: ", "loss curve: ", "warning: "):
        assert messages.count(once) == 1
    assert "3 sample prompts do not divide evenly among 2 processes" in messages
    assert "Traceback" not in messages


def test_two_resumed_processes_end_with_the_same_bits(model: Path, data: Path, tmp_path: Path) -> None:
    """Each process goes on with its own random numbers for dropout."""
    common = ("--max_train_steps=4", "--network_args", "preset=attn-mlp", "module_dropout=0.3")
    states = ("--save_state", "--save_every_n_steps=2")
    first = start([*TORCHRUN, *MODULE, *flags(model, data, tmp_path / "1", *common, *states)])
    assert first.returncode == 0, first.stderr
    state = tmp_path / "1" / "x-step00000002-state"
    assert {"random_states_0.pkl", "random_states_1.pkl"} < names(state)
    resumed = start([*TORCHRUN, *MODULE, *flags(model, data, tmp_path / "2", *common, f"--resume={state}")])
    assert resumed.returncode == 0, resumed.stderr
    assert equal(load_file(tmp_path / "1" / "x.safetensors"), load_file(tmp_path / "2" / "x.safetensors"))


def test_a_failing_process_ends_the_run_and_only_rank_0_writes(model: Path, tmp_path: Path) -> None:
    """A picture is damaged while the training runs.

    Each process works in a folder of its own, named like its rank, so that what it writes is seen.
    """
    data = write_data(tmp_path / "data")
    words = flags(model, data, Path("o"), "--max_train_steps=200", "--save_every_n_steps=1", "--seed=5")
    picture = data / "1_cat" / "b.png"

    def damage() -> None:
        while not list(tmp_path.glob("0/o/x-step*.safetensors")):
            time.sleep(0.01)
        break_picture(picture, picture)

    threading.Thread(target=damage, daemon=True).start()
    apart = ("--no-python", "sh", "-c", 'mkdir $RANK && cd $RANK && exec "$@"', "sh", sys.executable, *MODULE)
    done = start([*TORCHRUN, *apart, *words], cwd=tmp_path)
    assert done.returncode != 0
    assert len(errors_with(done, "b.png: cannot be read")) == 1
    saved = sorted((tmp_path / "0" / "o").iterdir())
    assert saved
    assert all(re.fullmatch(r"x-step\d{8}\.safetensors", path.name) and load_file(path) for path in saved)
    assert names(tmp_path / "1") == set()


def test_a_process_that_fails_alone_before_training_tells_why(model: Path, data: Path, tmp_path: Path) -> None:
    """The second process caches every second picture."""
    data = write_data(tmp_path / "data")
    break_picture(data / "1_cat" / "b.png", data / "1_cat" / "b.png")
    done = start([*TORCHRUN, *MODULE, *flags(model, data, tmp_path / "o", "--cache_latents_to_disk")])
    assert done.returncode != 0
    assert len(errors_with(done, "b.png")) == 1
    assert not (tmp_path / "o").exists()


def break_picture(source: Path, broken: Path) -> None:
    """Its first half."""
    contents = source.read_bytes()
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(contents[: len(contents) // 2])


def errors_with(done: subprocess.CompletedProcess[str], text: str) -> list[str]:
    """The errors with this text."""
    return [line for line in re.split(r"[\r\n]", done.stderr) if "lorashrink: " in line and text in line]


def test_two_processes_that_find_no_gpus_do_not_train_the_same_twice(model: Path, data: Path, tmp_path: Path) -> None:
    command = [word for word in LAUNCH if not word.startswith("--gpu_ids")]
    done = start([*command, *flags(model, data, tmp_path / "o")], gpus=True, CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert len(errors_with(done, "2 processes")) == len(errors_with(done, "GPU")) == 1
    assert not (tmp_path / "o").exists()
