"""Whole runs: what must not change the result does not, and what is asked for happens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_sdxl
import torch
import training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import equal, flags, run, session

from lorashrink.adapters import open_adapter
from lorashrink.errors import InputError, NonFinite, OutputError, UsageError
from lorashrink.plots.loss import read_scalars
from lorashrink.train.command import main
from lorashrink.train.flags.options import parse
from lorashrink.train.output import saving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return training.write_data(tmp_path / "data")


def size(tensors: dict[str, torch.Tensor]) -> float:
    return max(float(value.abs().max()) for key, value in tensors.items() if "lora_up" in key)


def test_equal_seeds_give_equal_bits_and_others_do_not(model: Path, data: Path, tmp_path: Path) -> None:
    first = run(flags(model, data, tmp_path / "1"))
    again = run(flags(model, data, tmp_path / "2"))
    different = run(flags(model, data, tmp_path / "3", "--seed=2"))
    assert size(first) > 0
    assert equal(first, again)
    assert not equal(first, different)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_any_device_trains_and_limits_norms(
    precision: str, model: Path, data: Path, tmp_path: Path, device: str
) -> None:
    more = ("--scale_weight_norms=0.05", f"--mixed_precision={precision}", "--no_half_vae", "--cache_latents")
    with session(flags(model, data, tmp_path, *more)) as ready:
        assert ready.accelerator.device.type == device
        path = ready.run()
    assert size(load_file(path)) > 0
    with open_adapter(path) as trained:
        assert max(float(layer.delta.dense().norm()) for layer in trained) <= 0.05 * (1 + 1e-2)


def test_global_random_numbers_of_before_do_not_matter(model: Path, data: Path, tmp_path: Path) -> None:
    first = run(flags(model, data, tmp_path / "1"))
    torch.rand(7)
    assert equal(first, run(flags(model, data, tmp_path / "2")))


@pytest.mark.parametrize(
    "more",
    [
        ("--max_data_loader_n_workers=2",),
        ("--cache_latents",),
        ("--cache_latents_to_disk",),
        ("--cache_latents_to_disk", "--max_data_loader_n_workers=2", "--persistent_data_loader_workers"),
        ("--gradient_checkpointing",),
        ("--lowram", "--sdpa"),
    ],
    ids=" ".join,
)
def test_workers_caches_and_checkpointing_do_not_change_a_bit(
    more: tuple[str, ...], model: Path, data: Path, tmp_path: Path
) -> None:
    common = ("--shuffle_caption", "--keep_tokens=1", "--flip_aug")
    assert equal(
        run(flags(model, data, tmp_path / "1", *common)), run(flags(model, data, tmp_path / "2", *common, *more))
    )


def test_cached_captions_do_not_change_a_bit(model: Path, data: Path, tmp_path: Path) -> None:
    cache = "--cache_text_encoder_outputs"
    plain = run(flags(model, data, tmp_path / "1", "--network_train_unet_only"))
    cached = run(flags(model, data, tmp_path / "2", "--network_train_unet_only", cache))
    assert not any(key.startswith("lora_te") for key in plain)
    assert equal(plain, cached)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--scale_weight_norms=0.01",),
        ("--network_args", "preset=attn-mlp", "use_scalar=True"),
        ("--network_args", "preset=attn-mlp", "module_dropout=0.3", "rank_dropout=0.2"),
        ("--mixed_precision=fp16", "--no_half_vae", "--save_precision=fp16"),
        ("--optimizer_type=Prodigy", "--learning_rate=1"),
        ("--optimizer_type=schedulefree.AdamWScheduleFree",),
    ],
    ids=lambda more: " ".join(more) or "plain",
)
def test_a_resumed_run_ends_with_the_same_bits(more: tuple[str, ...], model: Path, data: Path, tmp_path: Path) -> None:
    """Interrupted within an epoch; six batches of one, two in a step."""
    common = ("--gradient_accumulation_steps=2", "--lr_scheduler=cosine", "--max_train_steps=5", *more)
    if "ScheduleFree" in str(more):
        common = tuple(flag for flag in common if "scheduler" not in flag)
    uninterrupted = run(flags(model, data, tmp_path / "1", *common, "--save_every_n_steps=2", "--save_state"))
    state = tmp_path / "1" / "x-step00000002-state"
    resumed = run(flags(model, data, tmp_path / "2", *common, f"--resume={state}"))
    assert equal(uninterrupted, resumed)


def test_the_state_at_the_end_of_an_epoch_goes_on_with_the_next(model: Path, data: Path, tmp_path: Path) -> None:
    common = ("--max_train_epochs=2", "--save_state")
    uninterrupted = run(
        flags(model, data, tmp_path / "1", *common, "--save_every_n_epochs=1", "--save_every_n_steps=6")
    )
    for name in ("x-000001-state", "x-step00000006-state"):
        assert json.loads((tmp_path / "1" / name / "train_state.json").read_text())["step"] == 6
        assert equal(
            uninterrupted, run(flags(model, data, tmp_path / name, *common, f"--resume={tmp_path / '1' / name}"))
        )


def test_a_state_at_the_end_is_not_resumed(model: Path, data: Path, tmp_path: Path) -> None:
    run(flags(model, data, tmp_path / "1", "--max_train_steps=2", "--save_state_on_train_end"))
    with pytest.raises(UsageError, match="step 2"):
        run(flags(model, data, tmp_path / "2", "--max_train_steps=2", f"--resume={tmp_path / '1' / 'x-state'}"))


def test_accumulating_two_batches_of_one_is_a_batch_of_two(model: Path, tmp_path: Path) -> None:
    data = training.write_data(tmp_path / "data", {"a.png": (64, 64), "b.png": (64, 64)})
    common = ("--max_train_steps=2", "--optimizer_type=torch.optim.SGD", "--learning_rate=0.1")
    (data / "2_cat").rename(data / "1_cat")
    accumulated = run(flags(model, data, tmp_path / "1", *common, "--gradient_accumulation_steps=2"))
    two = run(flags(model, data, tmp_path / "2", *common, "--train_batch_size=2"))
    assert size(two) > 1e-6
    for key in accumulated:
        torch.testing.assert_close(accumulated[key], two[key], rtol=1e-4, atol=1e-7)


def test_the_last_batches_of_an_epoch_are_a_step_of_their_own(model: Path, data: Path, tmp_path: Path) -> None:
    with training.session(
        flags(model, data, tmp_path / "o", "--gradient_accumulation_steps=4", "--max_train_epochs=2")
    ) as ready:
        assert (ready.length.steps_per_epoch, ready.length.steps) == (2, 4)
        ready.run()
        assert ready.position.step == 4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_and_leaves_the_adapter_in_float32(
    precision: str, model: Path, data: Path, tmp_path: Path
) -> None:
    tensors = run(flags(model, data, tmp_path / "o", f"--mixed_precision={precision}", "--no_half_vae"))
    assert size(tensors) > 0
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_the_adapter_itself_can_be_in_bf16(model: Path, data: Path, tmp_path: Path) -> None:
    arguments = flags(model, data, tmp_path / "o", "--mixed_precision=bf16", "--full_bf16", "--no_half_vae")
    with training.session(arguments) as ready:
        assert {parameter.dtype for parameter in ready.network.parameters()} == {torch.bfloat16}
        assert size(load_file(ready.run())) > 0


def test_no_layer_ends_longer_than_its_limit(model: Path, data: Path, tmp_path: Path) -> None:
    run(flags(model, data, tmp_path / "o", "--scale_weight_norms=0.01"))
    with open_adapter(tmp_path / "o" / "x.safetensors") as adapter:
        norms = [float(layer.delta.dense().norm()) for layer in adapter]
    assert max(norms) <= 0.01 * (1 + 1e-5)
    assert max(norms) >= 0.01 * (1 - 1e-5)


def test_text_encoders_stay_as_they_are_where_their_rate_is_zero(model: Path, data: Path, tmp_path: Path) -> None:
    tensors = run(flags(model, data, tmp_path / "o", "--text_encoder_lr=0"))
    ups = {key: bool(value.any()) for key, value in tensors.items() if key.endswith("lora_up.weight")}
    assert any(ups[key] for key in ups if key.startswith("lora_unet"))
    assert not any(ups[key] for key in ups if key.startswith("lora_te"))


def test_the_last_layer_of_the_first_text_encoder_is_not_reached(model: Path, data: Path, tmp_path: Path) -> None:
    """SDXL reads the layer before it, and the pooled vector of the second."""
    tensors = run(flags(model, data, tmp_path / "o"))
    trained = {key.split(".")[0] for key, value in tensors.items() if key.endswith("lora_up.weight") and value.any()}
    assert any(name.startswith("lora_te1_text_model_encoder_layers_0") for name in trained)
    assert not any(name.startswith("lora_te1_text_model_encoder_layers_1") for name in trained)
    assert any(name.startswith("lora_te2_text_model_encoder_layers_1") for name in trained)


def test_logs_hold_what_the_options_say(model: Path, data: Path, tmp_path: Path) -> None:
    more = (f"--logging_dir={tmp_path / 'logs'}", "--log_prefix=run-", "--scale_weight_norms=1", "--max_train_steps=7")
    run(flags(model, data, tmp_path / "o", *more))
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("run-20")
    assert list((folder / "network_train").glob("events.*"))
    assert (folder / "loss.png").stat().st_size > 5000
    scalars = read_scalars(folder)
    assert [step for step, _ in scalars["loss/current"]] == list(range(1, 8))
    losses = [value for _, value in scalars["loss/current"]]
    assert scalars["loss/average"][6][1] == pytest.approx(sum(losses[1:]) / 6)  # over the six steps of an epoch
    assert scalars["loss/epoch_average"] == [
        (1, pytest.approx(sum(losses[:6]) / 6)),
        (2, pytest.approx(losses[6])),
    ]
    assert scalars["lr/unet"][0][1] == scalars["lr/textencoder"][0][1] == pytest.approx(0.01)
    assert {"max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm"} < scalars.keys()


def test_a_log_prefix_alone_logs_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    with session(flags(model, data, tmp_path / "o", "--log_prefix=run-")) as ready:
        assert ready.accelerator.trackers == []
        assert ready.accelerator.logging_dir is None


def test_only_the_last_files_and_states_stay(model: Path, data: Path, tmp_path: Path) -> None:
    """The files of the last four steps and the states of the last two stay."""
    more = "--max_train_epochs=3 --save_every_n_steps=2 --save_last_n_steps=4 --save_last_n_steps_state=2 --save_state"
    run(flags(model, data, tmp_path / "o", *more.split(), "--save_every_n_epochs=1", "--save_last_n_epochs=1"))
    steps = {f"x-step{step:08d}" for step in (14, 16, 18)}
    files = {path.name for path in (tmp_path / "o").iterdir() if path.is_file()}
    assert files == {"x.safetensors", "x-000002.safetensors", *(f"{name}.safetensors" for name in steps)}
    folders = {path.name for path in (tmp_path / "o").iterdir() if path.is_dir()}
    assert folders == {"x-state", "x-000002-state", "x-step00000016-state", "x-step00000018-state"}


def test_each_saved_file_is_shrunk_and_goes_with_its_shrunk_files(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ("--max_train_epochs=3", "--save_every_n_epochs=1", "--save_last_n_epochs=1", "--shrink", "rank=1")
    assert main(flags(model, data, tmp_path / "o", *more)) == 0
    small = "_rank1.safetensors"
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        *("x.safetensors", f"x{small}", "x-000002.safetensors", f"x-000002{small}")
    }
    shrunk = load_file(tmp_path / "o" / f"x{small}")
    assert {value.shape[0] for key, value in shrunk.items() if "lora_down" in key} == {1}
    assert f"x{small}" in capfd.readouterr().err


def test_a_loss_that_is_nan_stops_the_run_and_keeps_what_was_saved(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(
        model, data, tmp_path / "o", "--max_grad_norm=0", "--learning_rate=1e30", "--save_every_n_steps=1"
    )
    assert main(arguments) == 1
    assert "NaN" in capfd.readouterr().err
    assert not (tmp_path / "o" / "x.safetensors").exists()


def test_nothing_to_train_on_is_exit_status_2(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "2_cat").mkdir(parents=True)
    assert main(flags(model, tmp_path / "data", tmp_path / "o")) == 2
    assert "no pictures" in capfd.readouterr().err
    assert not (tmp_path / "o").exists()


def test_what_a_picture_costs_is_taken_from_its_own_folder(model: Path, data: Path, tmp_path: Path) -> None:
    """Regularisation pictures of weight 0 change only the order."""
    reg = training.write_data(tmp_path / "reg", {"r.png": (64, 64)})
    common = ("--optimizer_type=torch.optim.SGD", "--max_train_steps=12", "--max_grad_norm=0", "--learning_rate=0")
    weighted = flags(model, data, tmp_path / "o", *common, "--unet_lr=0.1", f"--reg_data_dir={reg}")
    nothing = run([*weighted, "--prior_loss_weight=0"])
    something = run([*weighted, "--prior_loss_weight=1", f"--output_dir={tmp_path / 'p'}"])
    assert size(something) > size(nothing) > 0


def test_metadata_tells_how_it_was_made(model: Path, data: Path, tmp_path: Path) -> None:
    run(flags(model, data, tmp_path / "o", "--gradient_accumulation_steps=2"))
    with safe_open(tmp_path / "o" / "x.safetensors", "pt") as file:
        entries = file.metadata()
    assert entries["ss_steps"] == "5"
    assert entries["ss_epoch"] == entries["ss_num_epochs"] == "2"
    assert entries["ss_num_batches_per_epoch"] == "6"
    assert entries["ss_seed"] == "1"
    assert json.loads(entries["ss_network_args"]) == {"preset": "attn-mlp", "dropout": None}
    assert json.loads(entries["ss_tag_frequency"])["2_cat"]["a cat"] == 3
    assert entries["ss_sd_model_name"] == model.name


def test_a_failed_write_is_an_error_and_keeps_the_earlier_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    first = run(flags(model, data, tmp_path / "o"))
    with training.session(flags(model, data, tmp_path / "o", "--seed=2")) as ready:
        ready.options = dataclasses.replace(ready.options, output_dir="/dev/full")
        with pytest.raises(OutputError):
            ready.run()
    assert equal(first, load_file(tmp_path / "o" / "x.safetensors"))
    assert NonFinite is not OutputError


@pytest.mark.parametrize("more", [(), ("--cache_latents",), ("--cache_latents_to_disk",)])
def test_all_damaged_pictures_are_named_before_training(
    model: Path, data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    damaged = [data / "2_cat" / name for name in ("a.png", "c.png")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError) as caught, training.session(flags(model, data, tmp_path / "out", *more)):
        pass
    assert str(caught.value).startswith("2 of 3 pictures damaged; replace or remove: ")
    assert all(f"{path}: " in str(caught.value) for path in damaged)


def test_saves_and_samples_that_cannot_happen_are_warned_about(
    model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six pictures make six steps an epoch; five steps are less than one."""
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1")
    never = [
        "save_every_n_steps=6", "save_every_n_epochs=2", "sample_every_n_epochs=1", "caption_dropout_every_n_epochs=2"
    ]  # fmt: skip
    more = [*(f"--{words}" for words in never), f"--sample_prompts={tmp_path / 'p.txt'}", "--sample_every_n_steps=9"]
    assert saving.run_length(parse(flags(model, data, tmp_path)), 6).epochs == 1
    with training.session(flags(model, data, tmp_path / "out", *more)):
        pass
    warnings = [record.message for record in caplog.records if "cannot happen" in record.message]
    assert [line.partition(": ")[0] for line in warnings] == [f"--{words}" for words in never]
    assert [line.split(" has ")[1].split(";")[0] for line in warnings] == [
        "5 steps",
        "1 epochs",
        "0 full epochs",
        "1 epochs",
    ]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--sample_every_n_steps=6", "--sample_every_n_steps=6"),
        ("--save_n_epoch_ratio=2", "--save_n_epoch_ratio=2"),
        ("--save_every_n_steps=5 --save_every_n_epochs=1 --sample_every_n_steps=5", ""),
        ("--sample_every_n_steps=6 --sample_prompts=", ""),
        ("--max_train_steps=6 --sample_every_n_epochs=1", ""),
    ],
)
def test_only_what_is_beyond_the_end_cannot_happen(more: str, named: str) -> None:
    options = parse(["--max_train_steps=5", "--sample_prompts=p.txt", *more.split()])
    warnings = saving.never(options, saving.run_length(options, 6))
    assert [line.partition(": ")[0] for line in warnings] == ([named] if named else [])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("conv_dim=3", "conv_alpha=1.5"), ("4", "2.0", {"conv_dim": "3", "conv_alpha": "1.5"})),
        (
            ("conv_dim=3", "conv_alpha=1", "algo=loha"),
            ("4", "2.0", {"algo": "loha", "conv_dim": "3", "conv_alpha": "1.0"}),
        ),
        (("preset=attn-only",), ("4", "2.0", {})),
    ],
)
def test_ranks_from_a_file_are_those_that_the_next_file_names(
    model: Path, data: Path, tmp_path: Path, args: tuple[str, ...], expected: tuple[str, str, dict[str, str]]
) -> None:
    ranks = ("--network_dim=4", "--network_alpha=2", "--max_train_steps=1", "--save_precision=float")
    run(flags(model, data, tmp_path / "1", *ranks, "--network_args", *args))
    first = tmp_path / "1" / "x.safetensors"
    algo = [word for word in args if word.startswith("algo")]
    arguments = ("--network_dim=64", "--network_alpha=8", "--max_train_steps=1", f"--network_weights={first}")
    run(flags(model, data, tmp_path / "2", *arguments, "--dim_from_weights", "--network_args", "preset=full", *algo))
    with safe_open(tmp_path / "2" / "x.safetensors", "pt") as file:
        entries = file.metadata()
    assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == expected[:2]
    assert json.loads(entries["ss_network_args"]) == {**expected[2], "dropout": None}


def test_ranks_that_differ_between_layers_are_called_dynamic(model: Path, data: Path, tmp_path: Path) -> None:
    run(flags(model, data, tmp_path / "1", "--max_train_steps=1"))
    tensors = load_file(tmp_path / "1" / "x.safetensors")
    name = next(key for key in tensors if key.endswith("lora_down.weight")).removesuffix(".lora_down.weight")
    for end, dim in (("down", 0), ("up", 1)):
        tensors[f"{name}.lora_{end}.weight"] = tensors[f"{name}.lora_{end}.weight"].narrow(dim, 0, 1).contiguous()
    save_file(tensors, tmp_path / "mixed.safetensors")
    more = ("--max_train_steps=1", "--dim_from_weights", f"--network_weights={tmp_path / 'mixed.safetensors'}")
    run(flags(model, data, tmp_path / "2", *more))
    with safe_open(tmp_path / "2" / "x.safetensors", "pt") as file:
        assert (file.metadata()["ss_network_dim"], file.metadata()["ss_network_alpha"]) == ("Dynamic", "2.0")
