"""Adapters inside models are shrunk where they are: PEFT and diffusers run with what is left."""

import peft
import pytest
import torch
from loaders import pipe  # noqa: F401
from torch import nn

import lorashrink as ls
from lorashrink.errors import UsageError


class Small(nn.Module):
    """A model with layers of several shapes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.block = nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 16)])

    def forward(self, inputs):
        return self.block[1](self.block[0](self.first(inputs)).relu())


def with_numbers(model, seed=0):
    """Random numbers in all factors, a fast falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            rank = min(parameter.shape)
            decay = 0.5 ** torch.arange(rank).float()
            numbers = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = numbers * (decay[:, None] if parameter.shape[0] == rank else decay)
    return model


def peft_model(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["first", "block.0", "block.1"], **options)
    return with_numbers(peft.get_peft_model(Small(), config)).eval()


def deltas(model, name="default"):
    """What the active adapter adds to each weight, as PEFT itself computes it."""
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name)
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def best_of_rank(delta, rank):
    u, s, v = torch.linalg.svd(delta.double())
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"first": 16}, "rank_pattern": {"block.0": 3}}]
)
def test_a_peft_model_runs_with_the_best_adapter_of_lower_rank(options):
    model = peft_model(**options)
    before = deltas(model)
    report = ls.resize(model, recipes="rank=2")
    after = deltas(model)
    assert after.keys() == before.keys()
    for name, delta in before.items():
        assert torch.allclose(after[name].double(), best_of_rank(delta, 2), atol=1e-5), name
    assert report.results[0].relative_error > 0
    inputs = torch.randn(3, 12)
    changed = model(inputs)
    with model.disable_adapter():
        assert not torch.allclose(model(inputs), changed)


def test_layers_that_a_recipe_removes_leave_a_peft_model():
    model = peft_model()
    for name, parameter in model.named_parameters():
        if "first" in name and "lora_" in name:
            parameter.data *= 1e-3
    ls.resize(model, recipes="thr=-3")
    assert "first" not in deltas(model)
    assert deltas(model)


def test_a_shrunk_peft_model_is_saved_and_loaded_by_peft(tmp_path):
    model = peft_model()
    ls.resize(model, recipes="energy=0.9")
    expected = deltas(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = deltas(peft.PeftModel.from_pretrained(Small(), tmp_path))
    for name, delta in expected.items():
        assert torch.allclose(loaded[name], delta, atol=1e-6)


def test_a_peft_model_is_inspected_and_compared():
    model, shrunk = peft_model(), peft_model()
    table = ls.inspect(model).files[0]
    for row in table.layers:
        expected = deltas(model)[row.name.removeprefix("base_model.model.")].detach().norm()
        assert row.fro == pytest.approx(float(expected), rel=1e-4)
    report = ls.resize(shrunk, recipes="rank=1")
    difference = ls.compare(model, shrunk).total.relative_difference
    assert difference == pytest.approx(report.results[0].relative_error, rel=1e-3)


def test_a_model_with_several_active_adapters_is_refused():
    model = peft_model()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UsageError, match="set_adapters"):
        ls.resize(model, recipes="rank=1")


def test_a_model_takes_one_recipe():
    with pytest.raises(UsageError, match="2 recipes"):
        ls.resize(peft_model(), recipes=["rank=1", "rank=2"])


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_draws_with_the_best_adapter_of_lower_rank(pipe):  # noqa: F811
    config = peft.LoraConfig(r=6, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipe.unet.add_adapter(config, "style")
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "out_proj"]), "style")
    try:
        with_numbers(pipe.unet)
        with_numbers(pipe.text_encoder)
        pipe.set_adapters("style", 0.7)
        before = {part: deltas(getattr(pipe, part), "style") for part in ("unet", "text_encoder")}
        ls.resize(pipe, recipes="rank=2")
        for part, of_part in before.items():
            after = deltas(getattr(pipe, part), "style")
            assert after.keys() == of_part.keys()
            for name, delta in of_part.items():
                assert torch.allclose(after[name].double(), best_of_rank(delta, 2), atol=1e-5), name
        assert pipe.get_active_adapters() == ["style"]
    finally:
        pipe.delete_adapters("style")


def test_a_pipeline_without_an_adapter_is_refused(pipe):  # noqa: F811
    with pytest.raises(UsageError, match="no active adapter"):
        ls.inspect(pipe)
