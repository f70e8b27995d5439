"""A packed file that is complete but for its name."""

from __future__ import annotations

import itertools
import json
import math
import os.path
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lorashrink.adapters import peft
from lorashrink.engine.spectrum import truncate
from lorashrink.errors import OutputError
from lorashrink.files.header import Arrangement
from lorashrink.files.metadata_keys import PACKED
from lorashrink.files.packed import CODE, INDEX, VERSION, Form, contents_sha256
from lorashrink.files.store import ComputedStore, TensorInfo, info_of, memory_of, torch_dtype
from lorashrink.files.writing import save_tensors
from lorashrink.packing.allocation import Allocation
from lorashrink.packing.encoding import Encoder, Rounded, rounded
from lorashrink.recipes.choice import Selection
from lorashrink.shrinking.decomposed import Decomposed
from lorashrink.shrinking.plan import LayerPlan, Outline, Plan, plan
from lorashrink.shrinking.remarks import below_precision
from lorashrink.shrinking.write import NEGLIGIBLE

if TYPE_CHECKING:
    from torch import Tensor


# What float16 changes of a layer of ordinary numbers is far below this part of its norm.
_ROUNDING = 1e-2


@dataclass(frozen=True, eq=False)
class Draft:
    """A packed file that is complete but for its name."""

    plan: Plan
    allocation: Allocation
    own: Mapping[str, Tensor]  # index, code, and what is computed beside them
    copied: Sequence[str]  # keys of the adapter
    metadata: Mapping[str, str]
    sha256: str
    unpacked: int  # bytes
    numbers: int
    rounding: float  # Σ‖error of rounding‖²
    narrowed: Mapping[str, float]  # layer -> ‖error of float16‖ where that is most of the error of rounding

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        arrangement = Arrangement({**{key: info_of(tensor) for key, tensor in self.own.items()}, **self._infos})
        return len(arrangement.header(self.metadata)) + arrangement.nbytes

    def warnings(self) -> list[str]:
        """What is said of layers whose numbers do not fit float16. Raises OutputError where that is no small part."""
        for name, loss in self.narrowed.items():
            if loss > NEGLIGIBLE * self.plan.norm:
                raise OutputError(
                    f"{self.plan.adapter.path}: the numbers of layer {name} are too "
                    f"{'large' if math.isinf(loss) else 'small'} for fp16, which packed files unpack to. "
                    "Keep the file, or make it smaller with lorashrink resize -t bf16."
                )
        return below_precision(list(self.narrowed))

    @property
    def _infos(self) -> dict[str, TensorInfo]:
        return {key: self.plan.tensors[key] for key in self.copied}

    def write(self, path: Path) -> None:
        """Write the file. Raises OutputError."""
        store = self.plan.adapter.store
        copied = ComputedStore(
            store.path,
            {key: (info, partial(store.read, key)) for key, info in self._infos.items()},
            {},
            store.files,
        )
        save_tensors(path, self.own, self.metadata, source=copied)


