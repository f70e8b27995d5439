"""The nodes: sockets and widgets here, all work in `logic`."""

from __future__ import annotations

import os
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

from lorashrink import Recipe
from lorashrink.errors import LorashrinkError

from . import logic

_CATEGORY = "lorashrink"

# A LoRA and what is to become of it (`logic.Shrunk`), from Shrink to Save.
_Shrunk = io.Custom("LORASHRINK")


def _loras() -> list[str]:
    return folder_paths.get_filename_list("loras")


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("loras", name)


def _lora_input(id: str = "lora_name", **options: Any) -> io.Combo.Input:
    return io.Combo.Input(id, options=_loras(), tooltip="A file of the loras folder.", **options)


def _strength(id: str, of: str, default: float = 1.0) -> io.Float.Input:
    return io.Float.Input(
        id, default=default, min=-100.0, max=100.0, step=0.01, tooltip=f"How strongly the LoRA changes {of}."
    )


def _target_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "target",
            options=list(logic.TARGETS),
            default=logic.QUALITY,
            tooltip="Which of the widgets below decides how small the LoRA becomes.",
        ),
        io.Combo.Input(
            "quality",
            options=list(logic.QUALITIES),
            default="high",
            tooltip="How alike the pictures are to be: same, high (hard to tell apart) or small.",
        ),
        io.Float.Input(
            "megabytes",
            default=50.0,
            min=0.01,
            max=100000.0,
            step=0.5,
            tooltip="Size of the file in MB. The layers share it by what they change in the model.",
        ),
        io.Int.Input("rank", default=16, min=1, max=4096, tooltip="One rank for all layers."),
        io.String.Input(
            "recipe",
            default="fro_ckpt=1,thr=-3.55",
            tooltip="A recipe of lorashrink, for the target 'recipe'. Those of resize_lora work as they are.",
        ),
        io.Combo.Input(
            "dtype",
            options=list(logic.DTYPES),
            default="auto",
            tooltip="Numbers of the shrunk LoRA: auto takes fp8 where it is good enough; same keeps those of the file.",
        ),
    ]


def _model_inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The diffusion model that the LoRA is applied to."),
        io.Clip.Input("clip", optional=True, tooltip="The text encoders, if the LoRA changes them."),
    ]


def _shrink_inputs() -> list[io.Input]:
    return [
        *_model_inputs(),
        _lora_input(),
        _strength("strength_model", "the diffusion model"),
        _strength("strength_clip", "the text encoders"),
        *_target_inputs(),
    ]


class _OfFiles(io.ComfyNode):
    """A node that reads LoRA files, and runs again when one of them is replaced."""

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> object:
        names = [value for key, value in values.items() if key.startswith("lora_") and value]
        paths = [folder_paths.get_full_path("loras", name) for name in names]
        return [(path, os.path.getmtime(path)) for path in paths if path]


class _WithTarget(io.ComfyNode):
    """A node with a target, which is checked before anything runs."""

    @classmethod
    def validate_inputs(cls, target=None, recipe=None) -> bool | str:
        if target == logic.RECIPE and recipe is not None:  # None: it comes from another node
            try:
                Recipe.parse(recipe)
            except LorashrinkError as error:
                return str(error)
        return True


def _shrink(source: str, model: Any, clip: Any, dtype: str, **target: Any) -> tuple[logic.Shrunk, str, logic.Method]:
    """(the shrunk LoRA, the report, the method of the target)."""
    base = logic.base_of(model, clip)
    method = logic.method_for(source, base)
    recipe = logic.recipe_for(method=method, **target)
    shrunk = logic.shrink(source, recipe, dtype=dtype, base=base, calibration=method.calibration)
    return shrunk, logic.report(shrunk, None if target["target"] == logic.RECIPE else method), method


def _applied(model: Any, clip: Any, state: Any, strength_model: float, strength_clip: float) -> tuple[Any, Any]:
    return comfy.sd.load_lora_for_models(model, clip, state, strength_model, strength_clip)


