"""What a run leaves on the disk: when it saves, under which names, what it keeps, and state folders for --resume.

Everything is written beside its place and renamed when complete, so that whatever has its name is whole. Names and
numbers are sd-scripts'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import load
from torch import Tensor

from lorashrink._version import __version__
from lorashrink.errors import InputError, LorashrinkError, NonFinite, OutputError
from lorashrink.files.disk import write_bytes
from lorashrink.files.hashes import LEGACY_HASH, MODEL_HASH
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import cast
from lorashrink.files.writing import save_tensors
from lorashrink.text import share_text, size_text
from lorashrink.train.data.scanning import Data
from lorashrink.train.flags.checks import IDLE
from lorashrink.train.flags.options import Options

_log = logging.getLogger(__name__)

NETWORK_FILE, STATE_FILE = "network.safetensors", "train_state.json"

_PRECISIONS = {"float": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class Length:
    """How long a run is. An epoch ends with a step even if fewer batches than for other steps are left for it."""

    batches_per_epoch: int  # of one process
    steps_per_epoch: int
    epochs: int
    steps: int


def run_length(options: Options, batches_per_epoch: int) -> Length:
    """The length of a run whose processes have `batches_per_epoch` batches each; --max_train_epochs wins."""
    steps_per_epoch = math.ceil(batches_per_epoch / options.gradient_accumulation_steps)
    steps = options.max_train_steps if options.max_train_epochs is None else options.max_train_epochs * steps_per_epoch
    return Length(batches_per_epoch, steps_per_epoch, math.ceil(steps / steps_per_epoch), steps)


def never(options: Options, length: Length) -> list[str]:
    """A line for each option that asks for something after more steps or epochs than the run has."""
    o, full_epochs = options, length.steps // length.steps_per_epoch
    by_epoch = (o.sample_every_n_epochs or 0) > 0  # then samples are not drawn by steps, as `samples.due` says
    saves_epochs = None if o.save_n_epoch_ratio else o.save_every_n_epochs
    rows: tuple[tuple[str, int | None, int, str], ...] = (
        ("save_every_n_steps", o.save_every_n_steps, length.steps, "steps"),
        ("save_every_n_epochs", saves_epochs, length.epochs, "epochs"),
        ("save_n_epoch_ratio", o.save_n_epoch_ratio, length.epochs, "epochs"),
        ("sample_every_n_steps", o.sample_every_n_steps if not by_epoch else None, length.steps, "steps"),
        ("sample_every_n_epochs", o.sample_every_n_epochs, full_epochs, "full epochs"),
        ("caption_dropout_every_n_epochs", o.caption_dropout_every_n_epochs, length.epochs, "epochs"),
    )
    return [
        f"--{name}={number}: this cannot happen, for the run has {count} {unit}; lower it, or train for longer"
        for name, number, count, unit in rows
        if (number or 0) > count and (o.sample_prompts or not name.startswith("sample"))
    ]


def adapter_path(options: Options, *, epoch: int | None = None, step: int | None = None) -> Path:
    """The file after this epoch, counted from 1, or after this step; without either the final one."""
    return Path(options.output_dir or "", f"{_stem(options, epoch, step)}.{options.save_model_as}")


def state_path(options: Options, *, epoch: int | None = None, step: int | None = None) -> Path:
    """The state folder of the same moment."""
    return Path(options.output_dir or "", f"{_stem(options, epoch, step)}-state")


def _stem(options: Options, epoch: int | None, step: int | None) -> str:
    """Without a name, sd-scripts' words stand for it."""
    if epoch is not None:
        return f"{options.output_name or 'epoch'}-{epoch:06d}"
    return options.output_name or "last" if step is None else f"{options.output_name or 'at'}-step{step:08d}"


