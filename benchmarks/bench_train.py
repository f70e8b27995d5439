"""What a step of the trainer costs beside a bare loop that does nothing but the arithmetic. See README.md.

python benchmarks/bench_train.py                              two to three minutes
python benchmarks/bench_train.py --only plain --profile 20    where the trainer's own time goes
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from rates import cores
from torch.nn import functional

from lorashrink.train.data.batches import Batch, Loader
from lorashrink.train.model.loading import LATENT_SCALE, Encoded, encode, load_model, tokenize
from lorashrink.train.model.network import Network, build_network
from lorashrink.train.run.loop import Session
from lorashrink.train.run.objective import Noised, Objective

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny_sdxl
import training

AIM = 1.10
PICTURES = 8
SIDE = 512  # of the pictures, in pixels
WARM_UP = 2  # steps of each side that are not counted
RESULTS = Path(__file__).parent / "results_train.txt"
# What is measured, and the flags that it adds; {folder} is a temporary folder.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "captions cached": ("--network_train_unet_only", "--cache_text_encoder_outputs"),
    "latents in files": ("--cache_latents_to_disk", "--max_data_loader_n_workers=8"),
    "accumulation 2": ("--gradient_accumulation_steps=2",),
    "norms limited": ("--scale_weight_norms=1",),
    "multires noise": ("--multires_noise_iterations=10", "--multires_noise_discount=0.1"),
    "logging": ("--log_with=tensorboard", "--logging_dir={folder}/logs"),
    "as in the guide": (
        *("--cache_latents_to_disk", "--max_data_loader_n_workers=8", "--gradient_accumulation_steps=2"),
        *("--scale_weight_norms=1", "--multires_noise_iterations=10", "--multires_noise_discount=0.1"),
        *("--shuffle_caption", "--keep_tokens=1", "--log_with=tensorboard", "--logging_dir={folder}/logs"),
    ),
}


# --- the model ----------------------------------------------------------------------------------


def write_model(folder: Path) -> Path:
    """SDXL's architecture, narrow, but wide enough that arithmetic is nearly all of a step; its weights are noise."""
    tiny_sdxl.write_model(folder)
    narrow = dict(UNet2DConditionModel.load_config(folder / "unet"))
    torch.manual_seed(0)
    wider = {"block_out_channels": (64, 128, 192), "attention_head_dim": (2, 4, 6), "norm_num_groups": 32}
    UNet2DConditionModel.from_config(narrow | wider).save_pretrained(folder / "unet")
    return folder


def flags(model: Path, pictures: Path, folder: Path, steps: int) -> list[str]:
    """The guide's command as far as it matters for a step."""
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={pictures}",
        f"--output_dir={folder}",
        f"--resolution={SIDE}",
        f"--max_train_steps={steps + WARM_UP + 1}",  # after the last one the bare loop has no turn
        *["--caption_extension=.txt", "--cache_latents", "--seed=1"],
        *["--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=4", "--learning_rate=0.0001"],
        *["--network_args", "preset=full", "conv_dim=32", "conv_alpha=4", "algo=locon"],
    ]


