"""The node pack as ComfyUI imports it: a folder under a name of its own."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "comfyui"


def load_pack():
    """The package in the folder `comfyui`; ComfyUI itself is not imported."""
    name = "custom_nodes_lorashrink"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.logic")
