"""An adapter from two checkpoints: what fine-tuning changed, shrunk by a recipe.

ΔW = W_tuned - W_base of every weight that an adapter can change, read layer by layer. From there on it is an adapter
like any other, whose layers are whole differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import Adapter, adapter_of
from lorashrink.adapters.family import Shape
from lorashrink.bases import Base, Views, open_base, views_shape
from lorashrink.bases.weights import name_weights
from lorashrink.errors import FamilyMismatch, InputError, NotABase, Progress, UsageError
from lorashrink.files.store import ComputedStore, tensor_info
from lorashrink.linking.loaders import open_for_8_bits
from lorashrink.linking.renaming import NAMINGS, layer_name_in, layout_of
from lorashrink.recipes.grammar import DEFAULT, parse_recipes
from lorashrink.results.shrinking import Report
from lorashrink.shrinking.options import ResizeOptions
from lorashrink.shrinking.outputs import base_files, check_outputs, name_outputs
from lorashrink.shrinking.run import shrink

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = re.compile(r"(?:token_embedding|position(?:al)?_embedding|embed_tokens|wte|wpe|shared|attention_bias)$")

# (part, module name) -> views
Modules = Mapping[tuple[str, str], Views]

Read = Callable[[Base, Views], "Tensor"]


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    recipes: str | Sequence[str] = DEFAULT,
    output: str | Path | None = None,
    naming: str = "kohya",
    vectors: bool = False,
    dtype: str = "fp16",
    device: str = "auto",
    jobs: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    quantiles: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Make adapters of the difference between a tuned checkpoint and its base, one by each recipe.

    naming: "kohya", "diffusers" or "comfy". vectors: differences of biases and normalisation layers too, as they are.
    Errors and energies are relative to the whole difference. Memory is bounded by a few layers. Raises UsageError,
    RecipeError, OutputError, InputError, NotABase, and FamilyMismatch if the two are not of one family.
    """
    source = Path(tuned)
    if naming not in NAMINGS or naming == "peft":
        raise UsageError(f"naming: '{naming}' is not one of kohya, diffusers, comfy.")
    parsed = parse_recipes(recipes)
    targets = {source: name_outputs(source, [(recipe.file_items(), recipe) for recipe in parsed], output)}
    check_outputs(targets, [*base_files(source), *base_files(base)], force=force or dry_run)
    report = shrink(
        targets,
        ResizeOptions(
            base=base, dtype=dtype, device=device, jobs=jobs, form="lora", dry_run=dry_run, quantiles=quantiles
        ),
        opener=lambda path, opened: open_for_8_bits(
            lambda name: _difference(path, opened, naming=name or naming, vectors=vectors),
            opened,
            naming,
            dtype=dtype,
        ),
        variant=f",extracted from {Path(base).name},naming={naming},vectors={vectors}",
        progress=progress,
    )
    if report.failed:  # one source: its error is the outcome
        raise InputError(report.failed[0].error)
    larger = "is larger than the checkpoint itself; -r rank=64 or another smaller recipe makes it a LoRA of use"
    results = [
        replace(  # without forms, which cannot be chosen here
            result,
            warnings=(*result.warnings, *([larger] if result.bytes_after > result.bytes_before else [])),
            forms={},
        )
        for result in report.results
    ]
    return replace(report, results=tuple(results))


def _difference(tuned_path: Path, base: Base | None, *, naming: str, vectors: bool) -> Adapter:
    """The adapter whose layers are the differences of all weights that both checkpoints have."""
    assert base is not None, "extract passes it on"
    if base.store is None:
        raise NotABase(f"{base.path}: a norm table holds no weights to compare with. Give the checkpoint.")
    tuned = open_base(tuned_path)
    if tuned.store is None:
        raise NotABase(f"{tuned_path}: a norm table holds no weights. Give the tuned checkpoint.")
    if tuned.family.name != base.family.name:
        raise FamilyMismatch(
            f"{tuned_path} is {tuned.family.title}, but {base.path} is {base.family.title}. "
            "Give two checkpoints of one family."
        )
    layout = layout_of(naming, base)
    weights = [checkpoint.modules(layout) for checkpoint in (tuned, base)]
    compared: list[tuple[str, list[Modules], Read]] = [(".diff", weights, Base.weight)]
    if vectors:
        norms = []
        for checkpoint in (tuned, base):  # the weights of normalisation layers are vectors
            shapes = {key: shape for key, shape in checkpoint.shapes.items() if key.endswith(".weight")}
            columns = {key: (*shape, 1) for key, shape in shapes.items() if len(shape) == 1}
            norms.append(name_weights(columns, checkpoint.family).layouts[layout])
        biases = [_biases(tuned, {**weights[0], **norms[0]}), _biases(base, {**weights[1], **norms[1]})]
        compared += [(".diff", norms, _vector), (".diff_b", biases, _vector)]

    def subtract(read: Read, new: Views, old: Views, shape: Shape) -> Tensor:
        return (read(tuned, new) - read(base, old)).reshape(shape)

    tensors, missing = {}, {}
    for ending, (tuned_modules, base_modules), read in compared:
        for part, module in {**base_modules, **tuned_modules}:
            name = layer_name_in(naming, base.family, part, module)
            new, old = tuned_modules.get((part, module)), base_modules.get((part, module))
            if _EMBEDDING.search(module):
                missing[name] = "an embedding, which loaders of adapters do not change"
            elif not all(view.key.endswith(("weight", "bias")) for view in new or old or ()):
                missing[name] = "a parameter of another name than weight, which loaders of adapters do not change"
            elif new is None or old is None:
                missing[name] = f"only {base.path if new is None else tuned_path} has this weight"
            elif views_shape(new) != views_shape(old):
                missing[name] = f"its weight is {list(views_shape(new))}, that of the base {list(views_shape(old))}"
            else:
                info = tensor_info("F32", views_shape(old)[:1] if read is _vector else views_shape(old))
                tensors[name + ending] = (info, partial(subtract, read, new, old, info.shape))
    if not tensors:
        raise FamilyMismatch(f"{tuned_path}: has no weight in common with {base.path}.")
    # ranks are filled in when the file is written
    entries = {"ss_network_module": "networks.lora", "ss_network_dim": "", "ss_network_alpha": ""}
    store = ComputedStore(tuned_path, tensors, entries, tuned.store.files, tuned.store.headers)
    return replace(adapter_of(tuned_path, store, {}), dropped=missing)


def _biases(base: Base, modules: Modules) -> Modules:
    """The biases beside weights; of rows of a weight the same rows."""
    biases = {}
    for address, views in modules.items():
        keys = [view.key.removesuffix("weight") + "bias" for view in views]
        if all(view.key.endswith("weight") and key in base.shapes for view, key in zip(views, keys, strict=True)):
            biases[address] = tuple(
                replace(view, key=key, shape=(view.shape[0], 1)) for view, key in zip(views, keys, strict=True)
            )
    return biases


def _vector(base: Base, views: Views) -> Tensor:
    import torch

    assert base.store is not None
    return torch.cat([base.store.read(view.key, view.rows).float() for view in views])
