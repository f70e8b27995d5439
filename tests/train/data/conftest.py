"""The pictures that most tests of data read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_sdxl import write_pictures
from training import SQUARE, WIDE


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures shown twice, one shown three times."""
    parent = tmp_path / "train"
    write_pictures(
        parent / "2_big_cat",
        {"b.png": SQUARE, "a.png": WIDE, "c.png": SQUARE},
        {"a.png": "one, two, three, four", "b.png": "five, six, seven", "c.png": "eight"},
    )
    write_pictures(parent / "03_dog", {"d.png": SQUARE}, {"d.png": "nine, ten\nsecond line"})
    return parent
