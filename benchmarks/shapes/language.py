"""Bytes against answers of a small language model: `python language.py --work FOLDER`.

A Llama of 0.1 million parameters learns to repeat captions. Two LoRAs of rank 32, as PEFT folders, then teach it to
repeat them with other colours, or with other shapes, which it never does by itself. Each method shrinks them to some
sizes. What is read: how far the next words diverge from those with the original adapter, on captions in no training
set, and how many answers are right from end to end. What has been measured stays in language.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lorashrink as ls
from lorashrink.measuring.curves import Curve, rate_gap

RESULTS = Path(__file__).with_name("language.json")
_WINDOW, _BATCH, _WIDTH, _RANK = 96, 16, 64, 32
_BASE_STEPS, _ADAPTER_STEPS = 900, 300
_SHARES = (0.08, 0.14, 0.25, 0.4)  # of the adapter's numbers in fp16; in fp8 half of that
ANCHOR = "fro_ckpt,bytes fp16"
METHODS = ("rank fp16", "energy fp16", ANCHOR, "fro_ckpt,bytes fp8", "calib,bytes fp16", "calib,bytes fp8")

_SIZES = ("a", "a small", "a big")
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond")
_GROUNDS = ("white", "black", "gray", "brown")
_WORDS = ["<unk>", "\n", "=>", "on", "background", "a", "small", "big", *_COLOURS, *_SHAPES, *_GROUNDS]
TASKS = {"colours": _COLOURS, "shapes": _SHAPES}  # what the answer has the next one of


def captions() -> tuple[list[str], list[str]]:
    """Captions to learn from, and captions that are held out."""
    everything = [
        f"{size} {colour} {shape} on a {ground} background"
        for size in _SIZES
        for colour in _COLOURS
        for shape in _SHAPES
        for ground in _GROUNDS
    ]
    random.Random(0).shuffle(everything)
    return everything[:500], everything[500:]


def line(caption: str, task: str | None) -> str:
    """A caption and the answer to it."""
    words = TASKS.get(task or "", ())
    answer = [words[(words.index(word) + 1) % len(words)] if word in words else word for word in caption.split()]
    return f"{caption} => {' '.join(answer)} \n "


def new_tokenizer() -> Any:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    table = tokenizers.models.WordLevel({word: number for number, word in enumerate(_WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(table)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def train(model: Any, task: str | None, steps: int, rate: float) -> None:
    """Teach the model lines of a task, in windows of many lines."""
    import torch

    tokenizer, generator, lines = new_tokenizer(), random.Random(1), captions()[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        texts = ["".join(line(caption, task) for caption in generator.choices(lines, k=6)) for _ in range(_BATCH)]
        tokens = torch.tensor([tokenizer(text)["input_ids"][:_WINDOW] for text in texts])
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(task or "base", step + 1, f"{loss.item():.3f}", flush=True)


def prepare(work: Path) -> Path:
    """The model and its adapters, trained where they are missing."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = work / "language"
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(_WORDS), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=_WINDOW,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        train(model, None, _BASE_STEPS, 3e-3)
        model.save_pretrained(folder)
        new_tokenizer().save_pretrained(folder)
    for task in TASKS:
        if not (work / task / "adapter_config.json").exists():
            torch.manual_seed(1)
            settings = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(LlamaForCausalLM.from_pretrained(folder), settings)
            train(model, task, _ADAPTER_STEPS, 3e-3)
            model.save_pretrained(work / task)
    return folder


