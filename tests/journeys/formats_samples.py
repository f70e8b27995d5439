"""A few layers of every listed adapter, on every listed base, filled with numbers and shrunk for real."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fixtures
import torch
from torch import Tensor

from lorashrink.adapters import Adapter, Layer, layer_name, open_adapter
from lorashrink.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from lorashrink.bases import Base, open_base
from lorashrink.linking import matching
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.run import resize

T = TypeVar("T")
Contents = Mapping[str, fixtures.Shapes]  # folder ("" for a single file) -> tensors

ADAPTERS, BASES = fixtures.ALL_ADAPTERS, fixtures.ALL_BASES
# Names as in real files, but shapes that fit no model.
SYNTHETIC = frozenset(name for name in ADAPTERS if fixtures.about(name)["provenance"] == "synthetic")

# --- bases that adapters are for ----------------------------------------------------------------

_CLIP_L, _CLIP_G, _T5 = "base_clip_l_transformers", "base_clip_g_transformers", "base_t5xxl_transformers"
_FILE, _FOLDER, _NEW_FOLDER = "single file", "diffusers folder", "folder of transformers 5"
_DIFFUSERS, _TRANSFORMERS = "diffusers file", "transformers file"

# Family of the lists -> layout -> what a base with all its parts is made of: folder ("" for a file) -> lists as
# `_listed` takes them, or a layout of `fixtures`.
LAYOUTS: dict[str, dict[str, str | dict[str, tuple[str, ...]]]] = {
    "sdxl": {_FILE: "sdxl file", _FOLDER: "sdxl folder", _NEW_FOLDER: "sdxl folder without text_model"},
    "sdxl-refiner": {
        _FILE: {"": ("base_sdxl_refiner_ldm",)},
        _FOLDER: {"unet": ("base_sdxl_refiner_diffusers_unet",), "text_encoder_2": (_CLIP_G,)},
    },
    "sd15": {
        _FILE: "sd15 file",
        "single file without text_model": "sd15 file without text_model",
        _FOLDER: "sd15 folder",
        _NEW_FOLDER: "sd15 folder without text_model",
        "inpainting folder": {"unet": ("base_sd15_inpaint_diffusers_unet",), "text_encoder": (_CLIP_L,)},
    },
    "sd2": {
        _FILE: "sd2 file",
        "single file with 24 blocks": "sd2 file with 24 blocks",
        _FOLDER: "sd2 folder",
        _NEW_FOLDER: "sd2 folder without text_model",
    },
    "sd3": {
        _FILE: {"": ("base_sd35_medium_native", "base_sd3_medium_comfy text_encoders.")},
        _FOLDER: {
            "transformer": ("base_sd35_medium_diffusers",),
            "text_encoder": (_CLIP_L,),
            "text_encoder_2": (_CLIP_G,),
            "text_encoder_3": (_T5,),
        },
    },
    "flux": {
        _FILE: {"": ("base_flux_dev_comfy_full",)},
        _FOLDER: {"transformer": ("base_flux_dev_diffusers",), "text_encoder": (_CLIP_L,), "text_encoder_2": (_T5,)},
    },
    "flux2": {_DIFFUSERS: {"": ("base_flux2_klein4b_diffusers",)}},
    "auraflow": {_FILE: {"": ("base_auraflow_native",)}, _DIFFUSERS: {"": ("base_auraflow_diffusers",)}},
    "hidream": {_DIFFUSERS: {"": ("base_hidream_diffusers",)}},
    "hunyuan": {
        "original file": {"": ("base_hunyuan_video_original_blocks",)},
        "ComfyUI file": {"": ("base_hunyuan_video_native",)},
        _DIFFUSERS: {"": ("base_hunyuan_video_diffusers",)},
    },
    "krea2": {_DIFFUSERS: {"": ("base_krea2_diffusers",)}},
    "ltxv": {_FILE: {"": ("base_ltxv_2b_native",)}, _DIFFUSERS: {"": ("base_ltxv_2b_diffusers",)}},
    "pixart": {_DIFFUSERS: {"": ("base_pixart_sigma_diffusers",)}},
    "qwen-image": {_FILE: {"": ("base_qwen_image_native",)}, _DIFFUSERS: {"": ("base_qwen_image_diffusers",)}},
    "wan21": {_FILE: {"": ("base_wan21_1_3b_native",)}, _DIFFUSERS: {"": ("base_wan21_1_3b_diffusers",)}},
    "z-image": {_DIFFUSERS: {"": ("base_z_image_diffusers",)}},
    "anima": {_FILE: {"": ("base_anima_net_excerpt", "text_encoders.qwen3_06b.transformer.=base_qwen3_0_6b")}},
    "llm-gpt2": {_TRANSFORMERS: {"": ("base_gpt2",)}},
    "llm-llama": {_TRANSFORMERS: {"": ("base_llama32_1b",)}},
    "llm-qwen": {_TRANSFORMERS: {"": ("base_qwen3_0_6b",)}},
}
# The adapters for Llama were made with a smaller vocabulary.
_VOCABULARY = {128256: 4096}
# Layers that the right base has with another shape, and why.
EXCEPTIONS = {("flux_control_lora_bfl", "img_in"): "its first layer is for a model with twice the inputs"}


def family_of(name: str) -> str:
    """The lists' name of the family of models that a listed file belongs to."""
    family: str = fixtures.about(name)["family"]
    return family


