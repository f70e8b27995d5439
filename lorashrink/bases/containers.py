"""How a base lies on the disk: a file, shards, a folder of one model or of several parts."""

from __future__ import annotations

from pathlib import Path

from lorashrink.bases.gguf_file import is_gguf, open_gguf
from lorashrink.bases.quantised import unpacked
from lorashrink.errors import InputError, NotABase
from lorashrink.files.disk import absent_text
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import TensorStore, join_stores
from lorashrink.names import FOLDERS

_WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".non_ema")
_PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")


def is_model_folder(path: Path) -> bool:
    """Whether this folder holds a model, whole or in parts, as diffusers and transformers save them."""
    if (path / "model_index.json").is_file() or any((path / part).is_dir() for part in FOLDERS):
        return True
    return (path / "config.json").is_file() and _weights(path) is not None


def open_store(path: Path) -> tuple[TensorStore, str]:
    """The weights of a base, and what it is: "file", "shards" or "folder". Raises InputError or NotABase."""
    store: TensorStore
    kind = "file"
    if path.is_dir():
        kind = "folder"
        if parts := {f"{name}.": weights for name in FOLDERS if (weights := _weights(path / name))}:
            store = join_stores(path, {prefix: open_tensors(weights) for prefix, weights in parts.items()})
        elif weights := _weights(path):
            store = open_tensors(weights)
        else:
            raise NotABase(
                f"{path}: no unet/, transformer/ or text_encoder/ with safetensors weights in this folder, and no "
                "weights either. Give the folder of the model, or one file."
            )
    elif not path.is_file():
        raise InputError(f"{path}: {absent_text(path)}")
    elif is_gguf(path):
        store = open_gguf(path)
    else:
        store, kind = open_tensors(path), "shards" if path.suffix == ".json" else "file"
    try:
        return unpacked(store), kind
    except BaseException:
        store.close()
        raise


def _weights(folder: Path) -> Path | None:
    return weights_file(folder) or next((folder / name for name in _PICKLES if (folder / name).is_file()), None)


def weights_file(folder: Path) -> Path | None:
    """The one weights file, or shard index, of a diffusers or transformers folder.

    Several variants may lie side by side; the most precise is taken and never a mixture.
    """
    for variant in _VARIANTS:
        for stem in _WEIGHT_STEMS:
            for name in (
                f"{stem}{variant}.safetensors",
                f"{stem}.safetensors.index{variant}.json",
                f"{stem}{variant}.safetensors.index.json",
            ):
                if (folder / name).is_file():
                    return folder / name
    return None
