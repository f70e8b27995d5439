"""The trainer's options: one row per flag, with sd-scripts' names, types and defaults.

The rows make the parser, the reader of configuration files and the typed values that the rest of the trainer reads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from lorashrink.errors import InputError, UsageError, nearest
from lorashrink.files.disk import write_bytes
from lorashrink.pictures.prompts import SAMPLERS

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")

# Headings of the help, by the option that comes first below them.
_HEADINGS = {
    "pretrained_model_name_or_path": "Model",
    "train_data_dir": "Pictures",
    "caption_extension": "Captions",
    "network_module": "Adapter",
    "optimizer_type": "Optimizer",
    "max_train_steps": "Training",
    "noise_offset": "Noise and loss",
    "output_dir": "Saving",
    "sample_prompts": "Sample pictures",
    "logging_dir": "Logs and settings",
    "model_config": "Of lorashrink alone",
}


def _row(
    default: object,
    text: str,
    *,
    choices: Sequence[object] = (),
    read: Callable[[str], object] | None = None,
    hidden: bool = False,
) -> Any:
    """A field with what its flag needs to know; `hidden` keeps an alias out of the help."""
    return field(default=default, metadata={"help": text, "choices": choices, "read": read, "hidden": hidden})


def _steps(text: str) -> float:
    """An int, which counts steps, or a float, which is a share of all steps: `100`, `0.1` or `10%`."""
    try:
        return int(text)
    except ValueError:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one training run was asked to do. Names and defaults are sd-scripts'; the last group is lorashrink's own."""

    pretrained_model_name_or_path: str | None = _row(None, "base to train: a diffusers folder, .safetensors or .ckpt")
    vae: str | None = _row(None, "VAE to use instead of the base's own: a folder or a file")
    tokenizer_cache_dir: str | None = _row(None, "folder with the two tokenizers, for a base that is a single file")
    v_parameterization: bool = _row(False, "for a base that predicts v instead of noise")
    clip_skip: int | None = _row(None, "no effect with SDXL")
    lowram: bool = _row(False, "load the model straight to the GPU, for machines with little main memory")
    highvram: bool = _row(False, "accepted, no effect")
    no_half_vae: bool = _row(False, "run the VAE in float32; SDXL's own VAE often fails in fp16")
    disable_mmap_load_safetensors: bool = _row(False, "accepted, no effect")

    train_data_dir: str | None = _row(None, "folder with folders such as 10_my dog, whose pictures count 10 times")
    reg_data_dir: str | None = _row(None, "the same layout, for regularisation pictures")
    dataset_config: str | None = _row(None, "TOML file that describes the datasets, instead of --train_data_dir")
    dataset_repeats: int = _row(1, "no effect with --train_data_dir, where folder names tell the repeats")
    resolution: str | None = _row(None, "pixels, as 1024 or 1024,1024; with --enable_bucket only the area counts")
    train_batch_size: int = _row(1, "pictures that are trained on at once")
    flip_aug: bool = _row(False, "show pictures mirrored half of the time")
    enable_bucket: bool = _row(False, "keep the shapes of pictures: train in batches of equal shape, at about one area")
    min_bucket_reso: int = _row(256, "smallest side of a bucket")
    max_bucket_reso: int = _row(1024, "largest side of a bucket; 2048 loses fewer pixels of wide pictures")
    bucket_reso_steps: int = _row(64, "sides of buckets are multiples of this, itself a multiple of 32")
    bucket_no_upscale: bool = _row(False, "never enlarge a picture; the two limits of buckets are not used then")
    resize_interpolation: str | None = _row(None, "how to resize; area or lanczos if not given", choices=INTERPOLATIONS)
    max_data_loader_n_workers: int = _row(8, "processes that prepare pictures; 0 prepares them in the program itself")
    persistent_data_loader_workers: bool = _row(False, "keep these processes from epoch to epoch")
    cache_latents: bool = _row(False, "run the VAE once per picture, before training, and keep the results in memory")
    cache_latents_to_disk: bool = _row(False, "the same, in .npz files beside the pictures, for the next run too")
    vae_batch_size: int = _row(1, "pictures that the VAE encodes at once")
    skip_cache_check: bool = _row(False, "accepted, no effect: .npz files are always checked")
    cache_text_encoder_outputs: bool = _row(False, "encode captions once, before; needs --network_train_unet_only")
    cache_text_encoder_outputs_to_disk: bool = _row(False, "the same; no files are written: encoding takes seconds")
    text_encoder_batch_size: int | None = _row(None, "captions that are encoded at once")
    prior_loss_weight: float = _row(1.0, "how much regularisation pictures count")

    caption_extension: str = _row(".caption", "ending of caption files, with its dot, such as .txt")
    caption_extention: str | None = _row(None, "misspelled --caption_extension", hidden=True)
    caption_separator: str = _row(",", "text that separates tags, also after they are shuffled")
    shuffle_caption: bool = _row(False, "shuffle the tags each time a picture is shown")
    keep_tokens: int = _row(0, "tags at the start of a caption that stay there when the others are shuffled")
    keep_tokens_separator: str = _row("", "text in captions before which tags stay in place, instead of --keep_tokens")
    secondary_separator: str | None = _row(None, "what separates tags that stay together when shuffled")
    caption_prefix: str | None = _row(None, "text before each caption")
    caption_suffix: str | None = _row(None, "text after each caption")
    caption_dropout_rate: float = _row(0.0, "share of captions that are left empty, 0 to 1")
    caption_dropout_every_n_epochs: int = _row(0, "leave all captions empty in every Nth epoch")
    caption_tag_dropout_rate: float = _row(0.0, "share of tags that are left out, 0 to 1")
    max_token_length: int | None = _row(None, "longest caption in tokens, 75 if not given", choices=(75, 150, 225))

    network_module: str | None = _row(None, "what is trained: lycoris.kohya or networks.lora")
    network_dim: int | None = _row(None, "rank of the adapter; 4 if not given")
    network_alpha: float = _row(1.0, "the adapter counts alpha / rank as much; 0 stands for alpha = rank")
    network_dropout: float | None = _row(None, "share of the adapter's effect that is dropped in each step, 0 to 1")
    network_args: tuple[str, ...] = _row((), "key=value pairs for LyCORIS, such as algo=locon preset=full conv_dim=8")
    network_weights: str | None = _row(None, "adapter file to start from")
    dim_from_weights: bool = _row(False, "take the ranks from --network_weights")
    base_weights: tuple[str, ...] = _row((), "adapter files that are merged into the base before training")
    base_weights_multiplier: tuple[float, ...] = _row((), "their strengths, in the same order; 1 if not given")
    network_train_unet_only: bool = _row(False, "train the UNet, not the text encoders")
    network_train_text_encoder_only: bool = _row(False, "train the text encoders, not the UNet")
    scale_weight_norms: float | None = _row(None, "limit the norm of each layer's change to this; 1 is usual")

    optimizer_type: str = _row("", "AdamW (if not given), AdamW8bit, Lion, Prodigy, Adafactor, or a class by its path")
    optimizer_args: tuple[str, ...] = _row((), "key=value pairs for the optimizer, such as weight_decay=0.01")
    use_8bit_adam: bool = _row(False, "old name of --optimizer_type AdamW8bit", hidden=True)
    use_lion_optimizer: bool = _row(False, "old name of --optimizer_type Lion", hidden=True)
    learning_rate: float = _row(2e-6, "learning rate of what the next two leave open")
    unet_lr: float | None = _row(None, "learning rate of the UNet's layers")
    text_encoder_lr: tuple[float, ...] = _row((), "learning rate of the text encoders; 0 leaves them as they are")
    max_grad_norm: float = _row(1.0, "limit of the gradients' norm; 0 is no limit")
    lr_scheduler: str = _row("constant", "constant, constant_with_warmup, cosine, cosine_with_restarts, linear, ...")
    lr_scheduler_type: str = _row("", "a scheduler class by its dotted path, instead of --lr_scheduler")
    lr_scheduler_args: tuple[str, ...] = _row((), "key=value pairs for the scheduler")
    lr_warmup_steps: float = _row(0, "how long the rate rises at first: steps, or a share as 0.1 or 10%", read=_steps)
    lr_decay_steps: float = _row(0, "how long it falls at the end (warmup_stable_decay), as above", read=_steps)
    lr_scheduler_num_cycles: int = _row(1, "restarts of cosine_with_restarts")
    lr_scheduler_power: float = _row(1.0, "power of polynomial")
    lr_scheduler_timescale: int | None = _row(None, "timescale of inverse_sqrt")
    lr_scheduler_min_lr_ratio: float | None = _row(None, "lowest rate, a share (..._with_min_lr, warmup_stable_decay)")

    max_train_steps: int = _row(1600, "steps to train for, of --gradient_accumulation_steps batches each")
    max_train_epochs: int | None = _row(None, "epochs to train for, instead; an epoch shows every picture")
    gradient_accumulation_steps: int = _row(1, "batches that are added up to one step, to act like one larger batch")
    gradient_checkpointing: bool = _row(False, "use less memory and more time")
    mixed_precision: str = _row("no", "format of base and arithmetic; 16 bits halve it", choices=("no", "fp16", "bf16"))
    full_bf16: bool = _row(False, "keep the adapter in bf16 too; needs --mixed_precision bf16")
    sdpa: bool = _row(False, "torch's own attention, which is used in any case")
    xformers: bool = _row(False, "accepted, no effect: torch's own attention is used")
    mem_eff_attn: bool = _row(False, "accepted, no effect")
    seed: int | None = _row(None, "whole number that makes a run repeatable; random if not given")
    resume: str | None = _row(None, "state folder (see --save_state) to go on from")

    noise_offset: float | None = _row(None, "shift noise by this, for darker and brighter pictures; 0.05 is usual")
    noise_offset_random_strength: bool = _row(False, "shift it by a random amount up to that")
    adaptive_noise_scale: float | None = _row(None, "add this times the mean of a picture's latents to --noise_offset")
    multires_noise_iterations: int | None = _row(None, "add noise at so many coarser resolutions; 6 to 10 are usual")
    multires_noise_discount: float = _row(0.3, "strength of each coarser one relative to the one before")
    min_timestep: int | None = _row(None, "lowest timestep to train, 0 if not given")
    max_timestep: int | None = _row(None, "train timesteps below this, 1000 if not given")
    zero_terminal_snr: bool = _row(False, "noise schedule that ends in pure noise; for --v_parameterization")
    min_snr_gamma: float | None = _row(None, "weigh timesteps by min(SNR, gamma); 5 is usual")
    scale_v_pred_loss_like_noise_pred: bool = _row(False, "weigh v prediction as noise prediction")
    v_pred_like_loss: float | None = _row(None, "add the loss weighted as for v prediction, times this")
    debiased_estimation_loss: bool = _row(False, "weigh timesteps by 1 / sqrt(SNR)")

    output_dir: str | None = _row(None, "folder for everything that is written")
    output_name: str | None = _row(None, "name of the adapter files, without ending; last if not given")
    save_model_as: str = _row(
        "safetensors", "format of files; only this one carries metadata", choices=("safetensors", "ckpt", "pt")
    )
    save_precision: str | None = _row(
        None, "number format of files; float, which is fp32, if not given", choices=("float", "fp32", "fp16", "bf16")
    )
    save_every_n_epochs: int | None = _row(None, "save every N epochs")
    save_every_n_steps: int | None = _row(None, "save every N steps")
    save_n_epoch_ratio: int | None = _row(None, "save about this many times in all, evenly spread")
    save_last_n_epochs: int | None = _row(None, "keep the last N files of --save_every_n_epochs, delete older ones")
    save_last_n_steps: int | None = _row(None, "keep files of --save_every_n_steps from the last N steps (not N files)")
    save_state: bool = _row(False, "save, with each adapter file, all that --resume needs")
    save_state_on_train_end: bool = _row(False, "save it at the end only")
    save_last_n_epochs_state: int | None = _row(None, "as --save_last_n_epochs, for state folders")
    save_last_n_steps_state: int | None = _row(None, "as --save_last_n_steps, for state folders")
    no_metadata: bool = _row(False, "leave captions, folder names and settings out of adapter files")
    training_comment: str | None = _row(None, "comment in the metadata")
    metadata_title: str | None = _row(None, "title in the metadata")
    metadata_author: str | None = _row(None, "author in the metadata")
    metadata_description: str | None = _row(None, "description in the metadata")
    metadata_license: str | None = _row(None, "licence in the metadata")
    metadata_tags: str | None = _row(None, "tags in the metadata")
    metadata_usage_hint: str | None = _row(None, "usage hint in the metadata")
    metadata_thumbnail: str | None = _row(None, "thumbnail (data URL) in the metadata")
    metadata_merged_from: str | None = _row(None, "names of what was merged, in the metadata")
    metadata_trigger_phrase: str | None = _row(None, "trigger phrase in the metadata")
    metadata_preprocessor: str | None = _row(None, "preprocessor in the metadata")
    metadata_is_negative_embedding: str | None = _row(None, "marks a negative embedding in the metadata")

    sample_prompts: str | None = _row(None, "file of prompts to draw while training: .txt, .toml or .json")
    sample_sampler: str = _row("ddim", "sampler for these pictures", choices=SAMPLERS)
    sample_every_n_steps: int | None = _row(None, "draw them every N steps")
    sample_every_n_epochs: int | None = _row(None, "draw them every N epochs; then not by --sample_every_n_steps")
    sample_at_first: bool = _row(False, "draw them before training too")

    logging_dir: str | None = _row(None, "folder of the logs; nothing is logged without it, except to wandb")
    log_with: str | None = _row(None, "all is both; tensorboard if not given", choices=("tensorboard", "wandb", "all"))
    log_prefix: str | None = _row(None, "start of the name of this run's log folder")
    log_tracker_name: str | None = _row(None, "name of the log; network_train if not given")
    wandb_run_name: str | None = _row(None, "name of the run in wandb")
    log_config: bool = _row(False, "write the options into the log")
    config_file: str | None = _row(None, "TOML file with options, by their names here; the command line wins over it")
    output_config: bool = _row(False, "write the options to --config_file, and stop")

    model_config: str | None = _row(None, "diffusers folder whose settings describe a single file that is not SDXL 1.0")
    shrink: tuple[str, ...] = _row((), "recipes such as fro_ckpt=1,thr=-3.55: write files shrunk by each, too")
    plan: bool = _row(False, "load no weights and train nothing: print what would be trained, with size and memory")
    debug: bool = _row(False, "show where in the program an error came from")


