"""Every setting of PEFT: followed, harmless, or refused by name; the reference is PEFT itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lorashrink.adapters import open_adapter, peft
from lorashrink.adapters.peft_keys import FROM_BASE, HARMLESS, KEYS, UNDERSTOOD
from lorashrink.errors import InputError, LorashrinkError
from lorashrink.insight.comparison import compare
from lorashrink.insight.inspection import inspect
from lorashrink.making.conversion import convert
from lorashrink.making.merging import merge
from lorashrink.packing.pack import pack
from lorashrink.packing.unpack import unpack
from lorashrink.shrinking.run import resize

CONFIGS = {str(kind).rpartition(".")[2]: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
MODULES = ["q_proj", "down_proj"]
# PEFT asks transformers for a property that is on its way out, and warns of what these tests do on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter with these settings, as PEFT saves it after some training."""
    config = LoraConfig(**{"target_modules": MODULES, **settings})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


def weights(base: Path, folder: Path | None = None) -> dict[str, Tensor]:
    """All weights of the model, with the adapter merged in by PEFT."""
    model = LlamaForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload() if folder else model
    return {name: parameter.detach().double() for name, parameter in merged.named_parameters()}


def shrunk(adapter: Path, output: Path, recipe: str, **options: Any) -> Path:
    report = resize(adapter, recipes=recipe, output=output, dtype="fp32", **options)
    assert not report.failed, report.failed
    return Path(report.results[0].output)


def error(base: Path, before: Path, after: Path) -> float:
    """What of the true change of the weights is lost, relative."""
    plain, old, new = weights(base), weights(base, before), weights(base, after)
    lost = sum(float((new[name] - old[name]).square().sum()) for name in plain)
    return (lost / sum(float((old[name] - plain[name]).square().sum()) for name in plain)) ** 0.5


