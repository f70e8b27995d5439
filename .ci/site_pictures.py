"""A hook of mkdocs: the pictures of ComfyUI's workflows, which are not in docs/, become part of the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_FOLDER = "comfyui/example_workflows"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures to the files of the site."""
    for path in sorted((Path(config.config_file_path).parent / _FOLDER).glob("*.jpg")):
        files.append(File.generated(config, f"{_FOLDER}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to the pictures of the site."""
    return markdown.replace(f"../{_FOLDER}/", f"{_FOLDER}/")
