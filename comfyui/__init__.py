"""Nodes for ComfyUI: shrink a LoRA while you look at what it does to the picture.

This folder is copied or linked into ComfyUI's `custom_nodes`; `lorashrink comfyui install PATH` does it.
"""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """The nodes, as ComfyUI asks for them."""
    from .nodes import LorashrinkExtension

    return LorashrinkExtension()
