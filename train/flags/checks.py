"""Which options go together, and which values they may have: all that can be known before a model is loaded.

Nothing heavy is imported, so that a mistake on the command line costs no waiting.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from lorashrink.errors import UsageError
from lorashrink.files.disk import check_folder
from lorashrink.recipes.grammar import parse_recipes
from lorashrink.train.flags.network_args import read_network_args
from lorashrink.train.flags.options import Options

LEARNING_RATES = (
    "constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "linear", "polynomial", "inverse_sqrt", "warmup_stable_decay", "piecewise_constant",
    "adafactor",
)  # fmt: skip


def check(options: Options) -> list[str]:
    """What the user should know about these options before training starts, one line each.

    Raises UsageError (training with them is impossible, or would not do what one of them asks for), InputError (a file
    of settings, such as a preset, cannot be read) and OutputError (a folder cannot be written to).
    """
    if not options.plan:  # which needs neither base nor pictures
        _check_paths(options)
    check_values(options)
    warnings = [
        *_check_pairs(options),
        *check_sizes(options),
        *_check_schedule(options),
        *_check_others(options),
        *read_network_args(options).warnings,
    ]
    parse_recipes(options.shrink)
    name = optimizer_name(options)
    packages: dict[str, object] = {
        "wandb": options.log_with in ("wandb", "all") and f"--log_with={options.log_with}",
        "tensorboard": options.logging_dir and options.log_with != "wandb" and "--logging_dir",
        optimizer_path(options).partition(".")[0]: "." not in name and name,
    }
    for package, wanted_by in packages.items():
        if wanted_by and not importlib.util.find_spec(package):
            on_pypi = package.replace("_", "-")
            raise UsageError(f"{wanted_by} needs the package {on_pypi}: pip install {on_pypi}")
    return warnings


_HUB = ". lorashrink downloads nothing by itself; `hf download MODEL --local-dir FOLDER` fetches one into FOLDER"
_PATHS: tuple[tuple[tuple[str, ...], str, Callable[[Path], bool], str], ...] = (
    (("tokenizer_cache_dir", "train_data_dir", "reg_data_dir", "resume", "model_config"), "folder", Path.is_dir, ""),
    (("dataset_config", "network_weights", "base_weights", "sample_prompts"), "file", Path.is_file, ""),
    (("pretrained_model_name_or_path", "vae"), "file or folder on this machine named", Path.exists, _HUB),
)


def _check_paths(options: Options) -> None:
    """That what is needed is given, and what is given is there."""
    source = () if options.dataset_config else ("train_data_dir", "resolution")
    needed = ("pretrained_model_name_or_path", *source, "output_dir", "network_module")
    if missing := " ".join(f"--{name}" for name in needed if not getattr(options, name)):
        raise UsageError(f"needed but not given: {missing}. `--help` says what they are")
    for names, kind, exists, hint in _PATHS:
        for name in names:
            for path in _values(options, name):
                if not exists(Path(str(path))):
                    raise UsageError(f"--{name}: there is no {kind} {path}{hint}")
    for name in ("output_dir", "logging_dir"):
        if path := getattr(options, name):
            check_folder(Path(path), f"--{name}")


def _values(options: Options, name: str) -> tuple[object, ...]:
    """The values of a flag that may take several, or none."""
    value = getattr(options, name)
    return value if isinstance(value, tuple) else () if value is None else (value,)


_FROM_1 = (
    "train_batch_size", "min_bucket_reso", "bucket_reso_steps", "vae_batch_size", "text_encoder_batch_size",
    "lr_scheduler_num_cycles", "lr_scheduler_timescale", "max_train_steps", "max_train_epochs",
    "gradient_accumulation_steps", "save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio",
    "save_last_n_epochs", "save_last_n_steps", "save_last_n_epochs_state", "save_last_n_steps_state", "network_dim",
)  # fmt: skip
_FROM_0 = (
    "max_data_loader_n_workers", "prior_loss_weight", "keep_tokens", "caption_dropout_every_n_epochs",
    "scale_weight_norms", "learning_rate", "unet_lr", "text_encoder_lr", "max_grad_norm", "lr_warmup_steps",
    "lr_decay_steps", "lr_scheduler_power", "multires_noise_iterations", "multires_noise_discount", "min_snr_gamma",
    "dataset_repeats", "network_alpha",
)  # fmt: skip
_SHARES = ("caption_dropout_rate", "caption_tag_dropout_rate", "lr_scheduler_min_lr_ratio")
_RANGES: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (_FROM_1, 1, math.inf),
    (_FROM_0, 0, math.inf),
    (_SHARES, 0, 1),
    (("min_timestep",), 0, 999),
    (("max_timestep",), 1, 1000),
    (("seed",), 0, 2**32 - 1),
)


def check_values(options: Options) -> None:
    """Raises UsageError for numbers that are out of their range."""
    ranges = {name: (low, high) for names, low, high in _RANGES for name in names}
    for name in Options.__dataclass_fields__:
        low, high = ranges.get(name, (-math.inf, math.inf))
        allowed = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high}"
        for value in _values(options, name):
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name}={value}: must be a finite number")
            if name in ranges and not low <= float(str(value)) <= high:
                raise UsageError(f"--{name}={value}: must be {allowed}")


def parse_resolution(text: str | None) -> tuple[int, int]:
    """Width and height in pixels, from `1024` or `1024,768`."""
    if text is None:
        raise UsageError("--resolution is missing, such as 1024,1024 (in a dataset file: resolution = 1024)")
    try:
        sides = [int(side) for side in text.split(",")]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 2 or min(sides) < 1:
        raise UsageError(f"--resolution={text}: must be one size or width,height in pixels, such as 1024 or 1024,768")
    return sides[0], sides[-1]


def bucket_limits(options: Options) -> tuple[int, int]:
    """The shortest and the longest side of buckets in pixels, widened to multiples of --bucket_reso_steps."""
    step = options.bucket_reso_steps
    return options.min_bucket_reso // step * step, -(-options.max_bucket_reso // step) * step


def check_sizes(options: Options) -> Iterator[str]:
    """Warnings about --resolution and the buckets; UsageError for sizes that contradict each other."""
    step = options.bucket_reso_steps
    if step % 32:
        raise UsageError(f"--bucket_reso_steps={step}: must be a multiple of 32 for SDXL")
    if options.resolution is None:
        return
    width, height = parse_resolution(options.resolution)
    if not options.enable_bucket:
        if width % 8 or height % 8:
            raise UsageError(f"--resolution={options.resolution}: without --enable_bucket, sides are multiples of 8")
        return
    if options.bucket_no_upscale:
        if width * height < step * step:
            raise UsageError(f"--resolution={options.resolution}: too small for a bucket in steps of {step}")
        yield "--min_bucket_reso and --max_bucket_reso are not used with --bucket_no_upscale"
        return
    low, high = bucket_limits(options)
    if not 0 < low <= min(width, height):
        allowed = f"from --bucket_reso_steps={step} to the smaller side of --resolution={options.resolution}"
        raise UsageError(f"--min_bucket_reso={options.min_bucket_reso}: must be {allowed}")
    if high < max(width, height):
        raise UsageError(f"--max_bucket_reso={high} is below --resolution={options.resolution}; make it larger")
    for name, limit, used in (("min", options.min_bucket_reso, low), ("max", options.max_bucket_reso, high)):
        if limit != used:
            yield f"--{name}_bucket_reso={limit} is no multiple of --bucket_reso_steps={step}; {used} is used"
    if high == max(width, height):
        shrunk = f"--max_bucket_reso={high} shrinks pictures that are not square to as little as half of their pixels"
        yield f"{shrunk}; --max_bucket_reso={2 * high} keeps nearly all of them"


# An option -> the one without which it cannot do what it asks for.
_NEEDS = {
    "adaptive_noise_scale": "noise_offset",
    "cache_text_encoder_outputs": "network_train_unet_only",  # text encoders that are trained run in each step
    "dim_from_weights": "network_weights",
    "persistent_data_loader_workers": "max_data_loader_n_workers",
    "scale_v_pred_loss_like_noise_pred": "v_parameterization",
}
# Two that contradict each other: the first decides what the second would.
_EXCLUDE = (
    ("cache_text_encoder_outputs", "shuffle_caption"),
    ("cache_text_encoder_outputs", "caption_dropout_rate"),
    ("cache_text_encoder_outputs", "caption_dropout_every_n_epochs"),
    ("cache_text_encoder_outputs", "caption_tag_dropout_rate"),
    ("network_train_unet_only", "network_train_text_encoder_only"),
    ("use_8bit_adam", "use_lion_optimizer"),
    ("use_8bit_adam", "optimizer_type"),
    ("use_lion_optimizer", "optimizer_type"),
    ("v_pred_like_loss", "v_parameterization"),
)
# An option -> the one without which it does nothing.
_IDLE_WITHOUT = {
    "multires_noise_discount": "multires_noise_iterations",
    "noise_offset_random_strength": "noise_offset",
    "dataset_repeats": "dataset_config",
    "save_last_n_steps": "save_every_n_steps",
    "save_last_n_epochs_state": "save_state",
    "save_last_n_steps_state": "save_state",
    "sample_every_n_steps": "sample_prompts",
    "sample_every_n_epochs": "sample_prompts",
    "sample_at_first": "sample_prompts",
}
# Of two that are given, the first decides, and the second does nothing.
_DECIDES = {"max_train_epochs": "max_train_steps", "save_n_epoch_ratio": "save_every_n_epochs"}
IDLE = ("clip_skip", "highvram", "disable_mmap_load_safetensors", "xformers", "mem_eff_attn", "skip_cache_check")


def _is_set(options: Options, name: str) -> bool:
    return getattr(options, name) not in (Options.__dataclass_fields__[name].default, 0)


def _check_pairs(options: Options) -> Iterator[str]:
    """What the tables above say of these options."""
    for name, needed in _NEEDS.items():
        if _is_set(options, name) and not getattr(options, needed):
            raise UsageError(f"--{name} needs --{needed}; give it too, or leave --{name} out")
    for name, excluded in _EXCLUDE:
        if _is_set(options, name) and _is_set(options, excluded):
            raise UsageError(f"--{name} and --{excluded} exclude each other; leave one of them out")
    for name in filter(lambda name: _is_set(options, name), IDLE):
        yield f"--{name} has no effect here"
    for name, needed in _IDLE_WITHOUT.items():
        if _is_set(options, name) and not getattr(options, needed):
            yield f"--{name} has no effect without --{needed}"
    for name, unused in _DECIDES.items():
        if _is_set(options, name) and _is_set(options, unused):
            yield f"--{name} decides; --{unused}={getattr(options, unused)} is not used"


# Any other optimizer is given by the dotted path of its class.
OPTIMIZERS = {
    "AdamW": "torch.optim.AdamW",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "Lion": "lion_pytorch.Lion",
    "Adafactor": "transformers.optimization.Adafactor",
    "Prodigy": "prodigyopt.Prodigy",
}


def optimizer_name(options: Options) -> str:
    """The optimizer's name, with its aliases resolved."""
    alias = "AdamW8bit" if options.use_8bit_adam else "Lion" if options.use_lion_optimizer else None
    return alias or options.optimizer_type or "AdamW"


