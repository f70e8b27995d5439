"""Norms against dense ones, and a cache that can never give the norms of another file."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorashrink
from lorashrink.bases import norms as norms_module
from lorashrink.bases import open_base, views_id
from lorashrink.bases.norms import BaseNorms, cache_folder
from lorashrink.engine import norms as engine_norms
from lorashrink.engine.norms import frobenius, spectral, spectral_norms
from lorashrink.errors import NonFinite, NotABase, OutputError

KEY = "model.diffusion_model.input_blocks.4.1.proj_in.weight"


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


MATRICES = {
    "square": gaussian(600, 600),
    "tall": gaussian(1500, 400),
    "wide": gaussian(400, 1500),
    "small": gaussian(20, 900),
    "outlier": gaussian(700, 500) + torch.outer(gaussian(700, 1)[:, 0], gaussian(500, 1)[:, 0]) * 50,
    "equal": torch.eye(400),
    "zero": torch.zeros(400, 300),
    "one": torch.tensor([[3.0]]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_norms_are_those_of_the_dense_matrix(name: str) -> None:
    matrix = MATRICES[name]
    assert spectral(matrix) == pytest.approx(float(torch.linalg.matrix_norm(matrix.double(), 2)), rel=1e-6)
    assert frobenius(matrix) == pytest.approx(float(matrix.double().norm()), rel=1e-12)


def planted(rows: int, columns: int, sigma: Tensor) -> Tensor:
    """A matrix with these singular values, float64."""
    generator = torch.Generator().manual_seed(1)
    sides = (torch.randn(side, len(sigma), generator=generator, dtype=torch.float64) for side in (rows, columns))
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return left * sigma @ right.mT


SPECTRA = {
    "ten nearly equal": torch.cat([1 - 1e-5 * torch.arange(10.0).double(), torch.linspace(0.5, 0, 290).double()]),
    "flat but for the first": torch.cat([torch.tensor([1.001]).double(), torch.ones(299).double()]),
    "all close": torch.linspace(1, 0.99, 300).double(),
    "falling": torch.arange(1, 301).double() ** -0.8,
    "falling fast": 10.0 ** -torch.arange(300).double(),
    "one": torch.ones(1).double(),
    "three": torch.tensor([2.0, 2.0, 1e-4]).double(),
}


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e18])
@pytest.mark.parametrize("shape", [(300, 300), (700, 310), (310, 700)])
@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_norms_of_planted_spectra(name: str, shape: tuple[int, int], size: float) -> None:
    """Also where squares leave the range of float32."""
    matrix = (size * planted(*shape, SPECTRA[name])).float()
    assert spectral(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix.double())[0]), rel=1e-6)


@pytest.mark.parametrize("side", [200, 300])
def test_matrices_of_one_shape_are_computed_together(side: int, device: str) -> None:
    """NaN, zero and huge matrices do not change the others."""
    matrices = torch.stack([gaussian(side, 400, seed=n) for n in range(5)])
    matrices[1] = 0
    matrices[2, 3, 4] = torch.nan
    matrices[3] *= 1e25
    norms = spectral_norms(matrices.to(device))
    assert norms.isnan().tolist() == [False, False, True, False, False]
    for index in (0, 1, 3, 4):
        expected = float(torch.linalg.svdvals(matrices[index].double())[0])
        assert float(norms[index]) == pytest.approx(expected, rel=1e-6)


def test_wide_matrices_need_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_norms, "_SQUARE_SIDE", 256)
    for name in ("square", "tall", "outlier", "zero"):
        expected = float(torch.linalg.svdvals(MATRICES[name].double())[0])
        assert spectral(MATRICES[name]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_summed_in_double(dtype: torch.dtype) -> None:
    weight = (gaussian(3000, 900) * 1e-2).to(dtype)
    assert frobenius(weight) == pytest.approx(float(weight.double().norm()), rel=1e-12)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a test has just written count as old."""
    monkeypatch.setattr(norms_module, "SETTLED_SECONDS", -1.0)


def norm(path: Path, key: str = KEY) -> float:
    with open_base(path) as base:
        return BaseNorms(base).look_up(base.all_views, ("fro",))[key]["fro"]


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(base, tmp_path / "model.safetensors"))


