"""Which files are read and what becomes of them: every listed adapter, on every listed base, shrunk for real.

What comes out is the table in `docs/formats.md`; `python tests/journeys/test_formats.py` writes it anew.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fixtures
import pytest
import torch
from torch import Tensor

from lorashrink.adapters import Adapter, Layer, layer_name, open_adapter
from lorashrink.adapters.peft import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE
from lorashrink.bases import Base, open_base, recognise
from lorashrink.engine.delta import AnyDelta, Delta
from lorashrink.linking import matching
from lorashrink.names import address
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.run import resize

T = TypeVar("T")
Contents = Mapping[str, fixtures.Shapes]  # folder ("" for a single file) -> tensors

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"
ADAPTERS = tuple(name for name in fixtures.LISTED if not name.startswith("base_"))
BASES = tuple(name for name in fixtures.LISTED if name.startswith("base_"))
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
    made_of = LAYOUTS[family][layout]
    if isinstance(made_of, str):
        return fixtures.parts(made_of)
    return {folder: {k: v for each in lists for k, v in _listed(each).items()} for folder, lists in made_of.items()}


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
    """What tells a kind of layer from others of its file: its tensors and their shapes."""
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
    chosen = [each[0] for each in by_kind.values()]
    rest = [each for of_kind in by_kind.values() for each in of_kind[1:]]
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
    """Every listed file, written, opened and shrunk once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._made: dict[object, Any] = {}

    def __enter__(self) -> Formats:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

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
        folder, whole = self._folder / name, self.adapter(name)
        layout = self._layout(name)
        views = matching.match(whole, self.base(family_of(name), layout)) if layout else [()] * len(whole)
        layers = some_of(matching.bind(whole, views, None).layers)
        by = divisor(layers)
        source = write_some(folder, name, whole, layers, by)
        before, base, place = self._opened(open_adapter, source), None, None
        if layout:
            contents = {
                part: {key: divided(shape, by) for key, shape in tensors.items()}
                for part, tensors in contents_of(family_of(name), layout).items()
            }
            place = fixtures.write_parts(folder, "base", contents, {"title": name})
            with open_base(place) as empty:
                fill(empty, before)
            base = self._opened(open_base, place)
            before = matching.bind(before, matching.match(before, base), base)
        others = any(not layer.family.written for layer in layers)
        results = {}
        for form in _FORMS if others else _FORMS[:1]:
            report = resize(
                source,
                base=place,
                recipes=list(_RECIPES.values()),
                output=folder / form,
                dtype="fp32",
                form=form,
            )
            assert report.failed == ()
            results |= {(form, recipe): each for recipe, each in zip(_RECIPES, report.results, strict=True)}
        return Shrunk(before, base, results)

    def _layout(self, name: str) -> str:
        """The layout of the base that differs most from the adapter's own; "" if its shapes fit none."""
        if name in SYNTHETIC or not len(self.adapter(name)):
            return ""

        def differs(layout: str) -> int:
            found = matching.match(self.adapter(name), self.base(family_of(name), layout))
            return sum(len(views) > 1 or any(view.rows for view in views) for views in found)

        return max(LAYOUTS[family_of(name)], key=differs)


def write_some(folder: Path, name: str, whole: Adapter, layers: Sequence[Layer], by: int) -> Path:
    """A file, or PEFT folder, with these layers of a listed adapter, and with some of its other tensors."""
    random = torch.Generator().manual_seed(len(name))
    tensors = {}
    for layer in layers:
        for role, key in {**layer.keys, **layer.common}.items():
            tensors[key] = numbers(layer, role, smaller(layer, role, layer.infos[role].shape, by), random)
    chosen, reasons = {layer.name for layer in layers}, Counter[str]()
    for key, reason in whole.others.items():
        if reasons[reason] < _MOST_LAYERS or layer_name(key) in chosen:
            tensors[key] = torch.randn(divided(whole.store.tensors[key].shape, by), generator=random)
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


