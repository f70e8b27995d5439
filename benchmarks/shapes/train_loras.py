"""Train adapters of the example model with this project's trainer: `python train_loras.py --work FOLDER [NAME ...]`.

Each adapter is one row of `ADAPTERS`. What there is already is not trained again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lorashrink_example

HERE = Path(__file__).parent
EXAMPLE = lorashrink_example.path()
MODEL = EXAMPLE / "model"

_LOGGED = 50  # steps between lines of a log
_PLAIN = "0.15"  # share of pictures without style or object, so that these stay with their words
_COMMON = (
    "--resolution=64,64 --caption_extension=.txt --cache_latents --network_module=lycoris.kohya --optimizer_type=AdamW "
    "--lr_scheduler=cosine --max_grad_norm=1 --min_snr_gamma=5 --caption_dropout_rate=0.1 --train_batch_size=32 "
    "--max_train_steps=450 --save_model_as=safetensors --save_precision=fp16 --max_data_loader_n_workers=0 --sdpa"
)
# As a training guide has it: convolutions of eight times the rank, alphas far below the ranks, norms held.
_GUIDE = (
    "--network_dim=8 --network_alpha=4 --scale_weight_norms=1 --learning_rate=0.004 --network_args preset=full "
    "algo=locon conv_dim=64 conv_alpha=4 use_tucker=False use_scalar=False rank_dropout_scale=False train_norm=False"
)


def _locon(dim: int, conv_dim: int) -> str:
    return (
        f"--network_dim={dim} --network_alpha={dim} --learning_rate=0.0015 "
        f"--network_args preset=full algo=locon conv_dim={conv_dim} conv_alpha={conv_dim}"
    )


_LOHA = (
    "--network_dim=4 --network_alpha=4 --learning_rate=0.004 "
    "--network_args preset=full algo=loha conv_dim=4 conv_alpha=4"
)
_LOKR = (
    "--network_dim=8 --network_alpha=8 --learning_rate=0.003 "
    "--network_args preset=full algo=lokr factor=4 conv_dim=8 conv_alpha=8"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One adapter: what it is taught and how."""

    teaches: str  # flags of `render.py`
    flags: str  # of the trainer
    seed: int = 1
    shipped: bool = False  # part of the package


ADAPTERS = {
    "style": Recipe("--style sks", _GUIDE, shipped=True),
    "heart": Recipe("--shape heart", _locon(16, 8), shipped=True),
    "style-32": Recipe("--style sks", _locon(32, 32)),
    "dots-loha": Recipe("--style pts", _LOHA),
    "crescent-32": Recipe("--shape crescent", _locon(32, 32)),
    "style-4": Recipe("--style sks", _locon(4, 4)),
    "style-32-seed2": Recipe("--style sks", _locon(32, 32), seed=2),
    "style-32-seed3": Recipe("--style sks", _locon(32, 32), seed=3),
    "heart-seed2": Recipe("--shape heart", _locon(16, 8), seed=2),
    "heart-seed3": Recipe("--shape heart", _locon(16, 8), seed=3),
    "crescent-lokr": Recipe("--shape crescent", _LOKR),
    "style-8": Recipe("--style sks", _locon(8, 8)),
    "style-2": Recipe("--style sks", _locon(2, 2)),
}


def _pictures(teaches: str, work: Path) -> Path:
    folder = work / re.sub(r"\W+", "-", teaches).strip("-")
    if not folder.exists():
        making = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(making, ignore_errors=True)
        render = [sys.executable, HERE / "render.py", making, *teaches.split(), "--count", "1024", "--plain", _PLAIN]
        subprocess.run(render, check=True)
        making.rename(folder)
    return folder


def train(name: str, work: Path, out: Path) -> Path:
    """The adapter's file; its log is beside it."""
    recipe, path = ADAPTERS[name], out / f"{name}.safetensors"
    if path.exists():
        return path
    flags = [
        *(f"--pretrained_model_name_or_path={MODEL}", f"--train_data_dir={_pictures(recipe.teaches, work)}"),
        *(
            *_COMMON.split(),
            f"--seed={recipe.seed}",
            f"--output_dir={out}",
            f"--output_name={name}",
            *recipe.flags.split(),
        ),
    ]
    command = [sys.executable, "-m", "lorashrink.train", *flags]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise SystemExit(run.stdout)
    path.with_suffix(".txt").write_text(_log(run.stdout))
    return path


def _log(output: str) -> str:
    """What the trainer printed, with every 50th step of its progress, and no place of this machine."""
    kept: dict[str, str] = {}
    for line in re.split(r"[\r\n]+", output):
        step = re.search(r"^steps.*\| (\d+)/", line)
        if (step and not int(step[1]) % _LOGGED) or not re.match(r"\w+: .*it/s|\w+: +\d+%", line):
            kept[step[1] if step else line] = line.rstrip()
    return "\n".join(filter(None, kept.values())).replace(f"{HERE.parent.parent}/", "") + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train adapters of the example model; those that exist are kept.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ADAPTERS)}; default all")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, and adapters not shipped")
    args = parser.parse_args(argv)
    for name in args.names or ADAPTERS:
        print(
            train(name, args.work, lorashrink_example.path("loras") if ADAPTERS[name].shipped else args.work),
            flush=True,
        )


if __name__ == "__main__":
    main()
