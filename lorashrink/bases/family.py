"""The row of the base table: how a family of models is recognised, where its parts lie, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lorashrink.bases.rules import Rules
from lorashrink.names import DIFFUSERS_PARTS

# What may stand before the names of a denoiser: in files of one part, in all-in-one files, and in folders.
DENOISER = dict.fromkeys(
    (
        "",
        "module.",
        "net.",
        "model.",
        "unet.",
        "transformer.",
        "prior.",
        "diffusion_model.",
        "model.diffusion_model.",
    ),
    "unet",
)


class Header:
    """Names and shapes of a base's tensors, found by what their names end with, whatever stands before."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._names = tuple(shapes)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            ending = name
            while ending:
                self._shapes.setdefault(ending, shape)
                ending = ending.partition(".")[2]

    def has(self, *endings: str) -> bool:
        """Whether every ending is that of a tensor."""
        return all(ending in self._shapes for ending in endings)

    def has_weights(self) -> bool:
        """Whether any tensor is a matrix that is called a weight."""
        return any(name.endswith("weight") and len(shape) >= 2 for name, shape in self._shapes.items())

    def begins(self, *prefixes: str) -> bool:
        """Whether some tensor's whole name begins with one of the prefixes."""
        return any(name.startswith(prefixes) for name in self._names)

    def shape(self, ending: str) -> tuple[int, ...]:
        """The shape of the tensor, () if there is none."""
        return self._shapes.get(ending, ())


@dataclass(frozen=True, eq=False)
class BaseFamily:
    """A family of models.

    `containers` maps the prefix of a part's tensors to the part: "unet" is any denoiser and a language model, "te1",
    "te2", ... are text encoders, and others are called as in diffusers; a longer prefix wins. `rules` name the weights
    of "unet" and "transformer_2".

    `kohya` is the layout whose names kohya-style adapters flatten, `denoiser` the prefix of diffusers adapters, and
    `encoders` how many text encoders adapters can tell apart. `instead` maps a part that adapters speak of to the part
    of the base that they mean by it. Modules that end with `transposed` multiply from the right.
    """

    name: str
    title: str
    containers: Mapping[str, str]
    recognise: Callable[[Header], bool]
    rules: Rules = field(default=Rules(()), repr=False)
    kohya: str = "native"
    denoiser: str = "transformer"
    encoders: int = 1
    instead: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()

    @cached_property
    def by_length(self) -> tuple[tuple[str, str], ...]:
        """The containers, the longest prefix first."""
        return tuple(sorted(self.containers.items(), key=lambda item: -len(item[0])))

    def prefixes(self, part: str) -> list[str]:
        """What stands before the names of a part, in all containers."""
        return [prefix for prefix, contents in self.containers.items() if contents == part]

    def folder(self, part: str) -> str:
        """What diffusers calls a part: "unet", "transformer", "text_encoder_2", ...; "" if it has no name for it."""
        if part == "unet":
            return self.denoiser
        if part in DIFFUSERS_PARTS:
            return part
        names = (prefix[:-1] for prefix in self.prefixes(part) if prefix.count(".") == 1)
        return next((name for name in names if name.startswith("text_encoder")), "")

    def in_one_file(self, part: str) -> str:
        """What ComfyUI puts before a part's names: "diffusion_model.", "text_encoders.t5xxl.transformer.", or ""."""
        if part == "unet":
            return "diffusion_model."
        names = (prefix for prefix in self.prefixes(part) if prefix.count(".") == 3)
        return next((name for name in names if name.endswith(".transformer.")), "")


def marks(*alternatives: tuple[str, ...]) -> Callable[[Header], bool]:
    """Recognise a base by its tensors: it has all of one of the alternatives."""
    return lambda header: any(header.has(*endings) for endings in alternatives)


def containers(**encoders: tuple[str, ...]) -> dict[str, str]:
    """Where the denoiser lies, and each text encoder: in which folder, and under which names in all-in-one files."""
    prefixes = dict(DENOISER) | {f"{part}.": part for part in DIFFUSERS_PARTS}
    for part, (folder, *names) in encoders.items():
        prefixes[f"{folder}."] = part
        prefixes |= {f"text_encoders.{name}.{level}": part for name in names for level in ("", "transformer.")}
    return prefixes


# For families with one text encoder that is not CLIP: adapters number it in several ways.
ONE_ENCODER = {"te2": "te1", "te3": "te1"}
