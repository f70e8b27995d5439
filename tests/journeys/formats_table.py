"""The tables of `docs/formats.md`: which files are read, and what becomes of them.

`make formats` writes the page anew; `test_formats.py` compares it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fixtures
from formats_samples import ADAPTERS, BASES, EXCEPTIONS, LAYOUTS, SYNTHETIC, Formats, Shrunk, family_of

from lorashrink.adapters import Adapter
from lorashrink.bases import open_base
from lorashrink.linking import matching
from lorashrink.linking.loaders import LOADERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"

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
    "llama_peft_miss": "MiSS",
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
QUANTISED = {".scale_weight": "8-bit floats", ".weight_scale": "8-bit floats", "bitsandbytes__nf4": "4-bit nf4"}


@dataclass(frozen=True)
class Row:
    """What the table says of an adapter."""

    name: str
    layers: int
    stay: Mapping[str, int]  # reason -> tensors that no layer shrinks
    matched: str  # how many layers have a weight in each layout of the base
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
            self.matched,
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
    layouts = LAYOUTS[family_of(name)] if len(adapter) else {}
    matched = {layout: matched_in(formats, name, layout) for layout in layouts}
    written = written_as(formats.shrunk(name))
    return Row(name, len(adapter), +stay, _counts(name, matched), ways_of(formats, name), written)


def matched_in(formats: Formats, name: str, layout: str) -> list[str]:
    """The names of the layers that have a weight in a base."""
    adapter, base = formats.adapter(name), formats.base(family_of(name), layout)
    views = [base.find(layer.name) for layer in adapter] if name in SYNTHETIC else matching.match(adapter, base)
    return [layer.name for layer, weight in zip(adapter, views, strict=True) if weight]


def _counts(name: str, matched: Mapping[str, Sequence[str]]) -> str:
    counts = {len(names) for names in matched.values()}
    if not counts:
        return ""
    (count,) = counts
    why = "".join(f"; {reason}" for (listed, _), reason in EXCEPTIONS.items() if listed == name)
    return f"{count} in {len(matched)} layouts{why}" if len(matched) > 1 else f"{count}{why}"


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
    auto, lora = _shrinking(bound, "auto"), _shrinking(bound, "lora")
    counts = {_YES: own, _AS_LORA: alone - own, _WITH_BASE: auto - alone, _ON_REQUEST: lora - auto}
    return {way: count for way, count in counts.items() if count}


def _shrinking(adapter: Adapter, form: str) -> int:
    return len(matching.part(adapter, [()] * len(adapter), form)[0])


def written_as(shrunk: Shrunk) -> str:
    """The container of the outputs, and how new tensors are called."""
    form = "lora" if ("lora", "most") in shrunk.results else "auto"
    output = Path(shrunk.results[form, "most"].output)
    with shrunk.after(form, "most") as after:
        new = after.store.tensors.keys() - shrunk.before.store.tensors.keys()
    endings = sorted({match[0] for key in new if (match := re.search(r"lora_(?:up|down|A|B)(?=\.weight$)", key))})
    names = "same names" if not new else f"`{endings[0]}`, `{endings[1]}`"
    return f"{'folder' if output.is_dir() else 'file'}, {names}"


def containers(formats: Formats, folder: Path, name: str) -> list[str]:
    """What a listed base is read from, with the same result."""
    shapes = fixtures.shapes(name)
    if packed := {word for key in shapes for ending, word in QUANTISED.items() if key.endswith(ending)}:
        return sorted(packed)  # see test_quantised.py
    base, keys = formats.listed_base(name), sorted(shapes)
    halves = {f"model-0000{number}-of-00002.safetensors": keys[number - 1 :: 2] for number in (1, 2)}
    for file, held in halves.items():
        fixtures.write_header(folder / name / "shards" / file, {key: shapes[key] for key in held})
    index = folder / name / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, held in halves.items() for key in held}}))
    copies = {"shards": index}
    if fixtures.about(name)["naming"] == "diffusers":
        part_of = "unet" if base.family.denoiser == "unet" else "transformer"
        copies["folder"] = fixtures.write_parts(folder / name, "folder", {part_of: shapes}, {})
    elif fixtures.about(name)["naming"] == "transformers":
        copies["folder"] = fixtures.write_header(folder / name / "folder" / "model.safetensors", shapes).parent
    read = ["all-in-one file" if len({part for part, _ in base.weights}) > 1 else "file"]
    for container, path in copies.items():
        with open_base(path) as copy:
            if (copy.family, copy.weights.keys()) == (base.family, base.weights.keys()):
                read.append(container)
    return read


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
    with_base, on_request = (sum(row.ways.get(way, 0) for row in rows) for way in (_WITH_BASE, _ON_REQUEST))
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
        on_request=on_request,
        stay=sum(reasons.values()),
        adapter_table=table(
            "Model|Adapter|Names|Layers|Tensors that stay|Found in the base|Shrinks|Output|List",
            [row.cells() for row in rows],
        ),
        reason_table=table("Tensors|Why they stay", [[str(n), reason] for reason, n in reasons.most_common()]),
        loader_table=loader_table(),
        base_table=table(
            "Model|Names|Layouts|Read from|Adapters|Lists",
            [base_cells(formats, folder, family, bases[family]) for family in MODELS if family in bases],
        ),
    )
    return text


def loader_table() -> str:
    """The programs of the product's own table."""
    rows = [
        [loader.title, ", ".join(sorted(loader.families)), "PEFT folders" if loader.folder else "files", loader.source]
        for loader in LOADERS
    ]
    return table("Program|Models|Reads|Read off", rows)


