"""Adapters of every family with parts dropped, swapped, turned, renamed or retyped: refused, or right."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from fixtures import ALL_ADAPTERS, about, random_tensors, scaled, shapes
from fuzzing import FOLDER, add, limits
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorashrink.adapters import open_adapter
from lorashrink.errors import LorashrinkError
from lorashrink.insight.comparison import compare
from lorashrink.insight.inspection import inspect
from lorashrink.insight.overlapping import overlap
from lorashrink.making.conversion import convert
from lorashrink.making.merging import merge
from lorashrink.packing.pack import pack
from lorashrink.shrinking.run import resize

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
LAYERS = 3
NAMES = [name for name in ALL_ADAPTERS if "config" not in about(name)]


@cache
def few_layers(name: str) -> dict[str, Tensor]:
    """The first tensors of a listed adapter, small, with numbers."""
    small = scaled(shapes(name), 64)
    stems: dict[str, None] = dict.fromkeys(key.rpartition(".lora")[0] or key.rpartition(".")[0] for key in small)
    kept = list(stems)[:LAYERS]
    tensors = {key: shape for key, shape in small.items() if any(key.startswith(stem) for stem in kept)}
    return random_tensors({key: shape for key, shape in tensors.items() if torch.Size(shape).numel() < 200_000})


@st.composite
def mutated(draw: st.DrawFn, name: str) -> dict[str, Tensor]:
    """The tensors of a listed adapter after one to three changes."""
    tensors = dict(few_layers(name))
    for _ in range(draw(st.integers(1, 3))):
        if not tensors:
            break
        key, second = (draw(st.sampled_from(sorted(tensors))) for _ in range(2))
        tensor = tensors[key]
        match draw(st.integers(0, 8)):
            case 0:
                del tensors[key]
            case 1:
                tensors[key], tensors[second] = tensors[second], tensors[key]
            case 2:
                tensors[key] = tensor.transpose(0, -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
            case 3:
                tensors[draw(st.sampled_from([f"{key}.x", key.upper(), key[3:], key.replace("lora", "loha")]))] = (
                    tensors.pop(key)
                )
            case 4:
                tensors[key] = tensor.float().to(draw(st.sampled_from(DTYPES)))
            case 5:
                tensors[key] = tensor.reshape(-1)[: draw(st.integers(0, 5))]
            case 6:
                tensors[key] = tensor[..., None, None]
            case 7:
                factor = draw(st.sampled_from([0.0, float("nan"), float("inf"), 1e-8, 6e4, -1.0]))
                tensors[key] = (tensor.double() * factor).to(tensor.dtype)  # torch does not multiply fp8
            case _:
                tensors[f"{key.rpartition('.')[0]}.alpha"] = torch.tensor(
                    draw(st.sampled_from([0.0, -1.0, float("nan"), 1e300, 1e-300, 4.0])), dtype=torch.float64
                )
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def dense(path: Path) -> dict[str, Tensor]:
    """ΔW of each LoRA layer by the plain formula, up·down·alpha/rank."""
    tensors, layers = load_file(path), {}
    for key, down in tensors.items():
        stem = key.removesuffix(".lora_down.weight")
        up = tensors.get(f"{stem}.lora_up.weight")
        alpha = tensors.get(f"{stem}.alpha", torch.tensor(float(len(down)) if down.dim() else 1.0))
        whole = up is not None and f"{stem}.lora_mid.weight" not in tensors and alpha.numel() == 1
        if stem != key and whole and math.isfinite(alpha):
            layers[stem] = up.double().flatten(1) @ down.double().flatten(1) * (float(alpha) / len(down))
    return layers


def check_structure(name: str, tensors: dict[str, Tensor], command: str) -> None:
    path, beside, out = FOLDER / "a.safetensors", FOLDER / "b.safetensors", FOLDER / "out"
    shutil.rmtree(out, ignore_errors=True)
    save_file(tensors, path)
    save_file(few_layers(name), beside)
    with limits():
        outcome = attempt(lambda: inspect(path, jobs=1)) and attempt(lambda: COMMANDS[command](path, beside, out))
    written = getattr(outcome, "results", ())
    if written and command in SAME:
        same_changes(path, Path(written[0].output))


# command -> what it does with an adapter, a healthy one of the same kind, and a folder for outputs
COMMANDS: dict[str, Callable[[Path, Path, Path], Any]] = {
    "resize": lambda path, beside, out: resize(path, recipes="energy=1", output=out, jobs=1),
    "lora": lambda path, beside, out: resize(path, recipes="rank=2", form="lora", dtype="fp8", output=out, jobs=1),
    "merge": lambda path, beside, out: merge(path, output=out / "sum.safetensors", jobs=1),
    "sum": lambda path, beside, out: merge([beside, f"{path}:-0.5"], output=out / "sum.safetensors", jobs=1),
    "convert": lambda path, beside, out: convert(path, dtype="fp32", output=out),
    "convert to fp8": lambda path, beside, out: convert(path, dtype="fp8", output=out),
    "pack": lambda path, beside, out: pack(path, output=out, jobs=1),
    "compare": lambda path, beside, out: compare(path, beside, jobs=1),
    "overlap": lambda path, beside, out: overlap([path, beside], jobs=1),
}
SAME = ("resize", "merge", "convert")  # the commands whose output adds what the input adds


def attempt(work: Callable[[], Any]) -> Any:
    """What a command makes of the file; None for an error of ours."""
    outcome, errors = None, []
    try:
        outcome = work()
    except LorashrinkError as error:
        errors.append(str(error))
    errors += [failure.error for failure in getattr(outcome, "failed", ())]
    assert not any("unexpected" in error for error in errors), errors
    return outcome


# Products of small factors that are whole weights of real size, whose directions take a minute.
LARGE, SLOW = ("flux_lokr_bfl", "sd35_medium_lokr_simpletuner"), ("compare", "overlap", "pack")

for listed in NAMES:
    commands = st.sampled_from([command for command in COMMANDS if not (listed in LARGE and command in SLOW)])
    add(listed, 6, partial(check_structure, listed), tensors=mutated(listed), command=commands)


def same_changes(source: Path, output: Path) -> None:
    """energy=1 keeps ΔW of every plain LoRA layer, as far as the dtype goes; every tensor can be read."""
    before, after = dense(source), dense(output)
    with open_adapter(source) as opened:
        dtypes = {layer.name: layer.dtype for layer in opened if layer.algo == "lora"}
    for name in before.keys() & after.keys() & dtypes.keys():
        norm = float(before[name].norm())
        if norm > 1e-6:
            tolerance = {"F32": 1e-4, "F64": 1e-4, "F16": 2e-2, "BF16": 5e-2}.get(dtypes[name], 0.1)
            assert float((after[name] - before[name]).norm()) <= tolerance * norm, name
