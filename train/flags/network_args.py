"""What --network_args may say: the keys and values that LyCORIS reads, and what other keys were meant for.

LyCORIS accepts any key silently and reads some values otherwise than they look, so everything is read here first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorashrink.errors import UsageError, nearest
from lorashrink.train.flags.options import Options, key_values, read_toml

DEFAULT_DIM = 4  # sd-scripts'

# Names of LyCORIS' presets -> whether convolutions wider than 1×1 are in them.
PRESETS: Mapping[str, bool] = {
    "full": True, "full-lin": False, "attn-mlp": False, "attn-only": False, "unet-only": True,
    "unet-transformer-only": False, "unet-convblock-only": True,
}  # fmt: skip

_LORA = frozenset({"lora", "locon"})
_FACTORS = _LORA | {"loha", "lokr"}
_SCALED = _FACTORS | {"glora"}
_ROTATIONS = frozenset({"diag-oft", "boft"})
_EXPERIMENTAL = _ROTATIONS | {"glora"}
ALGOS = _FACTORS | {"full"} | _EXPERIMENTAL
_REFUSED = {
    "dylora": "LyCORIS saves it so that nothing can load the file again",
    "ia3": "its preset matches no layer of SDXL",
    "tlora": "it needs the time step in every layer, and fails on convolutions",
}


@dataclass(frozen=True, slots=True)
class NetworkArgs:
    """What LyCORIS is asked for. `values` are the further arguments of its `create_network`."""

    algo: str
    preset: str
    bypass: bool
    dora: bool
    values: Mapping[str, str | bool]
    warnings: list[str]


def read_network_args(options: Options) -> NetworkArgs:
    """The options of the network, with what the user should know of them, one line each."""
    pairs, warnings = _in_lycoris_words(options)
    if options.network_dropout is not None:
        pairs.setdefault("dropout", str(options.network_dropout))
    for key, text in pairs.items():
        _check_value(key, text)
    algo, preset = pairs.get("algo", "lora").lower(), pairs.get("preset", "full")
    _check_algo(algo)
    if preset == "ia3":
        raise UsageError("--network_args: preset=ia3 matches no layer of SDXL")
    if preset not in PRESETS:
        if not Path(preset).is_file():
            raise UsageError(f"--network_args: preset={preset} is neither a TOML file nor one of {', '.join(PRESETS)}")
        content = read_toml(Path(preset))
        for table in ("module_algo_map", "name_algo_map"):
            for override in content.get(table, {}).values():
                _check_algo(str(override.get("algo", "lora")).lower())
    dora = pairs.get("dora_wd", "").lower() == "true" and algo in _FACTORS
    # Half-precision weights round small changes away unless the change is applied beside them.
    bypass = pairs["bypass_mode"].lower() == "true" if "bypass_mode" in pairs else algo in _LORA and not dora
    if bypass and algo == "full":
        raise UsageError("--network_args: algo=full has no bypass_mode; leave it out")
    if bypass and dora:
        raise UsageError("--network_args: bypass_mode=True would leave DoRA's magnitudes out; give it or dora_wd=True")
    # LyCORIS takes a number 0 for "not given", and some booleans in quotes for true.
    values: dict[str, str | bool] = {
        key: text.lower() == "true" if _KEYS[key][0] == _BOOLEAN else text
        for key, text in pairs.items()
        if key != "preset"
    }
    arguments = NetworkArgs(algo, preset, bypass, dora, values | {"algo": algo, "bypass_mode": bypass}, warnings)
    warnings += _warnings(options, pairs, arguments)
    return arguments


# What a value must be -> whether a text is that.
_TEXT = "text"
_BOOLEAN = "True or False (LyCORIS takes anything but False for True)"
_NUMBER = "a number, 0 or more"
_SHARE = "a share, from 0 to below 1"
_WHOLE, _FROM_1, _FACTOR = (f"a whole number, {least} or more" for least in (0, 1, -1))
_FITS: Mapping[str, Callable[[str], bool]] = {
    _TEXT: lambda text: True,
    _BOOLEAN: lambda text: text.lower() in ("true", "false"),
    _NUMBER: lambda text: 0 <= float(text) < math.inf,
    _SHARE: lambda text: 0 <= float(text) < 1,
    _WHOLE: lambda text: int(text) >= 0,
    _FROM_1: lambda text: int(text) >= 1,
    _FACTOR: lambda text: int(text) >= -1,
}
_NOWHERE = frozenset[str]()
_LOKR = frozenset({"lokr"})

# The keys that `lycoris.kohya.create_network` 4.1.3 reads, but for old names -> what a value must be, and the algos for
# which it does something.
_KEYS: Mapping[str, tuple[str, frozenset[str]]] = {
    "algo": (_TEXT, ALGOS),
    "preset": (_TEXT, ALGOS),
    "conv_dim": (_WHOLE, ALGOS),
    "conv_alpha": (_NUMBER, _SCALED),
    "dropout": (_SHARE, ALGOS),
    "rank_dropout": (_SHARE, ALGOS),
    "module_dropout": (_SHARE, ALGOS),
    "use_tucker": (_BOOLEAN, _FACTORS),
    "use_scalar": (_BOOLEAN, _SCALED),
    "train_norm": (_BOOLEAN, ALGOS),
    "dora_wd": (_BOOLEAN, _FACTORS),
    "wd_on_output": (_BOOLEAN, _FACTORS),
    "bypass_mode": (_BOOLEAN, ALGOS),
    "rs_lora": (_BOOLEAN, _SCALED),
    "factor": (_FACTOR, _LOKR),
    "decompose_both": (_BOOLEAN, _LOKR),
    "full_matrix": (_BOOLEAN, _LOKR),
    "unbalanced_factorization": (_BOOLEAN, _LOKR),
    "constraint": (_NUMBER, _ROTATIONS),
    "rescaled": (_BOOLEAN, _ROTATIONS),
    "loraplus_lr_ratio": (_NUMBER, _LORA),
    "loraplus_unet_lr_ratio": (_NUMBER, _LORA),
    "loraplus_text_encoder_lr_ratio": (_NUMBER, _LORA),
    "block_size": (_FROM_1, _NOWHERE),
    "train_t5xxl": (_BOOLEAN, _NOWHERE),
    "train_llm_adapter": (_BOOLEAN, _NOWHERE),
}
KEYS = frozenset(_KEYS)
OLD_NAMES = {"use_cp": "use_tucker", "use_conv_cp": "use_tucker", "constrain": "constraint"}
OPPOSITES = {"disable_conv_cp": "use_tucker"}

_PER_BLOCK = (
    "ranks and alphas per block belong to networks.lora, which wants 23 values for SDXL; "
    "LyCORIS has one for all: --network_dim, --network_alpha, conv_dim, conv_alpha"
)
_MEANT = {
    **dict.fromkeys(("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"), _PER_BLOCK),
    "rank_dropout_scale": "LyCORIS does not pass it on; what rank_dropout leaves is never scaled up",
    "use_reentrant": "checkpointing of gradients is never re-entrant",
    **dict.fromkeys(("weight_decompose", "dora"), "write dora_wd=True for DoRA"),
    "wd_on_out": "write wd_on_output",
    **dict.fromkeys(("network_dim", "dim", "rank"), "write --network_dim"),
    "alpha": "write --network_alpha",
    "network_dropout": "write --network_dropout, or dropout",
}


def _check_value(key: str, text: str) -> None:
    expected = _KEYS[key][0]
    fits = False
    with contextlib.suppress(ValueError):
        fits = _FITS[expected](text)
    if not fits:
        raise UsageError(f"--network_args: {key}={text}: expected {expected}")


# The keys that networks.lora of sd-scripts reads, and those of them that LyCORIS has no like of.
_LORA_KEYS = {"conv_dim", "conv_alpha", "rank_dropout", "module_dropout"} | {k for k in _KEYS if k[:8] == "loraplus"}
_LORA_ONLY = {
    "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "block_lr_zero_threshold", "down_lr_weight",
    "mid_lr_weight", "up_lr_weight",
}  # fmt: skip


def _in_lycoris_words(options: Options) -> tuple[dict[str, str], list[str]]:
    """The pairs of --network_args that LyCORIS reads, under the names of today; and a line for every other pair."""
    pairs = key_values("--network_args", options.network_args)
    if options.network_module == "networks.lora":
        if refused := next((key for key in pairs if key in _LORA_ONLY), None):
            raise UsageError(f"--network_args: {refused} is not supported: ranks and rates are the same in all blocks")
        # It trains convolutions only if asked to, with an alpha of 1.
        convolutions = pairs.get("conv_dim", "0") != "0"
        usable = {"algo": "lora"} | ({"preset": "full", "conv_alpha": "1"} if convolutions else {"preset": "attn-mlp"})
        names = _LORA_KEYS if convolutions else _LORA_KEYS - {"conv_dim", "conv_alpha"}
        usable |= {key: text for key, text in pairs.items() if key in names}
        warning = "--network_args: {} has no effect with networks.lora; use --network_module=lycoris.kohya"
        return usable, [warning.format(key) for key in pairs if key not in _LORA_KEYS]
    if options.network_module != "lycoris.kohya":
        module = options.network_module or "missing"
        raise UsageError(f"--network_module: {module}; lorashrink trains with lycoris.kohya, or as networks.lora")
    usable, warnings = {}, []
    for key, text in pairs.items():
        name = OLD_NAMES.get(key, OPPOSITES.get(key, key))
        if key in OPPOSITES:
            _check_value(name, text)
            usable[name] = str(text.lower() == "false")
        elif name in _KEYS:
            usable[name] = text
        else:
            near = nearest(key, _KEYS, cutoff=0.7)
            instead = _MEANT.get(key) or (f"did you mean {near}?" if near else "it knows no such key")
            warnings.append(f"--network_args: {key} has no effect with LyCORIS: {instead}")
    return usable, warnings


def _check_algo(algo: str) -> None:
    if algo in _REFUSED:
        raise UsageError(f"--network_args: algo={algo} is not supported: {_REFUSED[algo]}; take locon or lokr")
    if algo not in ALGOS:
        raise UsageError(f"--network_args: there is no algo={algo}; it is one of {', '.join(sorted(ALGOS))}")


def _warnings(options: Options, pairs: Mapping[str, str], arguments: NetworkArgs) -> Iterator[str]:
    """Keys that LyCORIS reads and does not use, unless they are off anyway, and what works otherwise than expected."""
    algo, preset, bypass, dora = arguments.algo, arguments.preset, arguments.bypass, arguments.dora
    for key, text in pairs.items():
        if algo not in _KEYS[key][1] and text.lower() not in ("false", "0", "0.0", "-1"):
            yield f"--network_args: {key} has no effect with algo={algo}"
        elif key in ("conv_dim", "conv_alpha") and not PRESETS.get(preset, True):
            yield f"--network_args: {key} has no effect with preset={preset}, which has no convolutions in it"
    if float(pairs.get("dropout", 0)) and not bypass:
        hint = "" if algo == "full" else " without bypass_mode=True"
        yield f"--network_dropout (or dropout in --network_args) has no effect with algo={algo}{hint}"
    if algo in _EXPERIMENTAL or dora:
        name = "dora_wd=True" if dora else f"algo={algo}"
        yield f"--network_args: {name} is experimental: other programs may load its files wrongly or not at all"
    if algo in _SCALED:
        dim, alpha = options.network_dim or DEFAULT_DIM, options.network_alpha
        conv_dim, conv_alpha = int(pairs.get("conv_dim", dim)), float(pairs.get("conv_alpha", alpha))
        scales = {(dim, alpha): "--network_alpha / --network_dim"}
        scales.setdefault((conv_dim, conv_alpha), "conv_alpha / conv_dim")
        for (rank, strength), names in scales.items():
            if strength > rank > 0:
                scale = f"{strength:g} / {rank} = {strength / rank:g}"
                yield f"{names} is {scale}: changes are made stronger than usual, which is 1 or less"
    if algo in _LORA and not bypass and not dora and options.mixed_precision != "no":
        loss = f"{options.mixed_precision} weights, which rounds most of them away while training"
        yield f"--network_args: bypass_mode=False adds small changes to {loss}; leave it out"
    if len(set(options.text_encoder_lr)) > 1:
        yield f"--text_encoder_lr: LyCORIS has one rate for both text encoders; {options.text_encoder_lr[0]:g} is used"
