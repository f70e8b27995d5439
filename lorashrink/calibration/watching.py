"""Watching a running model: sums, at each layer, over its inputs and over the gradients at its outputs.

The gradients are those of a random projection of what the model makes: they say how much a layer's output matters.
A run is one picture or one text. All sums are linear in the runs, so that a calibration can be interrupted and resumed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorashrink.calibration.denoising import draw_latents, guided, step_width
from lorashrink.calibration.sites import Watched, forward_hooks
from lorashrink.calibration.statistics import Side, Sides
from lorashrink.engine.devices import core_device
from lorashrink.engine.gram import Grams
from lorashrink.errors import NonFinite

_EXTRA = 16  # columns of a sketch besides twice the rank that the result keeps
_PROBES = 8  # random sums of channels that stand for all of them where only taps matter
_TINY = 1e-12


class Watcher(Protocol):
    """The sums over the inputs and gradients of one module, or of some of its rows."""

    def add_inputs(self, module: nn.Module, batch: Tensor) -> None:
        """Add a batch of the module's inputs."""

    def add_gradients(self, gradients: Tensor) -> None:
        """Add the gradients [positions, out] at the outputs of one run."""

    def state(self) -> dict[str, Tensor]:
        """The sums so far: the tensors themselves, not copies."""


def positions(tensor: Tensor, module: nn.Module) -> Tensor:
    """[positions, channels] float32 of a batch at a linear layer, or of the pictures at a convolution."""
    tensor = tensor.detach().float()
    return (tensor.movedim(1, -1) if isinstance(module, nn.Conv2d) else tensor).flatten(0, -2)


class Projected:
    """The Gram matrices A·C·Aᵀ and Bᵀ·G·B of one layer of one adapter."""

    def __init__(self, up: Tensor, down: Tensor, device: str) -> None:
        """up [out, r] and down [r, in·kh·kw], both without the layer's scale."""
        self.up, self.down = up.to(device, torch.float32), down.to(device, torch.float32)
        rank, core = up.shape[1], core_device(device)
        # On the device, so that no layer waits for it.
        self._sums = {name: torch.zeros(rank, rank, dtype=torch.float64, device=core) for name in ("down", "up")}
        self._count = torch.zeros(1, dtype=torch.float64)

    def add_inputs(self, module: nn.Module, batch: Tensor) -> None:
        """See `Watcher`."""
        if isinstance(module, nn.Conv2d):
            weight = self.down.reshape(len(self.down), -1, *module.kernel_size)
            projected = functional.conv2d(batch.float(), weight, None, module.stride, module.padding, module.dilation)
            rows = positions(projected, module)
        else:
            rows = positions(batch, module) @ self.down.mT
        self._sums["down"] += (rows.mT @ rows).to(self._sums["down"].device).double()
        self._count += len(rows)

    def add_gradients(self, gradients: Tensor) -> None:
        """See `Watcher`."""
        rows = gradients @ self.up
        self._sums["up"] += (rows.mT @ rows).to(self._sums["up"].device).double()

    def state(self) -> dict[str, Tensor]:
        """See `Watcher`."""
        return {**self._sums, "count": self._count}

    def result(self, runs: int) -> Grams:
        """The Gram matrices, `down` per position and `up` per run."""
        down, up = self._sums["down"].cpu(), self._sums["up"].cpu()
        return Grams(down / self._count.clamp(min=1), up / max(1, runs))