# sd-scripts' flags that are not supported, and keys of its dataset files, with the values that change nothing there:
# programs that write settings files write those too.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys((
        "alpha_mask", "async_upload", "cache_info", "color_aug", "console_log_simple", "cpu_offload_checkpointing",
        "ddp_gradient_as_bucket_view", "ddp_static_graph", "debug_dataset", "deepspeed", "enable_wildcard",
        "fp16_master_weights_and_gradients", "fp8_base", "fp8_base_unet", "full_fp16", "fused_backward_pass",
        "ip_noise_gamma_random_strength", "masked_loss", "random_crop", "resume_from_huggingface",
        "save_state_to_huggingface", "skip_until_initial_step", "torch_compile", "v2", "weighted_captions",
        "zero3_init_flag", "zero3_save_16bit_model",
    ), (False,)),
    **dict.fromkeys((
        "conditioning_data_dir", "console_log_file", "dataset_class", "face_crop_aug_range", "huggingface_path_in_repo",
        "huggingface_repo_id", "huggingface_repo_type", "huggingface_repo_visibility", "huggingface_token", "in_json",
        "log_tracker_config", "metadata_file", "offload_optimizer_device", "offload_optimizer_nvme_path",
        "offload_param_device", "offload_param_nvme_path", "wandb_api_key",
    ), ("",)),
    **dict.fromkeys((
        "blocks_to_swap", "ddp_timeout", "initial_step", "ip_noise_gamma", "logit_mean", "max_validation_steps",
        "token_warmup_step", "validate_every_n_epochs", "validate_every_n_steps", "validation_seed", "validation_split",
    ), (0.0,)),
    "console_log_level": ("", "INFO"), "custom_attributes": ("{}",), "dynamo_backend": ("inductor", "no"),
    "huber_c": (0.1,), "huber_scale": (1.0,), "huber_schedule": ("snr",), "initial_epoch": (0, 1), "logit_std": (1.0,),
    "loss_type": ("l2",), "mode_scale": (1.29,), "network_multiplier": (1.0,), "token_warmup_min": (1,),
    "weighting_scheme": ("uniform",), "zero_stage": (2,),
}  # fmt: skip
_INSTEAD = {
    **dict.fromkeys(("initial_epoch", "initial_step", "skip_until_initial_step"), "--resume goes on exactly"),
    **dict.fromkeys(("token_warmup_min", "token_warmup_step"), "--caption_tag_dropout_rate leaves tags out at random"),
    "color_aug": "change colours in copies of the pictures instead",
    "console_log_file": "add 2> log.txt to the end of the command",
    "enable_wildcard": "write one caption for each picture",
    "full_fp16": "--full_bf16 or --mixed_precision fp16",
    "in_json": "put the captions into files beside the pictures",
    "random_crop": "--enable_bucket uses nearly all of each picture",
    "v2": "it is for Stable Diffusion 2.x, and this trains SDXL",
    "wandb_api_key": "set WANDB_API_KEY, which other users of the machine cannot see",
}


