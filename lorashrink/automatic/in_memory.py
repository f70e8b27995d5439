"""`shrink` of an adapter in memory: its tensors come out, and a model gets them in place of the old ones."""

from __future__ import annotations

from dataclasses import replace

from lorashrink._version import __version__
from lorashrink.adapters import Tensors, open_adapter
from lorashrink.automatic.methods import Methods
from lorashrink.automatic.request import Request, left_alone
from lorashrink.errors import Progress
from lorashrink.files.metadata_keys import RECIPE, SOURCE
from lorashrink.results.automatic import ShrinkReport, Shrunk
from lorashrink.shrinking.in_memory import put_back
from lorashrink.shrinking.prepared import prepare


def shrink_in_memory(
    held: Tensors,
    request: Request,
    methods: Methods,
    *,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Shrink an adapter in memory by the best method at hand. Raises as `prepare` and `Prepared.shrink`."""
    if {RECIPE, SOURCE} <= held.metadata.keys():
        with open_adapter(held) as adapter:
            result = left_alone(str(held), adapter.store.nbytes)
        return ShrinkReport(__version__, (_unchanged(result, held),), ())
    with methods:
        methods.check()
        method = methods.of(held)
        prepared = prepare(
            held, base=method.base, calibration=method.calibration, device=device, jobs=jobs, progress=progress
        )
        # Models do not compute with 8-bit floats: these would cost quality and save nothing.
        dtype = "fp16" if held.model is not None and request.dtype == "auto" else request.dtype
        smaller = prepared.shrink(request.recipe(method), dtype=dtype)
    result = request.result(str(held), smaller, method)
    if result.skipped or smaller.state_dict is None:
        result = _unchanged(result, held)
    else:
        result = replace(result, state_dict=smaller.state_dict, metadata=smaller.metadata)
        if held.model is not None:
            put_back(held, smaller.state_dict, smaller.settings)
    note = request.note(method)
    return ShrinkReport(__version__, (result,), (), notes=(note,) if note else ())


def _unchanged(result: Shrunk, held: Tensors) -> Shrunk:
    return replace(result, state_dict=held.tensors, metadata=held.metadata)