def contents_of(family: str, layout: str) -> Contents:
    """The tensors of a base."""
    parts = LAYOUTS[family][layout]
    if isinstance(parts, str):
        return fixtures.parts(parts)
    return {folder: {k: v for name in lists for k, v in _listed(name).items()} for folder, lists in parts.items()}


def _listed(text: str) -> fixtures.Shapes:
    """The tensors of a list; "LIST START" are those that begin with START, "PREFIX=LIST" have something before them."""
    prefix, _, rest = text.rpartition("=")
    listed, _, start = rest.partition(" ")
    tensors = {prefix + key: shape for key, shape in fixtures.shapes(listed).items() if key.startswith(start)}
    if "llama" not in listed:
        return tensors
    return {key: tuple(_VOCABULARY.get(side, side) for side in shape) for key, shape in tensors.items()}


# --- a few layers of each adapter, with numbers in them -----------------------------------------

# So many layers of a file are shrunk, each of another signature.
_MOST_LAYERS = 6
# So many numbers a ΔW may have that is decomposed as a matrix, that is compared as one, and that is in two factors.
_MOST_DECOMPOSED, _MOST_COMPARED, _MOST_IN_FACTORS = 1 << 20, 1 << 22, 1 << 25


def signature(layer: Layer) -> object:
    """What distinguishes a kind of layer in its file: its tensors and their shapes."""
    return layer.algo, tuple(sorted((role, info.shape) for role, info in layer.infos.items()))


def kind(layer: Layer) -> object:
    """The signature without the numbers."""
    return layer.algo, tuple(sorted((role, *(side == 1 for side in info.shape)) for role, info in layer.infos.items()))


def size(layer: Layer) -> int:
    """How many numbers ΔW has."""
    return math.prod(layer.shape)


def limit(layer: Layer) -> int:
    """How many it may have for the test to take no more than a moment."""
    if layer.family.written:
        return _MOST_IN_FACTORS
    full = 2 * layer.width > min(layer.shape[0], math.prod(layer.shape[1:]))
    return _MOST_DECOMPOSED if full else _MOST_COMPARED


def some_of(layers: Sequence[Layer]) -> list[Layer]:
    """Layers of different signatures: the smallest of each kind, and the largest that are not too large."""
    distinct = {signature(layer): layer for layer in reversed(layers)}.values()
    by_kind: dict[object, list[Layer]] = defaultdict(list)
    for layer in sorted(distinct, key=lambda layer: (size(layer) > limit(layer), size(layer))):
        by_kind[kind(layer)].append(layer)
    chosen = [alike[0] for alike in by_kind.values()]
    rest = [layer for alike in by_kind.values() for layer in alike[1:]]
    rest = [layer for layer in rest if layer.family.written or size(layer) <= limit(layer)]
    chosen += sorted(rest, key=size, reverse=True)[: max(0, _MOST_LAYERS - len(chosen))]
    return sorted(chosen, key=layers.index)


