"""Products of matrices: by numpy on a CPU, those with a transpose in strips on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lorashrink.engine.accelerators import computed, start
from lorashrink.engine.devices import core_device
from lorashrink.engine.products import product, square


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [0, 1, 31, 64])
def test_a_product_has_the_shape_dtype_and_numbers_of_torchs(engine_device: str, dtype: torch.dtype, kept: int) -> None:
    device = core_device(engine_device)
    start(device)
    first, second = (torch.randint(-9, 9, shape).to(dtype) for shape in ((70, 64), (kept, 64)))  # nothing is rounded
    second.requires_grad_()
    (ours,) = computed(
        lambda pairs, device: [product(*(factor.to(device) for factor in pair)).cpu() for pair in pairs],
        [(first, second.T)],
        device,
    )
    assert torch.equal(ours, first @ second.T)


@pytest.mark.parametrize("rank", [1, 47, 97, 150, 500])
@pytest.mark.parametrize("shape", [(), (3,)], ids=["one", "three"])
def test_a_square_is_the_product_with_the_transpose(engine_device: str, rank: int, shape: tuple[int, ...]) -> None:
    rows = torch.randn(*shape, rank, 70, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    device = core_device(engine_device)
    start(device)
    (products,) = computed(lambda parts, device: [square(part.to(device)).cpu() for part in parts], [rows], device)
    assert_close(products, torch.einsum("...in,...jn->...ij", rows, rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", [False, True])
def test_squares_of_transposed_rows_and_of_float32(columns: bool) -> None:
    rows = torch.randint(-9, 9, (40, 60)).float()  # whole numbers, so that no product is rounded
    rows = rows.T.contiguous().T if columns else rows
    assert torch.equal(square(rows), rows @ rows.T)
    assert torch.equal(square(rows.requires_grad_()), rows @ rows.T)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_a_row_that_overflows_gives_no_warning(number: float) -> None:
    rows = torch.ones(2, 3, 4, dtype=torch.float64)
    rows[1, 0, 0] = number
    products = square(rows)
    assert not products[1, 0, 0].isfinite()
    assert torch.equal(products[0], torch.full((3, 3), 4.0, dtype=torch.float64))
    assert torch.equal(product(rows[1], rows[1].T).isfinite(), products[1].isfinite())