def epochs_due(options: Options, epochs: int) -> range:
    """The epochs, counted from 1, after which a file is saved. Not the last one, whose file is the final one."""
    ratio = options.save_n_epoch_ratio
    every = max(1, epochs // ratio) if ratio else options.save_every_n_epochs
    return range(every, epochs, every) if every else range(0)


def steps_due(options: Options, steps: int) -> range:
    """The steps after which a file is saved; as in sd-scripts, the last may be among them."""
    every = options.save_every_n_steps
    return range(every, steps + 1, every) if every else range(0)


def expired(options: Options, every: int, *, epoch: int | None = None, step: int = 0) -> list[Path]:
    """The file and the state folder that go after those of this epoch or step were saved.

    What stays is counted in files after epochs and in steps after steps, as in sd-scripts.
    """
    unit = "step" if epoch is None else "epoch"
    files: int | None = getattr(options, f"save_last_n_{unit}s")
    states: int | None = getattr(options, f"save_last_n_{unit}s_state") or files
    paths = []
    for path, keep in ((adapter_path, files), (state_path, states if options.save_state else None)):
        if keep is None:
            continue
        gone = (step - keep - 1) // every * every if epoch is None else epoch - every * keep
        if gone > 0:
            paths.append(path(options, **{unit: gone}))
    return paths


def remove(paths: Sequence[Path]) -> None:
    """Delete those of the files and folders that exist. What cannot be deleted is left with a warning."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            _log.warning("%s: is no longer needed but cannot be deleted (%s)", path, error.strerror or error)
        else:
            _log.info("deleted %s, as --save_last_n_... asks", path)


def save_adapter(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, precision: str | None = None
) -> Path:
    """Write an adapter in the format of its ending; equal inputs give equal bytes. Returns `path`.

    `.safetensors` gets the metadata, and hashes of the contents in it (`sshs_*`); `.ckpt` and `.pt` are dictionaries of
    tensors without metadata. `precision` is "float", "fp16", "bf16", or None to keep what the tensors have.
    Raises OutputError, and NonFinite, before anything is written, if a tensor has NaN or infinity in that precision.
    """
    ready = {name: _in_precision(path, name, tensor, precision) for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, ready, {**metadata, MODEL_HASH: "", LEGACY_HASH: ""})
    else:
        buffer = io.BytesIO()
        torch.save(ready, buffer)
        write_bytes(path, buffer.getvalue())
    return path


def _in_precision(path: Path, name: str, tensor: Tensor, precision: str | None) -> Tensor:
    """The tensor on the CPU as it is written, contiguous."""
    tensor = tensor.detach()
    written = cast(tensor, _PRECISIONS[precision]) if precision and tensor.is_floating_point() else tensor
    if not written.isfinite().all():
        if tensor.isfinite().all():
            why = "numbers too large for fp16; use --save_precision bf16"
        else:
            why = "NaN or infinity: training has failed. Use a lower learning rate, or --mixed_precision bf16"
        raise NonFinite(f"{path}: not written, because {name} has {why}. Files saved before are good")
    return written.cpu().contiguous()


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands."""

    epoch: int  # in which it goes on, counted from 1
    batch: int  # batches of that epoch that each process has done
    step: int  # steps done since the beginning
    seed: int


# Options that change nothing of what is learned. Folders of pictures may move: the pictures themselves are compared.
_HARMLESS_BEGINNINGS = ("output_", "save_", "metadata_", "sample_", "log_", "wandb_")
_HARMLESS = frozenset(
    {
        "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
        *IDLE, "caption_extention", "config_file", "dataset_config", "dataset_repeats", "debug",
        "gradient_checkpointing", "logging_dir", "lowram", "max_data_loader_n_workers", "network_weights",
        "no_metadata", "persistent_data_loader_workers", "plan", "reg_data_dir", "resume", "sdpa", "seed", "shrink",
        "text_encoder_batch_size", "tokenizer_cache_dir", "train_data_dir", "training_comment", "vae_batch_size",
    }
)  # fmt: skip


def fingerprint(options: Options, data: Data, processes: int) -> dict[str, str]:
    """What must be equal for a resumed run to be as if it had never been interrupted, as texts to compare and show."""
    decisive = {
        field.name: str(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if field.name not in _HARMLESS and not field.name.startswith(_HARMLESS_BEGINNINGS)
    }
    pictures = [
        (p.subset.folder.name, p.path.name, [p.caption], p.repeats, p.subset.is_reg, p.fit.bucket)
        for p in data.pictures
    ]
    digest = hashlib.sha256(json.dumps(pictures).encode()).hexdigest()
    return {**decisive, "pictures and captions": f"{len(pictures)}, {digest[:8]}", "processes": str(processes)}


def save_state(
    folder: Path,
    accelerator: Accelerator,
    network: Mapping[str, Tensor],
    position: Position,
    fingerprint: Mapping[str, str],
) -> None:
    """Write what `load_state` needs to go on exactly. Every process calls this; each writes its random state.

    The folder appears when it is complete; an older one of the name stays until then. The hooks of `accelerator` leave
    the model out; `network` has its raw parameters and buffers.
    """
    unfinished, old = (folder.with_name(f".{folder.name}.{end}") for end in ("unfinished", "old"))
    main = accelerator.is_main_process
    entries = {**dataclasses.asdict(position), "version": __version__, "options": dict(fingerprint)}
    try:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if main:
            ready = {name: _in_precision(folder, name, tensor, None) for name, tensor in network.items()}
            save_tensors(unfinished / NETWORK_FILE, ready, {})
            write_bytes(unfinished / STATE_FILE, (json.dumps(entries, indent=2) + "\n").encode())
            for path in unfinished.iterdir():
                with open(path, "rb+") as handle:
                    os.fsync(handle.fileno())
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(folder, old)
            os.replace(unfinished, folder)
            shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{folder}: the state cannot be written ({reason}). Earlier ones are as they were") from error
    finally:
        if main:
            shutil.rmtree(unfinished, ignore_errors=True)


def peek_state(folder: Path) -> tuple[Position, dict[str, str]]:
    """Where the run of a state folder stands, and its `fingerprint`."""
    path = folder / STATE_FILE
    if not path.is_file() or not (folder / NETWORK_FILE).is_file():
        needs = "only folders that --save_state of lorashrink wrote can be resumed"
        raise InputError(f"--resume {folder}: {STATE_FILE} or {NETWORK_FILE} is missing; {needs}")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        numbers = [state[field.name] for field in dataclasses.fields(Position)]
        if any(type(number) is not int or number < 0 for number in numbers) or not isinstance(state["options"], dict):
            raise ValueError("an entry has the wrong type")
    except KeyError as error:
        why = f"saved by another build of lorashrink, or damaged: it has no {error}"
        raise InputError(f"{path}: {why}; resume with that build, or from another state folder") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); resume from another state folder") from None
    return Position(*numbers), state["options"]


def load_state(
    folder: Path,
    accelerator: Accelerator,
    load_network: Callable[[dict[str, Tensor]], object],
    fingerprint: Mapping[str, str],
    seed: int | None = None,
) -> Position:
    """Go back to a saved state; every process calls this. Options that are not as they were are named in a warning.

    `load_network` takes the raw parameters and buffers. The state's seed is used, not `seed`, which is --seed.
    """
    position, before = peek_state(folder)
    randomness = folder / f"random_states_{accelerator.process_index}.pkl"
    try:
        with open_tensors(folder / NETWORK_FILE) as store:
            load_network({name: store.read(name) for name in store.tensors})
        if randomness.is_file():
            load(randomness)  # because accelerate says nothing when it cannot
        accelerator.load_state(str(folder))
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        why = "it is damaged, or from a run with another network or optimizer"
        raise InputError(f"--resume {folder}: cannot be loaded; {why} ({error})") from error
    differing = [key for key in dict.fromkeys((*fingerprint, *before)) if before.get(key) != fingerprint.get(key)]
    if changed := "; ".join(f"{key} {fingerprint.get(key)} (was {before.get(key)})" for key in differing):
        _log.warning("--resume: not as if the run had not been interrupted, because these changed: %s", changed)
    if seed is not None and seed != position.seed:
        _log.warning("--resume: --seed %d is ignored; the run goes on with its own, %d", seed, position.seed)
    _log.info("resumed at step %d", position.step)
    return position


def shrink(path: Path, options: Options) -> list[Path]:
    """Write a saved adapter shrunk by each recipe of --shrink beside it, and return the new files.

    A failure is a warning: training, and the adapter that was saved, must not suffer from it.
    """
    if not options.shrink:
        return []
    from lorashrink.shrinking.run import resize

    base, recipes = options.pretrained_model_name_or_path, options.shrink
    try:
        # The GPU's memory belongs to training, and two cores do this in seconds.
        report = resize(path, base=base, recipes=recipes, device="cpu", force=True)
    except LorashrinkError as error:
        _log.warning("%s was saved but not shrunk: %s", path.name, error)
        return []
    for failure in report.failed:
        _log.warning("%s was saved but not shrunk: %s", path.name, failure.error)
    for result in report.results:
        sizes = f"{size_text(result.bytes_before)}, shrunk by {result.recipe} to {size_text(result.bytes_after)}"
        name = Path(result.output).name
        _log.info("%s: %s (error %s): %s", path.name, sizes, share_text(result.relative_error), name)
    return [Path(result.output) for result in report.results]
