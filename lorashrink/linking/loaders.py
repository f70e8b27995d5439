"""Which programs load an adapter: a table of what each program reads, one row per rule, and where the rule comes from.

A program reads a layer if it knows the name (a row of `Names`) and the ends of all its tensors (`Loader.endings`).
Names are compared in the two layouts that the rules of the base families spell, so that no row lists modules. Add a
program as a row of `LOADERS`.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

from lorashrink.adapters import Adapter, Layer, adapter_family, layer_name
from lorashrink.adapters.peft_keys import only_in_peft
from lorashrink.bases import Base, BaseFamily, family_named
from lorashrink.bases.rules import LAYOUTS
from lorashrink.errors import UsageError
from lorashrink.files.packed import PackedStore
from lorashrink.files.store import IN_8_BITS
from lorashrink.linking.renaming import layer_name_in
from lorashrink.names import address, flat
from lorashrink.text import count_text

OTHER = "other"  # names that adapters use and neither layout has
_ANY = frozenset((*LAYOUTS, OTHER))


@dataclass(frozen=True, slots=True)
class Names:
    """Layer names that a program reads: what they begin with, longest first, and the layouts of what follows.

    `families` are the models for which it does, none for all of them. `only` is what the rest of the name must fit,
    `beside` a tensor that the file must have. `multiplies` says that the program multiplies the factors, which PyTorch
    cannot do in 8 bits: "always", or where there is an "alpha".
    """

    begins: tuple[str, ...]
    layouts: frozenset[str]
    families: frozenset[str] = frozenset()
    only: str = ""
    beside: str = ""
    multiplies: str = ""

    def fails_in_8_bits(self, layer: Layer) -> bool:
        """Whether the program cannot load 8-bit factors of a layer that it reads by this row."""
        return self.multiplies == "always" or (self.multiplies == "alpha" and "alpha" in layer.keys)

    def reads(self, name: str, family: str) -> bool:
        """Whether this row reads a layer of this name, in a file for which it holds."""
        if not name.startswith(self.begins):
            return False
        start = next(prefix for prefix in self.begins if name.startswith(prefix))
        part, module = address(name)
        if not start and (part or module != flat(name)):  # such as `lycoris_x`, which is no bare name
            return False
        rest = name[len(start) :]
        if rest.startswith("_") or (self.only and not re.match(self.only, rest)):
            return False
        return part.startswith("te") or bool(layouts_of(family, rest) & self.layouts)

    def holds(self, family: str, adapter: Adapter) -> bool:
        """Whether the row is for this family of models, and for a file like this."""
        return self.suits(family) and (not self.beside or self.beside in adapter.store.tensors)

    def suits(self, family: str) -> bool:
        """Whether the row is for this family of models."""
        return not self.families or family in self.families


@dataclass(frozen=True, slots=True)
class Loader:
    """A program: the families of models that it runs, and the names and tensors of adapters that it reads.

    `namings` are those of `convert` that suit it, the best first. `folder` says that it reads PEFT folders and
    nothing else, `one_rank` that all layers must have one rank.
    """

    title: str
    source: str
    families: frozenset[str]
    names: tuple[Names, ...]
    endings: str
    namings: tuple[str, ...]
    folder: bool = False
    one_rank: bool = False

    def concerns(self, adapter: Adapter, family: str) -> bool:
        """Whether it runs the model; for pictures nobody asks for a folder, but one may be there."""
        return family in self.families and (not self.folder or adapter.as_folder or family in _LANGUAGE)


@dataclass(frozen=True, slots=True)
class Loads:
    """The programs that load an adapter, and those that run its model but do not load all of it."""

    loads_in: tuple[str, ...] | None = None  # None: the adapter's names tell no family of models
    loads_not: Mapping[str, str] = field(default_factory=dict)  # program -> why
    loads_after: Mapping[str, str] = field(default_factory=dict)  # program -> the command that mends it

    @property
    def lines(self) -> list[str]:
        """What people are told, programs with one answer together; nothing where no family is known."""
        if self.loads_in is None:
            return []
        return [
            f"loads in: {', '.join(self.loads_in) or 'no program that is known here'}",
            *(f"not in {', '.join(programs)}: {why}" for why, programs in _by_answer(self.loads_not)),
            *(f"for {', '.join(programs)}: {line}" for line, programs in _by_answer(self.loads_after)),
        ]


def _by_answer(answers: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    together: dict[str, list[str]] = {}
    for program, answer in answers.items():
        together.setdefault(answer, []).append(program)
    return list(together.items())


# --- the table ----------------------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def names(
    begins: str, layouts: str, families: str = "", *, only: str = "", beside: str = "", multiplies: str = ""
) -> Names:
    """A row; words in a text stand for several. The prefix `-` is none at all."""
    prefixes = tuple(sorted(("" if prefix == "-" else prefix for prefix in begins.split()), key=len, reverse=True))
    return Names(prefixes, _words(layouts), _words(families), only, beside, multiplies)


_UNETS = "sd15 sd2 sdxl sdxl-refiner"
_LANGUAGE = _words("llm gpt2")
_PICTURES = _words(
    f"{_UNETS} cascade anima auraflow chroma flux flux2 hidream hunyuan hunyuan-dit hunyuan-image krea2 ltxv lumina2 "
    "pixart qwen-image sana sd3 wan z-image"
)
_DIFFUSERS_ONLY = _words("ace-step ernie-image flux3 ideogram4 minimax-h3")

# Ends of tensors' names.
_UP_DOWN = r"\.lora_(?:up|down)\.weight|\.alpha"
_TUCKER = r"\.lora_mid\.weight"
_A_B = r"\.lora_[AB]\.weight"
_DEFAULT = r"\.lora_[AB]\.default\.weight"
_BARE_A_B = r"\.lora_[AB]"
_PROCESSOR = r"_lora\.(?:up|down)\.weight"
_DOTTED = r"\.lora\.(?:up|down)\.weight|\.lora_linear_layer\.(?:up|down)\.weight"
_XLABS = r"\.(?:up|down)\.weight"
_DORA = r"\.dora_scale"
_DORA_PEFT = r"\.lora_magnitude_vector(?:\.weight)?"
_HADA = r"\.hada_(?:w[12]_[ab]|t[12])"
_KRON = r"\.lokr_(?:w[12](?:_[ab])?|t2)"
_GLORA = r"\.[ab][12]\.weight"
_OFT = r"\.oft_blocks|\.rescale"
_IA3 = r"\.on_input|\.weight"
_DIFF = r"\.diff(?:_b)?"
_NORMS = r"\.[wb]_norm"
_CONTROL = r"\.lora_B\.bias|\.scale"
_WHOLE = r"\.(?:set|reshape)_weight"


def _any(*endings: str) -> str:
    return "|".join(endings)


# ComfyUI knows the projections of a UNet's attention by the names of their processors alone.
_COMFY_UNET = r"(?!.*(?<!\.processor)\.to_(?:q|k|v|out)(?:\.0)?$)"
# What A1111 renames of diffusers' names; SDXL's first upsampler gets the name that it has in SD 1.
_A1111_UNET = (
    r"(?:conv_(?:in|out)|time_embedding_linear_\d|mid_block_(?:attentions|resnets)_"
    r"|(?:down|up)_blocks_\d_(?:attentions|resnets|(?:down|up)samplers_0_conv))"
)
_TEXT_KOHYA = (
    names("lora_te_", "", "sd15 sd2 sdxl sdxl-refiner anima lumina2 qwen-image z-image"),
    names("lora_te1_", "", "sd15 sd2 sdxl flux sd3 hunyuan-dit"),
    names("lora_te2_", "", "sdxl sd3 flux"),
    names("lora_te3_", "", "sd3 flux"),
)
_COMFY = (
    names("lora_unet_ diffusion_model.", "native"),
    names("lora_unet_ lycoris_", "diffusers", _UNETS),
    names("unet. -", "diffusers", _UNETS, only=_COMFY_UNET),
    names("lora_unet__", "native", "wan", beside="lora_unet__blocks_0_cross_attn_k.lora_down.weight"),
    names("lora_prior_unet_ lora_prior_te_", "native diffusers", "cascade"),
    names("transformer.", "diffusers", "sd3 auraflow pixart flux chroma flux2 qwen-image krea2 z-image hidream"),
    names("lycoris_", "diffusers", "sd3 flux chroma flux2 qwen-image krea2 z-image hidream"),
    names("lora_transformer_", "diffusers", "sd3 flux chroma flux2"),
    names("base_model.model.", "diffusers", "sd3 pixart"),
    names("unet.base_model.model.", "diffusers", "pixart"),
    names("base_model.model.", "native", "hunyuan-dit"),
    names("-", "diffusers", "flux chroma flux2 qwen-image krea2 z-image"),
    names("-", "native", "ltxv"),
    names("-", "native", "flux", beside="single_blocks.0.norm.key_norm.scale"),  # control LoRAs
    names("-", "other", "flux", beside="single_blocks.37.processor.qkv_lora.up.weight"),  # X-Labs, all blocks
    names("diffusion_model.", "diffusers", "krea2 z-image"),
    names("transformer. diffusion_model.", "native other", "hunyuan"),
    *_TEXT_KOHYA,
    names("text_encoder.", "", "sd15 sd2 sdxl sdxl-refiner flux sd3"),
    names("text_encoder_2.", "", "sdxl sd3"),
    names("text_encoders.", ""),
)
_DIFFUSERS_TEXT = (
    names("text_encoder.", "", f"{_UNETS} sd3 flux"),
    names("text_encoder_2.", "", "sdxl sdxl-refiner sd3"),
)
_FLUX_BARE = (
    names("-", "native", "flux", beside="single_blocks.0.norm.key_norm.scale"),  # control LoRAs
    names("-", "other", "flux"),  # X-Labs
)
LOADERS: tuple[Loader, ...] = (
    Loader(
        "ComfyUI",
        "github.com/Comfy-Org/ComfyUI: comfy/lora.py, comfy/lora_convert.py, comfy/weight_adapter",
        _PICTURES,
        _COMFY,
        _any(
            *(_UP_DOWN, _TUCKER, _A_B, _DEFAULT, _BARE_A_B, _PROCESSOR, _DOTTED, _XLABS, _DORA, _HADA, _KRON),
            *(_GLORA, _OFT, _DIFF, _NORMS, _CONTROL, _WHOLE),
        ),
        ("comfy", "kohya"),
    ),
    Loader(
        "diffusers",
        "github.com/huggingface/diffusers 0.42: loaders/lora_pipeline.py, loaders/lora_conversion_utils.py",
        (_PICTURES - {"cascade", "pixart", "hunyuan-dit", "hunyuan-image"}) | _DIFFUSERS_ONLY,
        (
            names("lora_unet_", "native diffusers", _UNETS),
            names("lora_te_ lora_te1_", "", f"{_UNETS}"),
            names("lora_te2_", "", "sdxl sdxl-refiner"),
            names("unet.", "diffusers", _UNETS),
            names("transformer.", "diffusers"),
            names("connectors.", "native diffusers other", "ltxv"),
            names("lora_unet_", "native", "flux chroma flux2 wan qwen-image z-image", multiplies="always"),
            names("lora_te1_", "", "flux", multiplies="always"),
            names("diffusion_model.", "native", "flux2 ltxv hidream lumina2 krea2 anima"),
            names("diffusion_model.", "native", "wan", multiplies="alpha"),
            names("diffusion_model.", "native", "qwen-image", multiplies="always"),
            names("diffusion_model.", "native diffusers", "z-image", multiplies="always"),
            names("transformer.", "native", "hunyuan"),
            names("base_model.model.", "native", "flux flux2 krea2"),
            names("-", "diffusers", "qwen-image", multiplies="alpha"),
            *_FLUX_BARE,
            *_DIFFUSERS_TEXT,
        ),
        _any(_UP_DOWN, _A_B, _DEFAULT, _PROCESSOR, _DOTTED, _XLABS, _DORA_PEFT, _CONTROL),
        ("diffusers", "kohya"),
    ),
    Loader(
        "A1111",
        "github.com/AUTOMATIC1111/stable-diffusion-webui 1.10: extensions-builtin/Lora/networks.py",
        _words("sd15 sd2 sdxl sd3"),
        (
            names("lora_unet_ oft_unet_", "native", "sd15 sd2 sdxl"),
            names("lora_unet_", "diffusers", "sd15 sd2", only=_A1111_UNET),
            names("lora_unet_", "diffusers", "sdxl", only=rf"(?!up_blocks_0_upsamplers){_A1111_UNET}"),
            names("lora_te_", "", "sd15 sd2", only="text_model_encoder_layers_"),
            names("lora_te1_", "", "sd15 sdxl", only="text_model_"),
            names("lora_te2_", "", "sdxl", only="text_model_encoder_layers_"),
            names("transformer.", "diffusers", "sd3", only=r"transformer_blocks\.\d+\.attn\.to_(?:q|k|v|out\.0)$"),
        ),
        _any(_UP_DOWN, _A_B, _TUCKER, _DORA, _HADA, _KRON, _GLORA, _OFT, _IA3, _DIFF, _NORMS),
        ("kohya",),
    ),
    Loader(
        "Forge",
        "github.com/lllyasviel/stable-diffusion-webui-forge: packages_3rdparty/*_lora_collection/lora.py",
        _words("sd15 sd2 sdxl flux chroma sd3"),
        (
            names("lora_unet_ diffusion_model.", "native"),
            names("lora_unet_ lycoris_", "diffusers", _UNETS),
            names("unet. -", "diffusers", _UNETS, only=_COMFY_UNET),
            names("transformer. lycoris_ lora_transformer_", "diffusers", "flux"),
            *_TEXT_KOHYA,
            names("text_encoder.", "", "sd15 sd2 sdxl flux sd3"),
            names("text_encoder_2.", "", "sdxl sd3"),
        ),
        _any(_UP_DOWN, _TUCKER, _A_B, _PROCESSOR, _DOTTED, _DORA, _HADA, _KRON, _GLORA, _DIFF, _NORMS),
        ("kohya",),
    ),
    Loader(
        "sd-scripts",
        "github.com/kohya-ss/sd-scripts: create_network_from_weights of networks/lora*.py",
        _words("sd15 sd2 sdxl flux sd3 lumina2 hunyuan-image anima"),
        (
            names("lora_unet_", "native diffusers", "sdxl"),
            names("lora_unet_", "diffusers", "sd15 sd2"),
            names("lora_unet_", "native", "flux sd3 lumina2 hunyuan-image anima"),
            names("lora_te_", "", "sd15 sd2 lumina2 anima"),
            names("lora_te1_", "", "sdxl flux sd3"),
            names("lora_te2_", "", "sdxl sd3"),
            names("lora_te3_", "", "flux sd3"),
        ),
        _UP_DOWN,
        ("kohya",),
    ),
    Loader(
        "InvokeAI",
        "github.com/invoke-ai/InvokeAI: invokeai/backend/patches/lora_conversions",
        _words("sd15 sd2 sdxl flux flux2 qwen-image krea2 anima wan z-image"),
        (
            names("lora_unet_", "diffusers", "sd15 sd2 sdxl"),
            names("lora_unet_", "native", "sdxl flux krea2 anima wan qwen-image"),
            names("lora_unet_", "diffusers", "wan"),
            names("lora_unet__", "diffusers", "z-image"),
            names("lora_te_", "", "sd15 sd2 anima"),
            names("lora_te1_", "", "sdxl flux"),
            names("lora_te2_", "", "sdxl"),
            names("transformer.", "diffusers", "flux flux2 qwen-image krea2 wan z-image"),
            names("lora_transformer_", "diffusers", "flux"),
            names("base_model.model.", "native diffusers", "flux flux2"),
            names("diffusion_model.", "native", "flux flux2 krea2 anima wan z-image"),
            names("diffusion_model.", "diffusers", "krea2 wan z-image"),
            names("-", "diffusers", "flux2 qwen-image"),
            *_FLUX_BARE,
        ),
        _any(
            *(_UP_DOWN, _TUCKER, _A_B, _DEFAULT, _XLABS, _DORA, _HADA, _KRON, _IA3, _DIFF, r"\.w_norm"),
            *(_CONTROL,),
        ),
        ("kohya", "diffusers"),
    ),
    Loader(
        "stable-diffusion.cpp",
        "github.com/leejet/stable-diffusion.cpp: src/name_conversion.cpp, src/model/adapter/lora.hpp",
        _words(f"{_UNETS} sd3 flux chroma flux2 wan qwen-image z-image anima krea2 hunyuan") - {"sdxl-refiner"},
        (
            names("lora_unet_ diffusion_model.", "native"),
            names("lora_unet_ lycoris_ unet.", "diffusers", "sd15 sd2 sdxl"),
            names("transformer. diffusion_model.", "diffusers", "sd3 flux flux2 z-image anima krea2 hunyuan"),
            names("transformer.", "native", "qwen-image hunyuan"),
            names("-", "diffusers", "sd3 flux flux2 qwen-image krea2"),
            names("lora_te_ lora_te1_", "", "sd15 sd2 sdxl flux sd3"),
            names("lora_te2_", "", "sdxl sd3"),
            names("lora_te3_", "", "sd3 flux"),
            names("text_encoder.", "", "sd15 sd2 sdxl"),
        ),
        _any(_UP_DOWN, _TUCKER, _A_B, _DEFAULT, _BARE_A_B, _PROCESSOR, r"\.lora\.(?:up|down)\.weight")
        + "|"
        + _any(_HADA, _KRON, _DIFF),
        ("kohya", "comfy"),
    ),
    Loader(
        "PEFT",
        "github.com/huggingface/peft: PeftModel.from_pretrained",
        _PICTURES | _DIFFUSERS_ONLY | _LANGUAGE,
        (names("base_model.model.", "native diffusers other"),),
        ".*",
        ("peft",),
        folder=True,
    ),
    Loader(
        "vLLM",
        "docs.vllm.ai: LoRA adapters; vllm/lora/peft_helper.py",
        _LANGUAGE,
        (names("base_model.model.", "native diffusers other"),),
        _A_B,
        ("peft",),
        folder=True,
        one_rank=True,
    ),
)


# --- what a name tells ------------------------------------------------------------------------


@cache
def _spellings(family: str) -> Mapping[str, re.Pattern[str]]:
    """Layout -> what the names that only its rules spell look like with `_` for `.`."""
    base_family = family_named(family)
    patterns: dict[str, list[str]] = {layout: [] for layout in (*LAYOUTS, OTHER)}
    for rule in base_family.rules.rules if base_family else ():
        for index, spelling in enumerate(rule.spellings):
            layout = LAYOUTS[index] if index < len(LAYOUTS) else OTHER
            for name in filter(None, spelling.names):
                start, rest = (name[:-2], ".+") if name.endswith("{}") else (name, "")
                patterns[layout].append(r"\w+?".join(re.escape(flat(part)) for part in start.split("{}")) + rest)
    return {layout: re.compile("|".join(names) or "(?!)") for layout, names in patterns.items()}


@lru_cache(1 << 14)
def layouts_of(family: str, module: str) -> frozenset[str]:
    """The layouts that have a module of this name, with dots or without; all of them if no rule tells."""
    name = flat(module)
    spelled = frozenset(layout for layout, pattern in _spellings(family).items() if pattern.fullmatch(name))
    return spelled or _ANY


@lru_cache(1 << 10)  # a file has few endings, each of them thousands of times
def _fits(endings: str, ending: str) -> bool:
    """Whether this pattern is that of an ending."""
    return re.fullmatch(endings, ending) is not None


# --- which programs read a file -----------------------------------------------------------------


def loads(adapter: Adapter, family: str | None = None) -> Loads:
    """Which programs load the adapter, for a model of this family, or of the one that its names point to.

    Answers from the header alone.
    """
    if isinstance(adapter.store, PackedStore):
        return Loads((), {}, {"all programs": shlex.join(["lorashrink", "unpack", str(adapter.path), "-o", "FOLDER"])})
    if family not in _PICTURES | _DIFFUSERS_ONLY | _LANGUAGE:
        family = adapter_family(adapter)
    if family is None or not adapter.layers:
        return Loads()
    dtypes = frozenset((key, info.dtype) for key, info in adapter.store.tensors.items())
    several = len({layer.rank for layer in adapter.layers}) > 1
    experts = any(layer.family.name == "experts" for layer in adapter.layers)
    # Adapters of a batch mostly have the same tensors.
    same = (family, adapter.as_folder, several, experts, *_of_peft(adapter), dtypes)
    if same not in _answers:
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        readers = [_Reader(loader, adapter, family) for loader in LOADERS if loader.concerns(adapter, family)]
        reasons = {reader: reader.why_not() for reader in readers}
        _answers[same] = Loads(
            tuple(reader.loader.title for reader, reason in reasons.items() if not reason),
            {reader.loader.title: reason for reader, reason in reasons.items() if reason},
            {
                reader.loader.title: command
                for reader, reason in reasons.items()
                if reason and (command := reader.command())
            },
        )
    return _answers[same]


def _of_peft(adapter: Adapter) -> list[str]:
    """The settings that make the whole adapter another one, and that PEFT alone follows."""
    kept = {key: None for config in adapter.settings.values() for key in only_in_peft(config)}
    return [key for key in kept if key != "target_parameters"]  # that is said of its layers


_MOST_ANSWERS = 16
_answers: dict[object, Loads] = {}


# What is said of tensors that a program does not read: by the role in LoRA layers, else by the family.
_TITLES = {"magnitude": "magnitudes of DoRA", "mid": "Tucker cores", "bias": "biases of LoRA"}
_FAMILIES = {
    "adalora": "AdaLoRA",
    "embedding": "LoRA of embeddings",
    "experts": "LoRA of experts (target_parameters)",
    "full": "full differences",
    "glora": "GLoRA",
    "ia3": "IA3",
    "loha": "LoHa",
    "lokr": "LoKr",
    "miss": "MiSS",
    "oft": "OFT",
    "vera": "VeRA",
}


class _Reader:
    """A program before an adapter."""

    def __init__(self, loader: Loader, adapter: Adapter, family: str) -> None:
        self.loader, self.adapter, self.family = loader, adapter, family
        self.rows = [row for row in loader.names if row.holds(family, adapter)]
        # of each layer the roles of tensors whose names have endings that the program does not read
        self.unread = [
            [role for role, key in layer.keys.items() if not _fits(loader.endings, key[len(layer.name) :])]
            for layer in adapter.layers
        ]
        self.named = [[row for row in self.rows if row.reads(layer.name, family)] for layer in adapter.layers]

    def why_not(self) -> str:
        """What keeps the program from reading all of the adapter, "" if nothing does."""
        if self.loader.folder and not self.adapter.as_folder:
            return "a file, where a PEFT folder is read"
        if self.adapter.as_folder and not self.loader.folder:
            return "a PEFT folder, where a file is read"
        counts = Counter(map(self._unread_kind, self.adapter.layers, self.unread, self.named))
        total = len(self.adapter.layers)
        shares = {kind: "" if count == total else f" ({count} of {total} layers)" for kind, count in counts.items()}
        reasons = [f"{kind}{share}" for kind, share in shares.items() if kind]
        if reasons:
            return "; ".join(reasons)
        beside = []
        for key in self.adapter.others:
            ending = key[len(layer_name(key)) :] or "." + key.rpartition(".")[2]
            if not _fits(self.loader.endings, ending):
                beside.append(key)
        if beside:
            return f"{count_text(len(beside), 'tensor')} beside the layers not read, such as {beside[0]}"
        if self.loader.title != "PEFT" and (settings := _of_peft(self.adapter)):
            return f"{settings[0]} not followed"
        if self.loader.one_rank and len({layer.rank for layer in self.adapter.layers}) > 1:
            return "several ranks not read"
        return ""

    def _unread_kind(self, layer: Layer, unread: Sequence[str], rows: Sequence[Names]) -> str:
        """Why the program does not read a layer, "" if it does."""
        if unread and all(role in _TITLES for role in unread):
            return f"{_TITLES[unread[0]]} not read"
        of_experts = layer.family.name == "experts" and self.loader.title != "PEFT"
        if of_experts or (unread and layer.family.name != "lora"):
            return f"{_FAMILIES.get(layer.family.name, layer.family.name)} not read"
        if unread or not rows:
            return "names not known"
        if layer.dtype.startswith("F8") and all(row.fails_in_8_bits(layer) for row in rows):
            return "fp8 factors multiplied at loading, which fails"
        return ""

    def command(self) -> str:
        """The command that makes a file for the program, "" if there is none."""
        unread = list(zip(self.adapter.layers, self.unread, strict=True))
        lora = {role for layer, roles in unread for role in roles if layer.family.name == "lora"}
        foreign = any(roles and layer.family.name != "lora" for layer, roles in unread)
        names_known = all(self.named)
        naming = ""
        if not names_known or lora or self.loader.folder is not self.adapter.as_folder:
            family = family_named(self.family)
            namings = [
                naming
                for naming in self.loader.namings
                if family and _reads_naming(self.loader, family, self.adapter, naming)
            ]
            if not namings:
                return ""
            naming = namings[0]
            if naming == "peft" and any(layer.family.name != "lora" for layer in self.adapter.layers):
                return ""  # no one command makes such a folder
        for role in lora & _RENAMED.keys():
            ending = _RENAMED[role][naming not in ("kohya", "comfy")]
            dropped = self.loader.one_rank and role == "bias"  # targets drop biases
            if not dropped and not _fits(self.loader.endings, ending):
                return ""
        if _of_peft(self.adapter):
            return ""
        if self.loader.one_rank:
            renaming = "" if self.adapter.as_folder else "--naming peft MODEL "
            return "" if foreign or "magnitude" in lora else f"lorashrink resize --target vllm {renaming}FILE"
        if foreign or "mid" in lora:
            renaming = "" if names_known else f"--naming {naming} "
            return f"lorashrink resize --as lora -r energy=0.999 {renaming}MODEL FILE"
        return f"lorashrink convert --naming {naming} MODEL FILE" if naming else ""


# Role -> the ending that it has in kohya's and ComfyUI's naming, and in the others.
_RENAMED = {"magnitude": (".dora_scale", ".lora_magnitude_vector"), "bias": (".diff_b", ".lora_B.bias")}


def open_for_8_bits(
    open_as: Callable[[str | None], Adapter], base: Base | None, naming: str | None, *, dtype: str
) -> Adapter:
    """The adapter that `open_as` makes for a naming, in another one where its 8-bit factors would not load.

    dtype: the user's word for the output's. With "auto" the adapter keeps its names where no others are known, and is
    then written in fp16 (see `hinders_8_bits`). Raises as `naming_for_8_bits` and `open_as`.
    """
    adapter = open_as(naming)
    if dtype not in IN_8_BITS:
        return adapter
    try:
        new_naming = naming_for_8_bits(adapter, base)
    except UsageError:
        if dtype == "auto":
            return adapter
        adapter.close()
        raise
    if new_naming is None:
        return adapter
    adapter.close()
    note = f"has {new_naming} names: under its input's the factors are multiplied at loading, which fails in fp8"
    adapter = open_as(new_naming)
    return replace(adapter, notes=(*adapter.notes, note))


def naming_for_8_bits(adapter: Adapter, base: Base | None) -> str | None:
    """A naming in which programs load the adapter's layers with 8-bit factors; None if its own names are fine.

    Raises UsageError if there is none, or only a base would tell it.
    """
    family = base.family.name if base else adapter_family(adapter)
    failing = _failing_in_8_bits(adapter, family)
    if not failing:
        return None
    # new names help where rows read them that do not always multiply
    plain = [
        replace(loader, names=tuple(row for row in loader.names if row.multiplies != "always")) for loader in failing
    ]
    namings = [
        naming
        for naming in ("comfy", "diffusers")
        if base and all(_reads_naming(loader, base.family, adapter, naming) for loader in plain)
    ]
    if not namings:
        way_out = "Use" if base else "Give the base, or its norm table, from which other names come, or use"
        raise UsageError(f"{adapter.path}: {hinders_8_bits(adapter, family)}. {way_out} -t fp16.")
    return namings[0]


def hinders_8_bits(adapter: Adapter, family: str | None) -> str:
    """Why the adapter should not have 8-bit factors under its names, "" if nothing is known against it."""
    if family is None:
        return "its names do not tell which programs would read fp8; -t fp8 writes it anyway"
    failing = _failing_in_8_bits(adapter, family)
    return f"{failing[0].title} multiplies the factors under these names, and cannot in fp8" if failing else ""


def _failing_in_8_bits(adapter: Adapter, family: str | None) -> list[Loader]:
    """The programs that read names of the adapter by rows alone that multiply factors, alpha or not."""
    failing = []
    for loader in LOADERS:
        if family not in loader.families:
            continue
        rows = [row for row in loader.names if row.holds(family, adapter)]
        if not any(row.multiplies == "always" for row in rows):
            continue
        for layer in adapter.layers:
            reading = [row for row in rows if row.reads(layer.name, family)]
            if reading and all(row.multiplies == "always" for row in reading):
                failing.append(loader)
                break
    return failing


def parts(adapter: Adapter) -> Sequence[str]:
    """The parts of the model that the adapter changes: "unet", "te1", ..."""
    return sorted({address(layer.name)[0] or "unet" for layer in adapter.layers})


def _reads_naming(loader: Loader, family: BaseFamily, adapter: Adapter, naming: str) -> bool:
    """Whether a program knows the names that the adapter's layers get in a naming of `convert`."""
    layout = {"kohya": family.kohya, "comfy": "native"}.get(naming, "diffusers")
    modules: dict[str, list[str]] = {}
    for layer in adapter.layers:
        part, module = address(layer.name)
        modules.setdefault(part or "unet", []).append(module)
    for part in parts(adapter):
        try:
            start = layer_name_in(naming, family, part, "")
        except UsageError:
            return False
        rows = [
            row
            for row in loader.names
            if start in row.begins
            and row.suits(family.name)
            and (not row.only or (start.endswith("_") and _all_fit(row.only, modules[part], family.name, layout)))
        ]
        if not any(part != "unet" or layout in row.layouts for row in rows):
            return False
    return True


def _all_fit(pattern: str, modules: Sequence[str], family: str, layout: str) -> bool:
    """Whether the pattern fits the names of all modules, which this layout has too; names of others may change."""
    return all(layout in layouts_of(family, module) and re.match(pattern, module) for module in modules)