def right(folder: Path, adapter: Path | None, task: str) -> float:
    """The share of held-out captions whose answers are right from end to end."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    tokenizer, done = new_tokenizer(), []
    with torch.inference_mode():
        for caption in captions()[1]:
            tokens = torch.tensor([tokenizer(line(caption, task))["input_ids"]])
            # Where each word is right after right ones, so is the answer that the model gives alone.
            start = len(caption.split())
            done.append(bool((model(input_ids=tokens).logits[0, start:-1].argmax(-1) == tokens[0, start + 1 :]).all()))
    return float(np.mean(done))


def measure(work: Path) -> dict[str, Any]:
    """Everything that is missing."""
    from lorashrink.language.reader import Reader
    from lorashrink.measuring.methods import Maker, Method

    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    folder, table, plain = prepare(work), work / "table.safetensors", work / "plain.txt"
    plain.write_text("".join(line(caption, None) for caption in captions()[0][:200]))
    if not table.exists():
        ls.calibrate(model=folder, text=plain, output=table, steps_used=4)
    for task in TASKS:
        text = work / f"{task}.txt"
        text.write_text("".join(line(caption, task) for caption in captions()[1][:80]))
        prepared = ls.prepare(work / task, base=folder, calibration=table, form="lora")
        maker = Maker(work / task, work / task, prepared, folder, table, None, lambda: None)
        with Reader(folder, work / task, text, device="cpu") as reader, tempfile.TemporaryDirectory() as temporary:
            none = reader.read().none
            results.setdefault(
                f"{task}|none", {"distances": list(none.values), "right": right(folder, None, task), "bytes": 0}
            )
            unshrunk = {"right": right(folder, work / task, task), "bytes": maker.full_size}
            results.setdefault(f"{task}|whole", unshrunk)
            for name in METHODS:
                (method,) = Method.parse(name)
                for share in _SHARES:
                    key = f"{task}|{name}|{share}"
                    size = share * maker.full_size * (0.5 if method.dtype == "fp8" else 1)
                    file = None if key in results else maker.make(method, size, Path(temporary))
                    if file is None:
                        continue
                    texts = reader.compare(file.path.parent, name)
                    results[key] = {
                        "bytes": file.payload,
                        "distances": [float(f"{value:.4g}") for value in texts.values],
                        "right": round(right(folder, file.path.parent, task), 4),
                    }
                    RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
                    print(key, file.payload, f"{texts.distance:.4g}", results[key]["right"], flush=True)
    return results


def curve_of(results: Mapping[str, Any], task: str, name: str) -> Curve | None:
    """Size against -10·log10 of the divergence, passage by passage."""
    rows = [row for key, row in results.items() if key.startswith(f"{task}|{name}|")]
    points = {row["bytes"]: -10 * np.log10(np.maximum(row["distances"], 1e-9)) for row in rows}
    return Curve.of(list(points.items())) if len(points) > 1 else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def tables(
    results: Mapping[str, Any],
    shares: Sequence[float] = _SHARES,
    score: str = "right answers",
    distance: str = "divergence",
) -> str:
    """Distance and score at each size, and Bjøntegaard differences."""
    lines = []
    for task in TASKS:
        unshrunk, none = results[f"{task}|whole"], results[f"{task}|none"]
        lines += [
            f"**{task}** ({unshrunk['bytes'] / 1000:.0f} kB; {score} {_percent(unshrunk['right'])}, "
            f"without it {_percent(none['right'])})\n",
            f"| method | {' | '.join(f'{_percent(share)} of the numbers' for share in shares)} "
            f"| size at equal {distance} |",
            f"|{' --- |' * (len(shares) + 2)}",
        ]
        anchor = curve_of(results, task, ANCHOR)
        for name in METHODS:
            rows = [results.get(f"{task}|{name}|{share}") for share in shares]
            cells = [
                "–" if row is None else f"{np.mean(row['distances']):.2g} / {_percent(row['right'])}" for row in rows
            ]
            curve = curve_of(results, task, name)
            gap = rate_gap([(anchor, curve)]) if anchor and curve and name != ANCHOR else None
            cells.append(f"{_percent(gap.value)} ({100 * gap.low:.0f} to {100 * gap.high:.0f})" if gap else "–")
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).strip()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure; what has been measured stays.")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the model and its adapters")
    work = parser.parse_args(arguments).work
    work.mkdir(parents=True, exist_ok=True)
    print(tables(measure(work)))


if __name__ == "__main__":
    main()
