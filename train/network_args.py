"""What --network_args may say: the keys and values that LyCORIS reads, and what the others would have meant.

LyCORIS takes any key without a word and reads some values otherwise than they look, so everything is read here first.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorashrink.errors import UsageError
from lorashrink.train.options import Options, read_toml

DEFAULT_DIM = 4  # sd-scripts'

# Names of LyCORIS' presets -> whether convolutions wider than 1×1 are in them.
PRESETS: Mapping[str, bool] = {
    "full": True,
    "full-lin": False,
    "attn-mlp": False,
    "attn-only": False,
    "unet-only": True,
    "unet-transformer-only": False,
    "unet-convblock-only": True,
}

_LORA = frozenset({"lora", "locon"})
_FACTORS = _LORA | {"loha", "lokr"}
_SCALED = _FACTORS | {"glora"}
_ROTATIONS = frozenset({"diag-oft", "boft"})
_SUPPORTED = _FACTORS | {"full"}
_EXPERIMENTAL = _ROTATIONS | {"glora"}
ALGOS = _SUPPORTED | _EXPERIMENTAL
_REFUSED = {
    "dylora": "LyCORIS saves it so that nothing can load the file again",
    "ia3": "its preset matches no layer of SDXL",
    "tlora": "it needs the time step in every layer, and fails on convolutions",
}

Value = str | bool


@dataclass(frozen=True, slots=True)
class NetworkArgs:
    """What LyCORIS is asked for. `values` are the further arguments of its `create_network`."""

    algo: str
    preset: str
    bypass: bool
    dora: bool
    values: Mapping[str, Value]
    warnings: tuple[str, ...]


def check_network_args(options: Options) -> list[str]:
    """What the user should know of the options of the network, one line each.

    Raises:
        UsageError: options that do not parse, exclude each other, or ask for what cannot be trained.
        InputError: a preset's file that cannot be read.
    """
    return list(read_network_args(options).warnings)


def read_network_args(options: Options) -> NetworkArgs:
    """The options of the network. Raises as `check_network_args`."""
    _check_flags(options)
    given = dict(map(_pair, options.network_args))
    if options.network_module == "networks.lora":
        given, warnings = _from_networks_lora(given)
    else:
        given, warnings = _known(given)
    if options.network_dropout is not None:
        given.setdefault("dropout", str(options.network_dropout))
    for key, text in given.items():
        _KEYS[key].read(key, text)
    algo, preset = _algo(given.get("algo", "lora")), given.get("preset", "full")
    _check_preset(preset)
    dora = _is_on(given, "dora_wd") and algo in _FACTORS
    bypass = _is_on(given, "bypass_mode") if "bypass_mode" in given else algo in _LORA and not dora
    _check_bypass(algo, bypass=bypass, dora=dora)
    warnings += [
        *_useless(given, algo, preset),
        *_experimental(algo, dora=dora),
        *_dropout(given, algo, bypass=bypass),
        *_strengths(options, given, algo),
        *_rounding(options, algo, bypass=bypass, dora=dora),
        *_rates(options),
    ]
    # LyCORIS takes a number 0 for "not given", and some booleans in quotes for true.
    values: dict[str, Value] = {
        key: text.lower() == "true" if _KEYS[key].read is _boolean else text for key, text in given.items()
    }
    values |= {"algo": algo, "bypass_mode": bypass}
    values.pop("preset", None)
    return NetworkArgs(algo, preset, bypass, dora, values, tuple(warnings))


def given_network_args(options: Options) -> dict[str, object]:
    """The pairs as they were given, with --network_dropout among them: what sd-scripts writes into metadata."""
    return dict(map(_pair, options.network_args)) | {"dropout": options.network_dropout}


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key or not value:
        raise UsageError(f"--network_args: '{text}' is no key=value pair, such as conv_dim=8 (no blanks around '=')")
    return key, value


def _check_flags(options: Options) -> None:
    if options.network_module not in ("lycoris.kohya", "networks.lora"):
        raise UsageError(
            f"--network_module: {options.network_module or 'missing'}; lorashrink trains with lycoris.kohya "
            "(networks.lora is understood as LyCORIS' lora)"
        )
    if options.network_dim is not None and options.network_dim < 1:
        raise UsageError(f"--network_dim: {options.network_dim}, but a rank is 1 or more")
    if options.network_alpha < 0:
        raise UsageError(f"--network_alpha: {options.network_alpha:g}, but it is 0 or more")
    if options.network_dropout is not None:
        _share("--network_dropout", str(options.network_dropout), "")
    if options.network_train_unet_only and options.network_train_text_encoder_only:
        raise UsageError("--network_train_unet_only and --network_train_text_encoder_only: give one of them at most")
    if options.dim_from_weights and not options.network_weights:
        raise UsageError("--dim_from_weights: needs --network_weights, whose ranks it takes")
    if len(options.base_weights_multiplier) > len(options.base_weights):
        raise UsageError(
            f"--base_weights_multiplier: {len(options.base_weights_multiplier)} strengths for "
            f"{len(options.base_weights)} files of --base_weights"
        )


# --- values -------------------------------------------------------------------------------------


def _bad(key: str, text: str, expected: str, where: str = "--network_args: ") -> UsageError:
    return UsageError(f"{where}{key}={text}: expected {expected}")


def _text(key: str, text: str) -> None:
    """Any text."""


def _boolean(key: str, text: str) -> None:
    if text.lower() not in ("true", "false"):
        raise _bad(key, text, "True or False (LyCORIS takes anything but False for True)")


def _whole(least: int) -> Callable[[str, str], None]:
    def read(key: str, text: str) -> None:
        try:
            right = int(text) >= least
        except ValueError:
            right = False
        if not right:
            raise _bad(key, text, f"a whole number, {least} or more")

    return read


def _number(key: str, text: str) -> None:
    try:
        right = 0 <= float(text) < float("inf")
    except ValueError:
        right = False
    if not right:
        raise _bad(key, text, "a number, 0 or more")


def _share(key: str, text: str, where: str = "--network_args: ") -> None:
    try:
        right = 0 <= float(text) < 1
    except ValueError:
        right = False
    if not right:
        raise _bad(key, text, "a share, from 0 to below 1", where)


# --- keys ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Key:
    """How a value is checked, and the algos for which it does something."""

    read: Callable[[str, str], None]
    algos: frozenset[str] = ALGOS


_NOWHERE = frozenset[str]()
# The keys that `lycoris.kohya.create_network` 4.1.3 reads, but for the old names of three.
_KEYS: Mapping[str, _Key] = {
    "algo": _Key(_text),
    "preset": _Key(_text),
    "conv_dim": _Key(_whole(0)),
    "conv_alpha": _Key(_number, _SCALED),
    "dropout": _Key(_share),
    "rank_dropout": _Key(_share),
    "module_dropout": _Key(_share),
    "use_tucker": _Key(_boolean, _FACTORS),
    "use_scalar": _Key(_boolean, _SCALED),
    "train_norm": _Key(_boolean),
    "dora_wd": _Key(_boolean, _FACTORS),
    "wd_on_output": _Key(_boolean, _FACTORS),
    "bypass_mode": _Key(_boolean),
    "rs_lora": _Key(_boolean, _SCALED),
    "factor": _Key(_whole(-1), frozenset({"lokr"})),
    "decompose_both": _Key(_boolean, frozenset({"lokr"})),
    "full_matrix": _Key(_boolean, frozenset({"lokr"})),
    "unbalanced_factorization": _Key(_boolean, frozenset({"lokr"})),
    "constraint": _Key(_number, _ROTATIONS),
    "rescaled": _Key(_boolean, _ROTATIONS),
    "loraplus_lr_ratio": _Key(_number, _LORA),
    "loraplus_unet_lr_ratio": _Key(_number, _LORA),
    "loraplus_text_encoder_lr_ratio": _Key(_number, _LORA),
    "block_size": _Key(_whole(1), _NOWHERE),
    "train_t5xxl": _Key(_boolean, _NOWHERE),
    "train_llm_adapter": _Key(_boolean, _NOWHERE),
}
KEYS = frozenset(_KEYS)
OLD_NAMES = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker", "constrain": "constraint"}
OPPOSITES = {"disable_conv_cp": "use_tucker"}

_PER_BLOCK = (
    "ranks and alphas per block belong to networks.lora, which wants 23 values for SDXL (1 embedding, 9 input, "
    "3 middle, 9 output, 1 last); LyCORIS has one for all: --network_dim, --network_alpha, conv_dim, conv_alpha"
)
_MEANT = {
    **dict.fromkeys(("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"), _PER_BLOCK),
    "rank_dropout_scale": "LyCORIS does not pass it on; what rank_dropout leaves is never scaled up",
    "use_reentrant": "checkpointing of gradients is never re-entrant",
    "weight_decompose": "write dora_wd=True for DoRA",
    "dora": "write dora_wd=True for DoRA",
    "wd_on_out": "write wd_on_output",
    "network_dim": "write --network_dim",
    "dim": "write --network_dim",
    "rank": "write --network_dim",
    "alpha": "write --network_alpha",
    "network_dropout": "write --network_dropout, or dropout",
}


def _known(given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The pairs that LyCORIS reads, under the names of today; and a line for each of the others."""
    known: dict[str, str] = {}
    warnings = []
    for key, text in given.items():
        if key in OPPOSITES:
            _boolean(key, text)
            known[OPPOSITES[key]] = str(text.lower() == "false")
        elif (name := OLD_NAMES.get(key, key)) in _KEYS:
            known[name] = text
        else:
            warnings.append(f"--network_args: {key} has no effect with LyCORIS: {_instead(key)}")
    return known, warnings