def optimizer_path(options: Options) -> str:
    """The dotted path of the optimizer's class. Raises a UsageError if its name is not among `OPTIMIZERS`."""
    name = optimizer_name(options)
    paths = {title.lower(): path for title, path in OPTIMIZERS.items()}
    if "." not in name and name.lower() not in paths:
        raise UsageError(
            f"not supported: --optimizer_type {name}; it is one of {', '.join(OPTIMIZERS)}, or a class by its dotted "
            "path, such as torch.optim.RMSprop"
        )
    return paths.get(name.lower(), name)


def _check_schedule(o: Options) -> Iterator[str]:
    fixed = bool(o.lr_scheduler_type) or o.lr_scheduler in ("constant", "piecewise_constant", "adafactor")
    warmup, optimizer = o.lr_warmup_steps, optimizer_path(o).lower()
    if not o.lr_scheduler_type and o.lr_scheduler not in LEARNING_RATES:
        raise UsageError(f"--lr_scheduler={o.lr_scheduler}: must be one of {', '.join(LEARNING_RATES)}")
    if o.lr_scheduler == "adafactor" and not optimizer.endswith(".adafactor"):
        raise UsageError("--lr_scheduler=adafactor works with --optimizer_type=Adafactor only")
    if warmup and fixed and not optimizer.endswith("schedulefree"):
        raise UsageError(
            "--lr_warmup_steps has no place in this course of the learning rate; remove it, or take "
            "--lr_scheduler=constant_with_warmup"
        )
    if any(isinstance(steps, float) and steps > 1 for steps in (warmup, o.lr_decay_steps)):
        raise UsageError("--lr_warmup_steps and --lr_decay_steps are whole numbers of steps, or shares up to 1 or 100%")
    if o.max_train_epochs is None and isinstance(warmup, int) and warmup >= o.max_train_steps:
        yield f"--lr_warmup_steps={warmup}: the learning rate reaches its full height only when training is over"
    if o.lr_scheduler_num_cycles != 1 and o.lr_scheduler == "cosine":
        yield "--lr_scheduler_num_cycles has no effect with cosine; --lr_scheduler=cosine_with_restarts uses it"


