"""Outputs of an earlier, equal run that are kept instead of being made again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, peft
from lorashrink.errors import OutputError
from lorashrink.files.disk import sha256_file
from lorashrink.files.header import read_header
from lorashrink.files.metadata_keys import ENERGY, ERROR
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.journal import Stamp, stamps
from lorashrink.shrinking.ledger import Done, Ledger, Trace, origin_of
from lorashrink.shrinking.metadata import Origin
from lorashrink.shrinking.outputs import shown
from lorashrink.shrinking.session import BaseContext, Session
from lorashrink.sums.summing import contents_sha256

# --- what is there already ----------------------------------------------------------------------


def already_there(source: Path, outputs: Mapping[Path, Recipe], session: Session, ledger: Ledger) -> Done | None:
    """What is known of outputs that an equal run has written, None if there are none.

    Raises LorashrinkError if one was made from something else.
    """
    against = session.against(source)
    known = recorded_results(source, outputs, against, session, ledger)
    rest = {path: recipe for path, recipe in outputs.items() if path not in known and os.path.exists(path)}
    if not rest:
        return Done(source, tuple(known.values())) if known else None
    with session.how.opener(source, against.base) as adapter:
        before = stamps(adapter_files(adapter))
        identity = Identity.of(source, adapter, against, session)
        found = {
            path: existing_result(path, source, adapter, recipe, identity, own_base(against, session))
            for path, recipe in rest.items()
        }
    results = (*known.values(), *found.values())
    return Done(source, results, identity.trace({path: rest[path] for path in found}, before))


@dataclass(frozen=True, eq=False)
class Identity:
    """What decides the bytes of an adapter's outputs, but for the recipe."""

    source_hash: Future[str]
    fingerprint: str  # of the base, "" without one
    depends_on_base: bool  # whatever the recipe
    options: str

    @classmethod
    def of(cls, source: Path, adapter: Adapter, against: BaseContext, session: Session) -> Identity:
        # By other names, and by layers that are no LoRA.
        depends = bool(session.how.options) or not all(layer.family.written for layer in adapter.layers)
        hashed = session.pool.submit(contents_sha256, adapter)
        return cls(hashed, _fingerprint(against), depends, options_text(source, session))

    def origin(self, recipe: Recipe) -> Origin:
        return _origin(self.source_hash.result(), recipe, self.fingerprint, self.depends_on_base, self.options)

    def trace(self, outputs: Mapping[Path, Recipe], before: tuple[Stamp, ...]) -> Trace:
        origins = {path: self.origin(recipe) for path, recipe in outputs.items()}
        return Trace(origins, self.depends_on_base, before)


def _fingerprint(against: BaseContext) -> str:
    return against.base.fingerprint if against.base else ""


def options_text(source: Path, session: Session) -> str:
    """The session's, and the file beside the tensors of a PEFT folder."""
    settings = f",settings={sha256_file(source / peft.CONFIG_FILE)[:16]}" if peft.is_folder(source) else ""
    return f"{session.options}{settings}"


def _origin(source_hash: str, recipe: Recipe, fingerprint: str, depends_on_base: bool, options: str) -> Origin:
    base = fingerprint if recipe.needs_base or depends_on_base else ""
    return Origin(source_hash, str(recipe), base, options, __version__)


def adapter_files(adapter: Adapter) -> list[Path]:
    """All that was read of an adapter."""
    folders = [path.parent for path in adapter.store.files if path.name in peft.WEIGHTS_FILES]
    return [*adapter.store.files, *(folder / peft.CONFIG_FILE for folder in folders if peft.is_folder(folder))]


def recorded_results(
    source: Path, outputs: Mapping[Path, Recipe], against: BaseContext, session: Session, ledger: Ledger
) -> dict[Path, FileResult]:
    """Results of outputs that the journal knows to be equal; no file is read."""
    found = {}
    for path, recipe in outputs.items():
        entry = ledger.known(path, source)
        if entry is None:
            continue
        options = options_text(source, session)
        expected = _origin(entry.source_sha256, recipe, _fingerprint(against), entry.depends_on_base, options)
        if expected == origin_of(entry):
            found[path] = FileResult(
                source=str(source),
                output=str(shown(path)),
                recipe=str(recipe),
                threshold=entry.threshold,
                bytes_before=entry.bytes_before,
                bytes_after=entry.bytes_after,
                relative_error=entry.relative_error,
                seconds=0.0,
                skipped=True,
                base=own_base(against, session),
                kept_energy=float(read_header(path)[1][ENERGY]) if recipe.caps else None,
            )
    return found


def own_base(against: BaseContext, session: Session) -> str | None:
    """What reports say of the base of one adapter, where there are several."""
    return str(against.base.path) if session.how.bases and against.base else None


def existing_result(
    path: Path, source: Path, adapter: Adapter, recipe: Recipe, identity: Identity, base: str | None
) -> FileResult:
    """The result that an output which is already there stands for."""
    entries = read_header(path)[1]
    if not identity.origin(recipe).made(entries):
        raise OutputError(
            f"{path}: exists, but was made from another source, base, recipe, options or version. "
            "Use --force to replace it, or choose another place with -o."
        )
    return FileResult(
        source=str(source),
        output=str(shown(path)),
        recipe=str(recipe),
        threshold=json.loads(entries["resize_params"])["threshold"],
        bytes_before=sum(each.stat().st_size for each in adapter.store.files),
        bytes_after=path.stat().st_size,
        relative_error=float(entries[ERROR]) if recipe.caps else (1 - float(entries[ENERGY])) ** 0.5,
        seconds=0.0,
        skipped=True,
        base=base,
        kept_energy=float(entries[ENERGY]) if recipe.caps else None,
    )
