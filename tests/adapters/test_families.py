"""Every family of layers against the library that trains it: the rows of the table alone, without files."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from fixtures import shapes
from hypothesis import given
from hypothesis import strategies as st
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from lorashrink.adapters import adalora, embedding, full, glora, ia3, loha, lokr, miss, oft, open_adapter, vera
from lorashrink.adapters.family import SHARED, Family, Infos, Needs, Stored
from lorashrink.engine.delta import AnyDelta, Delta, Dense, Kronecker
from lorashrink.errors import ShapeError
from lorashrink.files.store import TensorInfo

FAMILIES = [
    family
    for module in (adalora, embedding, full, glora, ia3, loha, lokr, miss, oft, vera)
    for family in module.FAMILIES
]
(LOHA,), (LOKR,), (GLORA,), (FULL,) = loha.FAMILIES, lokr.FAMILIES, glora.FAMILIES, full.FAMILIES
(ADALORA,), (VERA,), (EMBEDDING,) = adalora.FAMILIES, vera.FAMILIES, embedding.FAMILIES
(MISS,) = miss.FAMILIES
OFT, SPLIT_OFT, PEFT_OFT = oft.FAMILIES
IA3, PEFT_IA3 = ia3.FAMILIES


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def infos_of(tensors: Mapping[str, Tensor] | Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    stored = {role: tuple(value.shape) if isinstance(value, Tensor) else value for role, value in tensors.items()}
    return {role: TensorInfo("F32", shape, 4 * math.prod(shape)) for role, shape in stored.items()}


def by_role(family: Family, stored: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Role -> tensor of the keys that begin with the layer's name, and of those that all layers share."""
    roles = {}
    for key, tensor in stored.items():
        for role, suffix in {**SHARED, **family.suffixes}.items():
            if re.fullmatch(re.escape(layer) + f"(?:{suffix})", key):
                roles[role] = tensor
        roles |= {role: tensor for role, pattern in family.common.items() if re.fullmatch(pattern, key)}
    return roles


def known(infos: Infos, family: Family, shape: tuple[int, ...]) -> bool:
    """Whether what the header tells agrees with the base weight's shape."""
    header_shape = family.shape(infos)
    if family.flat(infos):
        return header_shape == (shape[0], math.prod(shape[1:]))
    return header_shape == (
        shape[: len(header_shape)] if family.needs in (Needs.MULTIPLICATION, Needs.SHAPE) else shape
    )


def delta_of(
    family: Family,
    roles: Mapping[str, Tensor],
    weight: Tensor,
    *,
    config_scale: float = 1.0,
    config: Mapping[str, object] | None = None,
) -> AnyDelta:
    infos = infos_of(roles)
    shape = tuple(weight.shape)
    assert any(required <= infos.keys() for required in family.required)
    assert family.check(infos) is None
    assert known(infos, family, shape)
    alpha = float(roles["alpha"]) if "alpha" in roles else None
    scale = family.scale(infos, alpha, config_scale)
    own = {role: tensor for role, tensor in roles.items() if role not in SHARED}
    base = None if family.needs in (Needs.NOTHING, Needs.SHAPE) else weight.float().flatten(1)
    delta = family.delta(Stored(own, scale, shape, base, config or {}))
    if family.needs is not Needs.MULTIPLICATION:
        assert delta.rank == family.width(infos)
    assert delta.shape == shape
    return delta


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest number, in whatever precision."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance


