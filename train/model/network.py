"""The network that is trained: LyCORIS' layers on SDXL, under sd-scripts' names."""

from __future__ import annotations

import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from lycoris.config import PRESET
from lycoris.config_sdk import PresetConfig, PresetValidationError
from lycoris.kohya import LycorisNetworkKohya, create_network
from lycoris.logging import logger as lycoris_log
from lycoris.modules import get_module, make_module
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.wrapper import network_module_dict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorashrink.adapters import layer_name, open_adapter
from lorashrink.bases import FAMILIES, Base, View, encoders
from lorashrink.bases.rules import spell
from lorashrink.errors import InputError, UsageError
from lorashrink.files.store import pickled_store
from lorashrink.linking.matching import bind, match
from lorashrink.linking.renaming import layer_name_in, renamed
from lorashrink.text import names_text
from lorashrink.train.data.batches import generator
from lorashrink.train.flags.network_args import PRESETS, NetworkArgs, read_network_args
from lorashrink.train.flags.options import Options, read_toml
from lorashrink.train.model.loading import Model

# LyCORIS' fused kernels for GPUs know nothing of autocast: they compute and keep in float32 what torch's do in half.
os.environ.setdefault("LYCORIS_KERNEL_BACKEND", "torch")

_log = logging.getLogger(__name__)


class NormReport(NamedTuple):
    """What limiting norms did; norms are those after it."""

    scaled: int  # layers that were over the limit
    average: float
    largest: float


class Network(nn.Module):
    """LyCORIS' layers, applied to a model: calling the model computes with them. All parameters are float32."""

    def __init__(self, module: LycorisNetworkKohya) -> None:
        super().__init__()
        self.module = module

    @property
    def layers(self) -> list[Any]:
        """LyCORIS' layers, text encoders first."""
        return list(self.module.loras)

    @property
    def sizes(self) -> dict[str, list[int]]:
        """Part of the network -> the numbers of parameters of its modules; of those that are trained."""
        sizes: dict[str, list[int]] = {name: [] for name in _PARTS}
        for layer in self.layers:
            sizes[_part(layer)].append(sum(parameter.numel() for parameter in layer.parameters()))
        return {name: numbers for name, numbers in sizes.items() if numbers}

    @property
    def dims(self) -> dict[str, object]:
        """Rank and alpha of the layers, as `network_dim`, `network_alpha`, and `conv_...` for larger convolutions.

        "Dynamic", as sd-scripts writes, where layers differ; nothing for layers without a rank.
        """
        values: dict[str, set[float]] = {}
        for layer in self.layers:
            is_full = getattr(layer, "use_w1", False) and getattr(layer, "use_w2", False)  # LoKr without factors
            if hasattr(layer, "lora_dim") and hasattr(layer, "alpha") and not is_full:
                kind = "conv" if _part(layer) == CONVOLUTIONS else "network"
                values.setdefault(f"{kind}_dim", set()).add(int(layer.lora_dim))
                values.setdefault(f"{kind}_alpha", set()).add(float(layer.alpha))
        return {name: numbers.pop() if len(numbers) == 1 else "Dynamic" for name, numbers in values.items()}

    def groups(self, options: Options) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups for an optimizer, and their names: "textencoder", "unet", and " plus" for LoRA+.

        A group whose learning rate is 0 is left out, and its parameters get no gradients; if all are, UsageError.
        """
        text_rate = options.text_encoder_lr[0] if options.text_encoder_lr else None
        with _quiet():
            groups, names = self.module.prepare_optimizer_params(text_rate, options.unet_lr, options.learning_rate)
        groups = [{**group, "params": list(group["params"])} for group in groups]
        if not groups:
            raise UsageError("--learning_rate, --unet_lr, --text_encoder_lr: all of what is trained has a rate of 0")
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return groups, names

    def state(self) -> dict[str, Tensor]:
        """The tensors of an adapter file, float32 copies on the CPU. Scalars are folded into the factors."""
        state: Mapping[str, Tensor] = self.module.state_dict()
        return {key: value.detach().to("cpu", torch.float32, copy=True).contiguous() for key, value in state.items()}

    def raw_state(self) -> dict[str, Tensor]:
        """All parameters and buffers as they are, also what `state` folds: training goes on from it bit by bit."""
        return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in self._raw().items()}

    @torch.no_grad()
    def load_raw(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `raw_state` gave; InputError if it is of another network."""
        own = self._raw()
        if wrong := own.keys() ^ state.keys() or {key for key in own if own[key].shape != state[key].shape}:
            raise InputError(
                f"the saved state is of another network: {names_text(sorted(wrong))}. "
                "Resume with the network options of that run"
            )
        for key, value in own.items():
            value.copy_(state[key])

    def _raw(self) -> dict[str, Tensor]:
        return {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}

    @torch.no_grad()
    def limit_norms(self, limit: float) -> NormReport:
        """Scale down each layer whose change, ‖ΔW‖_F with its scale, is longer than the limit.

        As LyCORIS does, which waits for the GPU in every layer: of rotations the blocks, of other layers than these and
        factors (full differences, GLoRA, normalisation) nothing.
        """
        training = self.module.training
        self.module.eval()  # dropout would shorten what is measured
        factors = [layer for layer in self.layers if isinstance(layer, LoConModule) and not layer.tucker]
        measured = list(zip((layer.scalar for layer in factors), _norms_of_factors(factors), strict=True))
        for layer in self.layers:  # what is scaled in each other layer, and its norm, 0-dim
            if isinstance(layer, LoConModule) and layer.tucker:
                measured.append((layer.scalar, layer.make_weight().norm() * layer.scale))
            elif isinstance(layer, (LohaModule, LokrModule)):
                measured.append((layer.scalar, (layer.get_weight(layer.shape) * layer.scalar).norm()))
            elif isinstance(layer, (DiagOFTModule, ButterflyOFTModule)):
                measured.append((layer.oft_blocks, layer.oft_blocks.norm()))
        self.module.train(training)
        if not measured:
            return NormReport(0, 0.0, 0.0)
        scaled_tensors, lengths = zip(*measured, strict=True)
        norms = torch.stack(lengths)
        ratios = (limit / norms).clamp(max=1)
        torch._foreach_mul_(scaled_tensors, list(ratios.unbind()))
        after = norms * ratios
        scaled, average, largest = torch.stack([(ratios < 1).sum(), after.mean(), after.max()]).tolist()
        return NormReport(int(scaled), average, largest)


