"""The same adapter in another naming, container or dtype; nothing is shrunk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, open_adapter, peft
from lorashrink.bases import open_base
from lorashrink.errors import LorashrinkError, NonFinite, Progress, UsageError
from lorashrink.files.store import FLOATS, OUTPUT_DTYPES, ComputedStore, TensorStore, cast, tensor_info
from lorashrink.files.writing import save_tensors
from lorashrink.linking.inputs import find_adapters
from lorashrink.linking.loaders import loads
from lorashrink.linking.renaming import Renamed, check_naming, renamed
from lorashrink.results.shrinking import ConversionReport, Converted, Failure, Verbatim
from lorashrink.shrinking.outputs import base_files, becomes_folder, check_outputs, name_outputs, shown

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
    """Write adapters in another naming ("kohya", "diffusers", "comfy", "peft") or dtype ("fp16", "bf16", "fp32").

    New names come from the base, a checkpoint or a norm table. With an unchanged dtype factors keep their bits, except
    where a scale can be said nowhere else; `Converted.exact` tells. "peft" writes a folder, the others a file.

    An input that fails is in `ConversionReport.failed`. Raises UsageError, OutputError or InputError if nothing can be
    done at all.
    """
    if dtype not in OUTPUT_DTYPES:
        raise UsageError(f"dtype: '{dtype}' is not one of {', '.join(OUTPUT_DTYPES)}.")
    check_naming(naming, base)
    kind = OUTPUT_DTYPES[dtype]
    if naming is None and kind is None:
        raise UsageError("convert: nothing to do. Name a --naming, a --dtype, or both.")
    sources = find_adapters([adapters] if isinstance(adapters, (str, Path)) else adapters, recursive=recursive)
    label = "_".join(filter(None, [naming, dtype if kind else None]))
    targets = {
        source: name_outputs(
            source,
            [(label, None)],
            output,
            sources=len(sources),
            folder=becomes_folder(source, naming),
        )
        for source in sources
    }
    check_outputs(targets, [*sources, *base_files(base)], force=force)
    results, failed = [], []
    with ExitStack() as stack:
        opened = stack.enter_context(open_base(base)) if base is not None else None
        for done, (source, outputs) in enumerate(targets.items(), 1):
            try:
                with open_adapter(source) as adapter:
                    new = renamed(adapter, naming, opened, kind) if naming and opened else Renamed(adapter, {}, True)
                    result = _write(source, new, next(iter(outputs)), naming, dtype, kind)
                with open_adapter(result.output) as written:
                    results.append(replace(result, loads=loads(written, opened.family.name if opened else None)))
            except LorashrinkError as error:
                failed.append(Failure(str(source), str(error)))
            if progress:
                progress("converting", done, len(targets))
    return ConversionReport(__version__, opened.info if opened else None, tuple(results), tuple(failed))


def _write(source: Path, new: Renamed, path: Path, naming: str | None, dtype: str, kind: str | None) -> Converted:
    adapter = new.adapter
    store = _cast_store(adapter, kind) if kind else adapter.store
    config = {path.parent / peft.CONFIG_FILE: peft.to_file(adapter.settings)} if adapter.as_folder else {}
    save_tensors(path, {}, store.metadata, source=store, companions=config)
    same = all(info.dtype == adapter.store.tensors[key].dtype for key, info in store.tensors.items())
    return Converted(
        source=str(source),
        output=str(shown(path)),
        naming=naming,
        dtype=dtype,
        bytes_before=sum(file.stat().st_size for file in adapter.store.files),
        bytes_after=path.stat().st_size,
        layers=len(adapter),
        exact=new.exact and same,
        kept=tuple(Verbatim(key, reason) for key, reason in new.kept.items()),
    )


def _cast_store(adapter: Adapter, kind: str) -> TensorStore:
    """The adapter's tensors with floats in another dtype; alphas stay F32, so that they keep their values."""
    store = adapter.store
    alphas = {key for layer in adapter.layers for role, key in layer.keys.items() if role == "alpha"}
    tensors = {}
    for key, info in store.tensors.items():
        if key in alphas or info.dtype not in FLOATS or info.dtype == kind:
            tensors[key] = (info, partial(store.read, key))
        else:
            tensors[key] = (tensor_info(kind, info.shape), partial(_cast, store, key, kind))
    return ComputedStore(store.path, tensors, store.metadata, store.files, store.headers)


def _cast(store: TensorStore, key: str, kind: str) -> Tensor:
    import torch

    tensor = store.read(key)
    new = cast(tensor.float() if tensor.element_size() < 2 else tensor, kind)
    if not torch.isfinite(new).all() and torch.isfinite(tensor.float()).all():
        raise NonFinite(f"{store.path}: {key} has numbers that {kind} cannot hold. Use -t bf16 or -t fp32.")
    return new