def divisor(layers: Sequence[Layer]) -> int:
    """What the sides of all weights are divided by, so that no layer is too large."""
    return next(by for by in (1, 2, 4, 8, 16, 32) if all(size(layer) <= by**2 * limit(layer) for layer in layers))


def divided(shape: tuple[int, ...], by: int) -> tuple[int, ...]:
    """A side's new length depends on its old one alone, so that all still fit."""
    return tuple(side // by if side >= 64 and side % by == 0 else side for side in shape)


def smaller(layer: Layer, role: str, shape: tuple[int, ...], by: int) -> tuple[int, ...]:
    """The shape of one tensor of a layer whose weight has its sides divided."""
    match layer.family.name, role:
        case "lokr", "w1" | "w1_a" | "w1_b":  # the second factor is the one that shrinks
            return tuple(side // by if side >= 512 else side for side in shape)
        case "lokr", "w2" | "w2_a" | "w2_b":
            return tuple(side // by if side % by == 0 else side for side in shape)
        case "oft", "blocks" | "triangles":  # fewer blocks, of the same size
            return (*shape[:-3], shape[-3] // by, *shape[-2:]) if role == "blocks" else (shape[0] // by, *shape[1:])
    return divided(shape, by)


def numbers(layer: Layer, role: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """What a tensor of a layer might hold: a small ΔW, of singular values that fall."""
    noise = torch.randn(shape, generator=random)
    match layer.family.name, role:
        case "oft", "alpha":  # bounds the rotations
            return torch.tensor(1e-3)
        case "lokr", "alpha" if {"w1", "w2"} <= layer.keys.keys():  # means nothing, and is like this in real files
            return torch.tensor(1e4)
        case _, "alpha":
            return torch.tensor(layer.rank / 2)
        case _, "magnitude" | "rescale":
            return 1 + 0.1 * noise
        case "ia3", "vector":
            return 1 + 0.1 * noise
        case "ia3", "on_input":
            return torch.tensor(int(layer.infos["weight"].shape[0] == layer.shape[1] and "_ff_" in layer.name))
        case "ia3" | "oft", _:
            return 0.1 * noise
        case _, "down" | "w1_b" | "w2_b" | "A":
            noise *= torch.linspace(0, -2, shape[0]).exp().reshape(-1, *[1] * (len(shape) - 1))
    return noise / math.sqrt(max(1, math.prod(shape[1:])))


# --- files on the disk, and what is made of them ------------------------------------------------

_RECIPES = {"all": "energy=1", "most": "energy=.9", "few": "rank=2"}
_FORMS = ("auto", "lora", "same")


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A few layers of a listed adapter, with random contents, and what was made of them."""

    before: Adapter  # with what its layers need of the base
    base: Base | None
    results: Mapping[tuple[str, str], FileResult]  # (form, recipe)

    def after(self, form: str, recipe: str) -> Adapter:
        """The output, opened."""
        return open_adapter(self.results[form, recipe].output)


class Formats:
    """Every listed file, written, opened and shrunk once, when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._cache: dict[object, Any] = {}

    def __enter__(self) -> Formats:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        value: T = self._cache[key]
        return value

    def adapter(self, name: str) -> Adapter:
        """A listed adapter, header only."""
        folder = self._folder / "headers"
        return self._once(name, lambda: self._opened(open_adapter, fixtures.write_listed(folder, name)))

    def base(self, family: str, layout: str) -> Base:
        """A base of all parts, headers only."""
        return self._once((family, layout), lambda: self._base(f"{family} {layout}", contents_of(family, layout)))

    def listed_base(self, name: str) -> Base:
        """A listed base, header only."""
        return self._once(name, lambda: self._base(name, {"": fixtures.shapes(name)}))

    def shrunk(self, name: str) -> Shrunk:
        """See `Shrunk`."""
        return self._once(("shrunk", name), lambda: self._shrunk(name))

    def _opened(self, opener: Callable[[Path], T], path: Path) -> T:
        return self._stack.enter_context(opener(path))  # type: ignore[type-var]

    def _base(self, name: str, contents: Contents) -> Base:
        return self._opened(open_base, fixtures.write_parts(self._folder / "bases", name, contents, {"title": name}))

    def _shrunk(self, name: str) -> Shrunk:
        folder, adapter = self._folder / name, self.adapter(name)
        layout = self._layout(name)
        views = matching.match(adapter, self.base(family_of(name), layout)) if layout else [()] * len(adapter)
        layers = some_of(matching.bind(adapter, views, None).layers)
        by = divisor(layers)
        source = write_some(folder, name, adapter, layers, by)
        before, base, base_path = self._opened(open_adapter, source), None, None
        if layout:
            contents = {
                part: {key: divided(shape, by) for key, shape in tensors.items()}
                for part, tensors in contents_of(family_of(name), layout).items()
            }
            base_path = fixtures.write_parts(folder, "base", contents, {"title": name})
            with open_base(base_path) as empty:
                fill(empty, before)
            base = self._opened(open_base, base_path)
            before = matching.bind(before, matching.match(before, base), base)
        others = any(not layer.family.written for layer in layers)
        results = {}
        for form in _FORMS if others else _FORMS[:1]:
            report = resize(
                source,
                base=base_path,
                recipes=list(_RECIPES.values()),
                output=folder / form,
                dtype="fp32",
                form=form,
            )
            assert report.failed == ()
            results |= {(form, recipe): result for recipe, result in zip(_RECIPES, report.results, strict=True)}
        return Shrunk(before, base, results)

    def _layout(self, name: str) -> str:
        """The layout of the base that differs most from the adapter's own; "" if its shapes fit none."""
        if name in SYNTHETIC or not len(self.adapter(name)):
            return ""

        def differs(layout: str) -> int:
            matched = matching.match(self.adapter(name), self.base(family_of(name), layout))
            return sum(len(views) > 1 or any(view.rows for view in views) for views in matched)

        return max(LAYOUTS[family_of(name)], key=differs)


def write_some(folder: Path, name: str, adapter: Adapter, layers: Sequence[Layer], by: int) -> Path:
    """A file, or PEFT folder, with these layers of a listed adapter, and with some of its other tensors."""
    random = torch.Generator().manual_seed(len(name))
    tensors = {}
    for layer in layers:
        for role, key in {**layer.keys, **layer.common}.items():
            tensors[key] = numbers(layer, role, smaller(layer, role, layer.infos[role].shape, by), random)
    chosen, reasons = {layer.name for layer in layers}, Counter[str]()
    for key, reason in adapter.others.items():
        if reasons[reason] < _MOST_LAYERS or layer_name(key) in chosen:
            tensors[key] = torch.randn(divided(adapter.store.tensors[key].shape, by), generator=random)
            reasons[reason] += 1
    config = fixtures.about(name).get("config")
    half = fixtures.about(name).get("dtype") != "F32"
    tensors = {k: v.half() if half and v.ndim else v for k, v in tensors.items()}
    if config is None:
        return fixtures.write_tensors(folder / f"{name}.safetensors", tensors, fixtures.metadata(name))
    fixtures.write_tensors(folder / name / WEIGHTS_FILE, tensors, fixtures.metadata(name))
    (folder / name / CONFIG_FILE).write_text(json.dumps(config))
    return folder / name


def fill(base: Base, adapter: Adapter) -> None:
    """Write random numbers into the weights that a few layers change; the others stay zero."""
    random = torch.Generator().manual_seed(1)
    for views in matching.match(adapter, base):
        for key in {view.key for view in views}:
            info = base.store.tensors[key]
            if math.prod(info.shape) <= _MOST_COMPARED:
                with open(base.store.files[info.file], "r+b") as file:
                    file.seek(info.offset)
                    weight = torch.randn(info.shape, generator=random) / math.sqrt(info.shape[-1])
                    file.write(weight.half().numpy().tobytes())