def edited(folder: Path, **settings: Any) -> Path:
    """The folder with other settings in its configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEYS)
def test_the_table_has_every_key_of_the_installed_peft(kind: str) -> None:
    assert {field.name for field in dataclasses.fields(CONFIGS[kind])} <= KEYS[kind].keys()


# Layers of `use_bdlora` are copied as they are, with the reason; its row answers other commands.
REFUSED = [key for key, why in KEYS["LORA"].items() if why not in (UNDERSTOOD, HARMLESS) and key != "use_bdlora"]


@pytest.mark.parametrize("key", [*REFUSED, "key_of_next_year"])
def test_a_setting_of_unknown_meaning_is_refused_by_name(base: Path, tmp_path: Path, key: str) -> None:
    adapter = edited(trained(base, tmp_path / "a", r=4), **{key: {"blocks": 2}})
    with pytest.raises(InputError, match=rf"{key} is .*blocks"):
        open_adapter(adapter)
    open_adapter(edited(adapter, **{key: None})).close()
    open_adapter(edited(adapter, **{key: False})).close()


def test_a_kind_without_factors_is_refused_by_its_name(base: Path, tmp_path: Path) -> None:
    """It has no layer that is known here, and is no base either."""
    adapter = edited(trained(base, tmp_path / "a", r=4), peft_type="DELORA")
    file = adapter / "adapter_model.safetensors"
    tensors = {key.replace("lora_", "delora_").replace(".weight", ""): value for key, value in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(InputError, match="its peft_type is DELORA"):
        open_adapter(adapter)


@pytest.mark.parametrize("kind", ["GRALORA", "of next year"])
def test_factors_of_an_unknown_kind_are_refused(base: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="peft_type"):
        open_adapter(edited(trained(base, tmp_path / "a", r=4), peft_type=kind))


SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"0.self_attn.q_proj|down_proj": 7}, "alpha_pattern": {r".*\.1\..*": 3}},
    "dora": {"r": 4, "use_dora": True},
    "bias": {"r": 4, "modules_to_save": ["lm_head"]},
    "tokens": {"r": 4, "trainable_token_indices": [1, 5]},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "mica": {"r": 4, "init_lora_weights": "mica"},
    "layers": {"r": 4, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_of_an_adapter_has_the_same_merged_weights(base: Path, tmp_path: Path, name: str) -> None:
    adapter = trained(base, tmp_path / "a", **SETTINGS[name])
    assert error(base, adapter, shrunk(adapter, tmp_path / "out", "energy=1")) < 1e-5


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("dora", "bias", "tokens")])
def test_a_part_of_an_adapter_is_as_near_as_reported(base: Path, tmp_path: Path, name: str) -> None:
    adapter = trained(base, tmp_path / "a", **SETTINGS[name])
    report = resize(adapter, recipes="rank=3", output=tmp_path / "out", dtype="fp32")
    (result,) = report.results
    assert error(base, adapter, Path(result.output)) == pytest.approx(result.relative_error, rel=1e-3)


# --- MiSS ---------------------------------------------------------------------------------------

MISS: dict[str, dict[str, Any]] = {
    "balance": {"r": 8},
    "a rank that does not divide the inputs": {"r": 7},
    "mini": {"r": 8, "init_weights": "mini", "mini_r": 16},
    "bat": {"r": 8, "init_weights": "bat"},
}


def trained_miss(base: Path, folder: Path, name: str) -> Path:
    """A MiSS adapter as PEFT saves it after some training."""
    config = MissConfig(target_modules=MODULES, **MISS[name])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "miss_block" in key:
            parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in MISS if name != "bat"])
def test_miss_becomes_a_lora_with_the_same_merged_weights(base: Path, tmp_path: Path, name: str) -> None:
    adapter = trained_miss(base, tmp_path / "a", name)
    output = shrunk(adapter, tmp_path / "out", "energy=1", base=base, form="lora")
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert error(base, adapter, output) < 1e-6
    report = resize(adapter, recipes="rank=2", output=tmp_path / "two", dtype="fp32", base=base, form="lora")
    (result,) = report.results
    assert error(base, adapter, Path(result.output)) == pytest.approx(result.relative_error, rel=1e-3)


@pytest.mark.parametrize("name", MISS)
def test_miss_stays_as_it_is_without_a_base(base: Path, tmp_path: Path, name: str) -> None:
    adapter = trained_miss(base, tmp_path / "a", name)
    report = resize(adapter, recipes="rank=2", output=tmp_path / "out")
    (result,) = report.results
    assert {item.reason.partition(":")[0] for item in result.verbatim} == {
        "MiSS by `bat`, which multiplies the base weight" if name == "bat" else "miss"
    }
    assert error(base, adapter, Path(result.output)) == 0


@pytest.mark.parametrize("name", [name for name in MISS if name != "bat"])
def test_miss_is_merged_and_measured_by_its_true_weights(base: Path, tmp_path: Path, name: str) -> None:
    adapter, other = trained_miss(base, tmp_path / "a", name), trained(base, tmp_path / "b", r=4, lora_alpha=16)
    plain, a, b = weights(base), weights(base, adapter), weights(base, other)
    for row in inspect(adapter, base=base).files[0].layers:
        key = f"{row.name.removeprefix('base_model.model.')}.weight"
        assert row.fro == pytest.approx(float((a[key] - plain[key]).norm()), rel=1e-5)
    merge([f"{adapter}:0.5", other], output=tmp_path / "sum", base=base, dtype="fp32")
    (output,) = (tmp_path / "sum").iterdir()
    for key, weight in weights(base, output).items():
        expected = plain[key] + 0.5 * (a[key] - plain[key]) + b[key] - plain[key]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)


def test_miss_gets_other_names_only_where_they_mean_the_same(base: Path, tmp_path: Path) -> None:
    mini = trained_miss(base, tmp_path / "mini", "mini")
    (failure,) = convert(mini, base=base, naming="diffusers", output=tmp_path / "out").failed
    assert "depends on PEFT's settings" in failure.error
    adapter = trained_miss(base, tmp_path / "a", "balance")
    (result,) = convert(adapter, base=base, naming="diffusers", output=tmp_path / "out").results
    assert not result.loads.loads_after  # no one command makes a folder of PEFT again
    lora = shrunk(Path(result.output), tmp_path / "lora", "energy=1", base=base, form="lora")
    (back,) = convert(lora, base=base, naming="peft", output=tmp_path / "back").results
    assert error(base, adapter, Path(back.output)) < 1e-6


def test_miss_of_an_unknown_mode_is_not_taken_for_factors(base: Path, tmp_path: Path) -> None:
    adapter = edited(trained_miss(base, tmp_path / "a", "balance"), init_weights="of_next_year")
    with open_adapter(adapter) as opened:
        assert not opened.layers
        assert {reason.partition(";")[0] for reason in opened.others.values()} == {
            "MiSS whose init_weights is not true, false or mini"
        }


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "CPT"])
def test_prompts_are_refused_as_what_changes_no_weight(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = edited(trained(base, tmp_path / "a", r=4), peft_type=kind)
    save_file({"prompt_embeddings": torch.ones(8, 32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="changes no weight of the model"):
        open_adapter(adapter)


# --- initialisations that change the base -------------------------------------------------------


@pytest.mark.parametrize("recipe", ["energy=1", "rank=12", "rank=3"])
@pytest.mark.parametrize("name", FROM_BASE)
def test_a_changed_base_is_replaced_by_the_true_one(base: Path, tmp_path: Path, name: str, recipe: str) -> None:
    adapter = trained(base, tmp_path / "a", r=8, lora_alpha=12, init_lora_weights=name)
    output = shrunk(adapter, tmp_path / "out", recipe, base=base, form="lora")
    assert json.loads((output / "adapter_config.json").read_text())["init_lora_weights"] is True
    plain, old, new = weights(base), weights(base, adapter), weights(base, output)
    for key in plain:
        delta, lost = old[key] - plain[key], old[key] - new[key]
        rank = {"energy=1": 16, "rank=12": 12, "rank=3": 3}[recipe]
        best = torch.linalg.svdvals(delta)[rank:].norm() if delta.ndim == 2 else torch.tensor(0.0)
        assert float(lost.norm()) <= float(best) * 1.001 + 1e-4 * float(delta.norm())


@pytest.mark.parametrize("name", FROM_BASE)
def test_the_norm_of_a_changed_base_is_that_of_the_true_change(base: Path, tmp_path: Path, name: str) -> None:
    adapter = trained(base, tmp_path / "a", r=8, init_lora_weights=name)
    plain, merged = weights(base), weights(base, adapter)
    for row in inspect(adapter, base=base).files[0].layers:
        key = f"{row.name.removeprefix('base_model.model.')}.weight"
        assert row.fro == pytest.approx(float((merged[key] - plain[key]).norm()), rel=1e-3)
    assert {row.fro for row in inspect(adapter).files[0].layers} == {None}


def test_a_merge_of_changed_bases_adds_the_true_changes(base: Path, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "a", r=4, init_lora_weights="pissa")
    second = trained(base, tmp_path / "b", r=4, lora_alpha=16)
    merge([f"{first}:0.5", second], output=tmp_path / "sum", base=base, dtype="fp32")
    (output,) = (tmp_path / "sum").iterdir()
    plain, a, b = weights(base), weights(base, first), weights(base, second)
    for key, weight in weights(base, output).items():
        expected = plain[key] + 0.5 * (a[key] - plain[key]) + b[key] - plain[key]
        torch.testing.assert_close(weight, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("command", ["resize", "merge", "convert"])
def test_a_changed_base_without_the_true_one_is_refused(base: Path, tmp_path: Path, command: str) -> None:
    adapter = trained(base, tmp_path / "a", r=8, init_lora_weights="pissa")
    says: list[str] = []
    try:
        if command == "resize":
            says += [failure.error for failure in resize(adapter, recipes="rank=2", output=tmp_path / "out").failed]
        elif command == "merge":
            merge(adapter, output=tmp_path / "out")
        else:
            says += [f.error for f in convert(adapter, naming="comfy", base=base, output=tmp_path / "out").failed]
    except LorashrinkError as refusal:
        says.append(str(refusal))
    assert "init_lora_weights is pissa" in says[0]
    assert not list(tmp_path.glob("out/**/*.safetensors"))


@pytest.mark.parametrize("name", ["pissa_niter_4", "corda", "loftq", "of_next_year"])
def test_a_base_that_no_file_tells_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    adapter = edited(trained(base, tmp_path / "a", r=8), init_lora_weights=name)
    with pytest.raises(InputError, match=f"init_lora_weights is '{name}'.*path_initial_model"):
        open_adapter(adapter)


def test_an_odd_rank_of_orthogonal_factors_loads(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", r=4, init_lora_weights="orthogonal")
    output = shrunk(adapter, tmp_path / "out", "rank=3")
    assert weights(base, output).keys() == weights(base).keys()


# --- patterns -----------------------------------------------------------------------------------

NAMES = [
    f"model.layers.{n}.{name}" for n in (0, 1, 10) for name in ("self_attn.q_proj", "mlp.down_proj", "mlp.xdown_proj")
]
PATTERNS = [
    "q_proj",
    "self_attn.q_proj|mlp.down_proj",
    r"down_proj|.*\.0\.self_attn\.q_proj",
    "^model.layers.1.mlp.down_proj",
    "layers.1",
    r"layers\.\d+\.mlp\.(down|up)_proj",
    "(?:.*)[qk]_proj",
    "proj",
    "q.proj",
    r".*\.1\..*",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_peft(pattern: str) -> None:
    config = {"": {"lora_alpha": 1, "alpha_pattern": {pattern: 8}}}
    for name in NAMES:
        expected = 8 if get_pattern_key([pattern], name) == pattern else 1
        assert peft.scale(config, f"base_model.model.{name}", 1, peft.Patterns()) == expected


HOSTILE = [
    *("(a+)+b", "(.*.*.*)*x", "(a|aa)+$b", "(" * 9 + "a" + "+)+" * 9 + "b", "(", "a{9999999999}"),
    *("((a{1000}){1000}){1000}b", "a|" * 300_000 + "b", "(" * 3000 + "a" + ")*" * 3000 + "b"),
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_cannot_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(peft, "_SECONDS", 1.0)
    name = f"base_model.model.{'a' * 60}"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": {pattern: 8}}))
    start = time.process_time()
    with contextlib.suppress(InputError), open_adapter(tmp_path) as adapter:
        assert adapter.layers[0].scale == 1
    assert time.process_time() - start < 15


def test_patterns_of_a_file_share_one_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them is fast enough for each of the names."""
    monkeypatch.setattr(peft, "_SECONDS", 1.0)
    names = [f"base_model.model.{number}.{'a' * 28}" for number in range(20)]
    tensors = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for name in names for side in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    patterns = {f"(a|aa)+${number}": 8 for number in range(20)}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "alpha_pattern": patterns}))
    start = time.process_time()
    with pytest.raises(LorashrinkError, match="the patterns take more than 1 s"):
        open_adapter(tmp_path)
    assert time.process_time() - start < 15


