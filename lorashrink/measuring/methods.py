"""The methods that are compared, and the file that each makes of an adapter for so many bytes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lorashrink.adapters import open_adapter, peft
from lorashrink.calibration.refine import refine
from lorashrink.errors import Progress, RecipeError, UsageError
from lorashrink.files.header import header_bytes, read_header
from lorashrink.packing.pack import TooFewBytes, pack_into
from lorashrink.recipes.grammar import Recipe
from lorashrink.shrinking.prepared import Prepared

DTYPES = ("fp16", "bf16", "fp8", "mixed", "packed")

# What is compared where nothing else is asked for.
METHODS = (
    "rank fp16",
    "energy fp16",
    "fro_ckpt fp16",
    "fro_ckpt,bytes fp16",
    "fro_ckpt,bytes fp8",
    "fro_ckpt,bytes packed",
    "calib,bytes fp16",
    "calib,bytes fp8",
    "calib,bytes mixed",
    "calib,bytes packed",
    "calib,bytes+scaled fp8",
)

SCALED = "+scaled"

# What the dimensions of a packed file are judged by -> the methods that mean it.
_JUDGES = {"calib,bytes": "calibration", "fro_ckpt,bytes": "base", "energy": "weights", "bytes": "weights"}
_PACKED_RULE = f"Packed goes with {'; '.join(_JUDGES)}, without {SCALED}."

# The search for a rank, or for what is kept of the energy as a multiple of what is lost.
_MOST, _ROUNDS = 1e6, 24


@dataclass(frozen=True, slots=True)
class Method:
    """A way to make an adapter smaller."""

    score: str  # "rank", "energy", or a recipe without a selection, such as "calib,bytes"
    dtype: str  # one of DTYPES
    scaled: bool = False  # then each dimension gets a factor, see `refine`

    @classmethod
    def parse(cls, text: str, dtypes: Sequence[str] = ()) -> list[Method]:
        """The methods of a text such as `calib,bytes fp8`; without a dtype one for each of `dtypes`, else fp16.

        Raises UsageError or RecipeError.
        """
        score, _, dtype = text.strip().partition(" ")
        scaled = score.endswith(SCALED)
        score = score.removesuffix(SCALED)
        if score not in ("rank", "energy"):
            try:
                Recipe.parse(f"{score},size=1")
            except RecipeError as error:
                raise RecipeError(f"--methods {text}: {error}") from None
        names = [dtype.strip()] if dtype else list(dtypes) or ["fp16"]
        for name in names:
            if name not in DTYPES:
                raise UsageError(f"--methods {text}: '{name}' is not one of {', '.join(DTYPES)}.")
        packable = score in _JUDGES and not scaled
        methods = [cls(score, name, scaled) for name in names if packable or name != "packed"]
        if not methods:
            raise UsageError(f"--methods {text}: {_PACKED_RULE} Leave packed out for others.")
        return methods

    @property
    def calibrated(self) -> bool:
        """Whether it needs statistics of the model."""
        return "calib" in self.score.split(",")

    def __str__(self) -> str:
        return f"{self.score}{SCALED * self.scaled} {self.dtype}"


def methods_of(texts: Sequence[str], dtypes: Sequence[str]) -> tuple[tuple[Method, ...], tuple[str, ...]]:
    """(the methods that texts name, notes on those that have no packed form though `dtypes` asks for it).

    texts: with colons between several; by default the usual methods. dtypes: of texts that name none; of the usual
    methods those with these dtypes. Raises UsageError or RecipeError.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UsageError(f"--dtypes {dtype}: is not one of {', '.join(DTYPES)}.")
    named = [text.strip() for entry in texts for text in entry.split(":") if text.strip()]
    parsed = {text: Method.parse(text, dtypes) for text in named or METHODS}
    methods = [method for of_text in parsed.values() for method in of_text]
    if not named and dtypes:
        methods = [method for method in methods if method.dtype in dtypes]
    notes = [
        f"{text}: not measured packed. {_PACKED_RULE}"
        for text, of_text in parsed.items()
        if "packed" in dtypes and " " not in text and all(method.dtype != "packed" for method in of_text)
    ]
    return tuple(dict.fromkeys(methods)), tuple(notes)


@dataclass(frozen=True, slots=True)
class Made:
    """A file of a method."""

    path: Path
    recipe: str
    payload: int  # bytes of tensors; of a packed file all but its metadata
    bytes: int
    relative_error: float
    predicted_db: float | None