def base_cells(formats: Formats, folder: Path, family: str, lists: Sequence[str]) -> list[str]:
    """The row of a family of models."""
    names = dict.fromkeys(NAMES[fixtures.about(name)["naming"]] for name in lists)
    read = dict.fromkeys(container for name in lists for container in containers(formats, folder, name))
    adapters = sum(family_of(name) == family for name in ADAPTERS)
    listed = ", ".join(f"`{name.removeprefix('base_')}`" for name in lists)
    cells = [", ".join(words) for words in (names, LAYOUTS.get(family, ()), read)]
    return [MODELS[family], *cells, str(adapters or ""), listed]


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


TEXT = """\
# Formats

lorashrink recognises adapters and base models by their tensors. The name of the file does not matter. The tables list
what the tests read: {adapters} adapters for {models} families of models, and {bases} bases of {families} families.
Their names and shapes come from published files, or from the program that writes them. The tests fill some layers of
each adapter with numbers, shrink them, and compare the result with the original.

- {files} of the {adapters} adapters shrink. The other {rest} are copied.
- Of {layers} layers, {alone} shrink without a base, {with_base} more with a base, and {on_request} more with a base
  and `--as lora`.
- {stay} other tensors are copied unchanged. The report gives the reason for each.

Other files work too. The family of the model must be known only if you give a base. Even then, a base of an unknown
family is searched by its own names.

## Adapters

- *Layers*: each changes one weight. "Part of a file" and "names only" (with made-up shapes) mark lists that are not a
  whole file.
- *Found in the base*: layers whose weight was found with the right shape in each layout of the base (see below).
- *Shrinks*: "yes" means in its own form. Layers that shrink as LoRA keep their own form if that gives the smaller
  file, or with `--as same`.
- *Output*: a file, or a folder with `adapter_config.json`, and the new names of tensors if a layer becomes LoRA.

{adapter_table}

## What is copied unchanged

These tensors are copied bit for bit. Layers that need a base are also copied if there is none.

{reason_table}

## Where adapters load

`inspect`, `resize`, `convert` and `report` say which programs load a file, and what helps for the others. Two cases
are surprising:

- ComfyUI does not read diffusers' names for Wan. For SDXL it reads them only outside of the attention layers. Use
  `lorashrink convert --naming kohya` or `comfy`.
- If a kohya file has several alphas, diffusers uses one of them for all layers. `inspect` reports this as
  mixed_alpha.

{loader_table}

## 8-bit factors

`-t fp8` writes the factors of LoRA in e4m3, which takes half the bytes of fp16. Each dimension is balanced between its
two factors. With statistics, numbers are rounded so that the output of the model changes least. e4m3 has 3 bits of
mantissa, so a layer changes by about 4 %.

- SD and SDXL in the names of kohya, and PEFT folders, have one alpha of 1 for all layers. This keeps numbers out of the
  range where e4m3 has few digits.
- All others have no alpha, and the scale is in the factors. In wide layers the numbers come near the smallest that e4m3
  has: a layer of FLUX changes by 8 % if its norm is 1, and by 14 % if it is 0.3. Layers that would change by more than
  25 % stay in fp16, and a warning says so.
- diffusers multiplies the factors when it loads the names of kohya for FLUX, Wan, Qwen-Image, Chroma, FLUX.2 and
  Z-Image, and those of ComfyUI for Qwen-Image and Z-Image. PyTorch cannot do this in 8 bits. With a base, such files
  get other names (`diffusion_model.` for Wan, `transformer.` for the others). Without a base, `-t fp8` is refused, and
  `-t auto` writes fp16, as it does for files whose names tell no model. `-t same` keeps 8-bit factors under their
  names.
- Tensors that are not factors of LoRA keep 16 bits or more. `convert -t fp8` does not change other families.

`-t mixed` chooses fp8 or fp16 for each layer by what a byte is worth. If the recipe decides the ranks, rounding harms
no more than what the recipe drops. `-t auto` is fp8 if its rounding is small beside what the recipe drops, and
otherwise mixed. int8 is not written, because programs load it without its scale.

## Bases

Original names and diffusers' names refer to the same weights, fused or split, so an adapter with one kind of names
finds a base with the other. Bases are read from `.safetensors`: one file, shards with their index, or a folder of
diffusers or transformers. These also work:

- pickles (`.ckpt`, `.pt`, `.bin`) that contain only tensors, no code;
- GGUF (`pip install gguf`);
- 8-bit floats with or without scales;
- int8, nf4 and fp4 of bitsandbytes.

GPTQ, AWQ, nvfp4, SVDQuant and other packed formats are refused with a message.

{base_table}

`make formats` writes this page. A test fails if it is out of date.
"""


def main() -> None:
    """Write the table anew."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        with Formats(Path(folder)) as formats:
            DOCUMENT.write_text(document(formats, Path(folder) / "containers"), encoding="utf-8")


if __name__ == "__main__":
    main()