def _instead(key: str) -> str:
    near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.7)
    return _MEANT.get(key) or (f"did you mean {near[0]}?" if near else "it knows no such key")


# What networks.lora of sd-scripts reads.
_LORA_KEYS = frozenset(
    {"conv_dim", "conv_alpha", "rank_dropout", "module_dropout"} | {key for key in _KEYS if key.startswith("loraplus_")}
)
_LORA_ONLY = frozenset(
    {"block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "block_lr_zero_threshold"}
    | {"down_lr_weight", "mid_lr_weight", "up_lr_weight"}
)


def _from_networks_lora(given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The same network in LyCORIS' words: networks.lora trains convolutions only if asked to, with an alpha of 1."""
    for key in given:
        if key in _LORA_ONLY:
            raise UsageError(f"--network_args: {key} is not supported: ranks and rates are the same in all blocks")
    known = {key: text for key, text in given.items() if key in _LORA_KEYS}
    warnings = [
        f"--network_args: {key} has no effect with networks.lora; use --network_module=lycoris.kohya"
        for key in given
        if key not in known
    ]
    convolutions = known.get("conv_dim", "0") != "0"
    if convolutions:
        known.setdefault("conv_alpha", "1")
    else:
        known = {key: text for key, text in known.items() if not key.startswith("conv_")}
    return {"algo": "lora", "preset": "full" if convolutions else "attn-mlp", **known}, warnings


# --- what the values mean together --------------------------------------------------------------


def _is_on(given: Mapping[str, str], key: str) -> bool:
    return given.get(key, "").lower() == "true"


def _algo(text: str) -> str:
    algo = text.lower()
    if algo in _REFUSED:
        raise UsageError(
            f"--network_args: algo={algo} is not supported: {_REFUSED[algo]}. Take algo=locon or algo=lokr"
        )
    if algo not in ALGOS:
        raise UsageError(f"--network_args: there is no algo={text}; it is one of {', '.join(sorted(ALGOS))}")
    return algo


def _check_preset(preset: str) -> None:
    if preset in PRESETS:
        return
    if preset == "ia3":
        raise UsageError("--network_args: preset=ia3 matches no layer of SDXL")
    if not Path(preset).is_file():
        raise UsageError(f"--network_args: preset={preset} is neither a TOML file nor one of {', '.join(PRESETS)}")
    for table in ("module_algo_map", "name_algo_map"):
        for override in read_toml(Path(preset)).get(table, {}).values():
            _algo(str(override.get("algo", "lora")))


def _check_bypass(algo: str, *, bypass: bool, dora: bool) -> None:
    if bypass and algo == "full":
        raise UsageError("--network_args: algo=full has no bypass_mode; leave it out")
    if bypass and dora:
        raise UsageError("--network_args: bypass_mode=True would leave DoRA's magnitudes out; give it or dora_wd=True")


def _useless(given: Mapping[str, str], algo: str, preset: str) -> Iterator[str]:
    """Keys that LyCORIS reads and does not use, unless they are off anyway."""
    for key, text in given.items():
        if algo not in _KEYS[key].algos and text.lower() not in ("false", "0", "0.0", "-1"):
            yield f"--network_args: {key} has no effect with algo={algo}"
        elif key in ("conv_dim", "conv_alpha") and not PRESETS.get(preset, True):
            yield f"--network_args: {key} has no effect with preset={preset}, which has no convolutions in it"


def _experimental(algo: str, *, dora: bool) -> Iterator[str]:
    if algo in _EXPERIMENTAL or dora:
        what = "dora_wd=True" if dora else f"algo={algo}"
        yield f"--network_args: {what} is experimental: other programs may load its files wrongly or not at all"


def _dropout(given: Mapping[str, str], algo: str, *, bypass: bool) -> Iterator[str]:
    if float(given.get("dropout", 0)) and not bypass:
        hint = "" if algo == "full" else " without bypass_mode=True"
        yield f"--network_dropout (or dropout in --network_args) has no effect with algo={algo}{hint}"


def _strengths(options: Options, given: Mapping[str, str], algo: str) -> Iterator[str]:
    """Layers whose change is made stronger than its factors say."""
    if algo not in _SCALED:
        return
    dim, alpha = options.network_dim or DEFAULT_DIM, options.network_alpha
    conv = int(given.get("conv_dim", dim)), float(given.get("conv_alpha", alpha))
    named = {("--network_alpha", "--network_dim"): (dim, alpha)}
    if conv != (dim, alpha):
        named["conv_alpha", "conv_dim"] = conv
    for (above, below), (rank, strength) in named.items():
        if strength > rank > 0:
            yield (
                f"{above} / {below} is {strength:g} / {rank} = {strength / rank:g}: changes are made stronger than "
                "usual, which is 1 or less"
            )


def _rounding(options: Options, algo: str, *, bypass: bool, dora: bool) -> Iterator[str]:
    if algo in _LORA and not bypass and not dora and options.mixed_precision != "no":
        yield (
            f"--network_args: bypass_mode=False adds small changes to {options.mixed_precision} weights, which rounds "
            "most of them away while training; leave it out"
        )


def _rates(options: Options) -> Iterator[str]:
    if len(set(options.text_encoder_lr)) > 1:
        yield f"--text_encoder_lr: LyCORIS has one rate for both text encoders; {options.text_encoder_lr[0]:g} is used"