# --- both sides ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lap:
    """Seconds that passed, and that processors spent on this process."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Lap:
        """Both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, start: Lap) -> Lap:
        return Lap(self.wall - start.wall, self.cpu - start.cpu)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A batch as the model takes it."""

    noised: Noised
    time_ids: torch.Tensor
    text: Encoded | None
    tokens: Sequence[torch.Tensor]


class Bare:
    """The same model and network once more, and no more than a step needs: forward, loss, backward, clip, update."""

    def __init__(self, session: Session) -> None:
        self._options = session.options
        self._seed = session.position.seed
        self._objective = Objective(session.options)
        self._model = load_model(self._options, torch.device("cpu"))
        self.network: Network = build_network(self._model, self._options)
        self.network.train(True)
        groups, _ = self.network.groups(self._options)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups)

    def inputs(self, batch: Batch) -> Inputs:
        """With the noise and the tokens that the trainer makes of it."""
        assert batch.latents is not None
        keys = [(draw.epoch, draw.dataset, draw.picture, draw.repeat) for draw in batch.draws]
        noised = self._objective.noised(batch.latents * LATENT_SCALE, keys, self._seed)
        longest = self._options.max_token_length
        tokens = [tokenize(tokenizer, batch.captions, longest) for tokenizer in self._model.tokenizers]
        return Inputs(noised, batch.time_ids, batch.text, tokens)

    def step(self, batches: Sequence[Inputs]) -> None:
        """One step."""
        for batch in batches:
            text = batch.text or encode(self._model.encoders, batch.tokens[0], batch.tokens[1])
            prediction = self._model.unet(
                batch.noised.noisy,
                batch.noised.timesteps,
                text.context,
                added_cond_kwargs={"text_embeds": text.pooled, "time_ids": batch.time_ids},
                return_dict=False,
            )[0]
            (functional.mse_loss(prediction, batch.noised.target) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._options.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


@dataclass(slots=True)
class Turns:
    """The trainer's loader, in which the bare loop takes a step whenever the trainer has taken one.

    A step of the trainer is all that it does from one of these moments to the next: reading batches, logging and the
    ends of epochs included.
    """

    loader: Loader
    session: Session
    bare: Bare
    profile: cProfile.Profile | None
    trainer_laps: list[Lap] = field(default_factory=list)
    bare_laps: list[Lap] = field(default_factory=list)
    difference: float = 0.0  # of both networks, relative
    _taken: list[Batch] = field(default_factory=list)
    _begun: Lap | None = None

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """As `Loader.epoch`."""
        batches = self.loader.epoch(number, start)
        while True:
            if self._begun is None or len(self._taken) == self.session.length.accumulation:
                self._turn()
            batch = next(batches, None)
            if batch is None:
                return
            self._taken.append(batch)
            yield batch

    def _turn(self) -> None:
        if self.profile:
            self.profile.disable()
        if self._begun is not None:
            self.trainer_laps.append(Lap.now() - self._begun)
            inputs = [self.bare.inputs(batch) for batch in self._taken]
            begun = Lap.now()
            self.bare.step(inputs)
            self.bare_laps.append(Lap.now() - begun)
            self.difference = difference(self.session.network, self.bare.network)
        self._taken.clear()
        if self.profile and len(self.bare_laps) >= WARM_UP:
            self.profile.enable()
        self._begun = Lap.now()


def difference(network: Network, reference: Network) -> float:
    """How far two networks with the same layers are apart, relative to the second."""
    ours, theirs = network.state(), reference.state()
    distance = sum(float((ours[key] - theirs[key]).square().sum()) for key in theirs)
    return float((distance / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5)


# --- results ------------------------------------------------------------------------------------


def compare(name: str, arguments: list[str], profile: cProfile.Profile | None) -> str:
    """Train with the bare loop in between; a line, the ratio first."""
    with training.session(arguments) as session:
        turns = Turns(session.loader, session, Bare(session), profile)
        session.loader = turns
        session.run()
    ours, bare = middle(turns.trainer_laps), middle(turns.bare_laps)
    return (
        f"{ours.wall / bare.wall:.3f}x  ours {ours.wall:.3f} s  bare {bare.wall:.3f} s  | {name}; "
        f"by CPU time {ours.cpu / bare.cpu:.3f}x, adapters differ by {turns.difference:.0e}"
    )


def middle(laps: Sequence[Lap]) -> Lap:
    """Medians of those that count."""
    counted = laps[WARM_UP:]
    return Lap(median(lap.wall for lap in counted), median(lap.cpu for lap in counted))


def setting(steps: int) -> str:
    """What and where, in two lines."""
    load = f", load of the last minute {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"medians of {steps} steps of each side in turn, {torch.get_num_threads()} of {cores()} cores{load}, "
        f"torch {torch.__version__}\n"
        f"latents {SIDE // 8}x{SIDE // 8}, batch 1, float32, preset=full, dim 8, conv_dim 32; aim: at most {AIM}x"
    )


def main() -> None:
    """Print the comparison, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--steps", type=int, default=7, help="steps of each side that count (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument(
        "--profile",
        type=int,
        metavar="N",
        help="print the N functions that take the trainer longest; counts against it",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [setting(options.steps)]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_model(folder / "model")
        sizes = {f"{number}.png": (SIDE, SIDE) for number in range(PICTURES)}
        pictures = training.write_data(folder / "pictures", sizes)
        for name in options.only:
            more = [flag.format(folder=folder) for flag in VARIANTS[name]]
            profile = cProfile.Profile() if options.profile else None
            lines.append(compare(name, [*flags(model, pictures, folder / "out", options.steps), *more], profile))
            print(lines[-1], flush=True)
            if profile:
                pstats.Stats(profile).sort_stats("cumulative").print_stats(options.profile)
    if options.only == list(VARIANTS):
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