def computed(path: Path) -> int:
    """How many norms had to be computed to answer for a base."""
    steps: list[int] = []
    with open_base(path) as base:
        BaseNorms(base).look_up(base.all_views, ("fro",), progress=lambda step, total: steps.append(step))
    return len(steps)


def test_norms_of_a_base_are_those_of_its_weights_on_any_device(base: Path, engine_device: str) -> None:
    with open_base(base) as opened, ThreadPoolExecutor(3) as pool:
        norms = BaseNorms(opened, cache=False).look_up(
            opened.all_views, ("fro", "spn"), pool=pool, device=engine_device
        )
        for views in opened.all_views:
            sigma = torch.linalg.svdvals(opened.weight(views).double())
            expected = {"fro": float(sigma.norm()), "spn": float(sigma[0])}
            assert norms[views_id(views)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("settled")
def test_norms_are_computed_once(copy: Path) -> None:
    assert computed(copy) > 100
    assert computed(copy) == 0


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("way", ["in place", "renamed over", "in place, times restored"])
def test_a_changed_base_never_gives_the_old_norms(copy: Path, tmp_path: Path, way: str) -> None:
    """resize_lora, which keys its cache by the path, gives the old norms."""
    before, stat = norm(copy), copy.stat()
    tensors = {key: value * 4 for key, value in load_file(copy).items()}
    if way == "renamed over":
        save_file(tensors, tmp_path / "new.safetensors")
        os.replace(tmp_path / "new.safetensors", copy)
    else:
        changed = tmp_path / "changed.safetensors"
        save_file(tensors, changed)
        copy.write_bytes(changed.read_bytes())
    if "restored" in way:
        os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert copy.stat().st_size == stat.st_size
    assert norm(copy) == pytest.approx(4 * before, rel=1e-3)


def test_norms_of_a_freshly_written_file_are_not_cached(copy: Path) -> None:
    norm(copy)
    assert not cache_folder().exists()


@pytest.mark.usefixtures("settled")
def test_a_damaged_cache_is_computed_anew(copy: Path) -> None:
    before = norm(copy)
    (path,) = cache_folder().iterdir()
    path.write_text("{broken")
    assert norm(copy) == before
    assert json.loads(path.read_text())[KEY]["fro"] == before


@pytest.mark.usefixtures("settled")
def test_several_runs_at_once_share_the_cache(copy: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(norm, [copy] * 24))
    assert len(set(values)) == 1
    assert len(list(cache_folder().iterdir())) == 1


def test_an_unwritable_cache_does_not_stop_a_run(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(norms_module, "SETTLED_SECONDS", -1.0)
    assert norm(copy) > 0


def test_a_base_with_nan_is_named_with_the_weight(copy: Path) -> None:
    tensors = load_file(copy)
    tensors[KEY][0, 0] = float("nan")
    save_file(tensors, copy)
    with pytest.raises(NonFinite, match=KEY):
        norm(copy)


# --- norm tables --------------------------------------------------------------------------------


def test_a_norm_table_answers_for_every_name_of_every_weight(base: Path, tmp_path: Path) -> None:
    table = lorashrink.norms(base, tmp_path / "table.json", jobs=2)
    with open_base(base) as full, open_base(table.path) as small:
        assert full.weights == small.weights
        assert full.fingerprint == small.fingerprint
        for views in full.all_views:
            weight = full.weight(views).double()
            values = BaseNorms(small).look_up([views], ("fro", "spn"))[views_id(views)]
            assert values["fro"] == pytest.approx(float(weight.norm()), rel=1e-9)
            assert values["spn"] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-6)


def test_tables_are_not_overwritten_or_made_of_tables(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    lorashrink.norms(base, path)
    with pytest.raises(OutputError, match="--force"):
        lorashrink.norms(base, path)
    with pytest.raises(NotABase, match="norm table already"):
        lorashrink.norms(path, tmp_path / "other.json")
    with pytest.raises(OutputError, match=r"ends in \.json"):
        lorashrink.norms(base, tmp_path / "table.txt")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "lorashrink-norms", "version": 2}', '{"weights": 3}'])
def test_a_broken_norm_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(NotABase, match="lorashrink base-norms BASE"):
        open_base(path)
