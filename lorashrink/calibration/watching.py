"""A running model watched: at each layer what goes in, and how a random projection of the output changes with what
comes out. `calibration` says what this is for.

A run is one picture or one text. Everything added up is linear in the runs, so that it can be saved and gone on with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorashrink.calibration.statistics import Side, Sides
from lorashrink.engine.gram import Grams
from lorashrink.errors import NonFinite

_EXTRA = 16  # columns of a sketch beside twice the rank that is kept of it

_PROBES = 8  # random sums of channels that stand for all of them where only taps matter

_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Site:
    """A module of the running model, or some of its rows."""

    name: str
    module: nn.Module
    rows: tuple[int, int]


class Watcher(Protocol):
    """What is added up at one site."""

    def inputs(self, module: nn.Module, given: Tensor) -> None:
        """Take note of a batch of inputs."""

    def gradients(self, gradient: Tensor) -> None:
        """Take note of the gradients [positions, out] of one run's outputs."""

    def state(self) -> dict[str, Tensor]:
        """What is added up so far; the tensors themselves."""


def positions(tensor: Tensor, module: nn.Module) -> Tensor:
    """[positions, channels] float32 of a batch at a linear layer, or of the pictures at a convolution."""
    tensor = tensor.detach().float()
    return (tensor.movedim(1, -1) if isinstance(module, nn.Conv2d) else tensor).flatten(0, -2)


class Projected:
    """The Gram matrices A·C·Aᵀ and Bᵀ·G·B of one layer of one adapter."""

    def __init__(self, up: Tensor, down: Tensor, device: str) -> None:
        """up [out, r] and down [r, in·kh·kw], both without the layer's scale."""
        self.up, self.down = up.to(device, torch.float32), down.to(device, torch.float32)
        rank = up.shape[1]
        self._sums = {name: torch.zeros(rank, rank, dtype=torch.float64) for name in ("down", "up")}
        self._count = torch.zeros(1, dtype=torch.float64)

    def inputs(self, module: nn.Module, given: Tensor) -> None:
        """See `Watcher`."""
        if isinstance(module, nn.Conv2d):
            weight = self.down.reshape(len(self.down), -1, *module.kernel_size)
            answered = functional.conv2d(given.float(), weight, None, module.stride, module.padding, module.dilation)
            rows = positions(answered, module)
        else:
            rows = positions(given, module) @ self.down.mT
        self._sums["down"] += (rows.mT @ rows).double().cpu()
        self._count += len(rows)

    def gradients(self, gradient: Tensor) -> None:
        """See `Watcher`."""
        rows = gradient @ self.up
        self._sums["up"] += (rows.mT @ rows).double().cpu()

    def state(self) -> dict[str, Tensor]:
        """See `Watcher`."""
        return {**self._sums, "count": self._count}

    def result(self, runs: int) -> Grams:
        """What was found, `up` per run."""
        return Grams(self._sums["down"] / self._count.clamp(min=1), self._sums["up"] / max(1, runs))


class Sketched:
    """C and G of one weight, each as a diagonal and `rank` columns, without ever forming them.

    With a fixed random Ω the products Y = C·Ω add up over the runs; C ≈ Y·(ΩᵀY)⁻¹·Yᵀ (Nyström; Tropp, Yurtsever, Udell
    and Cevher, https://arxiv.org/abs/1706.05736).
    """

    def __init__(self, shape: Sequence[int], rank: int, device: str) -> None:
        """shape: of the weight, [out, in, ...]."""
        self.rank = rank
        self._sides = {"in": _Sketch(shape[1], rank, device), "out": _Sketch(shape[0], rank, device)}
        taps = math.prod(shape[2:])
        self._taps = torch.zeros(taps, taps, dtype=torch.float64) if taps > 1 else None
        self._probe = _start(shape[1], _PROBES, device) if taps > 1 else None
        self._count = torch.zeros(1, dtype=torch.float64)

    def inputs(self, module: nn.Module, given: Tensor) -> None:
        """See `Watcher`."""
        rows = positions(given, module)
        self._sides["in"].add(rows)
        self._count += len(rows)
        if self._taps is not None and self._probe is not None and isinstance(module, nn.Conv2d):
            mixed = torch.einsum("nchw,cp->nphw", given.detach().float(), self._probe)
            padding = module.padding if isinstance(module.padding, tuple) else (0, 0)  # the one word known is "valid"
            patches = functional.unfold(mixed, module.kernel_size, module.dilation, padding, module.stride)
            taps = patches.reshape(len(mixed), _PROBES, len(self._taps), -1)
            self._taps += torch.einsum("npal,npbl->ab", taps, taps).double().cpu()

    def gradients(self, gradient: Tensor) -> None:
        """See `Watcher`."""
        self._sides["out"].add(gradient)

    def state(self) -> dict[str, Tensor]:
        """See `Watcher`."""
        found = {
            f"{label}.{key}": tensor for label, side in self._sides.items() for key, tensor in side.state().items()
        }
        return found | {"count": self._count} | ({} if self._taps is None else {"taps": self._taps})

    def result(self, runs: int) -> Sides:
        """What was found, G per run."""
        inputs = self._sides["in"].result(float(self._count.clamp(min=1)))
        if self._taps is not None:
            mean = self._taps.diagonal().mean().clamp(min=_TINY)
            inputs = Side(inputs.diagonal, inputs.low, (self._taps / mean).float())
        return Sides(inputs, self._sides["out"].result(max(1, runs)))


