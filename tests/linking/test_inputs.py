"""What arguments stand for: adapters, weights and sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import write_tensors

from lorashrink.errors import UsageError
from lorashrink.linking.inputs import Sum, find_inputs, is_sum, split_sum, split_weight, to_sum


def adapters(folder: Path) -> tuple[Path, Path]:
    """Two small adapters, a and b."""
    name = "lora_unet_middle_block_1_proj_in"
    factors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.lora_down.weight": torch.ones(2, 8)}
    a, b = (write_tensors(folder / f"{letter}.safetensors", factors) for letter in "ab")
    return a, b


def test_weights_stand_behind_the_last_colon(tmp_path: Path) -> None:
    existing = tmp_path / "a:2"
    existing.write_bytes(b"")
    assert split_weight("style.safetensors:0.7") == ("style.safetensors", 0.7)
    assert split_weight("style.safetensors:-1e-1") == ("style.safetensors", -0.1)
    assert split_weight("style.safetensors") == ("style.safetensors", 1.0)
    assert split_weight(r"C:\x.safetensors") == (r"C:\x.safetensors", 1.0)
    assert split_weight(str(existing)) == (str(existing), 1.0)
    assert split_weight(f"{existing}:3") == (str(existing), 3.0)
    for weight in ("nan", "inf", "strong"):
        with pytest.raises(UsageError, match=f"'{weight}' is no weight"):
            split_weight(f"{existing}:{weight}")


def test_a_weight_is_the_number_behind_the_last_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_sum("A:0.7,B:-5e-1,C") == [("A", 0.7), ("B", -0.5), ("C", 1.0)]
    assert split_sum(r"C:\x.safetensors") == [(r"C:\x.safetensors", 1.0)]
    assert split_sum(r"C:\x.safetensors:2,D:\y.safetensors") == [(r"C:\x.safetensors", 2.0), (r"D:\y.safetensors", 1.0)]
    for name in ("one, two.safetensors", "three:4", "a,b:1,c"):
        (tmp_path / name).write_bytes(b"")
        assert split_sum(name) == [(name, 1.0)]
        assert not is_sum(name)
        assert split_sum(f"X:2,{name}:0.5,Y") == [("X", 2.0), (name, 0.5), ("Y", 1.0)]
    assert not is_sum("A.safetensors")
    assert is_sum("A.safetensors:0.5")


def test_sums_and_files_are_found_side_by_side(tmp_path: Path) -> None:
    a, b = adapters(tmp_path)
    text = f"{a}:0.5,{b}"
    inputs = find_inputs([text, tmp_path, text])
    assert list(inputs) == [Path(f"{a}:0.5,{b}:1"), a, b]
    assert list(inputs.values()) == [Sum(((a, 0.5), (b, 1.0))), None, None]


@pytest.mark.parametrize(
    ("terms", "error"),
    [
        ("{a}:nan", "is no weight"),
        ("{a}:inf,{b}", "is no weight"),
        ("{a}:half,{b}", "'half' is no weight"),
        ("{a}:0.5,,{b}", "a name is missing"),
        ("{a}:0.5,{a}:0.25", "is there twice. Give it once, with the weight 0.75"),
        ("{a}:0,{b}:0", "weights are all 0"),
        ("{folder}:0.5", "stands for 2 adapters"),
    ],
)
def test_arguments_that_are_no_sum(tmp_path: Path, terms: str, error: str) -> None:
    a, b = adapters(tmp_path)
    with pytest.raises(UsageError, match=error):
        to_sum([terms.format(a=a, b=b, folder=tmp_path)])