def test_layers_that_stay_keep_their_patterns_in_order(base: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"z?down_proj": 6, "down.*": 2}, "alpha_pattern": {"z?down_proj": 3, ".*proj": 5}}
    adapter = edited(trained(base, tmp_path / "a", r=4, **patterns), **patterns)  # PEFT saves them sorted
    unknown = tmp_path / "b"
    tensors = load_file(adapter / "adapter_model.safetensors")
    base_tensors = load_file(base / "model.safetensors")
    unknown.mkdir()
    save_file({k: v for k, v in base_tensors.items() if "layers.0" not in k}, unknown / "model.safetensors")
    (unknown / "config.json").write_text((base / "config.json").read_text())
    output = shrunk(adapter, tmp_path / "out", "fro_ckpt=1,thr=-9", base=unknown)
    assert tensors.keys() == load_file(output / "adapter_model.safetensors").keys()
    assert error(base, adapter, output) < 1e-5


# --- experts ------------------------------------------------------------------------------------


def experts_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": 40, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(num_key_value_heads=2, **sizes, **sparse))


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(experts_model(), LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def expert_weights(adapter: Path) -> dict[str, Tensor]:
    merged = PeftModel.from_pretrained(experts_model(), str(adapter)).merge_and_unload()
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}


def expert_changes(adapter: Path) -> dict[str, Tensor]:
    """What PEFT adds to each weight, experts one by one [e, out, in]."""
    plain = dict(experts_model().named_parameters())
    return {name: weight - plain[name].detach() for name, weight in expert_weights(adapter).items()}


