"""Files of text and JSON, mutated: only errors of ours, in bounded time and memory."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fuzzing import FOLDER, add, limits
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.bases.containers import open_store
from lorashrink.calibration.statistics import FORMAT, VERSION, open_statistics
from lorashrink.errors import LorashrinkError
from lorashrink.files.header import read_header
from lorashrink.files.reading import open_tensors
from lorashrink.linking.inputs import split_sum, split_weight
from lorashrink.pictures.prompts import read_prompts
from lorashrink.recipes.grammar import keys, parse_recipes
from lorashrink.shrinking import journal
from lorashrink.shrinking.grouping import read_table
from lorashrink.train.flags.options import read_toml

PARITY = Path(__file__).parents[1] / "data" / "parity"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {f"{MODULE}.lora_A.weight": torch.ones(4, 8), f"{MODULE}.lora_B.weight": torch.ones(8, 4)}

# --- values ----------------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 2**31, 2**62, 2**64, 10**400, 1e308, 1e-308, float("inf"), float("nan"), True]
SCALARS = st.one_of(
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.none(),
    st.sampled_from(["\ud800", "\0", "../x", "\x1b[2J"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def changed(draw: st.DrawFn, original: Any, depth: int = 4) -> Any:
    """The JSON value with one part of it replaced, removed, renamed or added."""
    if depth and isinstance(original, dict) and original and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(original)))
        match draw(st.integers(0, 5)):
            case 0:
                return {name: value for name, value in original.items() if name != key}
            case 1:
                return {**original, draw(st.text(max_size=8)): draw(VALUES)}
            case _:
                return {**original, key: draw(changed(original[key], depth - 1))}
    if depth and isinstance(original, list) and original and draw(st.booleans()):
        index = draw(st.integers(0, len(original) - 1))
        return [*original[:index], draw(changed(original[index], depth - 1)), *original[index + 1 :]]
    return draw(VALUES)


@st.composite
def bytes_of(draw: st.DrawFn, original: bytes) -> bytes:
    """The bytes with some of them replaced, removed, repeated or cut off."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 3)):
            case 0:
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
            case 1:
                del data[at : at + draw(st.integers(1, 16))]
            case 2:
                data[at:at] = data[at : at + draw(st.integers(1, 16))]
            case _:
                del data[at:]
    return bytes(data)


def as_text(value: Any) -> str:
    """JSON with everything that Python's writer can be brought to write."""
    return json.dumps(value)


def only_ours(work: Callable[[], Any]) -> Any:
    """What the work gives, None for an error of ours; any other error, a hang, or much memory fails the test."""
    with limits(), contextlib.suppress(LorashrinkError):
        return work()


def close(opened: Any) -> None:
    if opened is not None:
        opened.close()


# --- headers ---------------------------------------------------------------------------------------

HEADER = {
    "__metadata__": {"a": "b"},
    "x": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "y": {"dtype": "F16", "shape": [4], "data_offsets": [8, 16]},
}


