"""Print what CHANGELOG.md says of one version: `python .ci/release_notes.py 0.2.0`.

The version must be that of the package and of CITATION.cff. Before a release `## Unreleased` becomes `## 0.2.0 - DATE`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def notes(changelog: str, version: str) -> str:
    """The text of the section of a version. Raises ValueError if there is none, or if it is empty."""
    section = re.search(rf"^## {re.escape(version)}(?: [^\n]*)?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if not section or not section[1].strip():
        raise ValueError(f"CHANGELOG.md says nothing of version {version}; rename its section Unreleased.")
    return section[1].strip() + "\n"


def check_version(version: str) -> None:
    """Raises ValueError if the package or the citation has another version."""
    for name, pattern in (
        ("lorashrink/_version.py", r'^__version__ = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
    ):
        found = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        if not found or found[1] != version:
            raise ValueError(f"{name} has version {found and found[1]}, not {version}.")


if __name__ == "__main__":
    try:
        check_version(sys.argv[1])
        sys.stdout.write(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))
