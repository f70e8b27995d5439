"""One adapter on its way through the pipeline: decomposed, outlined and planned for each of its recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from lorashrink.adapters import Adapter, adapter_family
from lorashrink.bases import Views
from lorashrink.bases.norms import Norms
from lorashrink.calibration.statistics import LayerStatistics
from lorashrink.engine.devices import core_device
from lorashrink.engine.spectrum import Item, PendingSpectrum, Spectrum, decompose
from lorashrink.errors import InputError, RecipeError
from lorashrink.linking.matching import bind, match, misfits, part
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.decomposed import Decomposed, aligned
from lorashrink.shrinking.options import output_dtype
from lorashrink.shrinking.plan import Outline, Plan, outline, plan
from lorashrink.shrinking.reuse import OpenSource

_REPORT_EVERY = 16  # layers


@dataclass(eq=False)
class Work:
    """An open adapter with all that its recipes need."""

    source: OpenSource
    outputs: Mapping[Path, Recipe]  # to be made
    adapter: Adapter  # the source, with weights of the base where its layers need them
    views: Sequence[Views]  # per layer
    statistics: Sequence[LayerStatistics | None] = ()  # per layer, of calibrated recipes
    started: float = 0.0
    skipped: tuple[FileResult, ...] = ()  # results of outputs that are not made again
    traced: Mapping[Path, Recipe] = field(default_factory=dict)  # outputs of which the journal is to know
    misfits: Mapping[str, str] = field(default_factory=dict)  # see `linking.matching.misfits`
    spectra: Mapping[bool, Sequence[PendingSpectrum]] = field(default_factory=dict)  # calibrated or not -> per layer

    @classmethod
    def begin(cls, source: OpenSource, outputs: Mapping[Path, Recipe]) -> Work:
        """Match the adapter with its base and statistics, for these outputs."""
        base, session, adapter = source.against.base, source.session, source.adapter
        views = match(adapter, base) if base else [()] * len(adapter)
        differing = misfits(adapter, base) if base and not all(views) else {}
        adapter, views = part(bind(adapter, views, base), views, session.options.form)
        calibrated = any(recipe.calibrated for recipe in outputs.values())
        statistics = session.statistics.of_layers(adapter) if session.statistics and calibrated else ()
        return cls(source, outputs, adapter, views, statistics, misfits=differing)

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes of the outputs to be made."""
        return list(self.outputs.values())

    def decompose(self) -> None:
        """Begin to decompose the layers in the threads of the session, as they are, calibrated, or both."""
        session = self.source.session
        # Recipes that look at the base's weight keep other dimensions than the first ones.
        limits = [None if "weight" in recipe.needs else recipe.limit for recipe in self.recipes]
        bounds = [limit for limit in limits if limit is not None]
        limit = max(bounds) if len(bounds) == len(limits) else None
        items = {}
        for calibrated in sorted({recipe.calibrated for recipe in self.recipes}):
            statistics = self.statistics if calibrated else [None for _ in self.adapter.layers]
            items[calibrated] = [
                Item(partial(getattr, layer, "delta"), layer.width, of_layer.grams if of_layer else None, limit)
                for layer, of_layer in zip(self.adapter.layers, statistics, strict=True)
            ]
        flat = [item for layers in items.values() for item in layers]
        pending = iter(decompose(flat, session.pool, device=session.device, reading=self._reading))
        self.spectra = {calibrated: [next(pending) for _ in layers] for calibrated, layers in items.items()}

    def _reading(self, items: Sequence[int]) -> AbstractContextManager[None]:
        """While these items are read; there is one for each layer, or two."""
        return self.adapter.reading(item % len(self.adapter) for item in items)

    def decomposed(self) -> dict[bool, Decomposed]:
        """The adapter with spectra, base norms and alignments, calibrated or not; waits for the spectra."""
        report = self.source.session.reporter(f"decomposing {self.source.path.name}")
        pending = [(calibrated, future) for calibrated, futures in self.spectra.items() for future in futures]
        spectra: dict[bool, list[Spectrum]] = {calibrated: [] for calibrated in self.spectra}
        for count, (calibrated, future) in enumerate(pending, 1):
            spectra[calibrated].append(future.result())
            if report and (count % _REPORT_EVERY == 0 or count == len(pending)):
                report(count, len(pending))
        norms, alignments = self.base_norms(), self.alignments(spectra)
        return {
            calibrated: Decomposed(
                self.adapter,
                self.views,
                computed,
                norms,
                alignments,
                self.statistics if calibrated else (),
                self.misfits,
            )
            for calibrated, computed in spectra.items()
        }

    def base_norms(self) -> Norms:
        """The norms of the base weights that the recipes ask for, computed where they are not known."""
        if self.source.against.norms is None:
            return {}
        session = self.source.session
        names = {"fro"}.union(*(recipe.base_norms for recipe in self.recipes))
        matched = [views for views in self.views if views]
        report = session.reporter("norms of the base")
        return self.source.against.norms.look_up(
            matched, names, pool=session.pool, device=session.device, progress=report
        )

    def alignments(self, spectra: Mapping[bool, Sequence[Spectrum]]) -> list[Tensor | None]:
        """Per layer the alignment with its base weight, None where no recipe asks for it."""
        base, layers = self.source.against.base, range(len(self.adapter))
        if base is None or not any("weight" in recipe.needs for recipe in self.recipes):
            return [None for _ in layers]
        session = self.source.session
        measure = partial(aligned, self.adapter, self.views, spectra[False], base, core_device(session.device))
        return list(session.pool.map(measure, layers))

    def outline(self, decomposed: Mapping[bool, Decomposed], recipe: Recipe) -> Outline:
        """The outline of a recipe's output."""
        options, base = self.source.session.options, self.source.against.base
        return outline(
            decomposed[recipe.calibrated],
            recipe,
            dtype=output_dtype(options.dtype, [recipe]),
            unmapped=options.unmapped,
            form=options.form,
            family=base.family.name if base else adapter_family(self.adapter),
            origin=self.source.origin(recipe),
        )

    def plans(self) -> dict[Path, Plan]:
        """The plan of each output; waits for the spectra. Raises RecipeError or InputError."""
        session = self.source.session
        decomposed = self.decomposed()
        plans: dict[Path, Plan] = {}
        refusals: list[RecipeError] = []
        for path, recipe in self.outputs.items():
            try:
                outlined = self.outline(decomposed, recipe)
                plans[path] = plan(
                    decomposed[recipe.calibrated],
                    outlined,
                    session.selections.get(path),
                    anchor=session.options.anchor,
                )
            except RecipeError as error:
                refusals.append(error)
        if refusals and not (session.job.lenient and plans):
            raise refusals[0]
        copied = [item for planned in plans.values() for item in planned.verbatim.items()]
        if session.job.reader and copied:
            key, reason = copied[0]
            raise InputError(
                f"{self.source.path}: {key} stays as it is ({reason}), and {session.job.reader} cannot load it."
            )
        return plans
