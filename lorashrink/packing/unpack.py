"""`unpack`: ordinary files of packed ones, with the same bits everywhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, open_adapter, peft
from lorashrink.errors import InputError, LorashrinkError, Progress, UsageError, boundary
from lorashrink.files.packed import PackedStore, coder
from lorashrink.files.store import FACTOR_DTYPES, OUTPUT_DTYPES, ComputedStore, cast, tensor_info
from lorashrink.files.writing import save_tensors
from lorashrink.linking.inputs import find_adapters
from lorashrink.results.packing import Unpacked, UnpackReport
from lorashrink.results.shrinking import Failure
from lorashrink.shrinking.outputs import check_outputs, clear_outputs, folders_of_outputs, name_outputs, shown

if TYPE_CHECKING:
    from torch import Tensor


def unpack(
    packed: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    dtype: str = "fp16",
    recursive: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> UnpackReport:
    """Write the ordinary files that packed files stand for.

    output: a folder, or a file name if there is one file. dtype: "fp16" (default), "bf16" or "fp32", which are rounded
    from fp16. The contents are compared with the hash in the packed file.

    An input that fails is in `UnpackReport.failed`. Raises UsageError, OutputError or InputError if nothing can be done
    at all.
    """
    kind = OUTPUT_DTYPES.get(dtype, "")
    if kind not in FACTOR_DTYPES:
        raise UsageError(f"dtype: '{dtype}' is not one of fp16, bf16, fp32.")
    coder()
    sources = find_adapters(packed, recursive=recursive)
    folders = folders_of_outputs(sources, output)
    targets = {}
    errors: dict[Path, LorashrinkError] = {}
    for source in sources:
        with boundary(source, partial(errors.__setitem__, source)), _open(source) as adapter:
            assert isinstance(adapter.store, PackedStore)
            targets[source] = name_outputs(
                source, [("unpacked", None)], folders[source], sources=len(sources), folder=adapter.store.as_folder
            )
    check_outputs(targets, sources, force=force)
    clear_outputs([path for outputs in targets.values() for path in outputs])
    results: list[Unpacked] = []
    for done, (source, outputs) in enumerate(targets.items(), 1):
        with boundary(source, partial(errors.__setitem__, source)), _open(source) as adapter:
            results.append(_unpack_file(adapter, next(iter(outputs)), kind))
        if progress:
            progress("unpacking", done, len(targets))
    failed = tuple(Failure(str(source), str(error)) for source, error in errors.items())
    return UnpackReport(__version__, "unpack", tuple(results), failed)


def _open(path: Path) -> Adapter:
    """Raises InputError for a file that is not packed."""
    adapter = open_adapter(path)
    if not isinstance(adapter.store, PackedStore):
        adapter.close()
        raise InputError(f"{path}: is not packed. To change its names or dtype use: lorashrink convert")
    return adapter


def _unpack_file(adapter: Adapter, path: Path, kind: str) -> Unpacked:
    started = time.perf_counter()
    store = adapter.store
    assert isinstance(store, PackedStore)
    store.check_contents()
    factors = {key for key, info in store.index.infos() if info.dtype == "F16"}

    def cast_read(key: str, dtype: str) -> Tensor:
        return cast(store.read(key), dtype)

    tensors = {}
    for key, info in store.tensors.items():
        dtype = kind if key in factors else info.dtype
        tensors[key] = (tensor_info(dtype, info.shape), partial(cast_read, key, dtype))
    source = ComputedStore(store.path, tensors, store.metadata, store.files)
    config = {path.parent / peft.CONFIG_FILE: peft.to_file(adapter.settings)} if store.as_folder else {}
    save_tensors(path, {}, store.metadata, source=source, companions=config)
    return Unpacked(
        source=str(adapter.path),
        output=str(shown(path)),
        dtype=kind,
        bytes_before=adapter.path.stat().st_size,
        bytes_after=path.stat().st_size,
        layers=len(adapter),
        seconds=time.perf_counter() - started,
        sha256=store.sha256,
    )