# --- what is compared ---------------------------------------------------------------------------


def distance(one: AnyDelta, other: AnyDelta) -> tuple[float, float]:
    """(‖one - other‖_F, ‖one‖_F)."""
    if isinstance(one, Delta) and isinstance(other, Delta) and math.prod(one.shape) > 1 << 20:
        up, down = one.scale * one.up.double(), one.down.double()
        up2, down2 = -other.scale * other.up.double(), other.down.double()
        return norm_of(torch.cat([up, up2], 1), torch.cat([down, down2])), norm_of(up, down)
    dense = one.dense().double()
    return float((dense - other.dense().double().reshape(dense.shape)).norm()), float(dense.norm())


def norm_of(up: Tensor, down: Tensor) -> float:
    """‖up · down‖_F without the product; differences are exact to about 1e-8 of what is subtracted."""
    return math.sqrt(max(0.0, float(((up.mT @ up) * (down @ down.mT)).sum())))


def by_address(adapter: Adapter) -> dict[tuple[str, str], Layer]:
    """The layers by the weights that they change, whatever stands before their names."""
    return {address(layer.name): layer for layer in adapter}


def explained(shrunk: Shrunk, form: str, recipe: str) -> dict[str, str]:
    """Key -> why no tensor of this name is in the output, of all that are said to be gone."""
    removed = {each.name: each.reason for each in shrunk.results[form, recipe].removed}
    keys = {key: reason for key, reason in removed.items() if key in shrunk.before.store.tensors}
    with shrunk.after(form, recipe) as after:
        written = by_address(after)
        for layer in shrunk.before:
            new = written.get(address(layer.name))
            if layer.name in removed:
                keys |= dict.fromkeys(layer.keys.values(), removed[layer.name])
            elif new and new.family is not layer.family:
                keys |= dict.fromkeys(layer.keys.values(), "written as LoRA")
    return keys


