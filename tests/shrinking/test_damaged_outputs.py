"""`--skip-existing` and outputs that were damaged since: they are made again, byte by byte the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorashrink
from lorashrink.errors import UsageError
from lorashrink.shrinking import journal

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-100],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "header cut": lambda data: data[:64],
    "bytes too many": lambda data: data + bytes(8),  # which programs refuse
}
SILENT: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda data: data[:-512] + bytes(512),
    "one bit": lambda data: data[:-5] + bytes([data[-5] ^ 64]) + data[-4:],
}


@pytest.fixture
def shrunk_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, bytes]:
    """(an adapter, its output, the output's bytes)."""
    monkeypatch.setattr(journal, "SETTLED_SECONDS", 0.0)
    torch.manual_seed(0)
    layer, path = "lora_unet_b_to_q", tmp_path / "a.safetensors"
    save_file({f"{layer}.lora_up.weight": torch.randn(64, 8), f"{layer}.lora_down.weight": torch.randn(8, 64)}, path)
    assert again(path) == "made"
    output = tmp_path / "out" / "a_rank4.safetensors"
    return path, output, output.read_bytes()


def again(path: Path, *, verify: bool = False) -> str:
    report = lorashrink.resize(path, recipes="rank=4", output=path.parent / "out", skip_existing=True, verify=verify)
    assert not report.failed
    return "kept" if report.results[0].skipped else "made"


@pytest.mark.parametrize("with_journal", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_output_that_cannot_be_read_is_made_again(
    shrunk_file: tuple[Path, Path, bytes], damage: str, with_journal: bool
) -> None:
    path, output, good = shrunk_file
    output.write_bytes(DAMAGE[damage](good))
    if not with_journal:
        (output.parent / journal.NAME).unlink()
    assert again(path) == "made"
    assert output.read_bytes() == good
    assert again(path) == "kept"


def test_a_file_that_never_was_an_output_is_left_alone(shrunk_file: tuple[Path, Path, bytes]) -> None:
    path, output, _ = shrunk_file
    output.write_text("mine")
    report = lorashrink.resize(path, recipes="rank=4", output=path.parent / "out", skip_existing=True)
    assert str(output) in report.failed[0].error
    assert output.read_text() == "mine"


@pytest.mark.parametrize("damage", SILENT)
def test_verify_finds_what_only_the_hash_tells(shrunk_file: tuple[Path, Path, bytes], damage: str) -> None:
    path, output, good = shrunk_file
    assert again(path, verify=True) == "kept"
    output.write_bytes(SILENT[damage](good))
    assert again(path, verify=True) == "made"
    assert output.read_bytes() == good


def test_verify_goes_with_skip_existing_only(shrunk_file: tuple[Path, Path, bytes]) -> None:
    with pytest.raises(UsageError, match="--verify"):
        lorashrink.resize(shrunk_file[0], recipes="rank=4", verify=True)


def test_outputs_that_are_moved_away_at_once_do_not_end_the_run(
    shrunk_file: tuple[Path, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rsync --remove-source-files and watched folders do."""
    from lorashrink.shrinking import pipeline

    path, output, _ = shrunk_file
    output.unlink()
    written = pipeline.write

    def write_and_move(*plans: object, **options: object) -> object:
        warnings = written(*plans, **options)
        output.rename(path.parent / "moved.safetensors")
        return warnings

    monkeypatch.setattr(pipeline, "write", write_and_move)
    assert again(path) == "made"
    monkeypatch.undo()
    assert again(path) == "made"