def truncated(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]).float()


@pytest.mark.parametrize("recipe", ["rank=4", "energy=1", "rank=2"])
def test_experts_shrink_each_and_load_in_peft(experts: Path, tmp_path: Path, recipe: str) -> None:
    report = resize(experts, recipes=recipe, output=tmp_path / "out", dtype="fp32")
    (result,) = report.results
    before, after = expert_changes(experts), expert_changes(Path(result.output))
    lost = total = 0.0
    for key, change in before.items():
        expected = truncated(change, 2) if recipe == "rank=2" and change.ndim > 1 else change
        torch.testing.assert_close(after[key], expected, atol=1e-5, rtol=1e-4)
        lost, total = lost + float((after[key] - change).norm() ** 2), total + float(change.norm() ** 2)
    assert result.relative_error == pytest.approx((lost / total) ** 0.5, abs=1e-4)
    assert {row.rank_after for row in result.layers} == {2 if recipe == "rank=2" else 4}


def test_the_parameters_of_a_module_get_one_rank(experts: Path, tmp_path: Path) -> None:
    """Names do not tell which factors are whose, so that PEFT could not be told two ranks."""
    file = experts / "adapter_model.safetensors"
    tensors = load_file(file)
    inner = next(key for key in tensors if "base_layer.lora_A" in key)
    tensors[inner][1::4] *= 1e-3  # the second dimension of each expert, of four
    tensors[inner][2::4] *= 1e-3
    save_file(tensors, file)
    report = resize(experts, recipes="energy=0.99", output=tmp_path / "out", dtype="fp32")
    (result,) = report.results
    ranks = {row.name.rpartition(".layers.0.")[2]: row.rank_after for row in result.layers}
    assert ranks["mlp.experts"] == ranks["mlp.experts.base_layer"] > 2
    before, after = expert_changes(experts), expert_changes(Path(result.output))
    lost, total = (
        sum(float(change.norm() ** 2) for change in changes)
        for changes in ((after[key] - before[key] for key in before), before.values())
    )
    assert (lost / total) ** 0.5 == pytest.approx(result.relative_error, abs=1e-4)


