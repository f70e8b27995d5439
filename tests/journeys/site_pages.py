"""Writes what the documentation takes from the program: `make docs` runs it, and test_site.py compares.

- `docs/commands.md`: the help of each command, between its marks. The rest of the page is written by hand.
- `docs/python.md`: the public names with their signatures and docstrings, and the results.
- `docs/schemas/`: a JSON schema of each document that a command prints with `--json`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from typer.main import get_command
from typer.testing import CliRunner

import lorashrink as ls
from lorashrink.cli import app

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = tuple(name for name, entry in get_command(app).commands.items() if not entry.hidden)  # type: ignore[attr-defined]
_FUNCTIONS = {"norms" if name == "base-norms" else name: name for name in COMMANDS}  # function in Python -> command
_WIDTH = 90  # columns of the help
_INDENT = "\n    "


def _marked(name: str, content: str) -> str:
    return f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"


def commands_page(page: str) -> str:
    """The page with today's help of every command; commands without a mark get a section at its end."""
    for name in COMMANDS:
        outcome = CliRunner().invoke(
            app, [name, "--help"], prog_name="lorashrink", terminal_width=_WIDTH, env={"COLUMNS": str(_WIDTH)}
        )
        assert outcome.exit_code == 0, outcome.output
        text = "\n".join(line.rstrip() for line in outcome.stdout.strip().splitlines())
        block = _marked(f"help of {name}", f"```text\n{text}\n```")
        mark = re.compile(rf"<!-- help of {name} -->.*?<!-- end of help of {name} -->", re.DOTALL)
        if mark.search(page):
            page = mark.sub(lambda _, block=block: block, page)
        else:
            page = f"{page.rstrip()}\n\n## {name}\n\n{block}\n"
    return page


# --- Python ------------------------------------------------------------------------------------

_PYTHON_HEAD = """\
# Python reference

```python
import lorashrink as ls

report = ls.resize("lora.safetensors", base="model.safetensors", recipes="fro_ckpt=1,thr=-3.55", output="out")
print(report.results[0].bytes_after, report.results[0].relative_error)
table = ls.inspect("lora.safetensors", base="model.safetensors")
for layer in ls.open_adapter("lora.safetensors"):
    print(layer.name, layer.rank, layer.delta.dense().shape)  # [out, in, ...] float32
```

Each command has a function of the same name. The functions print nothing. They return frozen dataclasses, and raise
subclasses of `LorashrinkError`. Their fields are also the fields of the JSON documents; the [JSON page](programs.md)
explains them.
"""


def python_page() -> str:
    """The public names of the package, with their signatures and docstrings, and the results that they return."""
    parts = [_PYTHON_HEAD]
    results: list[type] = []
    for name in sorted(ls._MODULES):
        value = getattr(ls, name)
        parts.append(f"## {name}\n\n```python\n{_signature(name, value)}\n```\n\n{_docstring(value)}")
        if name in _FUNCTIONS:
            results += [kind for kind in _dataclasses(_returned(value)) if kind not in results]
    parts.append("## Results")
    for kind in sorted(results, key=lambda kind: kind.__name__):
        comments = _comments(kind)
        rows = [
            f"| `{field.name}` | `{str(field.type).replace(' | ', '` or `')}` | {comments.get(field.name, '')} |"
            for field in dataclasses.fields(kind)
        ]
        table = "\n".join(["| field | type | |", "| --- | --- | --- |", *rows])
        parts.append(f"### {kind.__name__}\n\n{_docstring(kind)}\n\n{table}")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _signature(name: str, value: Any) -> str:
    signature = inspect.signature(value)
    arguments: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        arguments.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    returned = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    short = f"{name}({', '.join(arguments)}){returned}"
    return short if len(short) <= 100 else f"{name}(\n    {f',{_INDENT}'.join(arguments)},\n){returned}"


