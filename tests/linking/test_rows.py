"""Row intervals against sets of single rows."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from lorashrink.bases import View
from lorashrink.linking.rows import RowMap, RowRun, Rows, covers, joined_runs, row_intervals


def intervals(*keys: str) -> st.SearchStrategy[list[Rows]]:
    """Rows of a layer: intervals of these tensors, one below the other."""
    pieces = st.tuples(st.sampled_from(keys), st.integers(0, 12), st.integers(1, 6))

    def stacked(sizes: list[tuple[str, int, int]]) -> list[Rows]:
        firsts = [sum(size for _, _, size in sizes[:index]) for index in range(len(sizes))]
        return [Rows(key, start, start + size, first) for (key, start, size), first in zip(sizes, firsts, strict=True)]

    return st.lists(pieces, min_size=1, max_size=3).map(stacked)


def single_rows(rows: list[Rows]) -> list[tuple[str, int]]:
    return [(interval.key, row) for interval in rows for row in range(interval.start, interval.stop)]


def row_map(layers: list[list[Rows]]) -> RowMap[int]:
    owners = RowMap[int]()
    for index, rows in enumerate(layers):
        owners.add(rows, index)
    return owners


def test_a_layer_has_the_rows_of_its_views_in_order() -> None:
    views = (View("q", (4, 8)), View("qkv", (3, 8), rows=(10, 13)))
    assert row_intervals(views) == [Rows("q", 0, 4, 0), Rows("qkv", 10, 13, 4)]


@given(st.integers(0, 10), st.integers(1, 9), st.integers(0, 20), st.integers(0, 20))
def test_a_cut_keeps_the_rows_of_the_layer(start: int, size: int, low: int, high: int) -> None:
    part = Rows("k", start, start + size, 100).cut(low, high)
    layer_rows = {row: 100 + row - start for row in range(start, start + size) if low <= row < high}
    assert (part is None) == (not layer_rows)
    if part:
        assert dict(zip(range(part.start, part.stop), range(*part.in_layer), strict=True)) == layer_rows


@given(st.lists(intervals("a", "b"), max_size=4), intervals("a", "b", "c"))
def test_common_and_free_rows_are_those_of_the_sets(layers: list[list[Rows]], rows: list[Rows]) -> None:
    owners = row_map(layers)
    common: dict[int, set[tuple[str, int]]] = defaultdict(set)
    for part, own, index in owners.common(rows):
        assert part[:3] == own[:3]
        common[index] |= set(single_rows([part]))
    shared = {index: set(single_rows(layer)) & set(single_rows(rows)) for index, layer in enumerate(layers)}
    assert common == {index: rows_of_both for index, rows_of_both in shared.items() if rows_of_both}
    taken = {row for layer in layers for row in single_rows(layer)}
    assert set(single_rows(owners.free(rows))) == set(single_rows(rows)) - taken


@given(st.lists(intervals("a", "b"), max_size=4))
def test_a_clash_is_one_row_with_two_owners(layers: list[list[Rows]]) -> None:
    rows = [row for layer in layers for row in single_rows(layer)]
    assert (row_map(layers).clash() is None) == (len(set(rows)) == len(rows))


def test_runs_are_joined_where_both_sides_are_neighbours() -> None:
    runs = [RowRun(4, 4, 2), RowRun(0, 0, 4), RowRun(6, 0, 2), RowRun(9, 2, 1)]
    assert joined_runs(runs) == (RowRun(0, 0, 6), RowRun(6, 0, 2), RowRun(9, 2, 1))
    assert covers(joined_runs(runs[:2]), 6)
    assert not covers(joined_runs(runs), 10)