def unsupported(name: str, value: Any) -> str | None:
    """The name of a flag or key of `UNSUPPORTED` and what to do instead; None for a value that changes nothing."""
    for neutral in UNSUPPORTED[name]:
        with contextlib.suppress(TypeError, ValueError):
            if type(neutral)(value) == neutral:  # type: ignore[call-arg]
                return None
    return f"{name}; {_INSTEAD[name]}" if name in _INSTEAD else name


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `--help` lists all options")


def parser(program: str = "lorashrink train") -> argparse.ArgumentParser:
    """The parser of all flags, which reads texts. Flags that were not given are absent from what it returns."""
    flags = _Parser(
        prog=program,
        usage="%(prog)s --pretrained_model_name_or_path BASE --train_data_dir FOLDER --resolution SIZE"
        " --network_module lycoris.kohya --output_dir FOLDER [more options]",
        description="Train a LyCORIS adapter for SDXL. Flags are those of sd-scripts' sdxl_train_network.py.",
        epilog=f"Example: {program} --config_file settings.toml",
        argument_default=argparse.SUPPRESS,
    )
    group: argparse._ActionsContainer = flags
    for name, (kind, several) in _kinds().items():
        row = Options.__dataclass_fields__[name]
        if name in _HEADINGS:
            group = flags.add_argument_group(_HEADINGS[name])
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", help=_help(row))
        else:
            values = "|".join(map(str, row.metadata["choices"])) or {int: "N", float: "NUMBER", str: "TEXT"}[kind]
            group.add_argument(f"--{name}", nargs="*" if several else None, metavar=values, help=_help(row))
    for name in UNSUPPORTED:
        flags.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    return flags


