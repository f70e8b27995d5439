"""What merge and extract leave out is said on the screen, a line per kind; what they write, loaders map."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lorashrink.cli import app

NAME = "diffusion_model.blocks.{}.{}"


def run(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def distilled(path: Path, seed: int, **more: Tensor) -> Path:
    """A LoRA of Wan with differences of a bias and a modulation, as distilled models are published."""
    torch.manual_seed(seed)
    tensors = {
        NAME.format(0, "ffn.0.lora_up.weight"): torch.randn(40, 4),
        NAME.format(0, "ffn.0.lora_down.weight"): torch.randn(4, 24),
        NAME.format(0, "ffn.0.diff_b"): torch.randn(40),
        NAME.format(0, "diff_m"): torch.randn(1, 6, 24),
    }
    return saved(path, {**tensors, **more})


def wan(seed: int) -> dict[str, Tensor]:
    """A checkpoint with the names of Wan 2.1 and one block."""
    torch.manual_seed(seed)
    layers = [f"{part}_attn.{letter}" for part in ("self", "cross") for letter in "qkvo"]
    tensors = {f"blocks.0.{layer}.weight": torch.randn(24, 24) for layer in layers}
    return tensors | {
        "blocks.0.ffn.0.weight": torch.randn(40, 24),
        "blocks.0.ffn.2.weight": torch.randn(24, 40),
        "blocks.0.modulation": torch.randn(1, 6, 24),
        "head.head.weight": torch.randn(64, 24),
        "head.modulation": torch.randn(1, 2, 24),
        "patch_embedding.weight": torch.randn(24, 16, 1, 2, 2),
        "text_embedding.0.weight": torch.randn(24, 32),
        "text_embedding.2.weight": torch.randn(24, 24),
        "time_embedding.0.weight": torch.randn(24, 16),
        "time_embedding.2.weight": torch.randn(24, 24),
        "time_projection.1.weight": torch.randn(144, 24),
    }


def test_merge_weights_differences_of_modulations_as_those_of_biases(tmp_path: Path) -> None:
    a, b = distilled(tmp_path / "a.safetensors", 0), distilled(tmp_path / "b.safetensors", 1)
    run("merge", f"{a}:0.5", f"{b}:2", "-o", tmp_path / "sum.safetensors")
    first, second, total = (load_file(path) for path in (a, b, tmp_path / "sum.safetensors"))
    for ending in ("ffn.0.diff_b", "diff_m"):
        key = NAME.format(0, ending)
        assert torch.allclose(total[key], 0.5 * first[key] + 2 * second[key])


def test_merge_says_what_it_leaves_out_and_why(tmp_path: Path) -> None:
    key = "bundle_emb.word.string_to_param.*"
    a = distilled(tmp_path / "a.safetensors", 0, **{key: torch.randn(3, 8)})
    b = distilled(tmp_path / "b.safetensors", 1)
    text = run("merge", f"{a}:0.5", b, "-o", tmp_path / "sum.safetensors")
    assert f"1 removed, first {key} (a.safetensors): an embedding that comes with the adapter, which cannot be" in text
    assert key not in load_file(tmp_path / "sum.safetensors")


def test_extract_writes_only_what_loaders_map_and_lists_the_rest(tmp_path: Path) -> None:
    tuned, base = saved(tmp_path / "tuned.safetensors", wan(0)), saved(tmp_path / "wan.safetensors", wan(1))
    text = run("extract", tuned, base, "-r", "energy=1", "-o", tmp_path / "new.safetensors")
    assert not [key for key in load_file(tmp_path / "new.safetensors") if "modulation" in key]
    assert "2 removed, first lora_unet_blocks_0_modulation: a parameter of another name than weight" in text


def test_resize_says_on_the_screen_what_is_copied_and_why(tmp_path: Path) -> None:
    text = run("resize", "-r", "rank=2", "-o", tmp_path / "out", distilled(tmp_path / "a.safetensors", 0))
    assert "1 copied, first diffusion_model.blocks.0.diff_m: a difference of a modulation" in text
