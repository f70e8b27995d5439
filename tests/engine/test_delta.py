"""The three forms of ΔW have the same methods, held to their dense matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lorashrink.engine.delta import AnyDelta, Delta, Dense, Kronecker

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def small(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Dense:
    return Dense(randn(rows, columns, seed=rows, dtype=dtype), -0.5, (rows, columns))


FORMS: dict[str, AnyDelta] = {
    "factors": Delta(randn(12, 3), randn(3, 20, seed=1), -0.5, (12, 5, 2, 2)),
    "tall matrix": Dense(randn(12, 8), 0.25, (12, 8)),
    "wide matrix": Dense(randn(12, 20), 0.25, (12, 5, 2, 2)),
    "half precision matrix": Dense(randn(12, 8, dtype=torch.float16), 0.25, (12, 8)),
    "product of matrices": Kronecker(small(3, 2), small(4, 10), (12, 5, 2, 2)),
    "product with factors": Kronecker(small(3, 4), Delta(randn(4, 2), randn(2, 5), 3.0, (4, 5)), (12, 20)),
}


@pytest.fixture(params=list(FORMS.values()), ids=list(FORMS))
def delta(request: pytest.FixtureRequest) -> AnyDelta:
    form: AnyDelta = request.param
    return form


def test_factors_multiply_to_the_dense_matrix_at_the_rank_of_the_form(delta: AnyDelta) -> None:
    factors = delta.factored()
    assert factors.rank == delta.rank
    assert_close(factors.dense(), delta.dense(), rtol=1e-6, atol=1e-6)


def test_rows_are_a_slice_of_the_dense_matrix(delta: AnyDelta) -> None:
    assert torch.equal(delta.rows(3, 9).dense(), delta.dense().flatten(1)[3:9])


def test_a_row_reader_computes_a_slice_of_the_dense_matrix(delta: AnyDelta) -> None:
    rows = delta.row_reader(CPU)(3, 9)
    assert rows.dtype == torch.float64
    assert_close(rows.float(), delta.dense().flatten(1)[3:9])


def test_a_weight_multiplies_the_dense_matrix(delta: AnyDelta) -> None:
    assert_close(delta.times(-3).dense(), -3 * delta.dense())


def test_only_equal_bits_in_the_same_form_are_equal(delta: AnyDelta) -> None:
    assert delta.equals(replace(delta))
    assert not delta.equals(delta.times(2))
    assert not any(delta.equals(form) for form in FORMS.values() if form is not delta)


def test_the_product_of_two_matrices_is_their_kronecker_product() -> None:
    first, second = small(3, 2), small(4, 10)
    dense = Kronecker(first, second, (12, 20)).dense()
    assert_close(dense, torch.kron(first.dense(), second.dense()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_float64_layers_are_computed_in_float64(dtype: torch.dtype) -> None:
    matrix = small(4, 6, dtype)
    factors = Delta(matrix.matrix, randn(6, 5, dtype=dtype), 1.0, (4, 5))
    for form in (matrix, factors, Kronecker(small(2, 2), matrix, (8, 12))):
        assert form.precision == (torch.float64 if dtype == torch.float64 else torch.float32)