# --- LyCORIS ------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 16),
    "wide linear": lambda: nn.Linear(16, 48),
    "square linear": lambda: nn.Linear(16, 16),
    "conv 3x3": lambda: nn.Conv2d(24, 16, 3, padding=1),
    "square conv 3x3": lambda: nn.Conv2d(16, 16, 3, stride=2),
    "conv 1x1": lambda: nn.Conv2d(8, 32, 1),
    "conv 1d": lambda: nn.Conv1d(16, 24, 3),
    "conv 3d": lambda: nn.Conv3d(8, 16, 3, padding=1),
}
MODULES: dict[str, tuple[Family, type, dict]] = {
    "loha": (LOHA, LohaModule, {"lora_dim": 3}),
    "loha of a high rank": (LOHA, LohaModule, {"lora_dim": 5}),
    "loha with a core": (LOHA, LohaModule, {"lora_dim": 3, "use_tucker": True}),
    "loha with a core of a high rank": (LOHA, LohaModule, {"lora_dim": 5, "use_tucker": True}),
    "loha rs": (LOHA, LohaModule, {"lora_dim": 3, "rs_lora": True}),
    "lokr": (LOKR, LokrModule, {"lora_dim": 2, "factor": 2}),
    "lokr by itself": (LOKR, LokrModule, {"lora_dim": 1}),
    "lokr with both decomposed": (LOKR, LokrModule, {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr with a core": (LOKR, LokrModule, {"lora_dim": 2, "factor": 2, "use_tucker": True}),
    "lokr unbalanced": (LOKR, LokrModule, {"lora_dim": 2, "factor": 2, "unbalanced_factorization": True}),
    "lokr whole": (LOKR, LokrModule, {"lora_dim": 100000, "full_matrix": True}),
    "glora": (GLORA, GLoRAModule, {"lora_dim": 4}),
    "oft": (OFT, DiagOFTModule, {"lora_dim": 4}),
    "oft within a bound": (OFT, DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}),
    "oft below its bound": (OFT, DiagOFTModule, {"lora_dim": 4, "constraint": 10.0}),
    "oft with a scale": (OFT, DiagOFTModule, {"lora_dim": 8, "rescaled": True}),
    "boft": (OFT, ButterflyOFTModule, {"lora_dim": 6}),
    "boft within a bound": (OFT, ButterflyOFTModule, {"lora_dim": 12, "constraint": 0.02}),
    "boft with a scale": (OFT, ButterflyOFTModule, {"lora_dim": 6, "rescaled": True}),
    "ia3 of rows": (IA3, IA3Module, {}),
    "ia3 of columns": (IA3, IA3Module, {"train_on_input": True}),
    "full": (FULL, FullModule, {}),
}


def lycoris_case(name: str, layer: str, half: bool) -> tuple[dict[str, Tensor], nn.Module, nn.Module, Tensor]:
    """Stored tensors, the layer with the module in it, the layer before that, and the weight that it had."""
    family, kind, settings = MODULES[name]
    torch.manual_seed(len(name) + len(layer))
    precision = torch.float32 if family is OFT else torch.float64  # its rotations are in single precision
    before = LAYERS[layer]().to(precision)
    after = LAYERS[layer]().to(precision)
    after.load_state_dict(before.state_dict())
    module = kind("layer", after, **{"alpha": 1.5, **settings}).to(precision).eval()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            noise = randn(*parameter.shape, seed=number) * 0.3
            parameter.copy_(noise.half() if half else noise)
    if family is FULL:
        module.bias.data.zero_()
        stored = {"layer.diff": module.weight.detach().clone()}  # before it is added to the weight
    else:
        stored = {key: tensor.detach().clone() for key, tensor in module.state_dict(prefix="layer.").items()}
    weight = before.weight.detach()
    module.apply_to()
    if half:
        stored = {key: value if value.ndim == 0 else value.half() for key, value in stored.items()}
    return stored, after, before, weight


def inputs_of(layer: nn.Module) -> Tensor:
    sides = {2: (), 3: (7,), 4: (7, 7), 5: (4, 4, 4)}[layer.weight.ndim]
    return randn(3, layer.weight.shape[1], *sides, seed=9)


@pytest.mark.parametrize(
    ("layer", "half"),
    [(layer, False) for layer in LAYERS] + [("linear", True), ("conv 3x3", True)],
    ids=lambda value: value if isinstance(value, str) else ("half" if value else "full"),
)
@pytest.mark.parametrize("name", MODULES)
def test_a_layer_changes_its_outputs_as_lycoris_does(name: str, layer: str, half: bool) -> None:
    family = MODULES[name][0]
    stored, after, before, weight = lycoris_case(name, layer, half)
    delta = delta_of(family, by_role(family, stored, "layer"), weight)
    inputs = inputs_of(before).to(weight.dtype)
    with torch.no_grad():
        plain, expected = before(inputs), after(inputs)
        before.weight += delta.dense()
        assert_same(before(inputs) - plain, expected - plain)


def test_delta_has_the_smallest_form_that_holds_it() -> None:
    forms = {
        (name, layer): type(delta_of(MODULES[name][0], by_role(MODULES[name][0], stored, "layer"), weight))
        for name, layer in [
            ("loha", "linear"),
            ("loha of a high rank", "linear"),
            ("loha with a core", "conv 3x3"),
            ("loha with a core of a high rank", "conv 3x3"),
            ("lokr", "conv 3x3"),
            ("glora", "conv 3x3"),
            ("full", "linear"),
        ]
        for stored, _, _, weight in [lycoris_case(name, layer, half=False)]
    }
    assert list(forms.values()) == [Delta, Dense, Delta, Dense, Kronecker, Delta, Dense]


# --- PEFT ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.wide = nn.Linear(16, 48)
        self.square = nn.Linear(48, 48)
        self.narrow = nn.Linear(48, 8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 8, 1)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = randn(*parameter.shape, seed=number).float()

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


LINEAR = ["wide", "square", "narrow"]
PEFT = {
    "loha": (LOHA, LoHaConfig(r=3, alpha=7, target_modules=[*LINEAR, "conv", "point"])),
    "loha with cores": (
        LOHA,
        LoHaConfig(r=2, alpha=7, target_modules=["conv", "point"], use_effective_conv2d=True),
    ),
    "lokr": (LOKR, LoKrConfig(r=2, alpha=7, target_modules=[*LINEAR, "conv", "point"])),
    "lokr with cores": (
        LOKR,
        LoKrConfig(r=1, alpha=7, target_modules=["conv", "point"], use_effective_conv2d=True, decompose_factor=2),
    ),
    "lokr with both decomposed": (
        LOKR,
        LoKrConfig(r=1, alpha=7, target_modules=[*LINEAR, "conv"], decompose_both=True, decompose_factor=4),
    ),
    "lokr whole": (LOKR, LoKrConfig(r=40, alpha=7, target_modules=[*LINEAR, "conv"])),
    "adalora": (
        ADALORA,
        AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, target_modules=[*LINEAR, "conv"], total_step=10),
    ),
    "vera": (VERA, VeraConfig(r=4, target_modules=LINEAR)),
    "miss": (MISS, MissConfig(r=4, target_modules=LINEAR)),
    "miss of a rank that does not divide the inputs": (MISS, MissConfig(r=7, target_modules=LINEAR)),
    "miss that repeats along the outputs": (
        MISS,
        MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=LINEAR),
    ),
    "oft": (PEFT_OFT, OFTConfig(oft_block_size=4, target_modules=[*LINEAR, "conv", "point"])),
    "oft with one block": (PEFT_OFT, OFTConfig(oft_block_size=8, target_modules=LINEAR, block_share=True)),
    "oft exactly": (PEFT_OFT, OFTConfig(oft_block_size=8, target_modules=LINEAR, use_cayley_neumann=False)),
    "oft close to the start": (PEFT_OFT, OFTConfig(oft_block_size=4, target_modules=LINEAR, coft=True, eps=0.1)),
    **{
        f"oft with {terms} terms": (
            PEFT_OFT,
            OFTConfig(oft_block_size=4, target_modules=["wide"], num_cayley_neumann_terms=terms),
        )
        for terms in (2, 3, 4, 6, 7)
    },
    "ia3": (PEFT_IA3, IA3Config(target_modules=LINEAR, feedforward_modules=["narrow"])),
    "ia3 of convolutions": (PEFT_IA3, IA3Config(target_modules=["conv", "point"], feedforward_modules=["point"])),
    "embedding": (EMBEDDING, LoraConfig(r=3, lora_alpha=7, target_modules=["table"])),
}