def _check_others(o: Options) -> Iterator[str]:
    """What no table holds, because a value matters and not only whether it is there."""
    steps, epochs, name = o.sample_every_n_steps, o.sample_every_n_epochs, o.output_name
    strengths, bases = len(o.base_weights_multiplier), len(o.base_weights)
    if o.full_bf16 and o.mixed_precision != "bf16":
        raise UsageError("--full_bf16 needs --mixed_precision=bf16")
    if o.log_with in ("tensorboard", "all") and not o.logging_dir:
        raise UsageError(f"--log_with={o.log_with} needs --logging_dir, the folder for the logs")
    if name is not None and (name in (".", "..") or set(name) & set("/\\\0")):
        raise UsageError(f"--output_name={name}: must be a name and no path; the folder goes into --output_dir")
    if o.metadata_thumbnail and not o.metadata_thumbnail.startswith("data:"):
        raise UsageError("--metadata_thumbnail must be the picture as a data URL, such as data:image/png;base64,...")
    if o.shrink and o.save_model_as != "safetensors":
        raise UsageError("--shrink needs --save_model_as=safetensors")
    if o.network_dropout is not None and not 0 <= o.network_dropout < 1:
        raise UsageError(f"--network_dropout={o.network_dropout}: must be a share, from 0 to below 1")
    if (o.min_timestep or 0) > (o.max_timestep or 1000):
        raise UsageError(f"--min_timestep={o.min_timestep} is above --max_timestep={o.max_timestep}")
    if strengths > bases:
        raise UsageError(f"--base_weights_multiplier: {strengths} strengths for {bases} files of --base_weights")
    if strengths < bases:
        yield "--base_weights without a number in --base_weights_multiplier count fully"
    if not o.caption_extension.startswith("."):
        ending = o.caption_extension
        yield f"--caption_extension={ending} has no dot: the caption of a.png would be in a{ending}"
    if o.cache_text_encoder_outputs_to_disk:
        yield "--cache_text_encoder_outputs_to_disk keeps captions in memory, because encoding them takes seconds"
    if o.zero_terminal_snr and not o.v_parameterization:
        yield "--zero_terminal_snr is for bases that predict v; with others (no --v_parameterization) it does harm"
    if o.mixed_precision == "fp16" and not o.no_half_vae and not o.vae:
        yield "SDXL's own VAE often fails in fp16; --no_half_vae avoids that"
    if o.save_model_as != "safetensors":
        yield f"--save_model_as={o.save_model_as}: these files carry no metadata; most programs prefer safetensors"
    if o.save_last_n_epochs and not (o.save_every_n_epochs or o.save_n_epoch_ratio):
        yield "--save_last_n_epochs has no effect without --save_every_n_epochs"
    if o.sample_prompts and not (steps or epochs or o.sample_at_first):
        yield "--sample_prompts draws nothing; add --sample_every_n_steps, --sample_every_n_epochs or --sample_at_first"
    if any(number is not None and number <= 0 for number in (steps, epochs)):
        yield "--sample_every_n_... of 0 or less draws nothing"
    if (epochs or 0) > 0 and (steps or 0) > 0:
        yield "--sample_every_n_epochs decides; --sample_every_n_steps is not used"
    if not (o.logging_dir or o.log_with) and (o.log_prefix or o.log_tracker_name or o.log_config):
        yield "nothing is logged: --log_prefix and its like need --logging_dir, the folder for the logs"