def check_header(path: Path) -> None:
    """What we read is what the reference library reads; what it reads, we read; bytes that it refuses, we refuse."""
    ours = only_ours(lambda: read_header(path))
    try:
        with safe_open(path, "pt") as opened:
            names = list(opened.keys())
            theirs = {name: list(opened.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        refusal = str(error)
    else:
        assert ours is not None, "the reference library reads it"
        assert {name: list(info.shape) for name, info in ours[0].items()} == theirs
        return
    assert ours is None or "invalid JSON" in refusal, refusal  # it checks JSON that has no meaning, too


def check_header_of(header: Any, data: int) -> None:
    raw = as_text(header).encode()
    path = FOLDER / "header.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data))
    check_header(path)


def check_file(data: bytes) -> None:
    path = FOLDER / "bytes.safetensors"
    path.write_bytes(data)
    check_header(path)


add("header", 400, check_header_of, header=changed(HEADER), data=st.integers(0, 20))
add("file", 400, check_file, data=bytes_of(save({"x": torch.ones(2), "y": torch.ones(3).half()}, {"a": "b"})))

# --- what people write -----------------------------------------------------------------------------

ITEM = st.builds(
    lambda key, equals, value: f"{key}{equals}{value}",
    st.sampled_from([*keys(), "x", ""]),
    st.sampled_from(["=", "", "=="]),
    st.sampled_from(["1", "0.5", "1e308", "-1e308", "nan", "inf", "9" * 400, "", "0", "2.5"]) | st.text(max_size=5),
)


def check_recipe(text: str) -> None:
    recipes = only_ours(lambda: parse_recipes(text))
    for recipe in recipes or ():
        assert parse_recipes(str(recipe)) == [recipe]
        assert "/" not in recipe.file_items()
        only_ours(lambda recipe=recipe: recipe.limit)


def check_weight(text: str) -> None:
    only_ours(lambda: split_weight(text))
    only_ours(lambda: split_sum(text))


add("recipe", 400, check_recipe, text=st.lists(ITEM, max_size=4).map(",".join) | st.text(max_size=30))
add("weight", 300, check_weight, text=st.text(max_size=20) | st.builds("{}:{}".format, st.just("a"), SCALARS))


# name of the file -> an example, and what reads it
JSON_FILES: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "prompts.json": ([{"prompt": "a", "width": 64, "seed": 1, "scale": 2.5}, "b --w 64 --d 1"], read_prompts),
    "bases.json": ({"sdxl": "a.safetensors"}, read_table),
    "model.safetensors.index.json": (
        {"weight_map": {"x": "s.safetensors"}},
        lambda path: close(open_tensors(path)),
    ),
    "adapter_config.json": (
        {
            **{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": False},
            **{"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}, "task_type": None, "bias": "none"},
        },
        lambda path: close(open_adapter(path.parent)),
    ),
    "table.json": (
        {
            **{"format": "lorashrink-norms", "version": 2, "family": "sdxl", "base": "b", "fingerprint": "f"},
            **{"tensors": {"model.diffusion_model.out.2.weight": [4, 8]}, "norms": {"a": {"fro": 1.0, "spn": 1.0}}},
        },
        lambda path: close(open_base(path)),
    ),
}


TOML_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "bases.toml": ("sdxl = 'a.safetensors'\nsd15 = 'b.safetensors'\n", read_table),
    "prompts.toml": ("[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = 'a'\nscale = 1e3\n", read_prompts),
    "prompts.txt": ("a cat --w 64 --h 64 --d 1 --l 7.5 --s 20 --n dog\n# b\n", read_prompts),
    "settings.toml": ("[general]\nresolution = [64, 64]\n[[datasets]]\nbatch_size = 1\n", read_toml),
}


def check_bytes(name: str, read: Callable[[Path], Any], data: bytes) -> None:
    path = FOLDER / "texts" / name
    path.parent.mkdir(exist_ok=True)
    if not (path.parent / "s.safetensors").exists():
        save_file({"x": torch.ones(2)}, path.parent / "s.safetensors")  # the shard of the index
        save_file(FACTORS, path.parent / "adapter_model.safetensors")
    path.write_bytes(data)
    only_ours(lambda: read(path))
    path.unlink()  # some of them are looked for beside others


for file_name, (example, reads) in JSON_FILES.items():
    values = changed(example).map(lambda value: as_text(value).encode())
    add(file_name, 300, partial(check_bytes, file_name, reads), data=values | bytes_of(as_text(example).encode()))
for file_name, (lines, reads) in TOML_FILES.items():
    add(file_name, 200, partial(check_bytes, file_name, reads), data=bytes_of(lines.encode()))


STATISTICS = {
    "family": "sdxl",
    "name": "b",
    "fingerprint": "f",
    "tensors": {"a.weight": [4, 8]},
    "weights": ["a.weight"],
}


def check_statistics(base: str, entries: dict[str, str]) -> None:
    path = FOLDER / "statistics.safetensors"
    save_file(
        {"a|in.diagonal": torch.ones(8)},
        path,
        {"format": FORMAT, "version": str(VERSION), "kind": "base", "rows": "{}", "base": base, **entries},
    )
    close(only_ours(lambda: open_statistics(path)))


add(
    "statistics",
    200,
    check_statistics,
    base=changed(STATISTICS).map(as_text) | st.text(st.characters(codec="utf-8"), max_size=20),
    entries=st.dictionaries(
        st.sampled_from(["kind", "rows", "adapters", "version"]), st.text(st.characters(codec="utf-8"), max_size=12)
    ),
)


def check_journal(column: str, value: Any) -> None:
    """A journal with any cell is read."""
    folder = FOLDER / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with journal.Journal(folder) as opened:
        opened.write([opened.entry(folder / "a", folder / "b", state=journal.STARTED)])
    database = sqlite3.connect(folder / journal.NAME)
    with database:
        database.execute(f"UPDATE outputs SET {column}=?", (value,))
    database.close()
    with limits(), journal.Journal(folder) as opened:
        assert len(opened.entries()) <= 1
        opened.finished(folder / "a", folder / "b")


add(
    "journal",
    150,
    check_journal,
    column=st.sampled_from(["source", "state", "message", "stamps", "recipe", "base", "bytes_after", "threshold"]),
    value=st.one_of(
        st.none(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.binary(max_size=9),
        st.text(st.characters(codec="utf-8"), max_size=9),
        changed([["a", 1, 2, 3, 4]]).map(as_text),
    ),
)


def journal_bytes() -> bytes:
    """A journal with one entry."""
    folder = FOLDER / "example"
    folder.mkdir(exist_ok=True)
    with journal.Journal(folder) as opened:
        opened.write([opened.entry(folder / "a", folder / "b", state=journal.STARTED)])
    return (folder / journal.NAME).read_bytes()


def check_journal_file(data: bytes) -> None:
    """A journal of any bytes is read, or another one takes its place."""
    folder = FOLDER / "journal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / journal.NAME).write_bytes(data)
    with limits(), journal.Journal(folder) as opened:
        opened.finished(folder / "a", folder / "b")
        opened.write([opened.entry(folder / "a", folder / "b", state=journal.STARTED)])
        opened.entries()


add("journal file", 150, check_journal_file, data=st.deferred(lambda: bytes_of(journal_bytes())))


def gguf_bytes() -> bytes:
    """A small file of GGUF."""
    import gguf  # which is read with another extra

    path = FOLDER / "example.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("blk.0.attn_q.weight", torch.ones(32, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def check_gguf(data: bytes) -> None:
    path = FOLDER / "fuzzed.gguf"
    path.write_bytes(data)
    opened = only_ours(lambda: open_store(path))
    close(opened and opened[0])


add("gguf", 60, check_gguf, data=st.deferred(lambda: bytes_of(gguf_bytes())))