def peft_scale(config: object) -> float:
    if isinstance(config, AdaLoraConfig):
        return config.lora_alpha / (config.init_r + 1e-5)
    alpha = getattr(config, "alpha", getattr(config, "lora_alpha", None))
    return 1.0 if alpha is None else alpha / config.r


def peft_model(config: PeftConfig, half: bool) -> PeftModel:
    """Noise in all that is trained."""
    model = get_peft_model(Net(), config)
    with torch.no_grad():
        for number, (key, parameter) in enumerate(sorted(model.named_parameters())):
            if any(mark in key for mark in ("lora_", "hada_", "lokr_", "oft_", "ia3_", "vera_lambda", "miss_")):
                noise = randn(*parameter.shape, seed=number) * 0.3
                parameter.copy_(noise.half() if half else noise)
        for buffer in (buffer for key, buffer in model.named_buffers() if "vera_" in key):
            buffer.copy_(buffer.half() if half else buffer)
    return model


def changes(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each layer in the file -> (weight of the base, what merging adds to it)."""
    layers = [key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    before, merged = dict(Net().named_parameters()), dict(model.merge_and_unload().named_parameters())
    keys = {layer: f"{layer.removeprefix('base_model.model.')}.weight" for layer in layers}
    return {
        layer: (before[key].detach(), merged[key].detach().double() - before[key].detach().double())
        for layer, key in keys.items()
    }


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize("name", PEFT)
def test_a_layer_changes_its_weight_as_peft_does(name: str, half: bool) -> None:
    family, config = PEFT[name]
    model = peft_model(config, half)
    stored = {
        key: tensor.detach().clone().to(torch.float16 if half else tensor.dtype)
        for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    expected = changes(model)
    assert expected
    for layer, (weight, change) in expected.items():
        roles = by_role(family, stored, layer)
        delta = delta_of(family, roles, weight, config_scale=peft_scale(config), config=config.to_dict())
        assert_same(delta.dense(), change, 2e-5)  # PEFT adds in single precision


# --- through files ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["linear", "conv 3x3"])
@pytest.mark.parametrize("name", MODULES)
def test_a_file_by_lycoris(name: str, layer: str, tmp_path: Path) -> None:
    family = MODULES[name][0]
    stored, _, _, weight = lycoris_case(name, layer, half=True)
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "adapter.safetensors")
    with open_adapter(tmp_path / "adapter.safetensors") as adapter:
        (loaded,) = adapter.layers
        assert not adapter.others
        assert loaded.family is family
        delta = loaded.on(tuple(weight.shape), lambda: weight.float().flatten(1)).delta
    expected = delta_of(family, by_role(family, stored, "layer"), weight)
    assert_close(delta.dense(), expected.dense(), rtol=0, atol=0)


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_by_peft(name: str, tmp_path: Path) -> None:
    family, config = PEFT[name]
    model = peft_model(config, half=False)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    expected = changes(model)
    with open_adapter(tmp_path) as adapter:
        assert {layer.name for layer in adapter.layers} == expected.keys()
        assert not adapter.others
        for layer in adapter.layers:
            weight, change = expected[layer.name]
            assert layer.family is family
            read = functools.partial(torch.flatten, weight, 1)
            assert_same(layer.on(tuple(weight.shape), read).delta.dense(), change, 2e-5)


# --- what no library at hand computes -----------------------------------------------------------


def glora_roles(out: int, inner: int, rank: int, kernel: tuple[int, ...] = ()) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    expected_shapes = {"a1": (inner, rank, *ones), "a2": (rank, inner, *ones), "b1": (out, rank, *ones)}
    return {
        role: randn(*shape, seed=number)
        for number, (role, shape) in enumerate({**expected_shapes, "b2": (rank, inner, *kernel)}.items())
    }


@pytest.mark.parametrize("out", [10, 6], ids=["rectangular", "square"])
def test_glora_in_the_old_order_is_the_same(out: int) -> None:
    roles, weight = glora_roles(out, 6, 3), randn(out, 6, seed=7)
    old = {"a2": roles["a1"], "a1": roles["a2"], "b2": roles["b1"], "b1": roles["b2"]}
    new = delta_of(GLORA, roles, weight).dense()
    assert_same(new, roles["b1"] @ roles["b2"] + weight @ roles["a1"] @ roles["a2"])
    assert_close(delta_of(GLORA, old, weight).dense(), new, rtol=0, atol=0)


def test_glora_of_a_layer_narrower_than_its_rank() -> None:
    roles, weight = glora_roles(12, 2, 5, (3, 3)), randn(12, 2, 3, 3, seed=7)
    expected = torch.einsum("or,rikl->oikl", roles["b1"].flatten(1), roles["b2"])
    expected = expected + torch.einsum("oikl,ir,rj->ojkl", weight, roles["a1"].flatten(1), roles["a2"].flatten(1))
    assert_same(delta_of(GLORA, roles, weight).dense(), expected)


def test_glora_with_a_core() -> None:
    roles, weight = glora_roles(12, 6, 3, (1, 1)), randn(12, 6, 3, 3, seed=7)
    roles["bm"] = randn(3, 3, 3, 3, seed=8)
    core = torch.einsum("or,rskl,si->oikl", roles["b1"].flatten(1), roles["bm"], roles["b2"].flatten(1))
    moved = torch.einsum("oikl,ir,rj->ojkl", weight, roles["a1"].flatten(1), roles["a2"].flatten(1))
    assert_same(delta_of(GLORA, roles, weight).dense(), core + moved)


def test_glora_whose_sides_are_all_equal_is_refused() -> None:
    assert "come first" in str(GLORA.check(infos_of(glora_roles(4, 4, 4))))


def cayley(skew: Tensor) -> Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def test_rotations_of_the_parts_of_a_fused_weight() -> None:
    blocks, weight = [randn(2, 3, 3), randn(2, 3, 3, seed=1), randn(2, 5, 5, seed=2)], randn(22, 7, seed=3)
    roles = {**{f"blocks{part}": block for part, block in enumerate(blocks)}, "alpha": torch.tensor(0.3)}
    expected, row = [], 0
    for block in blocks:
        skew = block - block.mT
        skew = skew * min(1.0, 0.3 * block.shape[0] * block.shape[1] / float(skew.norm()))
        for turn in cayley(skew):
            expected.append(turn.mT @ weight[row : row + len(turn)])
            row += len(turn)
    assert_same(delta_of(SPLIT_OFT, roles, weight).dense(), torch.cat(expected) - weight)


@pytest.mark.parametrize("shape", [(10, 8), (10, 2, 2, 2)], ids=["linear", "convolution"])
def test_rotations_by_onetrainer(shape: tuple[int, ...]) -> None:
    weight, triangles = randn(*shape), randn(2, 6, seed=1) * 0.1
    upper = torch.zeros(2, 4, 4, dtype=torch.float64)
    upper[:, *torch.triu_indices(4, 4, 1)] = triangles / (2 * math.sqrt(3))
    skew = upper - upper.mT
    turns = torch.eye(4) + 2 * (skew + skew @ skew + skew @ skew @ skew) + skew @ skew @ skew @ skew
    turns = torch.block_diag(*(turns if len(shape) > 2 else turns.mT))
    roles = {"triangles": triangles, "scaled": torch.tensor(True)}
    expected = (weight.flatten(1) @ turns).reshape(shape) - weight
    assert_same(delta_of(PEFT_OFT, roles, weight).dense(), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_cayley_neumann_terms": "5"},
        {"num_cayley_neumann_terms": 10**9},
        {"num_cayley_neumann_terms": -1},
        {"coft": True, "eps": "small"},
    ],
)
def test_broken_settings_of_rotations(settings: dict) -> None:
    with pytest.raises(ShapeError, match="settings should be"):
        delta_of(PEFT_OFT, {"triangles": randn(2, 6)}, randn(10, 8), config=settings)


def test_rotations_by_what_is_no_number() -> None:
    for family, role, shape in ((OFT, "blocks", (2, 4, 4)), (PEFT_OFT, "triangles", (2, 6))):
        delta = delta_of(family, {role: torch.full(shape, math.nan)}, randn(8, 8), config={"coft": True})
        assert delta.dense().isnan().any()


@pytest.mark.parametrize(
    ("family", "roles", "shape"),
    [
        (OFT, {"blocks": (2, 4, 4)}, (9, 8)),
        (PEFT_OFT, {"triangles": (2, 6)}, (8, 12)),
        (PEFT_OFT, {"triangles": (1, 6)}, (8, 10)),
        (IA3, {"weight": (7,), "on_input": ()}, (8, 10)),
        (PEFT_IA3, {"vector": (7, 1)}, (8, 7)),
        (PEFT_IA3, {"vector": (1, 8)}, (8, 7)),
        (PEFT_IA3, {"vector": (1, 5, 1, 1)}, (8, 7, 3, 3)),
        (VERA, {"lambda_d": (3,), "lambda_b": (8,), "A": (3, 6), "B": (9, 3)}, (8, 7)),
        (VERA, {"lambda_d": (3,), "lambda_b": (8,), "A": (3, 6), "B": (9, 3)}, (8,)),
        (VERA, {"lambda_d": (3,), "lambda_b": (8,), "A": (3, 6), "B": (9, 3)}, (9, 6)),
        (MISS, {"block": (4, 8)}, (9, 6)),
        (MISS, {"block": (4, 8)}, (16, 6)),
        (MISS, {"block": (4, 8)}, (8, 3)),
        (MISS, {"block": (4, 8)}, (8, 6, 3, 3)),
    ],
)
def test_a_base_that_does_not_fit(family: Family, roles: dict, shape: tuple[int, ...]) -> None:
    assert family.check(infos_of(roles)) is None
    tensors = {role: torch.ones(size) for role, size in roles.items()}
    base = torch.ones(shape[0], math.prod(shape[1:]))
    with pytest.raises(ShapeError, match="not fit"):
        family.delta(Stored(tensors, 1.0, shape, base))


def test_square_convolutions_have_row_factors_unless_some_have_columns() -> None:
    weight, factors = randn(6, 6, 3, 3), randn(1, 6, 1, 1, seed=1)
    delta = delta_of(PEFT_IA3, {"vector": factors}, weight, config={"feedforward_modules": []})
    assert_same(delta.dense(), weight * (factors.transpose(0, 1) - 1))
    with pytest.raises(ShapeError, match="rows or the columns"):
        delta_of(PEFT_IA3, {"vector": factors}, weight, config={"feedforward_modules": ["conv"]})


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_a_single_ia3_factor(shape: tuple[int, ...]) -> None:
    weight = randn(*shape)
    delta = delta_of(PEFT_IA3, {"vector": torch.full((1, 1), 3.0)}, weight)
    assert_same(delta.dense(), 2 * weight)


def test_an_embedding_is_written_as_it_was_read() -> None:
    roles = {"A": randn(4, 30), "B": randn(16, 4, seed=1), "alpha": torch.tensor(4.0)}
    written = EMBEDDING.written(infos_of(roles), 3)
    assert written == {"A": (3, 30), "B": (16, 3), "alpha": ()}
    delta = delta_of(EMBEDDING, roles, randn(30, 16))
    packed = EMBEDDING.pack(delta.up, delta.down)
    assert_close(dict(packed), {"A": roles["A"], "B": roles["B"]}, rtol=0, atol=0)
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_a_difference_of_a_vector() -> None:
    assert full.is_vector(infos_of({"diff": (5,)}))
    assert full.is_vector(infos_of({"diff": ()}))
    assert not full.is_vector(infos_of({"diff": (5, 1)}))


@pytest.mark.parametrize(
    ("family", "roles", "alpha", "scale"),
    [
        (LOHA, {"w1_b": (4, 9)}, 2.0, 0.5),
        (LOHA, {"w1_b": (4, 9)}, None, 3.0),
        (LOKR, {"w1": (2, 2), "w2_a": (9, 4), "w2_b": (4, 9)}, 2.0, 0.5),
        (LOKR, {"w1_a": (9, 4), "w1_b": (4, 9), "w2": (2, 2)}, 2.0, 0.5),
        (LOKR, {"w1": (2, 2), "w2_a": (4, 9), "w2_b": (4, 7), "t2": (4, 4, 3, 3)}, 2.0, 0.5),
        (LOKR, {"w1": (2, 2), "w2": (9, 9)}, 1e10, 1.0),
        (LOKR, {"w1": (2, 2), "w2": (9, 9)}, None, 3.0),
        (GLORA, {"a1": (8, 4), "a2": (4, 8), "b1": (9, 4), "b2": (4, 8)}, 2.0, 0.5),
        (FULL, {"diff": (2, 2)}, 7.0, 1.0),
        (OFT, {"blocks": (2, 4, 4)}, 0.25, 0.25),
        (OFT, {"blocks": (2, 4, 4)}, None, 0.0),
        (PEFT_OFT, {"triangles": (2, 6)}, None, 1.0),
        (IA3, {"weight": (7,), "on_input": ()}, 5.0, 1.0),
        (VERA, {"lambda_d": (3,)}, None, 1.0),
        (MISS, {"block": (4, 8)}, None, 1.0),
        (ADALORA, {"down": (3, 9)}, None, 3.0),
        (EMBEDDING, {"A": (3, 9)}, None, 3.0),
        (EMBEDDING, {"A": (4, 9)}, 2.0, 0.5),
    ],
)
def test_scales(family: Family, roles: dict, alpha: float | None, scale: float) -> None:
    assert family.scale(infos_of(roles), alpha, 3.0 if family not in (VERA, MISS, PEFT_OFT) else 1.0) == scale


# --- any shapes ---------------------------------------------------------------------------------

SIDES = st.integers(1, 7)


@given(SIDES, SIDES, st.integers(1, 4), st.sampled_from([(), (1, 1), (3, 3), (2,), (1, 2, 2)]), st.booleans())
def test_loha_of_any_shape(out: int, inner: int, rank: int, kernel: tuple[int, ...], core: bool) -> None:
    roles, halves = {}, []
    for half in "12":
        if core and kernel:
            shapes_ = {"w_a": (rank, out), "t": (rank, rank, *kernel), "w_b": (rank, inner)}
            rule = "ao,ab...,bi->oi..."
        else:
            shapes_ = {"w_a": (out, rank), "w_b": (rank, inner * math.prod(kernel))}
            rule = "or,ri->oi"
        parts = [randn(*shape, seed=int(half) * 10 + number) for number, shape in enumerate(shapes_.values())]
        names = [name.replace("w_", f"w{half}_").replace("t", f"t{half}") for name in shapes_]
        roles |= dict(zip(names, parts, strict=True))
        halves.append(torch.einsum(rule, *parts).reshape(out, inner, *kernel))
    delta = delta_of(LOHA, {**roles, "alpha": torch.tensor(0.5)}, torch.empty(out, inner, *kernel))
    assert_close(delta.dense().double(), 0.5 / rank * halves[0] * halves[1], rtol=1e-5, atol=1e-5)


@st.composite
def lokr_cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of any LoKr layer, and the ΔW that they make, by indices and not by a library's Kronecker product."""
    n1, m1, n2, m2, rank = (draw(st.integers(1, 4)) for _ in range(5))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 2, 2)]))
    roles = {}
    if draw(st.booleans()):
        roles["w1"] = first = randn(n1, m1)
    else:
        roles |= {"w1_a": randn(n1, rank), "w1_b": randn(rank, m1, seed=1)}
        first = roles["w1_a"] @ roles["w1_b"]
    match draw(st.sampled_from(["whole", "factors", "core"] if kernel else ["whole", "factors"])):
        case "whole":
            roles["w2"] = second = randn(n2, m2, *kernel, seed=2)
        case "factors":
            roles |= {"w2_a": randn(n2, rank, seed=2), "w2_b": randn(rank, m2 * math.prod(kernel), seed=3)}
            second = (roles["w2_a"] @ roles["w2_b"]).reshape(n2, m2, *kernel)
        case "core":
            roles |= {"w2_a": randn(rank, n2, seed=2), "w2_b": randn(rank, m2, seed=3)}
            roles["t2"] = randn(rank, rank, *kernel, seed=4)
            second = torch.einsum("ab...,ao,bi->oi...", roles["t2"], roles["w2_a"], roles["w2_b"])
    expected = torch.stack([torch.cat([first[i, j] * second for j in range(m1)], dim=1) for i in range(n1)]).reshape(
        n1 * n2, m1 * m2, *kernel
    )
    return roles, expected