def _docstring(value: Any) -> str:
    """A docstring as Markdown: indented lists of names and what they mean become lists."""
    lines: list[str] = []
    text = inspect.getdoc(value) or ""
    if inspect.isfunction(value):  # a line may explain several arguments
        text = re.sub(rf"(?<=\. )({'|'.join(inspect.signature(value).parameters)}): ", r"\n\1: ", text)
    for line in text.splitlines():
        bare = line.lstrip()
        depth = (len(line) - len(bare)) // 4
        entry = re.match(r"([a-z_]+(?:, [a-z_]+)*|[A-Z]\w+(?:, [A-Z]\w+)*): (?=\S)", bare)
        if entry and depth:
            lines.append(f"- `{entry[1]}`: {bare[entry.end() :]}")
        elif depth:
            lines.append("  " + bare)
        elif re.fullmatch(r"[A-Z][\w ]+:", bare):
            lines += [f"\n**{bare[:-1]}**\n"]
        elif entry:
            lines += [f"\n`{entry[1]}`: {bare[entry.end() :]}"]
        else:
            lines.append(bare)
    return re.sub(r" *\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()


# --- JSON --------------------------------------------------------------------------------------


def schemas(*, open_ended: bool = True) -> dict[str, dict[str, Any]]:
    """A JSON schema of the document of each command. open_ended: later versions may have more keys."""
    return {
        name: _document(name, _returned(getattr(ls, function)), open_ended)
        for function, name in _FUNCTIONS.items()
        if function in ls._MODULES
    }


def _document(name: str, kind: type, open_ended: bool) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    document = _object(kind, definitions)
    head = {"version": {"type": "string", "description": "of lorashrink"}, "command": {"type": "string"}}
    document["properties"] = head | document["properties"]
    document["required"] = sorted({"version", *document["required"]})
    if not open_ended:
        for part in (document, *definitions.values()):
            part["additionalProperties"] = False
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"lorashrink {name} --json",
        **document,
        "$defs": dict(sorted(definitions.items())),
    }


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    hints, comments = _hints(kind), _comments(kind)
    properties = {
        field.name: _schema(hints[field.name], definitions)
        | ({"description": comments[field.name]} if field.name in comments else {})
        for field in dataclasses.fields(kind)
        if field.metadata.get("plain", True)  # tensors are no part of a document
    }
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
    return {"type": "object", "description": summary, "properties": properties, "required": sorted(properties)}


_SIMPLE = {str: "string", bool: "boolean", int: "integer", types.NoneType: "null"}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type that results have; raises TypeError for others."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if hint is float:
        return {"type": ["number", "null"]}  # null: NaN or infinity
    if origin in (typing.Union, types.UnionType):
        return _union([_schema(argument, definitions) for argument in arguments])
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # a type may contain itself
            definitions[hint.__name__].update(_object(hint, definitions))
        return {"$ref": f"#/$defs/{hint.__name__}"}
    raise TypeError(f"no schema for {hint}")


def _union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    if all(set(part) == {"type"} for part in parts):
        names = [part["type"] if isinstance(part["type"], list) else [part["type"]] for part in parts]
        return {"type": list(dict.fromkeys(name for group in names for name in group))}
    return {"anyOf": parts}


# --- what both need ----------------------------------------------------------------------------


def _returned(function: Any) -> Any:
    return _hints(function)["return"]


def _hints(documented: Any) -> dict[str, Any]:
    """The types of a function or a dataclass, also those that are imported for type checkers only."""
    return typing.get_type_hints(documented, localns={"Tensor": Tensor})


def _dataclasses(hint: Any) -> Iterator[type]:
    """The results in a type, and those in their fields."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
        for part in _hints(hint).values():
            yield from _dataclasses(part)
    for part in typing.get_args(hint):
        yield from _dataclasses(part)


def _comments(kind: type) -> dict[str, str]:
    """What the comment behind each field, or above it, says."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if alone := re.fullmatch(r"\s+# (.*)", line):
            above.append(alone[1])
            continue
        field = re.match(r"    (\w+): [^#]*?(?:\s+# (.*))?$", line)
        if field and (field[2] or above):
            comments[field[1]] = field[2] or " ".join(above)
        above = []
    return comments


def pages() -> dict[Path, str]:
    """Every file that is generated, and what belongs into it."""
    commands = DOCS / "commands.md"
    texts = {name: json.dumps(schema, indent=2, ensure_ascii=False) + "\n" for name, schema in schemas().items()}
    return {
        commands: commands_page(commands.read_text(encoding="utf-8")),
        DOCS / "python.md": python_page(),
        **{DOCS / "schemas" / f"{name}.json": text for name, text in texts.items()},
    }


def main() -> None:
    """Write all pages anew."""
    (DOCS / "schemas").mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
