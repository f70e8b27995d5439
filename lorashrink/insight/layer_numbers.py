"""What the layers of an adapter add to the base, in numbers: norms, spectra, and what is unusual about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lorashrink.adapters import Adapter, Layer
from lorashrink.bases import Base, Views, views_id
from lorashrink.bases.norms import BaseNorms, Norms
from lorashrink.engine.devices import pick_device, worker_pool
from lorashrink.engine.spectrum import Item, Spectrum, decompose
from lorashrink.errors import Progress
from lorashrink.insight.health import SPIKE

ENERGIES = ("0.9", "0.95", "0.99")

# Of an adapter and the base weights that its layers change: the measured fields of each layer's row.
Measure = Callable[[Adapter, Sequence[Views]], Sequence[Mapping[str, object]]]


@contextmanager
def measuring(
    files: Sequence[Path],
    base: Base | None,
    singular_values: bool,
    device: str,
    jobs: int | None,
    progress: Progress | None,
) -> Iterator[Measure]:
    """A function that measures one adapter after the other, by the same threads and with the same norms of the base.

    files: all that are read, which decides about the device.
    """
    norms = BaseNorms(base) if base else None
    device = pick_device(device, [*files, *([base.path] if base else [])])
    with worker_pool(jobs) as pool:

        def measure(adapter: Adapter, views: Sequence[Views]) -> Sequence[Mapping[str, object]]:
            present = [layer for layer in adapter.layers if layer.bound]
            items = [Item(partial(getattr, layer, "delta"), layer.width) for layer in present]
            spectra: dict[str, Spectrum] = {}
            for layer, future in zip(present, decompose(items, pool, device=device), strict=True):
                spectra[layer.name] = future.result()
                if progress:
                    progress(f"decomposing {adapter.path.name}", len(spectra), len(items))
            base_norms: Norms = {}
            if norms:
                report = partial(progress, "norms of the base") if progress else None
                weights = list(filter(None, views))
                base_norms = norms.look_up(weights, ("fro", "spn"), pool=pool, device=device, progress=report)
            widest = max((layer.rank for layer in adapter.layers), default=0)
            rows: list[Mapping[str, object]] = []
            for layer, layer_views in zip(adapter.layers, views, strict=True):
                if layer.name in spectra:
                    weight_norms = base_norms.get(views_id(layer_views), {}) if layer_views else {}
                    rows.append(numbers_of(layer, spectra[layer.name], weight_norms, singular_values, widest))
                else:
                    rows.append({"alpha": layer.alpha, "flags": ("needs_base",)})
            return rows

        yield measure


def numbers_of(
    layer: Layer, spectrum: Spectrum, norms: Mapping[str, float], singular_values: bool, widest: int
) -> dict[str, object]:
    """The fields of a layer's row; `norms` are of the base weight, `widest` is the largest rank of the file."""
    facts: dict[str, object] = {"alpha": layer.alpha, "scale": layer.scale, "flags": flags_of(layer, spectrum, widest)}
    facts |= {"base_fro": norms.get("fro"), "base_spectral": norms.get("spn")}
    if not spectrum.finite:
        return facts
    sigma = spectrum.sigma.numpy()
    top = float(sigma[0])
    parts = sigma / (top or 1.0)  # an alpha of 1e-300 makes squares of σ itself 0
    energies = (parts**2).cumsum()
    total = math.sqrt(float(energies[-1]))
    fro = top * total
    facts |= {"fro": fro, "spectral": top}
    if singular_values:
        facts["singular_values"] = tuple(sigma.tolist())
    if top > 0:
        shares = (parts[parts > 0] / total) ** 2
        facts["stable_rank"] = total**2
        facts["effective_rank"] = math.exp(-sum(share * math.log(share) for share in shares.tolist()))
        facts["rank_for_energy"] = {
            share: int(energies.searchsorted(float(share) * energies[-1])) + 1 for share in ENERGIES
        }
    if norms:
        facts["fro_ratio"] = fro / norms["fro"] if norms["fro"] else None
        facts["spectral_ratio"] = top / norms["spn"] if norms["spn"] else None
    return facts


def flags_of(layer: Layer, spectrum: Spectrum, widest: int) -> tuple[str, ...]:
    """What is unusual about a layer; see `health`."""
    if not spectrum.finite:
        return ("nan",)
    sigma, alpha, scale = spectrum.sigma, layer.alpha, layer.scale
    # Programs may disagree about an alpha above every rank of the file, or one that is no whole number, if it scales
    # anything. An alpha above the layer's own rank is usual: layers that share one alpha have the largest rank for it.
    odd = alpha is not None and scale != 1 and (alpha > widest or (alpha != int(alpha) and scale > 0))
    tests = {
        "zero": spectrum.rank == 0,
        "padded_rank": 0 < spectrum.rank < min(layer.rank, layer.shape[0], math.prod(layer.shape[1:])),
        "spike": spectrum.rank > 1 and float(sigma[0]) > SPIKE * float(sigma[1]),
        "negative_alpha": alpha is not None and scale < 0,
        "zero_alpha": layer.off,
        "odd_alpha": odd,
    }
    return tuple(flag for flag, present in tests.items() if present)