@given(lokr_cases())
def test_lokr_of_any_shape(case: tuple[dict[str, Tensor], Tensor]) -> None:
    roles, expected = case
    delta = delta_of(LOKR, roles, torch.empty(expected.shape), config_scale=-1.5)
    assert_close(delta.dense().double(), -1.5 * expected, rtol=1e-5, atol=1e-5)


# --- damage -------------------------------------------------------------------------------------

HEALTHY: dict[str, tuple[Family, dict[str, tuple[int, ...]]]] = {
    "loha": (LOHA, {"w1_a": (9, 4), "w1_b": (4, 7), "w2_a": (9, 4), "w2_b": (4, 7)}),
    "loha with a core": (
        LOHA,
        {
            "w1_a": (4, 9),
            "w1_b": (4, 7),
            "t1": (4, 4, 3, 3),
            "w2_a": (4, 9),
            "w2_b": (4, 7),
            "t2": (4, 4, 3, 3),
        },
    ),
    "lokr": (LOKR, {"w1": (2, 3), "w2_a": (9, 4), "w2_b": (4, 7)}),
    "lokr with both decomposed": (LOKR, {"w1_a": (5, 4), "w1_b": (4, 3), "w2_a": (9, 4), "w2_b": (4, 7)}),
    "lokr with a core": (LOKR, {"w1": (2, 3), "w2_a": (4, 9), "w2_b": (4, 7), "t2": (4, 4, 3, 3)}),
    "lokr whole": (LOKR, {"w1": (2, 3), "w2": (9, 7, 3, 3)}),
    "glora": (GLORA, {"a1": (7, 4), "a2": (4, 7), "b1": (9, 4), "b2": (4, 7)}),
    "glora of a convolution": (
        GLORA,
        {"a1": (7, 4, 1, 1), "a2": (4, 7, 1, 1), "b1": (9, 4, 1, 1), "b2": (4, 7, 3, 3)},
    ),
    "glora with a core": (
        GLORA,
        {"a1": (7, 4, 1, 1), "a2": (4, 7, 1, 1), "b1": (9, 4, 1, 1), "b2": (4, 7, 1, 1), "bm": (4, 4, 3, 3)},
    ),
    "full": (FULL, {"diff": (9, 7, 3, 3)}),
    "oft": (OFT, {"blocks": (3, 4, 4), "rescale": (12, 1)}),
    "boft": (OFT, {"blocks": (3, 4, 6, 6), "rescale": (24, 1, 1, 1)}),
    "oft in parts": (SPLIT_OFT, {"blocks0": (3, 4, 4), "blocks1": (3, 4, 4), "blocks2": (3, 5, 5)}),
    "oft by peft": (PEFT_OFT, {"triangles": (3, 10)}),
    "ia3": (IA3, {"weight": (9,), "on_input": ()}),
    "ia3 of a convolution": (IA3, {"weight": (1, 9, 1, 1), "on_input": ()}),
    "ia3 by peft": (PEFT_IA3, {"vector": (9, 1)}),
    "adalora": (ADALORA, {"up": (9, 4), "down": (4, 7), "diagonal": (4, 1)}),
    "vera": (VERA, {"lambda_d": (4,), "lambda_b": (9,), "A": (4, 12), "B": (11, 4)}),
    "miss": (MISS, {"block": (4, 9)}),
    "embedding": (EMBEDDING, {"A": (4, 30), "B": (9, 4)}),
}