@pytest.mark.parametrize("recipe", ["size=0.03", "fro_lora=1,thr=-0.4", "rank=2,rescale=0.5", "uniform,energy=0.9"])
@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_experts_follow_every_recipe(experts: Path, tmp_path: Path, recipe: str, dtype: str) -> None:
    report = resize(experts, recipes=recipe, output=tmp_path / "out", dtype=dtype)
    (result,) = report.results
    before, after = expert_changes(experts), expert_changes(Path(result.output))
    strength = 0.5 if "rescale" in recipe else 1.0
    lost = sum(float((after[key] - strength * before[key]).norm() ** 2) for key in before)
    total = sum(float((strength * before[key]).norm() ** 2) for key in before)
    rounding = {"fp16": 1e-3, "fp8": 0.08}[dtype]
    assert result.relative_error - rounding < (lost / total) ** 0.5 < result.relative_error + rounding


def test_experts_of_several_ranks_are_copied_with_the_reason(experts: Path, tmp_path: Path) -> None:
    settings = json.loads((experts / "adapter_config.json").read_text())
    edited(experts, rank_pattern={"experts.down_proj": 2}, r=settings["r"])
    report = resize(experts, recipes="rank=2", output=tmp_path / "out", dtype="fp32")
    reasons = [row.reason for row in report.results[0].verbatim]
    assert sum("nothing says which are whose" in reason for reason in reasons) == 4


