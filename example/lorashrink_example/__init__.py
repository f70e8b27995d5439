"""A small trained model of SDXL's architecture, adapters for it, and prompts: what `lorashrink demo` shows."""

from pathlib import Path


def path(*names: str) -> Path:
    """A file or folder of the example, such as `path("loras", "style.safetensors")`; without names its folder.

    `model` is a diffusers folder, `loras` has adapters that were trained on it, `table.safetensors` its calibration
    table, `prompts.txt` and `plain.txt` prompts with and without their words. `base.safetensors` and
    `adapter.safetensors` are a smaller pair with random numbers, which draws nothing.
    """
    return Path(__file__).parent.joinpath(*names)
