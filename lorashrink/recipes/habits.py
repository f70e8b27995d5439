"""What people write into recipes by habit, and the recipe that they mean."""

from __future__ import annotations

from collections.abc import Mapping

# Keys of sd-scripts, kohya_ss and other tools -> ours.
_KEYS: Mapping[str, str] = {
    "new_rank": "rank",
    "new_conv_rank": "conv_rank",
    "dim": "rank",
    "network_dim": "rank",
    "conv_dim": "conv_rank",
    "threshold": "thr",
    "quantile": "energy",
    "dynamic_param": "energy",
}

_DYNAMIC = "dynamic_method"


def meant(items: Mapping[str, str]) -> str | None:
    """The recipe that was probably meant by these keys and numbers, None if they are none of the known habits."""
    if method := items.get(_DYNAMIC):
        rest = {key: number for key, number in items.items() if key not in (_DYNAMIC, "dynamic_param")}
        return _text({method: items.get("dynamic_param", "0.9"), **rest})
    renamed = {_KEYS.get(key, key): number for key, number in items.items()}
    if renamed.keys() != items.keys():
        return _text(renamed)
    (key, number), *more = items.items()
    if number or more:
        return None
    try:
        value = float(key)
    except ValueError:
        return None
    if value < 0:
        return f"fro_ckpt=1,thr={key}"
    return f"energy={key}" if value < 1 else f"rank={value:.0f}"


def _text(items: Mapping[str, str]) -> str:
    return ",".join(f"{key}={number}" if number else key for key, number in items.items())
