"""Outputs of an earlier, equal run that are kept instead of being made again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, peft
from lorashrink.errors import DamagedFile, OutputError
from lorashrink.files.disk import sha256_file
from lorashrink.files.hashes import with_hashes, with_placeholders
from lorashrink.files.header import Arrangement, read_header
from lorashrink.files.metadata_keys import ENERGY, ERROR
from lorashrink.files.store import COPY_CHUNK, dtype_word
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.quality import anchor_of, predicted_db
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.journal import Stamp, stamps
from lorashrink.shrinking.ledger import Done, Ledger, Trace, origin_of
from lorashrink.shrinking.metadata import Origin
from lorashrink.shrinking.outputs import shown
from lorashrink.shrinking.session import AdapterBase, Session, log
from lorashrink.sums.summing import contents_sha256


@dataclass(frozen=True, eq=False)
class OpenSource:
    """An open adapter, and what decides the bytes of its outputs beside the recipe."""

    path: Path
    adapter: Adapter
    against: AdapterBase
    session: Session
    variant: str  # see `source_variant`
    stamps: tuple[Stamp, ...]  # of its files, from before they were read
    sha256: Future[str]  # of its contents

    @classmethod
    def open(cls, path: Path, against: AdapterBase, session: Session, *, load: bool = True) -> OpenSource:
        """Open the adapter, `load` it into memory if there is room, and begin to hash it in the pool."""
        adapter = session.job.opener(path, against.base)
        try:
            folders = [file.parent for file in adapter.store.files if file.name in peft.WEIGHTS_FILES]
            configs = [folder / peft.CONFIG_FILE for folder in folders if peft.is_folder(folder)]
            before = stamps([*adapter.store.files, *configs])
            if load:
                adapter.store.load()
            sha256 = session.pool.submit(contents_sha256, adapter)
            return cls(path, adapter, against, session, source_variant(path, session), before, sha256)
        except BaseException:
            adapter.close()
            raise

    def close(self) -> None:
        """Close the adapter's files."""
        self.adapter.close()

    @property
    def depends_on_base(self) -> bool:
        """Whether its outputs do, whatever the recipe: by other names, and by layers that are no LoRA."""
        return bool(self.session.job.variant) or not all(layer.family.written for layer in self.adapter.layers)

    def origin(self, recipe: Recipe) -> Origin:
        """The origin of this recipe's output; waits for the hash."""
        return _origin(self.sha256.result(), recipe, self.against, self.depends_on_base, self.variant)

    def trace(self, outputs: Mapping[Path, Recipe]) -> Trace:
        """The trace that lets a later run keep these outputs."""
        origins = {path: self.origin(recipe) for path, recipe in outputs.items()}
        return Trace(origins, self.depends_on_base, self.stamps)

    def existing_results(self, outputs: Mapping[Path, Recipe]) -> dict[Path, FileResult]:
        """Results that those of these outputs stand for which exist in good order.

        Raises OutputError if one was made from something else, and DamagedFile if it never was an output.
        """
        results = {}
        for output, recipe in outputs.items():
            if os.path.exists(output):
                try:
                    results[output] = self.existing_result(output, recipe)
                except DamagedFile as error:
                    with open(output, "rb") as handle:
                        start = handle.read(9)
                    # It begins as safetensors do, or with the zeros that a failing disk leaves; empty counts.
                    if any(start) and start[4:] != bytes(4) + b"{":
                        raise
                    log.warning("%s It is made again.", error)
        return results

    def existing_result(self, output: Path, recipe: Recipe) -> FileResult:
        """The result that an output stands for. Raises DamagedFile, or OutputError if it was made otherwise."""
        tensors, entries, header = read_header(output)
        if not self.origin(recipe).made(entries):
            raise OutputError(
                f"{output}: exists, but was made from another source, base, recipe, options or version. "
                "Use --force to replace it, or choose another place with -o."
            )
        if output.name == peft.WEIGHTS_FILE and not os.path.isfile(output.parent / peft.CONFIG_FILE):
            raise DamagedFile(f"{output}: the {peft.CONFIG_FILE} beside it is gone.")
        end, size = 8 + len(header) + sum(info.nbytes for info in tensors.values()), os.path.getsize(output)
        if end != size:  # programs refuse a file with bytes that belong to no tensor
            raise DamagedFile(f"{output}: its header promises {end} bytes, the file has {size}.")
        if self.session.options.verify:
            data = _data_behind(output, 8 + len(header))
            if with_hashes(with_placeholders(entries), Arrangement(tensors), data) != entries:
                raise DamagedFile(f"{output}: its contents are not those whose hash is in its header.")
        energy = float(entries[ENERGY])
        return _skipped_result(
            self.path,
            output,
            recipe,
            base=own_base(self.against, self.session),
            threshold=json.loads(entries["resize_params"])["threshold"],
            bytes_before=self.adapter.store.nbytes,
            bytes_after=output.stat().st_size,
            relative_error=float(entries[ERROR]) if recipe.caps else (1 - energy) ** 0.5,
            dtype=dtype_word({info.dtype for info in tensors.values() if len(info.shape) > 1}),
        )


