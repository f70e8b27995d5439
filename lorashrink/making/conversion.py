"""The same adapter in another naming, container or dtype; nothing is shrunk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, adapter_family, open_adapter, peft
from lorashrink.bases import Base, open_base
from lorashrink.errors import LorashrinkError, Progress, UsageError, boundary
from lorashrink.files.store import FLOATS, MIXTURES, OUTPUT_DTYPES, ComputedStore, TensorStore, tensor_info
from lorashrink.files.writing import save_tensors
from lorashrink.linking.inputs import find_adapters
from lorashrink.linking.loaders import loads, naming_for_8_bits
from lorashrink.linking.renaming import Renamed, check_naming, renamed
from lorashrink.making.eight_bits import in_8_bits
from lorashrink.making.narrowing import balanced, loss_warnings, narrowed
from lorashrink.results.shrinking import ConversionReport, Converted, Failure, Verbatim
from lorashrink.shrinking.layout import FP8, FP16
from lorashrink.shrinking.outputs import (
    base_files,
    becomes_folder,
    check_outputs,
    clear_outputs,
    folders_of_outputs,
    name_outputs,
    shown,
)

if TYPE_CHECKING:
    from torch import Tensor


def convert(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    naming: str | None = None,
    dtype: str = "same",
    output: str | Path | None = None,
    recursive: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write adapters in another naming ("kohya", "diffusers", "comfy", "peft") or dtype (fp8, fp16, bf16 or fp32).

    New names come from the base, a checkpoint or a norm table. With an unchanged dtype factors keep their bits, except
    where a scale can be said nowhere else; `Converted.exact` tells. "peft" writes a folder, the others a file. fp8 is
    for the factors of LoRA alone: alphas become 1 or go into them, names those under which programs load fp8.

    An input that fails is in `ConversionReport.failed`. Raises UsageError, OutputError or InputError if nothing can be
    done at all.
    """
    if dtype in MIXTURES:
        raise UsageError(f"dtype: {dtype} chooses fp16 where nothing is dropped, as here. Use -t fp8 or -t fp16.")
    if dtype not in OUTPUT_DTYPES:
        raise UsageError(f"dtype: '{dtype}' is not one of {', '.join(OUTPUT_DTYPES)}.")
    check_naming(naming, base)
    kind = OUTPUT_DTYPES[dtype]
    if naming is None and kind is None:
        raise UsageError("convert: nothing to do. Name a --naming, a --dtype, or both.")
    sources = find_adapters(adapters, recursive=recursive)
    label = "_".join(filter(None, [naming, dtype if kind else None]))
    folders = folders_of_outputs(sources, output)
    targets = {
        source: name_outputs(
            source,
            [(label, None)],
            folders[source],
            sources=len(sources),
            folder=becomes_folder(source, naming),
        )
        for source in sources
    }
    check_outputs(targets, [*sources, *base_files(base)], force=force)
    clear_outputs([path for outputs in targets.values() for path in outputs])
    results: list[Converted] = []
    errors: dict[Path, LorashrinkError] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(open_base(base)) if base is not None else None
        for done, (source, outputs) in enumerate(targets.items(), 1):
            with boundary(source, partial(errors.__setitem__, source)):
                results.append(_convert_file(source, next(iter(outputs)), opened, naming, dtype))
            if progress:
                progress("converting", done, len(targets))
    failed = tuple(Failure(str(source), str(error)) for source, error in errors.items())
    return ConversionReport(__version__, opened.info if opened else None, tuple(results), failed)


def _convert_file(source: Path, path: Path, base: Base | None, naming: str | None, dtype: str) -> Converted:
    kind, family = OUTPUT_DTYPES[dtype], base.family.name if base else None
    losses: dict[str, float] = {}
    warnings: list[str] = []
    with open_adapter(source) as original:
        new, naming = _renamed(original, naming, base, kind)
        adapter = new.adapter
        store: TensorStore
        if kind == FP8:
            store, warnings = in_8_bits(adapter, family or adapter_family(original), losses)
        else:
            store = _cast_store(adapter, kind, losses) if kind else adapter.store
        config = {path.parent / peft.CONFIG_FILE: peft.to_file(adapter.settings)} if adapter.as_folder else {}
        save_tensors(path, {}, store.metadata, source=store, companions=config)
        same_bits = all(info.dtype == adapter.store.tensors[key].dtype for key, info in store.tensors.items())
        with open_adapter(shown(path)) as written:
            loaders = loads(written, family)
    warnings += loss_warnings(losses, FP16 if kind == FP8 else str(kind))
    return Converted(
        source=str(source),
        output=str(shown(path)),
        naming=naming,
        dtype=dtype,
        bytes_before=adapter.store.nbytes,
        bytes_after=path.stat().st_size,
        layers=len(adapter),
        exact=new.exact and same_bits and kind != FP8,
        kept=tuple(Verbatim(key, reason) for key, reason in new.kept.items()),
        warnings=tuple(warnings),
        loads=loaders,
    )


def _renamed(adapter: Adapter, naming: str | None, base: Base | None, kind: str | None) -> tuple[Renamed, str | None]:
    """(the adapter in the naming, or in one in which 8-bit factors load, that naming)."""

    def named(name: str | None, dtype: str | None) -> Renamed:
        return renamed(adapter, name, base, dtype) if name and base else Renamed(adapter, {}, True)

    if kind != FP8:
        return named(naming, kind), naming
    new = named(naming, None)
    loading = naming_for_8_bits(new.adapter, base)
    return (named(loading, None), loading) if loading else (new, naming)


def _cast_store(adapter: Adapter, kind: str, losses: dict[str, float]) -> TensorStore:
    """The adapter's tensors with floats in another dtype; alphas stay F32, so that they keep their values.

    The two factors of a layer are balanced where the dtype would lose more of one of them than rounding does.
    losses: gets key -> share of its norm that is lost, of tensors that lose a noteworthy part.
    """
    store = adapter.store
    alphas = {key for layer in adapter.layers for role, key in layer.keys.items() if role == "alpha"}
    pairs = {
        layer.keys[role]: (layer.keys["up"], layer.keys["down"])
        for layer in adapter.layers
        for role in ("up", "down")
        if {"up", "down"} <= layer.keys.keys()
    }

    def read(key: str) -> Tensor:
        tensor = _wide(store, key)
        if key in pairs:
            up, down = pairs[key]
            if kind not in (store.tensors[up].dtype, store.tensors[down].dtype):
                factors = balanced(_wide(store, up), _wide(store, down), kind)
                tensor = factors[key == down]
        return narrowed(tensor, kind, key, store.path, losses)

    tensors = {}
    for key, info in store.tensors.items():
        if key in alphas or info.dtype not in FLOATS or info.dtype == kind:
            tensors[key] = (info, partial(store.read, key))
        else:
            tensors[key] = (tensor_info(kind, info.shape), partial(read, key))
    return ComputedStore(store.path, tensors, store.metadata, store.files, store.headers)


def _wide(store: TensorStore, key: str) -> Tensor:
    """A tensor in a dtype that has room for powers of two."""
    tensor = store.read(key)
    return tensor.double() if tensor.element_size() > 4 else tensor.float()
