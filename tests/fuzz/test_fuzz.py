"""Mutated files of every kind: refused with an error of ours, or read right, in bounded time and memory."""

from __future__ import annotations

import pytest
import structures
import texts  # noqa: F401  # adds its targets
from fuzzing import FACTOR, TARGETS

# Adapters of the same family are much alike; a third of them will do in the short form.
LEFT_OUT = set(structures.NAMES) - set(structures.NAMES[:: 1 if FACTOR > 1 else 3])


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in LEFT_OUT])
def test_a_mutated_input_is_refused_or_read_right(name: str) -> None:
    TARGETS[name].test()()
