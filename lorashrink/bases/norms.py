"""Frobenius and spectral norms of base weights, computed once per base and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorashrink.bases import Base, Views, joined, open_base, table_bytes, views_id
from lorashrink.bases.views import views_shape
from lorashrink.engine.accelerators import computed
from lorashrink.engine.devices import core_device, pick_device, worker_pool
from lorashrink.engine.norms import frobenius, spectral_norms
from lorashrink.errors import NonFinite, NotABase, OutputError
from lorashrink.files.disk import check_output, user_cache, write_bytes

log = logging.getLogger(__name__)

# Part of the cache key: change it whenever the numbers may change.
ALGORITHM = 3

# A file changed this recently could change again within the resolution of its time stamps.
SETTLED_SECONDS = 2.0

# Bytes of weights that a GPU has at once, as float32; the iteration for spectral norms is as long for many as for one.
_DEVICE_BYTES = 1 << 29

Norms = dict[str, dict[str, float]]


class BaseNorms:
    """The norms of one base's weights: from its norm table, the user's cache, or the weights themselves."""

    def __init__(self, base: Base, *, cache: bool = True) -> None:
        self.base = base
        kept = cache and base.store is not None and base.kind != "memory"
        self._file = _cache_file(base) if kept else None
        if self._file:
            self._norms = _load(self._file)
        elif base.kind == "memory":  # no file names them, but the base may be used again
            self._norms = base.norms
        else:
            self._norms = {key: {**norms} for key, norms in base.norms.items()}

    def look_up(
        self,
        weights: Iterable[Views],
        names: Collection[str],
        *,
        pool: Executor | None = None,
        device: str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> Norms:
        """The norms `names` ("fro", "spn") of base weights, by `views_id`; what is missing is computed and cached.

        On a GPU weights of equal shape are computed together. Raises NonFinite if a weight holds NaN or infinity.
        """
        views = {views_id(weight): weight for weight in weights}
        missing = {key: [name for name in sorted(names) if name not in self._norms.get(key, {})] for key in views}
        missing = {key: absent for key, absent in missing.items() if absent}

        def spectral(weights: Sequence[Sequence[Tensor]], device: torch.device) -> list[float]:
            matrices = [joined([part.to(device) for part in parts]) for parts in weights]
            sigma: list[float] = spectral_norms(torch.stack(matrices)).tolist()
            return sigma

        def compute(batch: Sequence[str]) -> list[dict[str, float]]:
            """The norms of weights of equal shape, which are read once."""
            weights_parts = [self.base.parts(views[key]) for key in batch]
            values: list[dict[str, float]] = [{} for _ in batch]
            if "fro" in missing[batch[0]]:  # by this thread: moving a weight to a GPU takes longer
                for norms, parts in zip(values, weights_parts, strict=True):
                    norms["fro"] = math.hypot(*map(frobenius, parts))
            if "spn" in missing[batch[0]]:
                sigmas = computed(spectral, weights_parts, core_device(device))
                for norms, sigma in zip(values, sigmas, strict=True):
                    norms["spn"] = sigma
            return values

        batches = _batches(views, missing, core_device(device))
        results = map(compute, batches) if pool is None else pool.map(compute, batches)
        done = 0
        for batch, norms_of_batch in zip(batches, results, strict=True):
            for key, values in zip(batch, norms_of_batch, strict=True):
                if not all(map(math.isfinite, values.values())):
                    raise NonFinite(
                        f"{self.base.path}: the weight {key} contains NaN or infinity; use another copy of it."
                    )
                self._norms.setdefault(key, {}).update(values)
            done += len(batch)
            if progress:
                progress(done, len(missing))
        if missing and self._file:
            _save(self._file, self.base, self._norms)
        return {key: {name: self._norms[key][name] for name in names} for key in views}


def _batches(views: Mapping[str, Views], missing: Mapping[str, list[str]], device: torch.device) -> list[list[str]]:
    """Weights that are computed together: each alone on a CPU, those of equal shape and norms on a GPU."""
    if device.type == "cpu":
        return [[key] for key in missing]
    groups: dict[tuple[int, int, str], list[str]] = defaultdict(list)
    for key, names in missing.items():
        rows, *columns = views_shape(views[key])
        groups[rows, math.prod(columns), ",".join(names)].append(key)
    batches = []
    for (height, width, _), keys in groups.items():
        most = max(1, _DEVICE_BYTES // (4 * height * width))
        batches += [keys[start : start + most] for start in range(0, len(keys), most)]
    return batches


# --- cache --------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where norms are kept between runs; None where there is no such place."""
    folder = user_cache()
    return folder and folder / "norms"


def _cache_file(base: Base) -> Path | None:
    """A name that no other content can have: sampled contents, and the identity and times of every file."""
    assert base.store is not None
    folder = cache_folder()
    if folder is None:
        return None
    digest = hashlib.sha256(f"{ALGORITHM} {base.fingerprint}".encode())
    for path in base.store.files:
        stat = path.stat()
        digest.update(f" {stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode())
    return folder / f"{digest.hexdigest()[:40]}.json"


def _load(path: Path) -> Norms:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): {str(k): float(v) for k, v in value.items()} for key, value in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError):
        log.warning("%s: unreadable, norms are computed anew", path)
        return {}


def _save(path: Path, base: Base, norms: Norms) -> None:
    assert base.store is not None
    newest = max(max(stat.st_mtime, stat.st_ctime) for stat in (file.stat() for file in base.store.files))
    if time.time() - newest < SETTLED_SECONDS or path != _cache_file(base):
        return  # the base is being written: what was read may not be what will stay
    stored = _load(path)  # another process may have added to it
    merged = {key: {**stored.get(key, {}), **norms.get(key, {})} for key in {*stored, *norms}}
    try:
        write_bytes(path, json.dumps(merged, sort_keys=True).encode())
    except OutputError as error:
        log.warning("norms are not cached: %s", error)


# --- the command --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NormTable:
    """A written norm table."""

    path: str
    base: str
    family: str
    weights: int
    bytes: int


def norms(
    base: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> NormTable:
    """Write a norm table: a small file that stands in for the base wherever only norms are needed.

    It holds the Frobenius and the spectral norm of every weight that an adapter can change. Raises InputError,
    NotABase, NonFinite, and OutputError if `output` exists and `force` is not set.
    """
    path = Path(output)
    if path.suffix != ".json":
        raise OutputError(f"{output}: a norm table is a JSON file; give a name that ends in .json.")
    check_output(path, force=force, inputs=[Path(base)])
    device = pick_device(device, [base])
    with open_base(base) as opened, worker_pool(jobs) as pool:
        if opened.store is None:
            raise NotABase(f"{base}: is a norm table already.")
        report = partial(progress, "norms of the base") if progress else None
        values = BaseNorms(opened).look_up(opened.all_views, ("fro", "spn"), pool=pool, device=device, progress=report)
        data = table_bytes(opened, values)
        write_bytes(path, data)
        return NormTable(str(path), str(base), opened.family.name, len(values), len(data))