def damaged(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """This shape in all ways in which it can be wrong."""
    wrong = [
        (),
        (*shape, 2),
        (2, *shape),
        (*shape, 1),
        (1, *shape),
        shape[::-1],
        shape[:-1],
        shape[1:],
        (*shape, 1, 1),
    ]
    wrong += [
        (*shape[:index], length, *shape[index + 1 :])
        for index, side in enumerate(shape)
        for length in (0, 1, side - 1, side + 1, 2 * side, 10**6)
    ]
    return [candidate for candidate in dict.fromkeys(wrong) if candidate != shape]


@pytest.mark.parametrize("name", HEALTHY)
def test_a_shape_that_passes_the_check_makes_a_sound_layer(name: str) -> None:
    """A header fails the check, or its layer has the shape that it states."""
    family, roles = HEALTHY[name]
    assert family.check(infos_of(roles)) is None
    refused = 0
    for role, shape in roles.items():
        for wrong in damaged(shape):
            infos = infos_of({**roles, role: wrong})
            reason = family.check(infos)
            if reason is not None:
                assert "\n" not in reason
                assert not reason.endswith(".")
                refused += 1
            elif sum(math.prod(info.shape) for info in infos.values()) < 10**5:
                assert_sound(family, infos)
    assert refused >= 5


def assert_sound(family: Family, infos: Infos) -> None:
    rank, width, header_shape = family.rank(infos), family.width(infos), family.shape(infos)
    assert rank > 0
    assert width > 0
    assert all(side > 0 for side in header_shape)
    shape = base_for(family, infos)
    assert math.prod(header_shape) <= math.prod(shape)
    tensors = {role: torch.ones(info.shape) for role, info in infos.items()}
    base = torch.ones(shape[0], math.prod(shape[1:]))
    delta = family.delta(Stored(tensors, 0.5, shape, base))
    assert tuple(delta.dense().shape) == shape
    if family.needs is not Needs.MULTIPLICATION:
        assert delta.rank == width


def base_for(family: Family, infos: Infos) -> tuple[int, ...]:
    """The shape of a base weight that such a layer is for."""
    header_shape = family.shape(infos)
    if family is VERA:
        return (*header_shape, infos["A"].shape[1])
    if family is MISS:
        return (infos["block"].shape[1], infos["block"].shape[0] + 3)
    if family in (OFT, SPLIT_OFT):
        return (*header_shape, 3)
    if family is PEFT_OFT:
        return (3, family.width(infos))
    if family is IA3:  # of columns, for the switch in these tests is 1
        return (2, family.width(infos))
    if family is PEFT_IA3:
        shape = infos["vector"].shape
        return (family.width(infos), 3) if len(shape) > 2 or shape[1] == 1 else (3, family.width(infos))
    return header_shape


@pytest.mark.parametrize(
    ("name", "roles", "reason"),
    [
        ("loha", {"w1_b": (5, 7)}, "ranks differ"),
        ("loha", {"w1_a": (4, 9)}, "ranks differ"),
        ("loha", {"w2_a": (8, 4)}, "halves make"),
        ("loha", {"w2_a": (9, 3), "w2_b": (3, 7)}, "halves have the ranks"),
        ("loha", {"w1_a": (9,)}, "no matrices"),
        ("loha", {"t1": (4, 4, 3, 3)}, "one half has a Tucker core"),
        ("loha with a core", {"w1_a": (9, 4)}, "do not chain"),
        ("loha with a core", {"t1": (4, 4)}, "do not chain"),
        ("loha with a core", {"t2": (4, 4, 3, 1)}, "halves make"),
        ("loha with a core", {"t1": (4, 4, 3, 0)}, "empty"),
        ("lokr", {"w1": (2, 3, 1, 1)}, "no matrix"),
        ("lokr", {"w2_a": (4, 9)}, "ranks differ"),
        ("lokr", {"w2_b": (4,)}, "no matrices"),
        ("lokr", {"w2": (9, 7)}, "whole and in factors"),
        ("lokr", {"w1_a": (2, 1), "w1_b": (1, 3)}, "whole and in factors"),
        ("lokr whole", {"t2": (4, 4, 3, 3)}, "though w2 is whole"),
        ("lokr whole", {"w2": (9,)}, "no matrix"),
        ("lokr whole", {"w2": (9, 0)}, "empty"),
        ("lokr with both decomposed", {"w1_b": (3, 4)}, "ranks differ"),
        ("lokr with both decomposed", {"w1_b": (4,)}, "no matrices"),
        ("lokr with a core", {"t2": (4, 5, 3, 3)}, "do not chain"),
        ("lokr with a core", {"w2_a": (9, 4)}, "do not chain"),
        ("glora", {"a1": (4, 7)}, "do not chain"),
        ("glora", {"b1": (4, 9)}, "do not chain"),
        ("glora", {"b2": (4,)}, "not all are matrices"),
        ("glora", {"a1": (0, 4), "a2": (4, 0)}, "empty"),
        ("glora of a convolution", {"a1": (7, 4, 3, 3)}, "do not chain"),
        ("glora with a core", {"bm": (4, 5, 3, 3)}, "do not chain"),
        ("glora with a core", {"b2": (4, 7, 3, 3)}, "do not chain"),
        ("full", {"diff": (9,)}, "no matrix"),
        ("full", {"diff": (9, 0)}, "empty"),
        ("oft", {"blocks": (3, 4, 5)}, "no square blocks"),
        ("oft", {"blocks": (12, 12)}, "no square blocks"),
        ("oft", {"blocks": (0, 4, 4)}, "empty"),
        ("oft", {"rescale": (11, 1)}, "for 12 rows"),
        ("oft", {"rescale": (1, 12)}, "for 12 rows"),
        ("boft", {"blocks": (3, 4, 5, 5)}, "butterfly"),
        ("boft", {"blocks": (3, 6, 4, 4)}, "butterfly"),
        ("boft", {"blocks": (10**18, 4, 6, 6)}, "butterfly"),
        ("oft in parts", {"blocks1": (3, 4, 5)}, "no square blocks"),
        ("oft by peft", {"triangles": (3, 11)}, "above its diagonal"),
        ("oft by peft", {"triangles": (3, 4, 4)}, "no list of triangles"),
        ("oft by peft", {"triangles": (3, 0)}, "no list of triangles"),
        ("ia3", {"weight": (9, 7)}, "no list of factors"),
        ("ia3", {"weight": (9, 1)}, "no list of factors"),
        ("ia3", {"weight": (0,)}, "no list of factors"),
        ("ia3", {"on_input": (2,)}, "not one number"),
        ("ia3 by peft", {"vector": (9, 7)}, "no list of factors"),
        ("ia3 by peft", {"vector": (9,)}, "no list of factors"),
        ("adalora", {"diagonal": (5, 1)}, "for the rank 4"),
        ("adalora", {"up": (4, 9)}, "ranks differ"),
        ("adalora", {"down": (4, 7, 3, 3)}, "no matrices"),
        ("adalora", {"up": (9, 0), "down": (0, 7), "diagonal": (0, 1)}, "empty"),
        ("vera", {"lambda_d": (5,)}, "ranks differ"),
        ("vera", {"A": (12, 4)}, "ranks differ"),
        ("vera", {"lambda_b": (12,)}, "too few rows"),
        ("vera", {"lambda_b": (9, 1)}, "no matrices"),
        ("vera", {"lambda_b": (0,)}, "empty"),
        ("miss", {"block": (4, 9, 1)}, "no matrix"),
        ("miss", {"block": (0, 9)}, "no matrix"),
        ("embedding", {"A": (30, 4)}, "ranks differ"),
        ("embedding", {"B": (9, 4, 1)}, "no matrices"),
        ("embedding", {"A": (4, 0)}, "empty"),
    ],
)
def test_the_check_names_the_problem(name: str, roles: dict[str, tuple[int, ...]], reason: str) -> None:
    family, healthy = HEALTHY[name]
    assert reason in str(family.check(infos_of({**healthy, **roles})))


def test_a_missing_part_of_a_fused_rotation_is_named() -> None:
    assert "missing" in str(SPLIT_OFT.check(infos_of({"blocks0": (3, 4, 4), "blocks2": (3, 4, 4)})))


# --- real names ---------------------------------------------------------------------------------

LISTED = {
    "sdxl_loha_kohya": LOHA,
    "sd15_loha_conv_kohya": LOHA,
    "sd15_loha_tucker_kohya": LOHA,
    "llama_peft_loha": LOHA,
    "sdxl_lokr_kohya_factor8": LOKR,
    "sdxl_lokr_kohya_full": LOKR,
    "sd15_lokr_both_kohya": LOKR,
    "sd15_lokr_unbalanced_kohya": LOKR,
    "flux_lokr_bfl": LOKR,
    "flux_lokr_simpletuner": LOKR,
    "qwen_image_lokr_kohya": LOKR,
    "qwen_image_lokr_simpletuner": LOKR,
    "sd35_medium_lokr_simpletuner": LOKR,
    "anima_lokr_dora_diffusion_model": LOKR,
    "llama_peft_lokr": LOKR,
    "llama_peft_lokr_both": LOKR,
    "sd15_glora_kohya": GLORA,
    "sdxl_glora_kohya": GLORA,
    "sd15_full_kohya": FULL,
    "sd15_diag_oft_kohya": OFT,
    "sd15_diag_oft_rescale_kohya": OFT,
    "sd15_boft_kohya": OFT,
    "sdxl_oft_kohya": OFT,
    "llama_peft_oft": PEFT_OFT,
    "sdxl_ia3_kohya": IA3,
    "llama_peft_ia3": PEFT_IA3,
    "llama_peft_adalora": ADALORA,
    "llama_peft_vera": VERA,
    "llama_peft_miss": MISS,
    "llama_peft_lora_embed_head": EMBEDDING,
}


def layers_of(family: Family, listed: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, TensorInfo]]:
    """Layer -> role -> info of the listed keys that belong to the family."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in listed.items():
        for role, suffix in {**SHARED, **family.suffixes}.items():
            if ending := re.search(f"(?:{suffix})$", key):
                layers.setdefault(key[: ending.start()], {})[role] = shape
    shared = {
        role: shape for role, name in family.common.items() for key, shape in listed.items() if re.fullmatch(name, key)
    }
    infos = {layer: infos_of({**roles, **shared}) for layer, roles in layers.items()}
    return {
        layer: roles for layer, roles in infos.items() if any(required <= roles.keys() for required in family.required)
    }


@pytest.mark.parametrize("listing", LISTED)
def test_the_layers_of_a_real_file(listing: str) -> None:
    """All pass the check, and each shape gives the stated rank and width."""
    family = LISTED[listing]
    layers = layers_of(family, shapes(listing))
    assert layers
    kinds = {}
    for infos in layers.values():
        assert family.check(infos) is None
        kinds.setdefault(tuple(sorted((role, info.shape) for role, info in infos.items())), infos)
    small = sorted(kinds.values(), key=lambda infos: math.prod(base_for(family, infos)))
    for infos in [*small[:2], *small[len(small) // 2 :][:1]]:
        tensors = {role: torch.zeros(info.shape) for role, info in infos.items() if role not in SHARED}
        shape = base_for(family, infos)
        tensors |= {"on_input": torch.tensor(1)} if "on_input" in infos else {}
        base = torch.zeros(shape[0], math.prod(shape[1:])) if family.needs is not Needs.NOTHING else None
        delta = family.delta(Stored(tensors, 1.0, shape, base))
        assert family.rank(infos) > 0
        if family.needs is not Needs.MULTIPLICATION:
            assert delta.rank == family.width(infos)
        sides = [(part.shape[0], math.prod(part.shape[1:])) for part in (delta, *parts(delta))]
        assert sides[0] == tuple(math.prod(side) for side in zip(*(sides[1:] or sides), strict=True))


def parts(delta: AnyDelta) -> tuple[AnyDelta, ...]:
    return (delta.first, delta.second) if isinstance(delta, Kronecker) else ()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}: {min(family.suffixes)}")
def test_a_row_of_the_table_is_complete(family: Family) -> None:
    roles = {*family.suffixes, *family.common}
    assert all(required <= roles for required in family.required)
    assert family.marks <= family.suffixes.keys()
    assert (family.written is None) == (family.pack is None)
    assert not roles & SHARED.keys()
    for suffix in family.suffixes.values():
        assert suffix.startswith(r"\.")
        re.compile(suffix)
