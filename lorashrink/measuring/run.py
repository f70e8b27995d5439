"""`evidence`: curves of quality over size, on anyone's model and adapters.

Every file is made, drawn with, compared and thrown away; what was measured is a line of a journal in the output folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorashrink._version import __version__
from lorashrink.adapters import open_adapter
from lorashrink.automatic.methods import Methods
from lorashrink.automatic.prompts import Trial, trial_of
from lorashrink.calibration.calibrate import calibrate
from lorashrink.calibration.statistics import open_statistics
from lorashrink.errors import InputError, LorashrinkError, Progress, UsageError, boundary
from lorashrink.files.disk import write_bytes
from lorashrink.linking.inputs import find_adapters
from lorashrink.measuring.curves import Curve, quality_gap, rate_gap
from lorashrink.measuring.journal import Journal
from lorashrink.measuring.methods import Maker, Method, methods_of
from lorashrink.measuring.page import markdown_page, web_page
from lorashrink.measuring.workload import workload
from lorashrink.pictures.drawing import PIXELS_AT_ONCE, Shot, Studio, read_picture, shots_of
from lorashrink.pictures.likeness import comparisons, psnr
from lorashrink.pictures.pipelines import KINDS, check_model, check_packages, own_side
from lorashrink.results.automatic import FailedInput
from lorashrink.results.evidence import Difference, Evidence, Measured, Reached, Studied
from lorashrink.results.shown import plain
from lorashrink.shrinking.prepared import prepare
from lorashrink.shrinking.run import resize
from lorashrink.sums.summing import contents_sha256

if TYPE_CHECKING:
    from lorashrink.pictures.drawing import Picture

# Pictures, uint8 [height, width, 3], and their prompts -> name of what is judged -> a number for each picture.
Judge = Callable[[Sequence[Any], Sequence[str]], Mapping[str, Sequence[float]]]

QUALITY = 40.0  # dB

_ANCHOR = "fro_ckpt,bytes fp16"

# Between these a curve is measured, where no sizes are given; its ends lie beyond them.
_LOWEST, _HIGHEST = 30.0, 44.0  # dB
_STEP, _MOST_STEPS = math.sqrt(2), 12  # of its sizes
_LEAST_GAIN = 1.0  # dB of a step: where larger files are hardly better, rounding decides, and the curve ends

# Where a curve begins: about what 38 dB take, as a part of all dimensions in fp16.
_START = {"fp16": 0.25, "bf16": 0.25, "fp8": 0.09, "mixed": 0.11, "packed": 0.04}

_APART = 0.01  # the sizes of files of nearly one size, from one to the next

_SCALING_PROMPTS = 12

_DIGITS = 4  # of what is measured of a picture

_ALGORITHM = 1  # part of keys: change it whenever measurements may change

_PAGE, _MARKDOWN, _DATA, _FIGURES = "evidence.html", "evidence.md", "evidence.json", "figures"


def evidence(
    model: str | Path,
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    prompts: str | Path | None = None,
    methods: str | Sequence[str] = (),
    dtypes: Sequence[str] = (),
    sizes: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2, 3),
    draws: int = 1,
    steps: int | None = None,
    quality: float = QUALITY,
    against: str | None = None,
    calibration: str | Path | None = None,
    settings: str | Path | None = None,
    plan: bool = False,
    with_prompts: bool = False,
    judge: Judge | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evidence:
    """Measure how near pictures stay to those of the original adapters, for methods, dtypes and sizes.

    model, settings: as for `sweep`'s images. adapters: files, folders or globs.
    output: a folder for the page, its Markdown, the numbers as JSON, and the journal. A rerun with the same folder
        measures only what is missing; what belongs to other contents or prompts is not used.
    prompts: as in `shrink`, or a folder with a file NAME.txt for each adapter; default are those of the adapters'
        metadata. Those without the words that call an adapter are its plain prompts; by default they are the others
        without these words.
    methods: such as "calib,bytes fp8": `rank`, `energy`, or a recipe without a selection; the dtype is one of fp16,
        bf16, fp8, mixed and packed. `calib,bytes+scaled` has the closed form of `refine`. Default are the usual ones.
    dtypes: for methods that name none. sizes: bytes of tensors that are tried; by default each curve is followed from
        30 to 44 dB. seeds: each prompt is drawn with each. steps: of each picture, in place of the prompts' own.
    quality: PSNR in dB at which sizes are compared. draws: files of nearly this size that are averaged there.
    against: the method that others are compared with; default is `fro_ckpt,bytes fp16`, or else the first one.
    calibration: a table; default is one at hand as for `shrink`, or else one is made in the output folder.
    plan: measure nothing, and tell how much work it would be. with_prompts: the texts of prompts are in the results.
    judge: is called with the pictures and prompts of each file; its numbers are kept.

    An adapter that fails is in `failed`; a method that does, or that has no packed form, is in `notes`. Raises
    UsageError, InputError or OutputError if nothing can be done at all.
    """
    check_packages()
    chosen, notes = methods_of([methods] if isinstance(methods, str) else methods, dtypes)
    request = _Request(chosen, tuple(sizes), tuple(seeds), draws, steps, quality, with_prompts, judge)
    model_path, folder = Path(model), Path(output)
    companion = None if settings is None else Path(settings)
    kind = KINDS[check_model(model_path, companion)]
    sources = _named(find_adapters([adapters] if isinstance(adapters, (str, Path)) else adapters))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"-o {folder}: is a file. Name a folder for the page and the numbers.")
    names = list(map(str, chosen))
    if against is None:
        against = _ANCHOR if _ANCHOR in names else names[0]
    elif against not in names:
        raise UsageError(f"--against {against}: is none of the methods: {'; '.join(names)}.")
    side = own_side(model_path, companion)
    trials = {
        name: partial(trial_of, source, _prompts_for(prompts, name), side=side, scale=kind.scale)
        for name, source in sources.items()
    }
    with Studio(
        model_path, (), folder=folder / "pictures", device=device, settings=companion, pixels_at_once=PIXELS_AT_ONCE
    ) as studio:
        study = _Study(request, studio, Journal(folder), folder, progress, notes=list(notes))
        for number, (name, source) in enumerate(sources.items()):
            with boundary(source, partial(_failed, study.failed, source)):
                subject = _Subject(study, name, source, trials[name]())
                study.subjects[name] = subject
            if progress:
                progress("reading adapters", number + 1, len(sources))
        pictures = max((len(subject.own) for subject in study.subjects.values()), default=0)
        counts = {"adapters": len(sources), "pictures": pictures, "sizes": len(sizes), "draws": draws}
        work = workload(model_path, companion, chosen, **counts, steps=steps)
        if not plan and study.subjects:
            study.measure(calibration)
        result = Evidence(
            model=model_path.stem,
            kind=kind.title,
            model_key=studio.model_key,
            device=studio.device,
            dtype=studio.dtype,
            calibration=study.table_key,
            against=against,
            quality=quality,
            workload=work,
            adapters=tuple(study.studied.values()),
            results=tuple(study.measured),
            reached=(),
            differences=(),
            failed=tuple(study.failed.values()),
            notes=tuple(study.notes),
        )
    if plan or not result.results:
        return result
    result = replace(result, reached=tuple(_reached(result)), differences=tuple(_differences(result)))
    return _write(result, folder)


def _named(sources: Sequence[Path]) -> dict[str, Path]:
    """Each adapter by its name, with that of its folder where two have one name."""
    stems = [source.stem for source in sources]
    named: dict[str, Path] = {}
    for source in sources:
        name = source.stem if stems.count(source.stem) == 1 else f"{source.absolute().parent.name}-{source.stem}"
        if name in named or "|" in name:
            raise UsageError(f"{source}: its name is that of another adapter, or holds a bar. Rename one of them.")
        named[name] = source
    return named


def _prompts_for(prompts: str | Path | None, name: str) -> str | Path | None:
    if prompts is None or not Path(prompts).is_dir():
        return prompts
    path = Path(prompts) / f"{name}.txt"
    if not path.is_file():
        raise UsageError(f"--prompts {prompts}: is a folder, and holds no {path.name}.")
    return path


def _failed(failed: dict[Path, FailedInput], source: Path, error: LorashrinkError) -> None:
    failed[source] = FailedInput.of(str(source), str(error))


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """What is measured of each adapter. Raises UsageError."""

    methods: tuple[Method, ...]
    sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    draws: int
    steps: int | None
    quality: float
    with_prompts: bool
    judge: Judge | None

    def __post_init__(self) -> None:
        if self.draws < 1 or (self.steps is not None and self.steps < 1):
            raise UsageError("--draws and --steps: are at least 1.")
        if not self.seeds:
            raise UsageError("--seeds: at least one is needed; 0 means those of the prompts alone.")
        if not all(0 < size < math.inf for size in self.sizes):
            raise UsageError("--sizes: are above 0.")
        if not 10 <= self.quality <= 80:
            raise UsageError(f"--quality {self.quality:g}: is a PSNR in dB, from 10 to 80.")


@dataclass(eq=False)
class _Study:
    """All adapters of a call, and what was measured of them."""

    request: _Request
    studio: Studio
    journal: Journal
    folder: Path
    progress: Progress | None
    subjects: dict[str, _Subject] = field(default_factory=dict)
    studied: dict[str, Studied] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    failed: dict[Path, FailedInput] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    table: Path | None = None
    table_key: str | None = None

    def measure(self, calibration: str | Path | None) -> None:
        """Measure adapter after adapter, each method after the other."""
        if any(method.calibrated for method in self.request.methods):
            self.table = self._table(None if calibration is None else Path(calibration))
            with open_statistics(self.table) as statistics:
                self.table_key = statistics.fingerprint
        total = len(self.subjects) * len(self.request.methods)
        for number, (name, subject) in enumerate(self.subjects.items()):
            with boundary(subject.source, partial(_failed, self.failed, subject.source)), subject:
                self.studied[name] = subject.studied()
                for done, method in enumerate(self.request.methods, number * len(self.request.methods) + 1):
                    reasons: list[object] = []  # why nothing was measured
                    with boundary(subject.source, reasons.append):
                        before = len(self.measured)
                        self.measured += subject.curve(method)
                        if len(self.measured) == before:
                            reasons.append("It makes no file of these --sizes.")
                    self.notes += [f"{name}, {method}: not measured. {reason}" for reason in reasons]
                    if self.progress:
                        self.progress("curves", done, total)

    def _table(self, named: Path | None) -> Path:
        """The calibration table: the one that was named, one at hand, or a new one in the folder."""
        own = self.folder / "table.safetensors"
        with Methods(self.studio.model, named) as at_hand:
            at_hand.check()
            source = next(iter(self.subjects.values())).source
            method = at_hand.of(source)
        if method.calibration:
            return method.calibration
        if named:
            raise UsageError(f"--calibration {named}: is for another model than these adapters.")
        if not own.exists():
            self.studio.release()
            calibrate(
                model=self.studio.model,
                output=own,
                settings=self.studio.settings,
                device=self.studio.device,
                progress=self.progress,
            )
        return own


class _Subject:
    """One adapter. Use it as a context manager: it makes files in a temporary folder."""

    def __init__(self, study: _Study, name: str, source: Path, trial: Trial) -> None:
        """Raises InputError if the adapter cannot be read."""
        self.study, self.name, self.source, self.trial = study, name, source, trial
        self._kept: dict[bool, list[Picture]] = {}
        with open_adapter(source) as adapter:
            self.sha256 = contents_sha256(adapter)
            self._algo = adapter.layers[0].algo if adapter.layers else ""
            self._payload = adapter.store.nbytes
            self._is_lora = all(layer.family.name == "lora" for layer in adapter.layers)
            self._bytes = sum(file.stat().st_size for file in adapter.store.files)
        steps = study.request.steps
        prompts = [replace(prompt, steps=steps) if steps else prompt for prompt in trial.prompts]
        own = [prompt for prompt, calls in zip(prompts, trial.calling, strict=True) if calls]
        others = [prompt for prompt, calls in zip(prompts, trial.calling, strict=True) if not calls]
        plain_prompts = others
        if not others and trial.triggers:  # then the own prompts without the words that call the adapter
            words = re.compile("|".join(rf",?\s*{re.escape(trigger)}" for trigger in trial.triggers), re.IGNORECASE)
            for prompt in own:
                text = " ".join(words.sub("", prompt.prompt).split()).strip(" ,")
                if text and text != prompt.prompt:
                    plain_prompts.append(replace(prompt, prompt=text))
        self.own: tuple[Shot, ...] = shots_of(own, study.request.seeds)
        self.plain: tuple[Shot, ...] = shots_of(plain_prompts, study.request.seeds)

    def __enter__(self) -> _Subject:
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lorashrink-")))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @cached_property
    def scope(self) -> str:
        """Text that differs where measurements may differ, whatever the method."""
        facts = [
            _ALGORITHM,
            self.study.studio.model_key,
            self.study.studio.device.partition(":")[0],
            self.sha256,
            _hash_of_shots(self.own),
            _hash_of_shots(self.plain),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def studied(self) -> Studied:
        """The facts about the adapter; draws its own pictures, which others are compared with."""
        if others := self.study.journal.others(self.name, self.scope):
            self.study.notes.append(
                f"{self.name}: the adapter, its prompts or the model are not those of {others} earlier measurements, "
                "which are not used"
            )

        def against_none() -> dict[str, Any]:
            none = self._pictures(None, "none", self.own)
            return {"psnr": [psnr(*pair) for pair in zip(self._original_pictures(False), none, strict=True)]}

        own = [shot.prompt for shot in self.own]
        none = self._remembered("none", against_none)
        return Studied(
            name=self.name,
            sha256=self.sha256,
            algo=self._algo,
            bytes=self._bytes,
            payload=self._payload,
            full_size=self._full_size,
            pictures=len(self.own),
            words=self.trial.words,
            prompts_sha256=_hash_of_shots(self.own),
            prompts=tuple(dict.fromkeys(prompt.prompt for prompt in own)) if self.study.request.with_prompts else None,
            none_db=fmean(none["psnr"]),
        )

    def curve(self, method: Method) -> Iterator[Measured]:
        """The points of a curve, and what it does at the quality that sizes are compared at."""
        request = self.study.request
        if request.sizes:
            by_payload: dict[int, Measured] = {}
            for size in request.sizes:
                if point := self._measured(method, size):
                    by_payload.setdefault(point.payload, point)
            points = list(by_payload.values())
        else:
            points = list(self._followed(method))
        yield from points
        curve = Curve.of([(point.payload, point.psnr) for point in points])
        enough = curve.size_for(request.quality) if len(points) > 1 else None
        if enough is None:
            return
        for draw in range(request.draws):
            nearby = enough * (1 + _APART * (draw - (request.draws - 1) / 2))
            if point := self._measured(method, nearby, draw=draw + 1):
                yield point
        if self.plain and (point := self._measured(method, enough, plain=True)):
            yield point

    def _followed(self, method: Method) -> Iterator[Measured]:
        """The curve from the lowest quality of interest to the highest one."""
        start, seen = _START[method.dtype] * self._full_size, set[int]()

        def point_at(step: int) -> Measured | None:
            size = start * _STEP**step
            return self._measured(method, size) if size < 1.2 * self._full_size else None

        first = point_at(0)
        if first is None:
            return
        yield first
        seen.add(first.payload)
        for direction in (-1, 1):
            point = first
            for step in range(1, _MOST_STEPS):
                if point.mean_db < _LOWEST if direction < 0 else point.mean_db > _HIGHEST:
                    break
                following = point_at(direction * step)
                if following is None:
                    break
                if following.payload not in seen:
                    seen.add(following.payload)
                    yield following
                    if direction > 0 and following.mean_db < point.mean_db + _LEAST_GAIN:
                        break
                point = following

    def _measured(self, method: Method, size: float, *, draw: int = 0, plain: bool = False) -> Measured | None:
        """One file: made, drawn with and compared, unless an earlier run did so. None if there is no such file."""
        facts = [str(method), self.study.table_key if method.calibrated else "", f"{size:.0f}", str(draw), str(plain)]
        key = "|".join([self.name, self.scope, *map(str, facts)])
        entry = self.study.journal.get(key)
        if entry is None or (self.study.request.judge and not entry["judged"]):
            entry = self._measure(method, size, draw, plain)
            if entry is None:
                return None
            self.study.journal.add(key, entry)
        series = {name: tuple(entry[name]) for name in ("psnr", "ssim", "ms_ssim")}
        judged = {name: tuple(numbers) for name, numbers in entry["judged"].items()}
        return Measured(**{**entry, **series, "judged": judged})

    def _measure(self, method: Method, size: float, draw: int, plain: bool) -> dict[str, Any] | None:
        file = self._maker.make(method, size, self._folder)
        if file is None:
            return None
        shots = self.plain if plain else self.own
        originals = self._original_pictures(plain)
        paths = self._draw(file.path, f"{method} {file.payload // 1000} kB", shots)
        pictures = [read_picture(path) for path in paths]
        values = {
            name: [round(compare(*pair), _DIGITS) for pair in zip(originals, pictures, strict=True)]
            for name, compare in comparisons(None, self.study.studio.device).items()
        }
        judge = self.study.request.judge
        texts = [shot.prompt.prompt for shot in shots]
        judged = {name: list(map(float, numbers)) for name, numbers in judge(pictures, texts).items()} if judge else {}
        for path in paths:
            path.unlink(missing_ok=True)
        facts = {
            "adapter": self.name,
            "curve": str(method),
            "recipe": file.recipe,
            "payload": file.payload,
            "bytes": file.bytes,
            "relative_error": file.relative_error,
            "predicted_db": file.predicted_db,
            "draw": draw,
            "plain": plain,
            "judged": judged,
        }
        return facts | values

    def _original_pictures(self, plain: bool) -> list[Picture]:
        """What the original adapter draws, which is kept in memory."""
        if plain not in self._kept:
            self._kept[plain] = self._pictures(self._reference, "whole", self.plain if plain else self.own)
        return self._kept[plain]

    def _pictures(self, adapter: Path | None, label: str, shots: Sequence[Shot]) -> list[Picture]:
        return [read_picture(path) for path in self._draw(adapter, label, shots)]

    def _draw(self, adapter: Path | None, label: str, shots: Sequence[Shot]) -> list[Path]:
        study = self.study
        study.studio.shots = tuple(shots)
        report = partial(study.progress, f"pictures: {self.name} {label}") if study.progress else None
        return study.studio.draw(adapter, re.sub(r"\W+", "-", f"{self.name} {label}"), progress=report)

    @property
    def _full_size(self) -> int:
        """Bytes of all dimensions in fp16."""
        return int(self._remembered("whole", lambda: {"bytes": self._maker.full_size})["bytes"])

    def _remembered(self, name: str, compute: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """Facts that a later run takes from the journal."""
        key = f"{self.name}|{self.scope}|{name}"
        entry = self.study.journal.get(key)
        if entry is None:
            entry = compute()
            self.study.journal.add(key, entry)
        return entry

    @cached_property
    def _reference(self) -> Path:
        """The adapter as LoRA, the only form that pictures are drawn with. Raises InputError."""
        path = self.source
        if not self._is_lora:
            path = self._folder / "whole.safetensors"
            report = resize(
                self.source,
                base=self.study.studio.model,
                recipes="energy=1",
                form="lora",
                dtype="fp32",
                output=path,
                force=True,
            )
            if report.failed:
                raise InputError(report.failed[0].error)
        self.study.studio.check(path)
        return path

    @cached_property
    def _maker(self) -> Maker:
        study = self.study
        prepared = prepare(
            self.source,
            base=study.studio.model,
            calibration=study.table,
            form="lora",
            device=study.studio.device,
            progress=study.progress,
        )
        return Maker(
            source=self.source,
            reference=self._reference,
            prepared=prepared,
            model=study.studio.model,
            calibration=study.table,
            scale_with=self._scaling_prompts(),
            before_scaling=study.studio.release,
            device=study.studio.device,
            settings=study.studio.settings,
            progress=study.progress,
        )

    def _scaling_prompts(self) -> Path:
        """A file of plain prompts with other noise than that of any picture that is measured."""
        prompts = dict.fromkeys(shot.prompt for shot in self.plain or self.own)
        lines = [
            {
                "prompt": prompt.prompt,
                "negative_prompt": prompt.negative,
                "width": prompt.width,
                "height": prompt.height,
                "seed": 1_000_000 + number,
                "sample_steps": prompt.steps,
                "scale": prompt.scale,
            }
            for number, prompt in enumerate(list(prompts)[:_SCALING_PROMPTS])
        ]
        path = self._folder / "scaling.json"
        path.write_text(json.dumps(lines), encoding="utf-8")
        return path


def _hash_of_shots(shots: Sequence[Shot]) -> str:
    facts = [[asdict(shot.prompt), shot.seed] for shot in shots]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# --- what follows from it -----------------------------------------------------------------------


def _curve(result: Evidence, adapter: str, name: str) -> Curve | None:
    points = result.points(adapter, name)
    return Curve.of([(point.payload, point.psnr) for point in points]) if len(points) > 1 else None


def _reached(result: Evidence) -> Iterator[Reached]:
    """What each curve takes for the quality: by the files drawn at it, or else between the points of the curve."""
    quality = result.quality
    for adapter, name in product([adapter.name for adapter in result.adapters], result.curves):
        curve = _curve(result, adapter, name)
        if curve is None:
            continue
        payload = curve.size_for(quality)
        if payload is None:
            yield Reached(adapter, name, quality, None, None, None, 0)
            continue
        worst = curve.worst_at(payload)
        draws = [point for point in result.results if point.adapter == adapter and point.curve == name and point.draw]
        if draws:
            # The draws lie beside the quality by chance; the curve says what that is in bytes.
            size = fmean(point.payload for point in draws)
            missing = quality - fmean(point.mean_db for point in draws)
            payload = size * math.exp(missing / curve.slope(size))
            worst = fmean(point.worst_db for point in draws)
        nearest = min(result.points(adapter, name), key=lambda point: abs(point.payload - payload))
        header = nearest.bytes - nearest.payload
        yield Reached(adapter, name, quality, payload, payload + header, worst, len(draws))


def _differences(result: Evidence) -> Iterator[Difference]:
    anchors = {adapter.name: _curve(result, adapter.name, result.against) for adapter in result.adapters}
    for name in result.curves:
        if name == result.against:
            continue
        pairs = {}
        for adapter, anchor in anchors.items():
            curve = _curve(result, adapter, name)
            if anchor and curve:
                pairs[adapter] = (anchor, curve)
                yield _difference(adapter, name, result.against, [(anchor, curve)])
        if len(pairs) > 1:
            yield _difference("", name, result.against, list(pairs.values()))


def _difference(adapter: str, name: str, against: str, pairs: Sequence[tuple[Curve, Curve]]) -> Difference:
    quality, rate = quality_gap(pairs), rate_gap(pairs)
    return Difference(
        adapter,
        name,
        against,
        *((quality.value, quality.low, quality.high) if quality else (None, None, None)),
        *((rate.value, rate.low, rate.high) if rate else (None, None, None)),
    )


def _write(result: Evidence, folder: Path) -> Evidence:
    """Write the page, its Markdown with figures, and the numbers, which name no folder of this machine."""
    from lorashrink.plots.rates import size_and_quality

    public = replace(
        result,
        page=_PAGE,
        markdown=_MARKDOWN,
        data=_DATA,
        failed=tuple(
            replace(failure, input=Path(failure.input).name, error="", hint=None) for failure in result.failed
        ),
    )
    document = {"version": __version__, "command": "evidence", **plain(public)}
    curves = [size_and_quality(public, adapter.name) for adapter in public.adapters]
    write_bytes(folder / _DATA, json.dumps(document, allow_nan=False).encode())
    write_bytes(folder / _PAGE, web_page(public, curves))
    write_bytes(folder / _MARKDOWN, markdown_page(public, curves, folder / _FIGURES))
    return replace(result, page=str(folder / _PAGE), markdown=str(folder / _MARKDOWN), data=str(folder / _DATA))