def _data_behind(path: Path, start: int) -> Iterator[bytes]:
    with open(path, "rb", buffering=0) as handle:
        handle.seek(start)
        while chunk := handle.read(COPY_CHUNK):
            yield chunk


def _skipped_result(source: Path, output: Path, recipe: Recipe, **facts: Any) -> FileResult:
    return FileResult(
        source=str(source),
        output=str(shown(output)),
        recipe=str(recipe),
        seconds=0.0,
        skipped=True,
        kept_energy=float(read_header(output)[1][ENERGY]) if recipe.caps else None,
        **facts,
    )


def recorded_results(
    source: Path, outputs: Mapping[Path, Recipe], against: AdapterBase, session: Session, ledger: Ledger
) -> dict[Path, FileResult]:
    """Results of the outputs that the journal knows to be equal; the adapter is not read.

    None if outputs are to be verified, which takes reading them.
    """
    results: dict[Path, FileResult] = {}
    if session.options.verify:
        return results
    for output, recipe in outputs.items():
        entry = ledger.recorded(output, source)
        if entry is None:
            continue
        variant = source_variant(source, session)
        expected = _origin(entry.source_sha256, recipe, against, entry.depends_on_base, variant)
        if expected == origin_of(entry):
            results[output] = _skipped_result(
                source,
                output,
                recipe,
                base=own_base(against, session),
                threshold=entry.threshold,
                bytes_before=entry.bytes_before,
                bytes_after=entry.bytes_after,
                relative_error=entry.relative_error,
                distortion=entry.distortion,
                predicted_db=None
                if entry.distortion is None
                else predicted_db(entry.distortion, anchor_of(session.options.anchor)),
                dtype=entry.dtype,
            )
    return results


def existing_results(source: Path, outputs: Mapping[Path, Recipe], session: Session, ledger: Ledger) -> Done | None:
    """Results of the outputs that an equal run has written, None without such outputs.

    Raises LorashrinkError if one was made from something else.
    """
    against = session.base_of(source)
    recorded = recorded_results(source, outputs, against, session, ledger)
    rest = {path: recipe for path, recipe in outputs.items() if path not in recorded and os.path.exists(path)}
    if not rest:
        return Done(source, tuple(recorded.values())) if recorded else None
    with closing(OpenSource.open(source, against, session)) as opened:
        results = opened.existing_results(rest)
        trace = opened.trace({path: rest[path] for path in results})
        return Done(source, (*recorded.values(), *results.values()), trace)


def own_base(against: AdapterBase, session: Session) -> str | None:
    """The base that a result names; None in runs with one base or none."""
    return str(against.base.path) if session.job.bases and against.base else None


def source_variant(source: Path, session: Session) -> str:
    """The session's variant, and the settings beside the tensors of a PEFT folder."""
    settings = f",settings={sha256_file(source / peft.CONFIG_FILE)[:16]}" if peft.is_folder(source) else ""
    return f"{session.variant}{settings}"


def _origin(sha256: str, recipe: Recipe, against: AdapterBase, depends_on_base: bool, variant: str) -> Origin:
    base = against.fingerprint if recipe.needs_base or depends_on_base else ""
    return Origin(sha256, str(recipe), base, variant, __version__)