@dataclass(eq=False)
class Maker:
    """Makes files of one adapter."""

    source: Path
    reference: Path  # the same adapter in a form that the model draws with
    prepared: Prepared
    model: Path
    calibration: Path | None
    scale_with: Path | str | None  # prompts for factors of dimensions
    before_scaling: Callable[[], None]  # makes room for the model
    device: str = "auto"
    settings: Path | None = None
    progress: Progress | None = None
    _headers: dict[Method, int] = field(default_factory=dict)  # bytes, of the last file

    def make(self, method: Method, payload: float, folder: Path) -> Made | None:
        """The file with about so many bytes of numbers; None if the method has none.

        It may have fewer, where ranks go in steps. Raises InputError, UsageError or OutputError.
        """
        name = peft.WEIGHTS_FILE if peft.is_folder(self.source) else "adapter.safetensors"
        if method.dtype == "packed":
            return self._packed(method, payload, folder / "packed.safetensors")
        recipe = self._recipe(method, payload)
        if recipe is None:
            return None
        file = None
        for _ in range(2):
            with suppress(RecipeError):  # it cannot reach so small a size
                result = self.prepared.save(recipe, folder / name, dtype=method.dtype, force=True)
                file = Made(folder / name, recipe, *_sizes(folder / name), result.relative_error, result.predicted_db)
                self._headers[method] = file.bytes - file.payload
            if file is None or "size=" not in recipe or abs(file.payload / payload - 1) < 0.01:
                break
            recipe = self._recipe(method, payload) or recipe  # now that the header's size is known
        if file and method.scaled:
            return self._scaled(file, folder)
        return file

    def _recipe(self, method: Method, payload: float) -> str | None:
        if method.score == "rank":
            return self._largest(lambda number: f"rank={number:.0f}", payload, method.dtype)
        if method.score == "energy":
            return self._largest(lambda number: f"energy={1 - 1 / (1 + number):.9g}", payload, method.dtype)
        return f"{method.score},size={(payload + self._headers.get(method, 0)) / 2**20:.6f}"

    def _largest(self, recipe: Callable[[float], str], payload: float, dtype: str) -> str | None:
        """Of the recipes of numbers from 1 on, which keep more the larger they are, the largest up to `payload`."""
        best, low, high = None, 1.0, _MOST
        for _ in range(_ROUNDS):
            middle = math.sqrt(low * high)
            if self._payload(self.prepared.at(recipe(middle), dtype=dtype).ranks, dtype) <= payload:
                best, low = recipe(middle), middle
            else:
                high = middle
        return best

    def _payload(self, ranks: Mapping[str, int], dtype: str) -> int:
        width = 1 if dtype == "fp8" else 2
        return sum(
            width * ranks.get(layer.name, 0) * (layer.shape[0] + math.prod(layer.shape[1:]))
            for layer in self.prepared.adapter.layers
        )

    @property
    def full_size(self) -> int:
        """Bytes of all dimensions in fp16."""
        return self._payload(self.prepared.at("energy=1", dtype="fp16").ranks, "fp16")

    def _packed(self, method: Method, payload: float, path: Path) -> Made | None:
        judge = _JUDGES[method.score]
        with open_adapter(self.reference) as adapter:
            metadata = adapter.store.metadata
        size = int(payload) + len(header_bytes({}, metadata))
        try:
            result = pack_into(
                self.reference,
                path,
                size,
                decided_by=judge,
                base=self.model if judge == "base" else None,
                calibration=self.calibration if judge == "calibration" else None,
                device=self.device,
            )
        except TooFewBytes:
            return None
        _, entries, _ = read_header(path)
        own = path.stat().st_size - len(header_bytes({}, entries))
        return Made(path, f"packed by {judge}", own, path.stat().st_size, result.relative_error, result.predicted_db)

    def _scaled(self, file: Made, folder: Path) -> Made:
        """The file with a factor for each dimension, where that brings the model nearer to the original."""
        self.before_scaling()
        path = folder / "scaled.safetensors"
        refine(
            file.path,
            like=self.reference,
            model=self.model,
            output=path,
            prompts=self.scale_with,
            settings=self.settings,
            steps=0,
            closed_form=True,
            device=self.device,
            force=True,
            progress=self.progress,
        )
        return Made(path, file.recipe + SCALED, *_sizes(path), file.relative_error, file.predicted_db)


def _sizes(path: Path) -> tuple[int, int]:
    """Bytes of the tensors of a file, and of the file."""
    return sum(info.nbytes for info in read_header(path)[0].values()), os.path.getsize(path)