class Sketched:
    """The covariances C and G of one weight, each as a diagonal and `rank` columns; neither is ever formed.

    With a fixed random Ω the products Y = C·Ω add up over the runs; C ≈ Y·(ΩᵀY)⁻¹·Yᵀ (Nyström; Tropp, Yurtsever, Udell
    and Cevher, https://arxiv.org/abs/1706.05736).
    """

    def __init__(self, shape: Sequence[int], rank: int, device: str) -> None:
        """shape: of the weight, [out, in, ...]."""
        self.rank = rank
        self._sides = {"in": _Sketch(shape[1], rank, device), "out": _Sketch(shape[0], rank, device)}
        taps = math.prod(shape[2:])
        core = core_device(device)
        self._taps = torch.zeros(taps, taps, dtype=torch.float64, device=core) if taps > 1 else None
        self._probe = _random_matrix(shape[1], _PROBES, device) if taps > 1 else None
        self._count = torch.zeros(1, dtype=torch.float64)

    def add_inputs(self, module: nn.Module, batch: Tensor) -> None:
        """See `Watcher`."""
        rows = positions(batch, module)
        self._sides["in"].add(rows)
        self._count += len(rows)
        if self._taps is not None and self._probe is not None and isinstance(module, nn.Conv2d):
            mixed = torch.einsum("nchw,cp->nphw", batch.detach().float(), self._probe)
            # A word instead of numbers is "valid": "same" occurs in no model.
            padding = module.padding if isinstance(module.padding, tuple) else (0, 0)
            patches = functional.unfold(mixed, module.kernel_size, module.dilation, padding, module.stride)
            taps = patches.reshape(len(mixed), _PROBES, len(self._taps), -1)
            self._taps += torch.einsum("npal,npbl->ab", taps, taps).to(self._taps.device).double()

    def add_gradients(self, gradients: Tensor) -> None:
        """See `Watcher`."""
        self._sides["out"].add(gradients)

    def state(self) -> dict[str, Tensor]:
        """See `Watcher`."""
        state = {"in." + key: tensor for key, tensor in self._sides["in"].state().items()}
        state |= {"out." + key: tensor for key, tensor in self._sides["out"].state().items()}
        return state | {"count": self._count} | ({} if self._taps is None else {"taps": self._taps})

    def result(self, runs: int) -> Sides:
        """The covariances, C per position and G per run."""
        inputs = self._sides["in"].result(float(self._count.clamp(min=1)))
        if self._taps is not None:
            mean = self._taps.diagonal().mean().clamp(min=_TINY)
            inputs = Side(inputs.diagonal, inputs.low, (self._taps / mean).float().cpu())
        return Sides(inputs, self._sides["out"].result(max(1, runs)))


class _Sketch:
    """The sum of x·xᵀ over rows x, as its diagonal and its product with a random matrix."""

    def __init__(self, size: int, rank: int, device: str) -> None:
        self.rank = rank
        width = 2 * rank + _EXTRA
        exact = width >= size
        self._start = torch.eye(size, device=device) if exact else _random_matrix(size, width, device)
        self._product = torch.zeros(self._start.shape, dtype=torch.float32, device=device)
        self._diagonal = torch.zeros(size, dtype=torch.float32, device=device)

    def add(self, rows: Tensor) -> None:
        self._product += rows.mT @ (rows @ self._start)
        self._diagonal += (rows**2).sum(0)

    def state(self) -> dict[str, Tensor]:
        return {"product": self._product, "diagonal": self._diagonal}

    def result(self, count: float) -> Side:
        product, start = self._product.cpu().double() / count, self._start.cpu().double()
        core = start.mT @ product
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        kept = values > _TINY * values[-1:].clamp(min=0)
        factor = product @ (vectors * torch.where(kept, 1 / values.clamp(min=1e-300).sqrt(), 0))
        basis, sigma, _ = torch.linalg.svd(factor, full_matrices=False)
        low = (basis * sigma)[:, : self.rank]
        rest = (self._diagonal.cpu().double() / count - (low**2).sum(1)).clamp(min=0)
        return Side(rest.float(), low.float())


def _random_matrix(size: int, width: int, device: str) -> Tensor:
    """A random matrix [size, width], the same in every run of this program."""
    generator = torch.Generator().manual_seed(size)
    return (torch.randn(size, width, generator=generator) / math.sqrt(width)).to(device)


# --- hooks --------------------------------------------------------------------------------------


