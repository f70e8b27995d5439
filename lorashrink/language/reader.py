"""A language model that reads a text with two adapters: how far apart are its answers?

Models of next words are compared by the Kullback-Leibler divergence of their distributions, encoders by the cosine of
their embeddings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import peft
from lorashrink.errors import InputError, Progress, UsageError
from lorashrink.files.store import read_text
from lorashrink.results.sweep import Read, Texts

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST = 512  # tokens of a passage
_SHORTEST = 8  # what is left at the end of a text counts from here on

_ORIGINAL, _SMALL = "original", "small"  # names of the adapters in PEFT


class Reader:
    """A model of transformers with the original adapter, and a text in passages. Use it as a context manager.

    Raises UsageError (packages, kinds of files) or InputError (what cannot be read).
    """

    def __init__(
        self, model: Path, adapter: Path, text: Path, *, device: str, progress: Progress | None = None
    ) -> None:
        check_readable(model, adapter)
        self.name, self.file, self._progress = str(model), str(text), progress
        self._causal, self._model, tokenizer = load_model(model, adapter, device)
        try:
            words = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{text}: cannot be read as UTF-8 text ({error}).") from error
        self._passages = _passages(tokenizer, words, self._model.config)
        if not self._passages:
            raise InputError(f"{text}: has fewer than {_SHORTEST} tokens. Give a longer text.")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._model

    def read(self) -> Read:
        """The text, and the two ends of the scale: with the original adapter, and without one."""
        none, perplexity = self._compared("without adapter", self._model.disable_adapter)
        return Read(
            model=self.name,
            file=self.file,
            measure="divergence" if self._causal else "cosine distance",
            passages=len(self._passages),
            tokens=sum(map(len, self._passages)),
            perplexity=perplexity,
            none=none,
        )

    def compare(self, adapter: Path, label: str) -> Texts:
        """How far the answers with a smaller adapter, a PEFT folder, are from those with the original."""
        self._model.load_adapter(str(adapter), adapter_name=_SMALL)
        try:
            return self._compared(label, lambda: self._using(_SMALL))[0]
        finally:
            self._model.set_adapter(_ORIGINAL)
            self._model.delete_adapter(_SMALL)

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        self._model.set_adapter(name)
        yield
        self._model.set_adapter(_ORIGINAL)

    def _compared(self, label: str, changed: Callable[[], Any]) -> tuple[Texts, float | None]:
        """(texts as the changed model reads them, perplexity of the original adapter)."""
        import torch

        distances, losses, original_losses = [], [], []
        with torch.inference_mode():
            for done, passage in enumerate(self._passages, 1):
                tokens = torch.tensor([passage], device=self._model.device)
                # Computed again for each recipe: all answers to a text would take gigabytes.
                original = self._answer(tokens)
                with changed():
                    answer = self._answer(tokens)
                distances.append(divergence(original, answer) if self._causal else cosine_distance(original, answer))
                if self._causal:
                    losses.append(_surprise(answer, tokens[0]))
                    original_losses.append(_surprise(original, tokens[0]))
                if self._progress:
                    self._progress(f"text: {label}", done, len(self._passages))
        worst = max(distances)
        return (
            Texts(
                distance=sum(distances) / len(distances),
                worst=distances.index(worst),
                worst_distance=worst,
                values=tuple(distances),
                perplexity=self._perplexity(losses),
            ),
            self._perplexity(original_losses),
        )

    def _answer(self, tokens: Tensor) -> Tensor:
        """Log-probabilities of the next word at each token, [tokens, words], or the embedding, [width]; float32."""
        output = self._model(input_ids=tokens)
        if self._causal:
            return output.logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]
        return output.last_hidden_state[0].float().mean(0)  # type: ignore[no-any-return]

    def _perplexity(self, losses: Sequence[float]) -> float | None:
        if not losses:
            return None
        words = [len(passage) - 1 for passage in self._passages]
        return math.exp(sum(loss * count for loss, count in zip(losses, words, strict=True)) / sum(words))


def divergence(original: Tensor, answer: Tensor) -> float:
    """Kullback-Leibler divergence of `answer` from `original` in nats, mean over tokens.

    Both are log-probabilities [tokens, words].
    """
    return float((original.exp() * (original - answer)).sum(-1).mean().clamp(min=0))


def cosine_distance(original: Tensor, answer: Tensor) -> float:
    """1 - the cosine of two embeddings."""
    from torch.nn.functional import cosine_similarity

    return max(0.0, 1 - float(cosine_similarity(original.double(), answer.double(), dim=0)))


def _surprise(answer: Tensor, tokens: Tensor) -> float:
    """Mean negative log-probability of the words that follow, in nats."""
    return float(-answer[:-1].gather(1, tokens[1:, None]).mean())


def check_readable(model: Path, adapter: Path) -> None:
    """Raises UsageError if a package is missing, or transformers and PEFT have no such kind of model or adapter."""
    from importlib.util import find_spec

    for package in ("transformers", "peft"):
        if find_spec(package) is None:
            raise UsageError(f"--text needs {package}, which is not installed: pip install 'lorashrink[pictures]'")
    if not (model / "config.json").is_file():
        raise UsageError(f"{model}: --text needs the model as transformers saves it, a folder with config.json.")
    if not peft.is_folder(adapter):
        raise UsageError(
            f"{adapter}: --text needs a PEFT folder. Make one with: "
            f"lorashrink convert --naming peft --base {model} {adapter}"
        )
    if isinstance(peft.from_folder(adapter)[""].get("init_lora_weights"), str):
        raise UsageError(f"{adapter}: changes its base at load (init_lora_weights), and is not compared by --text.")


def load_model(model: Path, adapter: Path, device: str) -> tuple[bool, Any, Any]:
    """(whether it predicts next words, the model with the original adapter, its tokenizer)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from lorashrink.engine.devices import pick_device
    from lorashrink.pictures.pipelines import quiet_libraries

    quiet_libraries()
    config = json.loads(read_text(model / "config.json"))
    causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())
    chosen = pick_device(device)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    dtype = "auto" if chosen.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"{model}: transformers finds no tokenizer in it ({type(error).__name__}). Put the model's tokenizer.json "
            "and tokenizer_config.json into the folder."
        ) from error
    try:
        kind = AutoModelForCausalLM if causal else AutoModel
        loaded = kind.from_pretrained(model, dtype=dtype, **options).to(chosen)
        wrapped = PeftModel.from_pretrained(loaded, str(adapter), adapter_name=_ORIGINAL)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"{model}: transformers and PEFT cannot open it with {adapter}: {error}") from error
    return causal, wrapped.eval(), tokenizer


def _passages(tokenizer: Any, text: str, config: Any) -> list[list[int]]:
    """The tokens of a text in pieces that the model takes."""
    longest = min(_LONGEST, getattr(config, "max_position_embeddings", None) or _LONGEST)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [tokens[start : start + longest] for start in range(0, len(tokens), longest)]
    return [piece for piece in pieces if len(piece) >= _SHORTEST]