class _Sketch:
    """The sum of x·xᵀ over rows x, as its diagonal and its product with a random matrix."""

    def __init__(self, size: int, rank: int, device: str) -> None:
        self.rank = rank
        width = 2 * rank + _EXTRA
        exact = width >= size
        self._start = torch.eye(size, device=device) if exact else _start(size, width, device)
        self._product = torch.zeros(self._start.shape, dtype=torch.float32, device=device)
        self._diagonal = torch.zeros(size, dtype=torch.float32, device=device)

    def add(self, rows: Tensor) -> None:
        self._product += rows.mT @ (rows @ self._start)
        self._diagonal += (rows**2).sum(0)

    def state(self) -> dict[str, Tensor]:
        return {"product": self._product, "diagonal": self._diagonal}

    def result(self, count: float) -> Side:
        product, start = self._product.double().cpu() / count, self._start.double().cpu()
        core = start.mT @ product
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        kept = values > _TINY * values[-1:].clamp(min=0)
        factor = product @ (vectors * torch.where(kept, 1 / values.clamp(min=1e-300).sqrt(), 0))
        left, sigma, _ = torch.linalg.svd(factor, full_matrices=False)
        low = (left * sigma)[:, : self.rank]
        rest = (self._diagonal.double().cpu() / count - (low**2).sum(1)).clamp(min=0)
        return Side(rest.float(), low.float())


def _start(size: int, width: int, device: str) -> Tensor:
    """A random matrix, the same for every run of this program."""
    generator = torch.Generator().manual_seed(size)
    return (torch.randn(size, width, generator=generator) / math.sqrt(width)).to(device)