# --- parts and norms ----------------------------------------------------------------------------

CONVOLUTIONS = "UNet convolutions"
_LINEAR = "UNet linear and 1×1"
_NORMALISATION = "normalisation"
_ENCODERS = {"lora_te1": "text encoder 1", "lora_te2": "text encoder 2"}
_PARTS = (_LINEAR, CONVOLUTIONS, *_ENCODERS.values(), _NORMALISATION)


def _part(layer: Any) -> str:
    if isinstance(layer, NormModule):
        return _NORMALISATION
    return _ENCODERS.get(layer.lora_name[:8], CONVOLUTIONS if math.prod(layer.shape[2:]) > 1 else _LINEAR)


def _norms_of_factors(layers: Sequence[LoConModule]) -> list[Tensor]:
    """‖ΔW‖_F of layers of two factors, 0-dim each.

    ‖BA‖_F² is the sum over BᵀB ∘ AAᵀ. A GPU takes longer to start products of this size than to compute them, so that
    layers of equal shape are computed together.
    """
    if not layers:
        return []

    def grams(matrices: Tensor) -> Tensor:
        return matrices @ matrices.mT

    ups = _by_shape(grams, [layer.lora_up.weight.flatten(1).mT for layer in layers])
    downs = _by_shape(grams, [layer.lora_down.weight.flatten(1) for layer in layers])
    squares = torch.stack(_by_shape(lambda up, down: (up * down).sum((1, 2)), ups, downs))
    norms = squares.clamp(min=0).sqrt()
    scales = torch.tensor([float(layer.scale) for layer in layers], device=norms.device)
    scalars = torch.stack([layer.scalar.detach() for layer in layers])
    return list((norms * scalars.abs() * scales).unbind())


