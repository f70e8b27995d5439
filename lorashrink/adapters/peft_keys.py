"""What every key of PEFT's configurations means here, so that no setting is passed over.

A row is `UNDERSTOOD` (it is followed, or what it adds is copied along), `HARMLESS` (it tells how the adapter was
trained or where it goes, and its ΔW is the same), or a reason: with any value but an empty one or False the adapter is
refused.
Source: the dataclasses `*Config` of PEFT 0.21, and keys that other trainers write beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorashrink.errors import InputError

UNDERSTOOD, HARMLESS = "understood", "harmless"

_Rows = Mapping[str, str]


def _harmless(*keys: str) -> _Rows:
    return dict.fromkeys(keys, HARMLESS)


def _understood(*keys: str) -> _Rows:
    return dict.fromkeys(keys, UNDERSTOOD)


_ANY = {
    **_harmless("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    **_harmless("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # the tensors that these add are copied along
    **_understood("modules_to_save", "bias", "fan_in_fan_out"),
    # of unsloth and ms-swift
    **_harmless("unsloth_fixed", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
}
_LORA = {
    **_ANY,
    **_understood("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias"),
    **_understood("init_lora_weights", "layer_replication", "target_parameters", "alora_invocation_tokens"),
    **_understood("trainable_token_indices", "ensure_weight_tying"),
    **_harmless("lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    **_harmless("lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
    **_understood("lora_parameters"),  # of mlx-lm
    # of PEFT before 0.3
    **_harmless("enable_lora", "merge_weights"),
    "use_qalora": "lora_A of QA-LoRA belongs to sums of groups of inputs",
    "use_bdlora": "a factor of BD-LoRA (block-diagonal LoRA) holds blocks and no matrix",
    "monteclora_config": "MonteCLoRA adds random samples to the factors",
    "arrow_config": "Arrow chooses among several adapters for each token",
    "kasa_config": "KaSA takes small singular values out of the base weight and has numbers between the factors",
}
_LYCORIS = {
    **_ANY,
    **_understood("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
    **_harmless("rank_dropout", "module_dropout", "init_weights"),
}
# peft_type -> key -> what it means, of all kinds whose layers are read
KEYS: Mapping[str, _Rows] = {
    "LORA": _LORA,
    "ADALORA": {
        **_LORA,
        **_understood("init_r"),
        **_harmless("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    },
    "LOHA": _LYCORIS,
    "LOKR": {
        **_LYCORIS,
        **_understood("decompose_both", "decompose_factor"),
        **_harmless("rank_dropout_scale"),
    },
    "OFT": {
        **_ANY,
        **_understood("r", "oft_block_size", "coft", "eps", "block_share"),
        **_understood("use_cayley_neumann", "num_cayley_neumann_terms"),
        **_harmless("module_dropout", "init_weights"),
    },
    "IA3": {**_ANY, **_understood("feedforward_modules"), **_harmless("init_ia3_weights")},
    "VERA": {
        **_ANY,
        **_understood("r", "projection_prng_key", "save_projection"),
        **_harmless("vera_dropout", "d_initial", "init_weights"),
    },
    "MISS": {**_ANY, **_understood("r", "mini_r", "init_weights"), **_harmless("miss_dropout")},
}

# Kinds that put learned vectors beside the prompt, or into the attention's keys and values.
_PROMPTS = frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"})

# Initialisations that leave the base as it is, and those whose change of it is computed from the base weight.
_FIRST_NUMBERS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
FROM_BASE = ("pissa", "olora")
_CONVERT = (
    "Save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes an ordinary "
    "LoRA of it."
)


def changes_base(config: Mapping[str, Any]) -> str | None:
    """The initialisation that takes its first factors out of the base at load; None if there is none."""
    value = config.get("init_lora_weights")
    return value.lower() if isinstance(value, str) and value.lower() in FROM_BASE else None


def check_keys(settings: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Raises InputError for a setting that gives the factors a meaning which is not known here."""
    for config in settings.values():
        kind = str(config.get("peft_type") or "LORA").rpartition(".")[2].upper()
        if kind in _PROMPTS:
            raise InputError(
                f"{path}: its peft_type is {kind}: learned vectors beside the prompt. It changes no weight of the "
                "model, and there is nothing to shrink."
            )
        if kind not in KEYS:
            raise InputError(
                f"{path}: its peft_type is {kind[:40]}, and what the factors of that kind mean is not known here. "
                "Merge it into its model with PEFT, and take the difference with: lorashrink extract"
            )
        for key, value in config.items():
            if problem := _problem(KEYS[kind], key, value):
                text = repr(value)
                text = text if len(text) <= 40 else f"{text[:37]}..."
                raise InputError(f"{path}: {key} is {text} in its settings: {problem}")


def _problem(rows: _Rows, key: str, value: object) -> str | None:
    """Why a value is refused, with the way out."""
    if key == "init_lora_weights":
        if not isinstance(value, str) or value.lower() in (*_FIRST_NUMBERS, *FROM_BASE, "true", "false"):
            return None
        if value.lower().startswith(("pissa", "corda", "loftq")):
            return (
                "PEFT changes the base at load in a way that the files do not hold (it is random, quantised, or comes "
                f"from data). {_CONVERT}"
            )
        return f"this initialisation is not known, and may change the base. {_CONVERT}"
    if _is_empty(value) or (meaning := rows.get(key)) in (UNDERSTOOD, HARMLESS):
        return None
    if meaning is None:
        return (
            "this key is not known, and may change what the factors mean. If it does not, delete it from the settings."
        )
    return f"{meaning}. Merge it into its model with PEFT, and take the difference with: lorashrink extract"


def _is_empty(value: object) -> bool:
    """Whether this is what a setting says that is not used."""
    return value is None or value is False or value in ("", [], {}, ())


def refuse_new_names(config: Mapping[str, Any], naming: str) -> str | None:
    """Why an adapter with these settings cannot get the names of another program; None if it can."""
    kept = only_in_peft(config)
    if not kept or naming == "peft":
        return None
    return f"{next(iter(kept))} is set, and only PEFT's own folders can hold that. Use --naming peft, or leave it out."


def way_out(name: str) -> str:
    """What to do about an adapter whose initialisation changes the base, where none is given."""
    return (
        f"init_lora_weights is {name}, with which PEFT takes the first factors out of the base at load, so that its ΔW "
        f"depends on the base weights. Give the checkpoint with --base. Or: {_CONVERT}"
    )


# Keys that give the whole adapter another meaning and stand in PEFT's settings alone.
_KEPT_BY_PEFT = ("layer_replication", "alora_invocation_tokens", "target_parameters")


def only_in_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that no other container than PEFT's can hold, without which the adapter is another one."""
    return {key: config[key] for key in _KEPT_BY_PEFT if not _is_empty(config.get(key))}