class ShrinkLora(_OfFiles, _WithTarget):
    """A LoRA is shrunk in memory and applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorashrinkShrink",
            display_name="Shrink LoRA",
            category=_CATEGORY,
            description="Applies a LoRA as small as you like. No file is written until you connect Save Shrunk LoRA. "
            "After the first run only the target is computed again.",
            inputs=_shrink_inputs(),
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                _Shrunk.Output(display_name="shrunk"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="curve"),
            ],
        )

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, dtype, clip=None, **target: Any) -> io.NodeOutput:
        shrunk, text, method = _shrink(_path(lora_name), model, clip, dtype, **target)
        model, clip = _applied(model, clip, shrunk.state_dict(), strength_model, strength_clip)
        picture = logic.to_image(logic.curve_figure(shrunk, method))
        return io.NodeOutput(model, clip, shrunk, text, picture, ui=ui.PreviewText(text))


class CompareLora(_OfFiles, _WithTarget):
    """The full and the shrunk LoRA, each on a model of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorashrinkCompare",
            display_name="Shrink LoRA (compare)",
            category=_CATEGORY,
            description="Gives the model with the full LoRA and with the shrunk one, to draw both from one queue.",
            inputs=_shrink_inputs(),
            outputs=[
                io.Model.Output(display_name="model_full"),
                io.Clip.Output(display_name="clip_full"),
                io.Model.Output(display_name="model_shrunk"),
                io.Clip.Output(display_name="clip_shrunk"),
                _Shrunk.Output(display_name="shrunk"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, dtype, clip=None, **target: Any) -> io.NodeOutput:
        path = _path(lora_name)
        shrunk, text, _ = _shrink(path, model, clip, dtype, **target)
        full = comfy.utils.load_torch_file(path, safe_load=True)
        return io.NodeOutput(
            *_applied(model, clip, full, strength_model, strength_clip),
            *_applied(model, clip, shrunk.state_dict(), strength_model, strength_clip),
            shrunk,
            text,
            ui=ui.PreviewText(text),
        )


class ComparisonGrid(io.ComfyNode):
    """Pictures side by side with sizes and likeness."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        columns = []
        for number in (1, 2, 3):
            ending = "" if number == 1 else f"_{number}"
            columns += [
                io.Image.Input(f"images{ending}", optional=number > 1, tooltip="Pictures with a shrunk LoRA."),
                _Shrunk.Input(f"shrunk{ending}", optional=True, tooltip="That LoRA, for its size."),
            ]
        return io.Schema(
            node_id="LorashrinkGrid",
            display_name="Comparison Grid",
            category=_CATEGORY,
            description="Puts pictures with the full and with shrunk LoRAs side by side, with MB, PSNR and MS-SSIM.",
            inputs=[io.Image.Input("images_full", tooltip="Pictures with the full LoRA, same seeds."), *columns],
            outputs=[io.Image.Output(display_name="grid")],
        )

    @classmethod
    def execute(
        cls, images_full, images, shrunk=None, images_2=None, shrunk_2=None, images_3=None, shrunk_3=None
    ) -> io.NodeOutput:
        pairs = [(images, shrunk), (images_2, shrunk_2), (images_3, shrunk_3)]
        columns = [pair for pair in pairs if pair[0] is not None]
        before = next((lora.bytes_before for _, lora in columns if lora is not None), None)
        return io.NodeOutput(logic.grid(images_full, columns, before))


class SaveShrunkLora(io.ComfyNode):
    """The shrunk LoRA becomes a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorashrinkSave",
            display_name="Save Shrunk LoRA",
            category=_CATEGORY,
            description="Writes the shrunk LoRA beside its source, with its preview, trigger words and notes.",
            inputs=[
                _Shrunk.Input("shrunk"),
                io.String.Input("name", default="", tooltip="Empty: the source's name with the recipe behind it."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name. Never the source."),
            ],
            outputs=[io.String.Output(display_name="path")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, shrunk, name, overwrite) -> io.NodeOutput:
        paths = logic.save(shrunk, name, overwrite=overwrite)
        text = "\n".join([f"saved {paths[0].name}", *(f"and {path.name}" for path in paths[1:])])
        return io.NodeOutput(str(paths[0]), ui=ui.PreviewText(text))


class InspectLora(_OfFiles):
    """What is inside a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorashrinkInspect",
            display_name="Inspect LoRA",
            category=_CATEGORY,
            description="Tells how a LoRA was trained, its ranks, and what is unusual; draws how much each block does.",
            inputs=[
                _lora_input(),
                io.Model.Input("model", optional=True, tooltip="Compares the LoRA with the weights that it changes."),
                io.Clip.Input("clip", optional=True),
            ],
            outputs=[io.String.Output(display_name="facts"), io.Image.Output(display_name="norms")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora_name, model=None, clip=None) -> io.NodeOutput:
        base = None if model is None else logic.base_of(model, clip)
        text, figure = logic.facts(_path(lora_name), base)
        return io.NodeOutput(text, logic.to_image(figure), ui=ui.PreviewText(text))


_NONE = "none"


def _stack_inputs() -> list[io.Input]:
    inputs: list[io.Input] = []
    for number in (1, 2, 3, 4):
        options = _loras() if number <= 2 else [_NONE, *_loras()]
        inputs += [
            io.Combo.Input(f"lora_{number}", options=options),
            _strength(f"strength_{number}", "the sum", 1.0),
        ]
    return inputs


def _stack(values: dict[str, Any]) -> list[tuple[str, float]]:
    """(path, strength) of each LoRA of a stack."""
    numbers = [number for number in (1, 2, 3, 4) if values.get(f"lora_{number}", _NONE) != _NONE]
    return [(_path(values[f"lora_{number}"]), values[f"strength_{number}"]) for number in numbers]


class MergeLoras(_OfFiles, _WithTarget):
    """Several LoRAs as one, shrunk and applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorashrinkMerge",
            display_name="Merge LoRAs",
            category=_CATEGORY,
            description="Applies several LoRAs as one LoRA of the size that you choose, which Save Shrunk LoRA keeps.",
            inputs=[*_model_inputs(), *_stack_inputs(), *_target_inputs()],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                _Shrunk.Output(display_name="shrunk"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, model, dtype, target, quality, megabytes, rank, recipe, clip=None, **stack: Any) -> io.NodeOutput:
        shrunk, text, _ = _shrink(
            logic.sum_of(_stack(stack)),
            model,
            clip,
            dtype,
            target=target,
            quality=quality,
            megabytes=megabytes,
            rank=rank,
            recipe=recipe,
        )
        model, clip = _applied(model, clip, shrunk.state_dict(), 1.0, 1.0)
        return io.NodeOutput(model, clip, shrunk, text, ui=ui.PreviewText(text))


class StackOverlap(_OfFiles):
    """Whether LoRAs get along."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LorashrinkOverlap",
            display_name="LoRA Stack Overlap",
            category=_CATEGORY,
            description="Tells which LoRAs do the same, work against each other, or are too strong together.",
            inputs=[*_stack_inputs(), io.Model.Input("model", optional=True), io.Clip.Input("clip", optional=True)],
            outputs=[io.String.Output(display_name="advice"), io.Image.Output(display_name="likeness")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model=None, clip=None, **stack: Any) -> io.NodeOutput:
        base = None if model is None else logic.base_of(model, clip)
        text, figure = logic.overlap(_stack(stack), base)
        return io.NodeOutput(text, logic.to_image(figure), ui=ui.PreviewText(text))


class LorashrinkExtension(ComfyExtension):
    """All nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ShrinkLora, CompareLora, ComparisonGrid, SaveShrunkLora, InspectLora, MergeLoras, StackOverlap]