class Recorder:
    """Hooks on modules, which give inputs and gradients to watchers."""

    def __init__(self, sites: Sequence[tuple[Watched, Watcher]]) -> None:
        self.sites: dict[nn.Module, list[tuple[Watched, Watcher]]] = defaultdict(list)
        for site, watcher in sites:
            self.sites[site.module].append((site, watcher))
        self.recording = True
        self._broken: dict[str, Tensor] = {}  # weight -> whether a gradient was NaN or infinity, on the device

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks are on the modules for as long as this lasts."""
        with forward_hooks(self.sites, self._record):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Modules run without being recorded for as long as this lasts: a checkpoint computes what is recorded."""
        self.recording = False
        try:
            yield
        finally:
            self.recording = True

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        if self.recording:
            with torch.no_grad():
                for _, watcher in self.sites[module]:
                    watcher.add_inputs(module, inputs[0].detach())

            def add_gradients(gradient: Tensor) -> None:
                rows = positions(gradient, module)
                broken = ~torch.isfinite(rows).all()
                for site, watcher in self.sites[module]:
                    name = str(site.view)
                    self._broken[name] = self._broken[name] | broken if name in self._broken else broken
                    watcher.add_gradients(rows[:, slice(*site.rows)])

            register_hook: Any = output.register_hook
            register_hook(add_gradients)
        return output

    def check(self) -> None:
        """Raises NonFinite, naming a layer, if a gradient was NaN or infinity."""
        flags = torch.stack(list(self._broken.values())).tolist() if self._broken else []
        broken = [name for name, flag in zip(self._broken, flags, strict=True) if flag]
        if broken:
            raise NonFinite(
                f"the gradient at {broken[0]} ({len(broken)} in all) is NaN or infinity: the model's numbers leave the "
                "range of its dtype. Use another --dtype, such as fp32 or bf16."
            )


# --- runs ---------------------------------------------------------------------------------------


def watch_picture(
    pipeline: Any,
    denoiser: str,
    recorder: Recorder,
    settings: Mapping[str, Any],
    used: int,
    progress: Callable[[], None],
) -> None:
    """Draw one picture and watch `used` of its sampling steps, evenly spread.

    settings: arguments of the pipeline; the seed of its `generator` decides the projections too. The projection of a
    step is Σ d∘v·(σ_t - σ_t+1), with d the guided prediction and v standard normal: a step counts with what it does to
    the picture. Raises NonFinite.
    """
    total = settings["num_inference_steps"]
    chosen = {int((index + 0.5) * total / used) for index in range(min(used, total))}
    generator = torch.Generator().manual_seed(settings["generator"].initial_seed() + 1)
    steps = itertools.count()

    def watched_step(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = next(steps)
        if step not in chosen:
            with torch.no_grad():
                return forward(*args, **kwargs)
        leaves: list[tuple[Tensor, Tensor]] = []
        output = forward(*_as_leaves(args, leaves), **_as_leaves(kwargs, leaves))
        guidance = guided(pipeline, output[0]).float()
        noise = torch.randn(guidance.shape, generator=generator).to(guidance.device)
        projection = noise * step_width(pipeline.scheduler, step)
        with recorder.paused():
            torch.autograd.backward([(guidance * projection).sum()])
            reached = [(tensor, leaf.grad) for tensor, leaf in leaves if leaf.grad is not None]
            if reached:  # on to the text encoders, which all steps share
                tensors, gradients = zip(*reached, strict=True)
                torch.autograd.backward(tensors, gradients, retain_graph=True)
        progress()
        predicted = output[0].detach()  # a step's graph ends here, so that memory holds one step
        return (predicted, *output[1:]) if isinstance(output, tuple) else type(output)(predicted)

    with torch.enable_grad():
        draw_latents(pipeline, denoiser, settings, watched_step)
    recorder.check()


def watch_text(
    model: Any, tokens: Mapping[str, Tensor], recorder: Recorder, probes: int, seed: int, progress: Callable[[], None]
) -> None:
    """Read one text `probes` times, each time with another random projection of the model's output.

    The projection of logits is Σ √p∘v·log p over positions and words, v standard normal: the mean square of its change
    is twice the divergence between the two distributions of the next word, to second order. Models without logits have
    their last hidden states projected. Raises NonFinite.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(probes):
        with torch.enable_grad():
            output = model(**tokens)
            if "logits" in output:
                projected = functional.log_softmax(output.logits.float(), -1)
                weight = projected.detach().div(2).exp()
            else:
                projected = output.last_hidden_state.float()
                weight = torch.ones(())
            noise = torch.randn(projected.shape, generator=generator).to(projected.device)
            with recorder.paused():
                torch.autograd.backward([(projected * noise * weight.to(noise.device)).sum()])
        progress()
    recorder.check()


def _as_leaves(value: Any, leaves: list[tuple[Tensor, Tensor]]) -> Any:
    """The value with every tensor that has a graph replaced by one that has none; both go to `leaves` as a pair."""
    if isinstance(value, Tensor) and value.requires_grad:
        leaf = value.detach().requires_grad_()
        leaves.append((value, leaf))
        return leaf
    if isinstance(value, dict):
        return {key: _as_leaves(item, leaves) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_leaves(item, leaves) for item in value)
    return value