def build_draft(
    decomposed: Decomposed, outlined: Outline, allocation: Allocation, *, pool: Executor, device: str, label: str
) -> Draft:
    """The packed file of this allocation, whose dimensions are those of `judging.dimensions_of`.

    pool: rounds the layers. label: what the metadata says of the request. Raises RecipeError if nothing is kept.
    """
    starts = np.cumsum([0, *(facts.rank for facts in outlined.facts)])
    kept = tuple(
        tuple(np.flatnonzero(allocation.kept[start:stop]).tolist()) for start, stop in itertools.pairwise(starts)
    )
    planned = plan(decomposed, outlined, Selection(kept, tuple(map(len, kept)), None))
    start_of = dict(zip(outlined.judged, starts, strict=False))
    encoder = Encoder()
    unpacked: dict[str, Tensor] = {}  # what is not copied from the adapter, as it will be unpacked
    beside: dict[str, Tensor] = {}  # of these what is not in the code
    rounding, narrowed = 0.0, dict[str, float]()

    def round_layer(index: int) -> tuple[Rounded, dict[str, Tensor], float]:
        """(the layer in whole numbers, the tensors that it unpacks to, its scale); the exact factors are let go."""
        layer = planned.written[index]
        written = WrittenLayer.of(planned, layer, device)
        classes = allocation.classes[start_of[index] + np.array(layer.kept)]
        result = rounded(written.prefix, written.form, written.matrices, classes)
        return result, written.unpacked(result), written.scale

    layers = zip(planned.written.values(), pool.map(round_layer, planned.written), strict=True)
    for layer, (result, tensors, scale) in layers:
        encoder.add(result)
        rounding += result.error / (scale**2 or 1.0)
        narrowing = math.sqrt(result.narrowing) / (abs(scale) or 1.0)
        if narrowing > _ROUNDING * layer.norm and 4 * result.narrowing > result.coding:
            narrowed[layer.layer.name] = narrowing
        unpacked |= tensors
        if "bias" in layer.form.keys:
            key = layer.form.keys["bias"]
            bias = layer.layer.store.read(key).float() * (layer.layer.scale * scale)
            beside[key] = bias.to(torch_dtype(planned.tensors[key].dtype))
    unpacked |= beside
    index_of_code, code = encoder.finish()

    def chunks(key: str) -> Iterator[memoryview]:
        return iter([_bytes_of(unpacked[key])]) if key in unpacked else planned.adapter.store.chunks(key)

    sha256 = contents_sha256(planned.arrangement, chunks)
    # of the file that it unpacks to; the packed file has one entry more
    ordinary = outlined.layout.packed_metadata([layer.width for layer in planned.layers], label)
    folder = planned.adapter.as_folder
    if folder:
        ordinary[peft.METADATA_KEY] = peft.to_metadata(planned.settings)
    index_bytes = index_of_code.to_bytes()
    return Draft(
        plan=planned,
        allocation=allocation,
        own={**beside, INDEX: _as_tensor(index_bytes), CODE: _as_tensor(code)},
        copied=[key for key in planned.tensors if key not in unpacked],
        metadata={**ordinary, PACKED: json.dumps({"version": VERSION, "sha256": sha256, "folder": folder})},
        sha256=sha256,
        unpacked=len(planned.arrangement.header(ordinary)) + planned.arrangement.nbytes,
        numbers=index_of_code.numbers,
        rounding=rounding,
        narrowed=narrowed,
    )


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memory_of(tensor.contiguous().reshape(-1).view(torch.uint8))


class WrittenLayer(NamedTuple):
    """A layer in the tensors that it is written as."""

    prefix: str  # of the names of its tensors
    form: Form
    matrices: list[Tensor]  # [k, numbers of a dimension] float32: of the outputs, then of the inputs
    constants: dict[str, Tensor]
    scale: float  # of their product, relative to the truncated ΔW

    @classmethod
    def of(cls, planned: Plan, layer: LayerPlan, device: str) -> WrittenLayer:
        """Truncate the layer as planned."""
        rank, scale = layer.width, planned.baked(layer)
        up, down = truncate(layer.layer.delta, layer.spectrum, layer.kept, scale=scale, device=device)
        _, family, keys, infos = layer.form
        assert family.written
        shapes, wider = family.written(infos, rank), family.written(infos, rank + 1)
        axes = {  # role -> axis of the dimensions, which is longer at a higher rank
            role: next(axis for axis, (old, new) in enumerate(zip(shape, wider[role], strict=True)) if old != new)
            for role, shape in shapes.items()
            if shape != wider[role]
        }
        tensors = family.pack(up, down) if family.pack else {"up": up, "down": down}
        factors = {role: tensors[role].reshape(shapes[role]).movedim(axis, 0) for role, axis in axes.items()}
        matrices = {role: factor.reshape(rank, -1) for role, factor in factors.items()}
        roles = sorted(axes, key=lambda role: not torch.equal(matrices[role], up.mT))  # that of the outputs first
        prefix = os.path.commonprefix([keys[role] for role in shapes])  # noqa: RUF071  # of any strings
        constants = {}
        for role in shapes.keys() - axes.keys():
            info = planned.tensors[keys[role]]
            constants[keys[role]] = torch.full(info.shape, float(planned.alpha)).to(torch_dtype(info.dtype))
        form = Form(
            factors=tuple(
                (keys[role].removeprefix(prefix), axes[role], tuple(factors[role].shape[1:])) for role in roles
            ),
            constants=tuple(
                (key.removeprefix(prefix), info_of(tensor).dtype, tuple(tensor.shape), _bytes_of(tensor).hex())
                for key, tensor in constants.items()
            ),
        )
        return cls(prefix, form, [matrices[role] for role in roles], constants, scale)

    def unpacked(self, result: Rounded) -> dict[str, Tensor]:
        """The tensors that it is unpacked to, by their names."""
        factors = zip(self.form.factors, result.values, strict=True)
        return self.constants | {
            self.prefix + end: factor.reshape(-1, *rest).movedim(0, axis).contiguous()
            for (end, axis, rest), factor in factors
        }