def _by_shape(compute: Callable[..., Tensor], *columns: Sequence[Tensor]) -> list[Tensor]:
    """What `compute` makes of each row of the columns, computed for all rows of equal shapes together, as a stack."""
    by_shape: dict[tuple[torch.Size, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(zip(*columns, strict=True)):
        by_shape[tuple(tensor.shape for tensor in row)].append(index)
    results: dict[int, Tensor] = {}
    for indices in by_shape.values():
        stacks = [torch.stack([column[index] for index in indices]) for column in columns]
        results |= zip(indices, compute(*stacks).unbind(), strict=True)
    return [results[index] for index in sorted(results)]


# --- building -----------------------------------------------------------------------------------


def build_network(model: Model, options: Options) -> Network:
    """The network that the options describe, applied to the model; --base_weights are in the model then.

    The model may be on the meta device, and the network is there then too, for its shapes alone. Raises UsageError
    (LyCORIS cannot carry out the options, they match no module or do not fit --network_weights) and InputError.
    """
    arguments = read_network_args(options)
    named = named_modules(model)
    parts = {"unet": model.unet, "text_encoder": model.encoders[0], "text_encoder_2": model.encoders[1]}
    tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    floats = {key: value for key, value in tensors.items() if value.is_floating_point()}
    shapes = {key: tuple(value.shape) for key, value in floats.items()}
    # As lorashrink sees a diffusers folder with this model, so that adapters of all namings find their weights.
    file = Path(options.pretrained_model_name_or_path or "the base")
    base = Base(file, "folder", _SDXL, shapes, "", pickled_store(file, floats))
    strengths = (*options.base_weights_multiplier, *[1.0] * len(options.base_weights))
    for name, strength in zip(options.base_weights, strengths, strict=False):
        _merge(Path(name), strength, base, tensors)
    path = Path(options.network_weights) if options.network_weights else None
    weights: dict[str, Tensor] = {}
    if path:
        with open_adapter(path) as adapter:
            store = renamed(adapter, "kohya", base).adapter.store
            weights = {key: store.read(key).float() for key in store.tensors}
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if options.seed is not None:  # random numbers of the seed alone
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(generator(options.seed, "network").initial_seed())
        if next(model.unet.parameters()).is_meta:  # no memory for a model without any
            stack.enter_context(init_empty_weights(include_buffers=False))
            stack.enter_context(_StayOnMeta())
        if path and options.dim_from_weights:
            module = _from_weights(path, weights, {names.kohya: names.module for names in named}, arguments)
        else:
            module = _from_options(model, options, arguments)
            kohya = {names.lycoris: names.kohya for names in named}
            for layer in module.loras:
                layer.lora_name = kohya[layer.lora_name]
        trains_text, trains_unet = not options.network_train_unet_only, not options.network_train_text_encoder_only
        module.apply_to(list(model.encoders), model.unet, trains_text, trains_unet)
        if not module.loras:
            raise UsageError(f"--network_args: preset={arguments.preset} matches no module that is to be trained")
        module.float()  # full differences begin in the base's dtype
        if path:
            _load(module, weights, path, options)
    return Network(module)


@contextmanager
def _quiet() -> Iterator[None]:
    """LyCORIS logs and prints for every layer; what matters of it is said by `read_network_args`."""
    level = lycoris_log.level
    lycoris_log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        lycoris_log.setLevel(level)


class _StayOnMeta(TorchFunctionMode):
    """Some layers of LyCORIS copy their base weight to the CPU, which a tensor without numbers refuses."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stays = func is torch.Tensor.cpu and args[0].is_meta
        return args[0] if stays else func(*args, **(kwargs or {}))


def _from_options(model: Model, options: Options, arguments: NetworkArgs) -> LycorisNetworkKohya:
    """A network with the layers of the preset, under LyCORIS' names."""
    # LyCORIS keeps the settings of a preset in its class for good.
    kept = {name: value for name, value in vars(LycorisNetworkKohya).items() if name.isupper()}
    # Names of modules in its own presets match none of sd-scripts' UNet, so that they are not trained there.
    own: dict[str, Any] = {"unet_target_name": []}
    if arguments.preset in PRESETS:
        settings = PRESET[arguments.preset] | own
    else:
        try:
            settings = PresetConfig.from_dict(read_toml(Path(arguments.preset))).to_dict()
        except PresetValidationError as error:
            raise InputError(f"{Path(arguments.preset)}: no preset of LyCORIS: {error}") from None
    # All settings are written, so that those of another preset do not shine through.
    unset = {"module_algo_map": {}, "name_algo_map": {}, "use_fnmatch": False, "exclude_name": []}
    preset: dict[str, Any] = PRESET["full"] | own | unset | settings
    kinds, algos = preset["unet_target_module"], preset["module_algo_map"]
    preset["unet_target_module"] = [_CLASSES.get(kind, kind) for kind in kinds if kind not in _OTHER_CLASSES]
    preset["module_algo_map"] = {_CLASSES.get(kind, kind): algo for kind, algo in algos.items()}
    PRESET[_OURS] = preset
    try:
        dims, more = (options.network_dim, options.network_alpha), {"warn_on_unmatched": False, "preset": _OURS}
        return create_network(1.0, *dims, None, list(model.encoders), model.unet, **more, **arguments.values)
    except (ValueError, AssertionError, TypeError) as error:
        raise UsageError(f"--network_args: LyCORIS cannot build this network: {error}") from error
    finally:
        del PRESET[_OURS]
        for name, value in kept.items():
            setattr(LycorisNetworkKohya, name, value)


# --- names --------------------------------------------------------------------------------------

_SDXL = next(family for family in FAMILIES if family.name == "sdxl")
# sd-scripts' name of a class -> diffusers' name
_CLASSES = {"CrossAttention": "Attention", "SelfAttention": "Attention"}
# Of another model's; what it holds in SDXL has other names in sd-scripts, and is never trained there.
_OTHER_CLASSES = frozenset({"TimestepEmbedding"})
_OURS = "lorashrink"


class Named(NamedTuple):
    """A module that holds weights, and its names."""

    lycoris: str  # what LyCORIS makes of its path in a diffusers model
    kohya: str  # sd-scripts' name
    module: nn.Module


def named_modules(model: Model) -> list[Named]:
    """All modules with weights of the UNet and the text encoders, in the layout of any version of transformers."""
    named = []
    for part, inner in {"unet": model.unet, "te1": model.encoders[0], "te2": model.encoders[1]}.items():
        modules = {
            path: module
            for path, module in inner.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
        }
        # The rules look at shapes only where they split or fuse weights, which these two layouts do not.
        weights = {path: (View(path, (1, 1)),) for path in modules}
        layouts = spell(weights, _SDXL.rules if part == "unet" else encoders.RULES).layouts
        for name, (view,) in layouts["native"].items():
            lycoris = f"lora_{part}_{view.key}".replace(".", "_")
            named.append(Named(lycoris, layer_name_in("kohya", _SDXL, part, name), modules[view.key]))
    return named


# --- files --------------------------------------------------------------------------------------


def _merge(path: Path, strength: float, base: Base, tensors: Mapping[str, Tensor]) -> None:
    """Add an adapter to the tensors of the model, in float32, rounded once to their dtype."""
    with open_adapter(path) as adapter:
        matched = match(adapter, base)
        unused = len(adapter.others) + sum(
            not views or "magnitude" in layer.keys for layer, views in zip(adapter.layers, matched, strict=True)
        )
        if unused:
            note = "--base_weights %s: %d parts of it are no change of SDXL's weights and are left out"
            _log.warning(note, path, unused)
        for layer, views in zip(bind(adapter, matched, base).layers, matched, strict=True):
            if not views:
                continue
            change = strength * layer.delta.dense().flatten(1)  # [out, in·kh·kw]; the views' rows, one below the other
            rows = [tensors[view.key][slice(*view.rows)] if view.rows else tensors[view.key] for view in views]
            for row, part in zip(rows, torch.split(change, [len(row) for row in rows]), strict=True):
                row.copy_(row.float() + part.reshape(row.shape).to(row.device))


def _from_weights(
    path: Path, weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module], arguments: NetworkArgs
) -> LycorisNetworkKohya:
    """A network with the layers, ranks, alphas and numbers of a file."""
    network = LycorisNetworkKohya([], nn.Module(), warn_on_unmatched=False)
    kinds = {name: kind for name in map(layer_name, weights) if (kind := get_module(weights, name)[0])}
    dora = any(key.endswith(".dora_scale") for key in weights)
    if dora != arguments.dora or not set(kinds.values()) <= {network_module_dict[arguments.algo], NormModule}:
        algos = ", ".join(sorted({kind.name for kind in kinds.values()}))
        raise UsageError(
            f"--network_weights {path}: holds {algos}{' with DoRA' if dora else ''}, and --network_args asks for "
            f"algo={arguments.algo} dora_wd={arguments.dora}; give the ones of the file"
        )
    values = arguments.values
    # LyCORIS has no place for these when it makes a layer from a file
    settings: dict[str, Any] = {
        **{name: float(values.get(name, 0)) for name in ("dropout", "rank_dropout", "module_dropout")},
        "wd_on_out": values.get("wd_on_output", True),
        "unbalanced_factorization": values.get("unbalanced_factorization", False),
        "bypass_mode": arguments.bypass,
    }
    for name, kind in kinds.items():
        if "alpha" in kind.weight_list and f"{name}.alpha" not in weights:
            raise InputError(f"--network_weights {path}: {name} has no alpha. Export the file again.")
        if name in modules:
            with_settings = type(kind.__name__, (kind,), {"__init__": partialmethod(kind.__init__, **settings)})
            try:
                layer = make_module(with_settings, get_module(weights, name)[1], name, modules[name])
            except (RuntimeError, ValueError) as error:
                raise InputError(f"--network_weights {path}: LyCORIS cannot make a layer of {name}: {error}") from error
            (network.unet_loras if name.startswith("lora_unet_") else network.text_encoder_loras).append(layer)
    network.loras = network.text_encoder_loras + network.unet_loras
    return network


def _load(module: LycorisNetworkKohya, weights: Mapping[str, Tensor], path: Path, options: Options) -> None:
    """Take over the numbers of a file with the tensors of the network, no more and no fewer."""
    own: Mapping[str, Tensor] = module.state_dict()
    if own.keys() != weights.keys():
        more, fewer = (names_text(sorted(names)) or "nothing" for names in (weights.keys() - own, own.keys() - weights))
        raise UsageError(
            f"--network_weights {path} does not fit this network: not in the network: {more}; not in the file: {fewer}."
            " --dim_from_weights takes the layers of the file"
        )
    if options.dim_from_weights:
        return  # the network was made of them
    numbers = {}
    theirs: Any
    ours: Any
    for key, value in weights.items():
        if not key.endswith(".alpha"):
            theirs, ours = list(value.shape), list(own[key].shape)
            fits, numbers[key] = theirs == ours, value.to(own[key].device)
        else:  # LyCORIS would write the file's and compute with its own; half precision has rounded the file's
            theirs, ours = value.item(), own[key].item()
            fits = math.isclose(theirs, ours, rel_tol=0.01)
        if not fits:
            raise UsageError(
                f"--network_weights {path}: {key} is {theirs}, and {ours} in this network: another rank or alpha. Give "
                "--dim_from_weights, or --network_dim, --network_alpha, conv_dim and conv_alpha as in the file"
            )
    module.load_state_dict(numbers, strict=False)