def test_experts_are_compared_and_packed(experts: Path, tmp_path: Path) -> None:
    report = resize(experts, recipes="rank=2", output=tmp_path / "out", dtype="fp32")
    (result,) = report.results
    comparison = compare(experts, result.output)
    assert comparison.total.relative_difference == pytest.approx(result.relative_error, rel=1e-4)
    packed = pack(experts, output=tmp_path / "packed").results[0]
    assert sum("not packed" in row.reason for row in packed.verbatim) == 4
    files = unpack(packed.output, output=tmp_path / "plain").results
    before, after = expert_changes(experts), expert_changes(Path(files[0].output))
    for key in before:
        if "experts" in key:
            torch.testing.assert_close(after[key], before[key], atol=1e-3, rtol=1e-3)


def gpt_oss() -> GptOssForCausalLM:
    """Its weights of experts are stored [experts, in, out], the other way round than Qwen's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sparse = {"num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 40, "head_dim": 16}
    return GptOssForCausalLM(GptOssConfig(num_key_value_heads=2, **sizes, **sparse))


@pytest.mark.parametrize("model", [experts_model, gpt_oss])
@pytest.mark.parametrize("modules", [["q_proj"], []])
def test_experts_are_merged_each(model: Callable[[], Any], modules: list[str], tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapters = []
    for seed, settings in enumerate(({"r": 4, "lora_alpha": 3}, {"r": 2, "lora_alpha": 5, "use_rslora": True})):
        common = {"target_modules": modules, "target_parameters": parameters}
        trained_model = get_peft_model(model(), LoraConfig(**settings, **common))
        torch.manual_seed(seed)
        for name, parameter in trained_model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.1
        adapters.append(tmp_path / f"{seed}")
        trained_model.save_pretrained(adapters[-1])

    def changes(adapter: Path) -> dict[str, Tensor]:
        merged = PeftModel.from_pretrained(model(), str(adapter)).merge_and_unload()
        plain = dict(model().named_parameters())
        return {name: parameter.detach() - plain[name].detach() for name, parameter in merged.named_parameters()}

    first, second = adapters
    merge([f"{first}:0.5", f"{second}:-0.7"], output=tmp_path / "sum", dtype="fp32")
    before, added, after = (changes(folder) for folder in (first, second, *(tmp_path / "sum").iterdir()))
    for key in before:
        torch.testing.assert_close(after[key], 0.5 * before[key] - 0.7 * added[key], atol=1e-5, rtol=1e-4)


def test_experts_and_an_ordinary_layer_are_not_added(base: Path, experts: Path, tmp_path: Path) -> None:
    with pytest.raises(LorashrinkError, match="target_parameters"):
        merge([experts, trained(base, tmp_path / "a", r=4)], output=tmp_path / "out")


def test_experts_of_several_ranks_are_not_added(experts: Path, tmp_path: Path) -> None:
    edited(experts, rank_pattern={"experts.down_proj": 2})
    with pytest.raises(LorashrinkError, match="nothing says which are whose"):
        merge(experts, output=tmp_path / "out")


def test_experts_alone_are_nothing_for_vllm_and_need_no_base(base: Path, experts: Path, tmp_path: Path) -> None:
    file = experts / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "experts" in key}, file)
    for options in ({"target": "vllm"}, {"base": base}):
        (failure,) = resize(experts, recipes="energy=1", output=tmp_path / "out", **options).failed
        assert "factors of experts alone" in failure.error


# --- settings of a sum --------------------------------------------------------------------------


def test_a_merge_keeps_replicated_layers(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", r=4, layer_replication=[[0, 1], [0, 2]])
    merge(f"{adapter}:0.5", output=tmp_path / "sum", dtype="fp32")
    (output,) = (tmp_path / "sum").iterdir()

    def deltas(folder: Path) -> dict[str, Tensor]:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(folder))
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        return {name: layer.get_delta_weight("default") for name, layer in layers.items()}

    before, after = deltas(adapter), deltas(output)
    assert len(before) == 6
    for name, delta in before.items():
        torch.testing.assert_close(after[name], 0.5 * delta)


@pytest.mark.parametrize("weight", [0.5, 1])
def test_a_merge_of_embeddings_loads_in_peft(base: Path, tmp_path: Path, weight: float) -> None:
    adapter = trained(base, tmp_path / "a", r=4, lora_alpha=3, target_modules=["embed_tokens", "q_proj"])
    merge(f"{adapter}:{weight}", output=tmp_path / "sum", dtype="fp32")
    (output,) = (tmp_path / "sum").iterdir()
    plain, old, new = weights(base), weights(base, adapter), weights(base, output)
    for name, weight_before in plain.items():
        expected = weight_before + weight * (old[name] - weight_before)
        torch.testing.assert_close(new[name], expected, atol=1e-6, rtol=1e-5)


SAVED = {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2]}


@pytest.mark.parametrize("key", SAVED)
@pytest.mark.parametrize("weight", [0.5, 1])
def test_settings_of_a_merge_name_no_tensors_that_are_left_out(
    base: Path, tmp_path: Path, key: str, weight: float
) -> None:
    """At full strength whole weights and tokens are copied. Otherwise PEFT must not expect them."""
    adapter = trained(base, tmp_path / "a", **{"r": 4, key: SAVED[key]})
    merge(f"{adapter}:{weight}", output=tmp_path / "sum", dtype="fp32")
    (output,) = (tmp_path / "sum").iterdir()
    if weight == 1:
        assert error(base, adapter, output) < 1e-5
    else:
        assert not json.loads((output / "adapter_config.json").read_text()).get(key)
        weights(base, output)


def test_tokens_stay_in_a_folder_with_new_names(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "a", r=4, trainable_token_indices=[1, 2])
    (result,) = convert(adapter, base=base, naming="peft", output=tmp_path / "out").results
    assert error(base, adapter, Path(result.output)) < 1e-5


@pytest.mark.parametrize("key", SAVED)
def test_settings_for_vllm_name_no_tensors_that_are_left_out(base: Path, tmp_path: Path, key: str) -> None:
    adapter = trained(base, tmp_path / "a", **{"r": 4, key: SAVED[key]})
    output = shrunk(adapter, tmp_path / "out", "energy=1", target="vllm")
    assert not json.loads((output / "adapter_config.json").read_text()).get(key)
    weights(base, output)


UNCOMMON = {"layer_replication": [[0, 1], [0, 2]], "alora_invocation_tokens": [1, 2]}


@pytest.mark.parametrize("key", UNCOMMON)
def test_a_merge_refuses_settings_that_are_not_common(base: Path, tmp_path: Path, key: str) -> None:
    first = trained(base, tmp_path / "a", **{"r": 4, key: UNCOMMON[key]})
    second = trained(base, tmp_path / "b", r=4)
    for pair in ([first, second], [second, first]):
        with pytest.raises(LorashrinkError, match=key):
            merge(pair, output=tmp_path / "out")


@pytest.mark.parametrize("key", UNCOMMON)
def test_settings_that_peft_alone_follows_are_not_for_vllm(base: Path, tmp_path: Path, key: str) -> None:
    adapter = trained(base, tmp_path / "a", **{"r": 4, key: UNCOMMON[key]})
    (failure,) = resize(adapter, recipes="energy=1", output=tmp_path / "out", target="vllm").failed
    assert key in failure.error
    (report,) = inspect(adapter).files
    assert report.loads.loads_in == ("PEFT",)
    assert key in report.loads.loads_not["vLLM"]


@pytest.mark.parametrize("act", [resize, convert])
def test_a_base_is_refused_with_replicated_layers(base: Path, tmp_path: Path, act: Callable[..., Any]) -> None:
    adapter = trained(base, tmp_path / "a", r=4, layer_replication=[[0, 1], [0, 2]])
    options = {"recipes": "fro_ckpt=1,thr=-9"} if act is resize else {"naming": "peft"}
    (failure,) = act(adapter, base=base, output=tmp_path / "out", **options).failed
    assert "layer_replication" in failure.error


# --- other trainers and torch.compile -----------------------------------------------------------


def factors(name: str, inner: int, out: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, inner, generator=generator), torch.randn(out, 4, generator=generator)


@pytest.mark.parametrize("trainer", ["mlx", "torchtune"])
def test_adapters_of_other_trainers_become_pefts(base: Path, tmp_path: Path, trainer: str) -> None:
    down, up = factors("q", 32, 32, 0)
    name, file = "model.layers.0.self_attn.q_proj", tmp_path / trainer / "adapters.safetensors"
    file.parent.mkdir()
    if trainer == "mlx":
        save_file({f"{name}.lora_a": down.mT.contiguous(), f"{name}.lora_b": up.mT.contiguous()}, file)
        settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
        (file.parent / "adapter_config.json").write_text(json.dumps(settings))
    else:
        save_file({f"{name}.lora_a.weight": down, f"{name}.lora_b.weight": up}, file)
    scale = 20.0 if trainer == "mlx" else 1.0
    with open_adapter(file) as adapter:
        torch.testing.assert_close(adapter.layers[0].delta.dense(), scale * up @ down, rtol=1e-5, atol=1e-4)
    for recipe in ("energy=1", "rank=2"):
        report = resize(file, recipes=recipe, output=tmp_path / "out", dtype="fp32")
        tensors = load_file(report.results[0].output)
        change = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] - scale * up @ down
        best = torch.linalg.svdvals(scale * up @ down)[2:].norm() if recipe == "rank=2" else 0
        assert float(change.norm()) == pytest.approx(float(best), rel=1e-3, abs=1e-2)
    (failure,) = convert(file, naming="comfy", base=base, output=tmp_path / "out").failed
    assert f"adapter of {trainer}" in failure.error


def test_mlx_dora_is_refused(tmp_path: Path) -> None:
    down, up = factors("q", 32, 32, 0)
    save_file(
        {"model.q.lora_a": down.mT.contiguous(), "model.q.lora_b": up.mT.contiguous()},
        tmp_path / "adapters.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "dora", "lora_parameters": {"scale": 2}}')
    with pytest.raises(InputError, match="DoRA of mlx-lm"):
        open_adapter(tmp_path / "adapters.safetensors")


COMPILED = ["_orig_mod.base_model.model.model.layers.0", "base_model.model.model.layers.0._orig_mod"]


@pytest.mark.parametrize("name", COMPILED)
def test_names_of_torch_compile_are_found_in_the_base(base: Path, tmp_path: Path, name: str) -> None:
    adapter = trained(base, tmp_path / "a", r=4, lora_alpha=4, alpha_pattern={"layers.0.self_attn.q_proj": 12})
    file = adapter / "adapter_model.safetensors"
    tensors = {key.replace("base_model.model.model.layers.0", name): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    result = resize(adapter, recipes="fro_ckpt=1,thr=-9", base=base, output=tmp_path / "out").results[0]
    assert len(result.layers) == 4
    table = inspect(adapter).files[0]
    assert "torch.compile" in " ".join(finding.text for finding in table.health)
    with open_adapter(adapter) as opened:
        assert sorted(layer.scale for layer in opened) == [1, 1, 1, 3]