@cache
def _kinds() -> Mapping[str, tuple[type, bool]]:
    """Flag -> type of its values, and whether it takes several."""
    return {
        name: ((typing.get_args(hint) or (hint,))[0], typing.get_origin(hint) is tuple)  # `str`, `str | None` or tuple
        for name, hint in typing.get_type_hints(Options).items()
    }


def _help(row: dataclasses.Field[Any]) -> str:
    if row.metadata["hidden"]:
        return argparse.SUPPRESS
    default = "" if row.default in (None, False, "", ()) else f" (default {row.default})"
    return f"{row.metadata['help']}{default}".replace("%", "%%")


def parse(arguments: Sequence[str], program: str = "lorashrink train") -> Options:
    """The options of a command line, with those of its --config_file below them.

    An empty value, as scripts pass for what is not set, means that the flag was not given. Raises UsageError (a flag
    does not exist, is not supported, or has a value of the wrong kind) and InputError (that file cannot be read).
    """
    namespace, rest = parser(program).parse_known_args(list(arguments))
    if unknown := [word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")]:
        raise UsageError(_no_such_options(unknown))
    if rest:
        raise UsageError(f"unexpected text: {' '.join(rest)}. Values with spaces need quotes")
    words = vars(namespace)
    unread = {name: " ".join(words[name]) if words[name] else True for name in words if name in UNSUPPORTED}
    values = read_values(words | unread)
    if (path := values.get("config_file")) and not values.get("output_config"):
        flat: dict[str, Any] = {}
        for key, value in read_toml(_toml(path)).items():  # headings of sections mean nothing, as in sd-scripts
            flat |= value if isinstance(value, dict) else {key: value}
        try:
            values = read_values(flat) | values
        except UsageError as error:
            raise UsageError(f"{_toml(path)}: {error}") from None
    options = Options(**values)
    # Aliases, and spellings that mean another option.
    extension = options.caption_extention
    return dataclasses.replace(
        options,
        caption_extension=options.caption_extension if extension is None else extension,
        save_precision="float" if options.save_precision == "fp32" else options.save_precision,
        max_token_length=None if options.max_token_length == 75 else options.max_token_length,
        cache_latents=options.cache_latents or options.cache_latents_to_disk,
        cache_text_encoder_outputs=options.cache_text_encoder_outputs or options.cache_text_encoder_outputs_to_disk,
    )


def _no_such_options(names: Sequence[str]) -> str:
    guesses = ((name, nearest(name, [*_kinds(), *UNSUPPORTED])) for name in names)
    listed = ", ".join(f"--{name}" + (f" (did you mean --{guess}?)" if guess else "") for name, guess in guesses)
    return f"no such option: {listed}; `--help` lists all"


def read_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the right kinds, from texts or TOML values; raises UsageError, which names all that do not exist."""
    kinds = _kinds()
    if unknown := [name for name in values if name not in kinds and name not in UNSUPPORTED]:
        raise UsageError(_no_such_options(unknown))
    if refused := [words for name in values if name in UNSUPPORTED and (words := unsupported(name, values[name]))]:
        raise UsageError("; ".join(f"not supported: --{words}" for words in refused))
    return {name: _converted(name, value, *kinds[name]) for name, value in values.items() if name in kinds}


def _converted(name: str, value: Any, kind: type, several: bool) -> Any:
    if several:
        items = value if isinstance(value, list) else [value]
        return tuple(_converted(name, item, kind, False) for item in items if item != "")
    row = Options.__dataclass_fields__[name]
    if value == "" and row.default is None:
        return None
    try:
        if not isinstance(value, bool | int | float | str) or isinstance(value, bool) != (kind is bool):
            raise ValueError("wrong kind")
        result = value if kind is bool else (row.metadata["read"] or kind)(str(value))
    except ValueError:
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        raise UsageError(f"--{name} must be {expected}, not {json.dumps(value, default=str)}") from None
    if row.metadata["choices"] and result not in row.metadata["choices"]:
        raise UsageError(f"--{name} must be one of {', '.join(map(str, row.metadata['choices']))}, not {result}")
    return result


def key_values(flag: str, words: Iterable[str]) -> dict[str, str]:
    """The `key=value` words of a flag that takes several."""
    values = {}
    for word in words:
        key, _, value = (part.strip() for part in word.partition("="))
        if not key or not value:
            raise UsageError(f"{flag}: '{word}' is no key=value pair, such as weight=8 (no blanks around '=')")
        values[key] = value
    return values


def _toml(path: str | Path) -> Path:
    """sd-scripts lets the ending be left out."""
    return Path(path) if str(path).endswith(".toml") else Path(f"{path}.toml")


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file. Raises an InputError if it is not there, or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no valid TOML ({error})") from None


def write_config(options: Options) -> Path:
    """Write the options that differ from their defaults to --config_file, as TOML, and return its path.

    Raises UsageError (no --config_file, or it exists) and OutputError (it cannot be written).
    """
    if not options.config_file:
        raise UsageError("--output_config needs --config_file, the file to write")
    path = _toml(options.config_file)
    if path.exists():
        raise UsageError(f"{path} exists; give --config_file another name, or delete it")
    # JSON writes texts, numbers, booleans and lists as TOML does.
    lines = [
        f"{row.name} = {json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}\n"
        for row in dataclasses.fields(options)
        if row.name not in ("config_file", "output_config") and (value := getattr(options, row.name)) != row.default
    ]
    write_bytes(path, "".join(lines).encode())
    return path