def scale_by(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a LoRA layer with. Its rank, by the settings, must be the one that is stored."""

    def value(patterns: Mapping[str, float], default: float) -> float:
        return next((each for name, each in patterns.items() if re.match(rf"(.*\.)?({name})$", module)), default)

    assert value(config.get("rank_pattern", {}), config["r"]) == rank
    alpha = value(config.get("alpha_pattern", {}), config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


# --- tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def formats() -> Iterator[Formats]:
    with tempfile.TemporaryDirectory() as folder, Formats(Path(folder)) as made:  # too large to be kept by pytest
        yield made


def outputs(shrunk: Shrunk, *recipes: str) -> Iterator[tuple[str, str, FileResult]]:
    """(form, recipe, result) of the outputs by these recipes, or all."""
    for (form, recipe), result in shrunk.results.items():
        if not recipes or recipe in recipes:
            yield form, recipe, result


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_tensor_is_part_of_a_layer_or_has_a_reason_to_stay(formats: Formats, name: str) -> None:
    adapter = formats.adapter(name)
    of_layers = Counter(key for layer in adapter for key in layer.keys.values())
    assert not any(count > 1 for count in of_layers.values())
    assert of_layers.keys() | adapter.common | adapter.others.keys() == fixtures.shapes(name).keys()
    assert not (of_layers.keys() | adapter.common) & adapter.others.keys()
    assert all(adapter.others.values())
    modules = {layer_name(key) for key in fixtures.shapes(name).keys() - adapter.others.keys() - adapter.common}
    assert {layer.name for layer in adapter} == modules


PAIRS = [(name, layout) for name in ADAPTERS for layout in LAYOUTS[family_of(name)]]


@pytest.mark.parametrize(("name", "layout"), PAIRS, ids=[f"{name}-{layout}" for name, layout in PAIRS])
def test_every_layer_changes_a_weight_of_its_base(formats: Formats, name: str, layout: str) -> None:
    adapter, base = formats.adapter(name), formats.base(family_of(name), layout)
    found = [base.find(layer.name) for layer in adapter] if name in SYNTHETIC else matching.match(adapter, base)
    missing = {layer.name for layer, views in zip(adapter, found, strict=True) if not views}
    assert missing == {layer for listed, layer in EXCEPTIONS if listed == name}


@pytest.mark.parametrize("name", ADAPTERS)
def test_layers_that_keep_all_their_energy_stay_what_they_are(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    for form, recipe, result in outputs(shrunk, "all"):
        assert result.relative_error < 1e-6
        with shrunk.after(form, recipe) as after:
            written = by_address(after)
            for layer in shrunk.before:
                if form == "lora" or layer.family.written:
                    new = written[address(layer.name)]
                    lost, whole = distance(layer.delta, new.delta)
                    assert lost <= 1e-5 * whole, layer.name
                    assert new.shape == layer.shape


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_error_that_is_reported_is_that_of_the_weights(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    for form, recipe, result in outputs(shrunk, "most", "few"):
        rows = {row.name: row for row in result.layers}
        assert len(rows) == len(shrunk.before) or form != "lora"
        squares = [0.0, 0.0]
        with shrunk.after(form, recipe) as after:
            written = by_address(after)
            for layer in shrunk.before:
                if row := rows.get(layer.name):
                    new = written[address(layer.name)]
                    stays = new.family is layer.family and not layer.family.written
                    lost = 0.0 if stays else distance(layer.delta, new.delta)[0]
                    whole = distance(layer.delta, layer.delta)[1]
                    squares = [squares[0] + lost**2, squares[1] + whole**2]
                    assert row.rle_lora == pytest.approx(lost / whole, abs=1e-4), layer.name
                    assert row.energy >= 0.9 - 1e-6 or recipe == "few"
                    assert row.rank_after == new.rank
                    if row.rle_ckpt is not None and shrunk.base:
                        weight = shrunk.base.weight(shrunk.base.find(layer.name))
                        assert row.rle_ckpt == pytest.approx(lost / float(weight.norm()), rel=1e-3, abs=1e-6)
        if rows:
            assert result.relative_error == pytest.approx(math.sqrt(squares[0] / squares[1]), abs=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_tensor_is_lost_or_changed_without_a_word(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    before = shrunk.before.store
    for form, recipe, result in outputs(shrunk):
        with shrunk.after(form, recipe) as after:
            gone = explained(shrunk, form, recipe)
            assert before.tensors.keys() - after.store.tensors.keys() == gone.keys() - after.store.tensors.keys()
            assert all(gone.values())
            stay = {each.key: each.reason for each in result.verbatim}
            assert all(stay.values())
            for key in stay:
                assert after.store.tensors[key].dtype == before.tensors[key].dtype
                assert torch.equal(after.store.read(key), before.read(key)), key
            new = {layer.keys[role] for layer in after for role in layer.keys if layer.keys[role] not in stay}
            assert after.store.tensors.keys() == stay.keys() | new
            assert shrunk.before.others.keys() <= stay.keys()
            assert {layer.keys["magnitude"] for layer in shrunk.before if "magnitude" in layer.keys} <= stay.keys()
            if form == "same":
                others = [layer for layer in shrunk.before if not layer.family.written]
                assert {key for layer in others for key in layer.keys.values()} <= stay.keys()
            if form == "lora":
                assert {layer.family.name for layer in after} <= {"lora", "embedding"}
            assert not any("mid" in layer.keys for layer in after)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_output_is_named_and_kept_as_its_input(formats: Formats, name: str) -> None:
    shrunk = formats.shrunk(name)
    for form, recipe, result in outputs(shrunk):
        place = Path(result.output)
        files = [place] if place.is_file() else sorted(place.iterdir())
        folder = "config" in fixtures.about(name)
        assert [path.name for path in files] == ([CONFIG_FILE, WEIGHTS_FILE] if folder else [place.name])
        assert files[-1].stat().st_size == result.bytes_after
        with shrunk.after(form, recipe) as after:
            assert by_address(after).keys() == by_address(shrunk.before).keys()
            if folder:
                check_settings(shrunk, after, json.loads((place / CONFIG_FILE).read_text()))
            if METADATA_KEY in after.store.metadata:
                settings = json.loads(after.store.metadata[METADATA_KEY])
                for part_of in ("unet", "text_encoder", "text_encoder_2"):
                    ranks = [layer.rank for layer in after if layer.name.startswith(f"{part_of}.")]
                    assert settings[f"{part_of}.r"] == max(ranks)
            for old, new in zip(shrunk.before, after, strict=True):
                if "bias" in old.keys:
                    before = old.scale * shrunk.before.store.read(old.keys["bias"]).float()
                    bias = new.scale * after.store.read(new.keys["bias"]).float()
                    assert torch.allclose(bias, before, rtol=1e-5, atol=1e-7)


def check_settings(shrunk: Shrunk, after: Adapter, config: Mapping[str, Any]) -> None:
    """Whether the settings of a PEFT folder are those of its tensors."""
    old = shrunk.before.settings[""]
    as_lora = any(each.family is not one.family for one, each in zip(shrunk.before, after, strict=True))
    assert config["peft_type"] == ("LORA" if as_lora else old["peft_type"])
    assert config["target_modules"] == old["target_modules"]
    if config["peft_type"] == "LORA":
        for layer in after:
            expected = scale_by(config, layer.name.removeprefix("base_model.model."), layer.rank)
            assert layer.scale == pytest.approx(expected), layer.name
    else:
        assert config == old


# --- the table ----------------------------------------------------------------------------------

# Adapters, in the order of the table: list -> what it is.
WHAT = {
    "sd15_lora_kohya": "LoRA, UNet and text encoder",
    "sd15_lora_diffusers_processor": "LoRA, oldest names (`processor`)",
    "sd15_locon_kohya": "LoCon (LoRA of convolutions too)",
    "sd15_locon_norm_kohya": "LoCon with normalisation layers",
    "sd15_dylora_kohya": "DyLoRA",
    "sd15_loha_conv_kohya": "LoHa of convolutions too",
    "sd15_loha_tucker_kohya": "LoHa with Tucker cores",
    "sd15_lokr_both_kohya": "LoKr, both factors decomposed",
    "sd15_lokr_unbalanced_kohya": "LoKr, unbalanced",
    "sd15_glora_kohya": "GLoRA",
    "sd15_full_kohya": "full differences",
    "sd15_diag_oft_kohya": "Diag-OFT",
    "sd15_diag_oft_rescale_kohya": "Diag-OFT, rescaled",
    "sd15_boft_kohya": "BOFT",
    "sd15_tlora_kohya": "T-LoRA",
    "sd2_lora_kohya": "LoRA, UNet and text encoder",
    "sdxl_lora_kohya_te1_te2": "LoRA, UNet and both text encoders",
    "sdxl_lora_diffusers_peft": "LoRA, ranks and alphas in the header",
    "sdxl_locon_kohya": "LoCon",
    "sdxl_locon_tucker_kohya": "LoCon with Tucker cores",
    "sdxl_dora_kohya_out": "DoRA",
    "sdxl_loha_kohya": "LoHa",
    "sdxl_lokr_kohya_factor8": "LoKr",
    "sdxl_lokr_kohya_full": "LoKr, both factors whole",
    "sdxl_glora_kohya": "GLoRA",
    "sdxl_ia3_kohya": "(IA)³",
    "sdxl_oft_kohya": "OFT",
    "sdxl_refiner_lora": "LoRA",
    "sd35_medium_lora_kohya": "LoRA, fused q, k, v and both CLIP encoders",
    "sd35_medium_lora_diffusers": "LoRA",
    "sd35_medium_lokr_simpletuner": "LoKr",
    "flux_lora_kohya": "LoRA",
    "flux_lora_kohya_te1": "LoRA, with CLIP",
    "flux_lora_kohya_t5": "LoRA of the text encoders, CLIP and T5",
    "flux_lora_diffusers": "LoRA",
    "flux_lora_diffusers_no_proj_mlp": "LoRA, without `proj_mlp`",
    "flux_lora_aitoolkit_bfl": "LoRA",
    "flux_lora_xlabs": "LoRA",
    "flux_control_lora_bfl": "control LoRA with biases",
    "flux_lokr_simpletuner": "LoKr",
    "flux_lokr_bfl": "LoKr, both factors whole",
    "flux2_klein4b_lora_diffusers": "LoRA",
    "auraflow_lora_diffusers": "LoRA",
    "hidream_lora_aitoolkit": "LoRA",
    "krea2_lora_diffusers": "LoRA",
    "krea2_lora_kohya": "LoRA",
    "pixart_lora_peft": "LoRA",
    "qwen_image_lora_diffusers": "LoRA",
    "qwen_image_lora_diffusers_downup": "LoRA, `lora_down` and `lora_up`",
    "qwen_image_lora_musubi": "LoRA",
    "qwen_image_lora_peft_default": "LoRA, with an adapter's name (`default`)",
    "qwen_image_lokr_simpletuner": "LoKr",
    "qwen_image_lokr_kohya": "LoKr, both factors whole",
    "z_image_lora_aitoolkit": "LoRA",
    "anima_lora_kohya": "LoRA",
    "anima_lora_kohya_te": "LoRA, with the text encoder",
    "anima_lora_peft_diffusion_model": "LoRA",
    "anima_lokr_dora_diffusion_model": "LoKr, some with DoRA",
    "hunyuan_video_lora_diffusion_pipe": "LoRA",
    "ltxv_lora_comfy": "LoRA",
    "wan21_1_3b_lora_musubi": "LoRA",
    "wan21_1_3b_lora_fun_double_underscore": "LoRA, two underscores (`lora_unet__`)",
    "wan21_1_3b_lora_comfy": "LoRA",
    "wan21_1_3b_lora_diffusers": "LoRA",
    "llama_peft_lora": "LoRA",
    "llama_peft_lora_default_infix": "LoRA, with an adapter's name (`default`), no settings",
    "llama_peft_rank_pattern": "LoRA, patterns of ranks and alphas",
    "llama_peft_rslora": "rsLoRA",
    "llama_peft_dora": "DoRA",
    "llama_peft_lora_bias": "LoRA with biases (`lora_bias`)",
    "llama_peft_lora_embed_head": "LoRA, embedding and head too",
    "llama_peft_lora_modules_to_save": "LoRA with whole modules (`modules_to_save`)",
    "llama_peft_adalora": "AdaLoRA",
    "llama_peft_vera": "VeRA, projections saved",
    "llama_peft_loha": "LoHa",
    "llama_peft_lokr": "LoKr",
    "llama_peft_lokr_both": "LoKr, both factors decomposed",
    "llama_peft_ia3": "(IA)³",
    "llama_peft_oft": "OFT",
    "llama_peft_boft": "BOFT",
    "llama_peft_hra": "HRA",
    "llama_peft_fourierft": "FourierFT",
    "llama_peft_vblora": "VB-LoRA",
    "llama_peft_ln_tuning": "LN tuning",
    "qwen3_peft_lora": "LoRA",
    "gpt2_peft_lora_fan_in_fan_out": "LoRA of transposed weights (`fan_in_fan_out`)",
}
# What the lists call a family or a naming -> what users do.
MODELS = {
    "sd15": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL", "sdxl-refiner": "SDXL refiner", "sd3": "SD 3, 3.5",
    "flux": "FLUX.1", "chroma": "Chroma", "flux2": "FLUX.2", "auraflow": "AuraFlow", "hidream": "HiDream",
    "hunyuan-dit": "HunyuanDiT", "hunyuan-image": "HunyuanImage 2.1", "krea2": "Krea 2", "lumina2": "Lumina 2",
    "pixart": "PixArt-Σ", "qwen-image": "Qwen-Image", "sana": "Sana", "z-image": "Z-Image", "anima": "Anima",
    "hunyuan": "HunyuanVideo", "ltxv": "LTX-Video", "wan21": "Wan 2.1", "wan22": "Wan 2.2", "llm-llama": "Llama",
    "llm-qwen": "Qwen", "llm-gpt2": "GPT-2", "qwen-vl-te": "Qwen2.5-VL", "clip-l": "CLIP-L", "clip-g": "CLIP-G",
    "t5xxl": "T5",
}  # fmt: skip
NAMES = {
    "kohya": "kohya", "musubi": "musubi-tuner", "diffusers": "diffusers", "peft": "PEFT", "comfy": "ComfyUI",
    "ai-toolkit": "ai-toolkit", "diffusion-pipe": "diffusion-pipe", "simpletuner": "SimpleTuner", "xlabs": "XLabs",
    "bfl-control": "Black Forest Labs", "native": "original", "bfl": "original", "ldm": "original",
    "transformers": "transformers", "bitsandbytes": "transformers",
}  # fmt: skip
_QUANTISED = {".scale_weight": "8-bit floats", ".weight_scale": "8-bit floats", "bitsandbytes__nf4": "4-bit nf4"}


@dataclass(frozen=True)
class Row:
    """What the table says of an adapter."""

    name: str
    layers: int
    stay: Mapping[str, int]  # reason -> tensors that no layer shrinks
    found: str  # how many layers have a weight in each layout of the base
    ways: Mapping[str, int]  # how they shrink -> layers
    written: str

    def cells(self) -> list[str]:
        """The row as text."""
        about = fixtures.about(self.name)
        note = "" if about["complete"] else ", names only" if self.name in SYNTHETIC else ", part of a file"
        ways = [way if count == self.layers else f"{count} {way}" for way, count in self.ways.items()]
        return [
            MODELS[about["family"]],
            WHAT[self.name],
            NAMES[about["naming"]],
            str(self.layers) + note,
            "; ".join(f"{count}: {reason}" for reason, count in self.stay.items()),
            self.found,
            "; ".join(ways) or "no",
            self.written,
            f"`{self.name}`",
        ]


_YES, _AS_LORA = "yes", "as LoRA"
_WITH_BASE, _ON_REQUEST = "as LoRA, with its base", "as LoRA, with its base and `--as lora`"


def row_of(formats: Formats, name: str) -> Row:
    """See `Row`."""
    adapter = formats.adapter(name)
    stay = Counter(adapter.others.values())
    stay["DoRA's magnitude"] = sum("magnitude" in layer.keys for layer in adapter)
    found = {layout: found_in(formats, name, layout) for layout in LAYOUTS[family_of(name)]} if len(adapter) else {}
    return Row(name, len(adapter), +stay, _found(name, found), ways_of(formats, name), written_as(formats.shrunk(name)))


def found_in(formats: Formats, name: str, layout: str) -> list[str]:
    """The names of the layers that have a weight in a base."""
    adapter, base = formats.adapter(name), formats.base(family_of(name), layout)
    views = [base.find(layer.name) for layer in adapter] if name in SYNTHETIC else matching.match(adapter, base)
    return [layer.name for layer, each in zip(adapter, views, strict=True) if each]


def _found(name: str, found: Mapping[str, Sequence[str]]) -> str:
    counts = {len(names) for names in found.values()}
    if not counts:
        return ""
    (count,) = counts
    why = "".join(f"; {reason}" for (listed, _), reason in EXCEPTIONS.items() if listed == name)
    return f"{count} in {len(found)} layouts{why}" if len(found) > 1 else f"{count}{why}"


def ways_of(formats: Formats, name: str) -> dict[str, int]:
    """How layers shrink -> how many do."""
    adapter = formats.adapter(name)
    own = sum(layer.family.written is not None for layer in adapter)
    alone = _shrinking(adapter, "lora")
    if alone == len(adapter):
        return {way: count for way, count in ((_YES, own), (_AS_LORA, alone - own)) if count}
    layout = next(iter(LAYOUTS[family_of(name)]))
    base = formats.base(family_of(name), layout)
    bound = matching.bind(adapter, matching.match(adapter, base), base)
    auto, asked = _shrinking(bound, "auto"), _shrinking(bound, "lora")
    counts = {_YES: own, _AS_LORA: alone - own, _WITH_BASE: auto - alone, _ON_REQUEST: asked - auto}
    return {way: count for way, count in counts.items() if count}


def _shrinking(adapter: Adapter, form: str) -> int:
    return len(matching.part(adapter, [()] * len(adapter), form)[0])


def written_as(shrunk: Shrunk) -> str:
    """The container of the outputs, and how new tensors are called."""
    form = "lora" if ("lora", "most") in shrunk.results else "auto"
    place = Path(shrunk.results[form, "most"].output)
    with shrunk.after(form, "most") as after:
        new = after.store.tensors.keys() - shrunk.before.store.tensors.keys()
    endings = sorted({found[0] for key in new if (found := re.search(r"lora_(?:up|down|A|B)(?=\.weight$)", key))})
    names = "same names" if not new else f"`{endings[0]}`, `{endings[1]}`"
    return f"{'folder' if place.is_dir() else 'file'}, {names}"


def containers(formats: Formats, folder: Path, name: str) -> list[str]:
    """What a listed base is read from, with the same result."""
    shapes = fixtures.shapes(name)
    if packed := {word for key in shapes for ending, word in _QUANTISED.items() if key.endswith(ending)}:
        return sorted(packed)  # see test_quantised.py
    base, keys = formats.listed_base(name), sorted(shapes)
    halves = {f"model-0000{number}-of-00002.safetensors": keys[number - 1 :: 2] for number in (1, 2)}
    for file, held in halves.items():
        fixtures.write_header(folder / name / "shards" / file, {key: shapes[key] for key in held})
    index = folder / name / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, held in halves.items() for key in held}}))
    places = {"shards": index}
    if fixtures.about(name)["naming"] == "diffusers":
        part_of = "unet" if base.family.denoiser == "unet" else "transformer"
        places["folder"] = fixtures.write_parts(folder / name, "folder", {part_of: shapes}, {})
    elif fixtures.about(name)["naming"] == "transformers":
        places["folder"] = fixtures.write_header(folder / name / "folder" / "model.safetensors", shapes).parent
    found = ["all-in-one file" if len({part_of for part_of, _ in base.weights}) > 1 else "file"]
    for kind_of, place in places.items():
        with open_base(place) as other:
            if (other.family, other.weights.keys()) == (base.family, base.weights.keys()):
                found.append(kind_of)
    return found


def document(formats: Formats, folder: Path) -> str:
    """The text of `docs/formats.md`."""
    rows = [row_of(formats, name) for name in WHAT]
    bases: dict[str, list[str]] = defaultdict(list)
    for name in BASES:
        bases[family_of(name)].append(name)
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(dict(row.stay))
    shrinking = [row for row in rows if row.ways]
    alone = sum(row.ways.get(_YES, 0) + row.ways.get(_AS_LORA, 0) for row in rows)
    with_base, asked = (sum(row.ways.get(way, 0) for row in rows) for way in (_WITH_BASE, _ON_REQUEST))
    text = TEXT.format(
        adapters=len(rows),
        models=len({fixtures.about(row.name)["family"] for row in rows}),
        bases=len(BASES),
        families=len(bases),
        files=len(shrinking),
        rest=len(rows) - len(shrinking),
        layers=sum(row.layers for row in rows),
        alone=alone,
        with_base=with_base,
        asked=asked,
        stay=sum(reasons.values()),
        adapter_table=table(
            "Model|Adapter|Names|Layers|Tensors that stay|Found in the base|Shrinks|Output|List",
            [row.cells() for row in rows],
        ),
        reason_table=table("Tensors|Why they stay", [[str(n), reason] for reason, n in reasons.most_common()]),
        base_table=table(
            "Model|Names|Layouts|Read from|Adapters|Lists",
            [base_cells(formats, folder, family, bases[family]) for family in MODELS if family in bases],
        ),
    )
    return text


def base_cells(formats: Formats, folder: Path, family: str, lists: Sequence[str]) -> list[str]:
    """The row of a family of models."""
    names = dict.fromkeys(NAMES[fixtures.about(name)["naming"]] for name in lists)
    read = dict.fromkeys(each for name in lists for each in containers(formats, folder, name))
    adapters = sum(family_of(name) == family for name in ADAPTERS)
    told = ", ".join(f"`{name.removeprefix('base_')}`" for name in lists)
    cells = [", ".join(each) for each in (names, LAYOUTS.get(family, ()), read)]
    return [MODELS[family], *cells, str(adapters or ""), told]


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


TEXT = """\
# Which files does lorashrink read?

Adapters and bases are known by their tensors, whatever the file is called. The tables list what the tests read:
{adapters} adapters for {models} families of models, and {bases} bases of {families}. Names and shapes are those of
published files, or those that the named program writes. Some layers of each adapter are filled with numbers, shrunk,
and compared with what they were.

- {files} of the {adapters} adapters shrink; the other {rest} are copied.
- Of {layers} layers, {alone} shrink without a base, {with_base} more with one, and {asked} more with one and
  `--as lora`.
- {stay} tensors beside the layers stay as they are, each with a reason in the report.

Other files are read as well: a model needs to be known only where a base is given, and even then a base of an unknown
family is searched by its own names.

## Adapters

- *Layers*: each changes one weight. "Part of a file" and "names only" (the shapes are made up) tell what the list is,
  where it is no whole file.
- *Found in the base*: layers whose weight was found, in its right shape, in each layout of the base (see below).
- *Shrinks*: "yes" is in its own form. Layers that shrink as LoRA stay in their own form where that is the smaller file,
  or with `--as same`.
- *Output*: a file, or a folder with `adapter_config.json`; and the tensors of new names that LoRA brings.

{adapter_table}

## What stays as it is

These tensors are copied bit by bit. So are layers that need a base, if there is none.

{reason_table}

## Bases

Original names and those of diffusers mean the same weights, fused or split, and each finds the other. Bases are read
from `.safetensors`: one file, shards with their index, or a folder of diffusers or transformers. Also read: pickles
(`.ckpt`, `.pt`, `.bin`) that hold tensors and no code, GGUF (`pip install gguf`), 8-bit floats with or without scales,
and int8, nf4 and fp4 of bitsandbytes. GPTQ, AWQ, nvfp4, SVDQuant and other packed formats are refused by name.

{base_table}

This page is written by `python tests/journeys/test_formats.py`; a test fails when it no longer holds.
"""


@pytest.fixture(scope="module")
def page(formats: Formats, tmp_path_factory: pytest.TempPathFactory) -> str:
    return document(formats, tmp_path_factory.mktemp("containers"))


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_read_from_files_shards_and_folders(formats: Formats, tmp_path: Path, name: str) -> None:
    found = set(containers(formats, tmp_path, name))
    folder = {"folder"} if fixtures.about(name)["naming"] in ("diffusers", "transformers") else set()
    assert recognise(fixtures.shapes(name)) is not None
    assert found <= set(_QUANTISED.values()) or found - {"file", "all-in-one file"} == {"shards"} | folder


def test_every_list_is_in_the_table() -> None:
    assert set(WHAT) == set(ADAPTERS)
    assert {family_of(name) for name in fixtures.LISTED} == set(MODELS)


def test_the_table_in_the_documentation_is_up_to_date(page: str) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == page, "run: python tests/journeys/test_formats.py"


def main() -> None:
    """Write the table anew."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        with Formats(Path(folder)) as formats:
            DOCUMENT.write_text(document(formats, Path(folder) / "containers"), encoding="utf-8")


if __name__ == "__main__":
    main()