# --- hooks --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Recorder:
    """Hooks on modules, which tell watchers of inputs and gradients."""

    sites: Mapping[nn.Module, Sequence[tuple[Site, Watcher]]]
    recording: bool = True
    broken: list[str] = field(default_factory=list)  # sites with NaN or infinity

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The hooks, for as long as this lasts."""
        with ExitStack() as stack:
            for module in self.sites:
                handle = module.register_forward_hook(self._forward)
                stack.callback(handle.remove)
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While this lasts, what modules compute is not new: a checkpoint computes it once more."""
        self.recording = False
        try:
            yield
        finally:
            self.recording = True

    def _forward(self, module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return answer
        if not answer.requires_grad:
            answer = answer.detach().requires_grad_()
        if self.recording:
            with torch.no_grad():
                for _, watcher in self.sites[module]:
                    watcher.inputs(module, given[0].detach())
            note: Any = answer.register_hook
            note(lambda gradient: self._backward(module, gradient))
        return answer

    def _backward(self, module: nn.Module, gradient: Tensor) -> None:
        rows = positions(gradient, module)
        for site, watcher in self.sites[module]:
            if not torch.isfinite(rows).all():
                self.broken.append(site.name)
            watcher.gradients(rows[:, slice(*site.rows)])

    def check(self) -> None:
        """Raises NonFinite, naming a layer, if a gradient was no number."""
        if self.broken:
            raise NonFinite(
                f"the gradient at {self.broken[0]} ({len(self.broken)} in all) is NaN or infinity: the model's numbers "
                "leave the range of its dtype. Use another --dtype, such as fp32 or bf16."
            )


# --- models -------------------------------------------------------------------------------------


def watch_picture(
    pipeline: Any,
    denoiser: str,
    recorder: Recorder,
    settings: Mapping[str, Any],
    used: int,
    progress: Callable[[], None],
) -> None:
    """Draw one picture and watch `used` of its sampling steps, evenly spread.

    settings: arguments of the pipeline; its `generator` gives the projections too. That of a step is
    Σ d∘v·(σ_t - σ_t+1), with d the guided prediction and v standard normal: a step counts with what it does to the
    picture. Raises NonFinite.
    """
    module = getattr(pipeline, denoiser)
    original, seen = module.forward, [0]
    total = settings["num_inference_steps"]
    chosen = {int((place + 0.5) * total / used) for place in range(min(used, total))}
    generator = torch.Generator().manual_seed(settings["generator"].initial_seed() + 1)

    def forward(*args: Any, **kwargs: Any) -> Any:
        step = seen[0]
        seen[0] += 1
        if step not in chosen:
            with torch.no_grad():
                return original(*args, **kwargs)
        leaves: list[tuple[Tensor, Tensor]] = []
        answer = original(*_as_leaves(args, leaves), **_as_leaves(kwargs, leaves))
        guidance = guided(pipeline, answer[0]).float()
        noise = torch.randn(guidance.shape, generator=generator).to(guidance.device)
        projection = noise * step_width(pipeline.scheduler, step)
        with recorder.paused():
            torch.autograd.backward([(guidance * projection).sum()])
            reached = [(tensor, leaf.grad) for tensor, leaf in leaves if leaf.grad is not None]
            if reached:  # on to the text encoders, which all steps share
                tensors, gradients = zip(*reached, strict=True)
                torch.autograd.backward(tensors, gradients, retain_graph=True)
        progress()
        predicted = answer[0].detach()
        return (predicted, *answer[1:]) if isinstance(answer, tuple) else type(answer)(predicted)

    module.forward = forward
    try:
        with torch.enable_grad():
            draw: Any = type(pipeline).__call__
            draw.__wrapped__(pipeline, **settings, output_type="latent")  # without its no_grad
    finally:
        del module.forward
    recorder.check()


def watch_text(
    model: Any, tokens: Mapping[str, Tensor], recorder: Recorder, probes: int, seed: int, progress: Callable[[], None]
) -> None:
    """Read one text and watch; each probe is another projection of what the model makes of it.

    With logits it is Σ √p∘v·log p over positions and words, v standard normal: the mean square of its change is twice
    the divergence between the two distributions of the next word, to second order. Other models' projection is that of
    their last hidden states. Raises NonFinite.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(probes):
        with torch.enable_grad():
            answer = model(**tokens)
            if "logits" in answer:
                projected = functional.log_softmax(answer.logits.float(), -1)
                weight = projected.detach().div(2).exp()
            else:
                projected = answer.last_hidden_state.float()
                weight = torch.ones(())
            noise = torch.randn(projected.shape, generator=generator).to(projected.device)
            with recorder.paused():
                torch.autograd.backward([(projected * noise * weight.to(noise.device)).sum()])
        progress()
    recorder.check()


def _as_leaves(value: Any, leaves: list[tuple[Tensor, Tensor]]) -> Any:
    """The value with every tensor that has a history replaced by one that has none; pairs go to `leaves`."""
    if isinstance(value, Tensor) and value.requires_grad:
        leaf = value.detach().requires_grad_()
        leaves.append((value, leaf))
        return leaf
    if isinstance(value, dict):
        return {key: _as_leaves(each, leaves) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_as_leaves(each, leaves) for each in value)
    return value


def guided(pipeline: Any, predicted: Tensor) -> Tensor:
    """What the sampler makes of a denoiser's answer: [n, ...], of one with twice as many where there is guidance."""
    if not getattr(pipeline, "do_classifier_free_guidance", False):
        return predicted
    without, with_prompt = predicted.chunk(2)
    return torch.lerp(without, with_prompt, float(pipeline.guidance_scale))


def step_width(scheduler: Any, step: int) -> float:
    """By how much a step changes the picture, for a prediction of length 1."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        high, low = float(sigmas[step]), float(sigmas[step + 1])
    else:
        signal = scheduler.alphas_cumprod
        times = scheduler.timesteps
        high = _sigma(signal[int(times[step])])
        low = _sigma(signal[int(times[step + 1])]) if step + 1 < len(times) else 0.0
    velocity = scheduler.config.get("prediction_type") == "v_prediction"
    return (high - low) / (math.hypot(1, high) if velocity else 1.0)


def _sigma(signal: Tensor) -> float:
    return math.sqrt((1 - float(signal)) / float(signal))
