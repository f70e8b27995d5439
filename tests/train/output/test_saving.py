"""When a run saves, what it names and keeps, and that what it leaves on the disk is whole and exact."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import pytest
import tiny_sdxl
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from lycoris.utils import precalculate_safetensors_hashes
from safetensors import safe_open
from safetensors.torch import load_file, save
from training import files_no_larger_than

from lorashrink.errors import InputError, NonFinite, OutputError
from lorashrink.train.data.scanning import scan
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.output import saving
from lorashrink.train.output.saving import Length, Position


def adapter(rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        "lora_unet_a.lora_up.weight": torch.randn(600, rank, generator=generator),
        "lora_unet_a.lora_down.weight": torch.randn(rank, 500, generator=generator),
        "lora_unet_a.alpha": torch.tensor(2.0),
    }


# --- how long, when, under which name: the rules are sd-scripts' ----------------------------------


@pytest.mark.parametrize(
    ("options", "batches", "expected"),
    [
        (Options(max_train_steps=400), 10, Length(10, 10, 40, 400)),
        (Options(max_train_steps=401), 10, Length(10, 10, 41, 401)),
        (Options(max_train_steps=400, gradient_accumulation_steps=6), 10, Length(10, 2, 200, 400)),
        (Options(max_train_steps=5, gradient_accumulation_steps=6), 3, Length(3, 1, 5, 5)),
        (
            Options(max_train_steps=5, max_train_epochs=3, gradient_accumulation_steps=4),
            9,
            Length(9, 3, 3, 9),
        ),
        (Options(), 7, Length(7, 7, 229, 1600)),
    ],
)
def test_steps_and_epochs_follow_from_batches_and_accumulation(
    options: Options, batches: int, expected: Length
) -> None:
    assert saving.run_length(options, batches) == expected


MOMENTS = ({"epoch": 50}, {"step": 1200}, {})


def test_files_have_the_names_of_sd_scripts() -> None:
    options = Options(output_dir="/out", output_name="mylora", save_model_as="ckpt")
    assert [str(saving.adapter_path(options, **moment)) for moment in MOMENTS] == [
        "/out/mylora-000050.ckpt", "/out/mylora-step00001200.ckpt", "/out/mylora.ckpt",
    ]  # fmt: skip
    assert [str(saving.state_path(options, **moment)) for moment in MOMENTS] == [
        "/out/mylora-000050-state", "/out/mylora-step00001200-state", "/out/mylora-state",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_name_files_are_called_epoch_at_and_last(name: str | None) -> None:
    options = Options(output_dir="out", output_name=name)
    assert [saving.adapter_path(options, **moment).name for moment in MOMENTS] == [
        "epoch-000050.safetensors", "at-step00001200.safetensors", "last.safetensors",
    ]  # fmt: skip
    assert [saving.state_path(options, **moment).name for moment in MOMENTS] == [
        "epoch-000050-state", "at-step00001200-state", "last-state",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["my lora", "lora..v2", "Zoë-1.0", ".hidden"])
def test_other_output_names_are_used_as_they_are(name: str) -> None:
    assert saving.adapter_path(Options(output_dir="", output_name=name)) == Path(f"{name}.safetensors")


@pytest.mark.parametrize(
    ("every", "epochs", "due"),
    [(None, 9, []), (1, 4, [1, 2, 3]), (2, 6, [2, 4]), (4, 9, [4, 8]), (50, 50, [])],
)
def test_epochs_are_saved_at_multiples_but_for_the_last(every: int | None, epochs: int, due: list[int]) -> None:
    assert list(saving.epochs_due(Options(save_every_n_epochs=every), epochs)) == due


@pytest.mark.parametrize(("every", "steps", "due"), [(None, 9, []), (4, 9, [4, 8]), (3, 9, [3, 6, 9]), (10, 9, [])])
def test_steps_are_saved_at_multiples(every: int | None, steps: int, due: list[int]) -> None:
    assert list(saving.steps_due(Options(save_every_n_steps=every), steps)) == due


@pytest.mark.parametrize(
    ("options", "epochs", "every"),
    [
        (Options(save_n_epoch_ratio=4), 22, 5),
        (Options(save_n_epoch_ratio=30), 22, 1),
        (Options(save_n_epoch_ratio=2, save_every_n_epochs=3), 22, 11),
    ],
)
def test_the_epoch_ratio_sets_how_often_epochs_are_saved(options: Options, epochs: int, every: int) -> None:
    assert list(saving.epochs_due(options, epochs)) == list(range(every, epochs, every))


@pytest.mark.parametrize(
    ("epoch", "every", "keep", "gone"),
    [(6, 2, None, None), (6, 2, 1, 4), (6, 2, 2, 2), (6, 2, 3, None), (100, 50, 1, 50)],
)
def test_the_last_epoch_files_are_counted_in_files(epoch: int, every: int, keep: int | None, gone: int | None) -> None:
    options = Options(output_dir="o", output_name="x", save_last_n_epochs=keep)
    assert saving.expired(options, every, epoch=epoch) == ([saving.adapter_path(options, epoch=gone)] if gone else [])


@pytest.mark.parametrize(
    ("step", "every", "keep", "gone"),
    # The first row with a number is the example in sd-scripts.
    [(50, 10, None, None), (50, 10, 30, 10), (40, 10, 30, None), (50, 10, 35, 10), (60, 10, 9, 50)],
)
def test_the_last_step_files_are_counted_in_steps(step: int, every: int, keep: int | None, gone: int | None) -> None:
    options = Options(output_dir="o", output_name="x", save_last_n_steps=keep)
    assert saving.expired(options, every, step=step) == ([saving.adapter_path(options, step=gone)] if gone else [])


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (Options(save_last_n_epochs=2), ["x-000003.safetensors"]),
        (Options(save_last_n_epochs=2, save_state=True), ["x-000003.safetensors", "x-000003-state"]),
        (
            Options(save_last_n_epochs=2, save_last_n_epochs_state=1, save_state=True),
            ["x-000003.safetensors", "x-000004-state"],
        ),
        (Options(save_last_n_epochs_state=1, save_state=True), ["x-000004-state"]),
        (Options(save_last_n_epochs_state=1), []),
        (Options(save_state=True), []),
    ],
)
def test_state_folders_have_their_own_number_or_that_of_the_files(options: Options, gone: list[str]) -> None:
    options = dataclasses.replace(options, output_name="x")
    assert [path.name for path in saving.expired(options, 1, epoch=5)] == gone


def test_a_run_leaves_the_files_and_states_of_the_last_steps(tmp_path: Path) -> None:
    rotation = {"save_every_n_steps": 10, "save_last_n_steps": 30, "save_last_n_steps_state": 10, "save_state": True}
    options = Options(output_dir=str(tmp_path), output_name="x", **rotation)
    for step in saving.steps_due(options, 100):
        saving.adapter_path(options, step=step).touch()
        saving.state_path(options, step=step).mkdir()
        (saving.state_path(options, step=step) / "optimizer.bin").touch()
        saving.remove(saving.expired(options, 10, step=step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x-step00000070.safetensors",
        "x-step00000080.safetensors",
        "x-step00000090-state",
        "x-step00000090.safetensors",
        "x-step00000100-state",
        "x-step00000100.safetensors",
    ]


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
def test_saving_twice_gives_equal_bytes(tmp_path: Path, ending: str) -> None:
    first, second = (
        saving.save_adapter(tmp_path / f"{name}.{ending}", adapter(), {"ss_b": "1", "a": "2"}, precision="fp16")
        for name in ("one", "two")
    )
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"one.{ending}", f"two.{ending}"]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, torch.float32), ("float", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_a_file_has_the_requested_precision(tmp_path: Path, precision: str | None, dtype: torch.dtype) -> None:
    path = saving.save_adapter(tmp_path / "a.safetensors", adapter(), {}, precision=precision)
    read = load_file(path)
    assert read.keys() == adapter().keys()
    for name, tensor in adapter().items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor.to(dtype))


def test_without_a_precision_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    mixed = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, 3).T, "n": torch.arange(3)}
    kept = load_file(saving.save_adapter(tmp_path / "a.safetensors", mixed, {}))
    assert {name: tensor.dtype for name, tensor in kept.items()} == {name: mixed[name].dtype for name in mixed}
    assert kept["b"].shape == (3, 2)
    assert load_file(saving.save_adapter(tmp_path / "a.safetensors", mixed, {}, precision="fp16"))["n"].dtype == (
        torch.int64
    )


def test_a_pickled_file_holds_the_tensors(tmp_path: Path) -> None:
    path = saving.save_adapter(tmp_path / "a.pt", adapter(), {"ss_a": "1"}, precision="bf16")
    read = torch.load(path, weights_only=True)
    assert {name: torch.equal(tensor, adapter()[name].bfloat16()) for name, tensor in read.items()} == dict.fromkeys(
        adapter(), True
    )


# The second adapter is long enough to reach the place of the old hash, 1 MiB into the file.
@pytest.mark.parametrize("rank", [4, 256])
def test_the_hashes_are_those_of_lycoris_and_sd_scripts(tmp_path: Path, rank: int) -> None:
    metadata = {"ss_steps": "7", "modelspec.title": "x", "ss_epoch": "1"}
    path = saving.save_adapter(tmp_path / "a.safetensors", adapter(rank), metadata)
    with safe_open(path, "pt") as opened:
        written = opened.metadata()
    tensors = load_file(path)
    in_order = {name: tensors[name] for name in sorted(tensors)}  # that of the file; LyCORIS hashes them as they come
    assert {key: written[key] for key in metadata} == metadata
    assert f"0x{written['sshs_model_hash']}" == precalculate_safetensors_hashes(in_order)
    # sd-scripts hashes a re-save with the ss_ entries alone: what follows the header, and 64 KiB at 1 MiB.
    again = save(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    body = again[8 + int.from_bytes(again[:8], "little") :]
    assert written["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert written["sshs_legacy_hash"] == hashlib.sha256(again[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_written(tmp_path: Path, bad: float, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    broken = adapter()
    broken["lora_unet_a.lora_up.weight"][3, 1] = bad
    with pytest.raises(NonFinite, match=r"lora_unet_a\.lora_up\.weight"):
        saving.save_adapter(path, broken, {})
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_fp16_are_not_written(tmp_path: Path) -> None:
    large = {"a": torch.tensor([70000.0])}  # the largest half is 65504
    with pytest.raises(NonFinite, match="bf16"):
        saving.save_adapter(tmp_path / "a.safetensors", large, {}, precision="fp16")
    assert saving.save_adapter(tmp_path / "a.safetensors", large, {}, precision="bf16").exists()


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_when_the_disk_is_full_the_older_file_stays(tmp_path: Path, ending: str) -> None:
    path = saving.save_adapter(tmp_path / f"a.{ending}", adapter(), {})
    before = path.read_bytes()
    with files_no_larger_than(10_000), pytest.raises(OutputError):
        saving.save_adapter(path, adapter(8), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- states --------------------------------------------------------------------------------------


class Run:
    """A small real run: one layer, an optimizer with momentum and a schedule, dropout from torch's own generator."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(300, 4)
        self.accelerator = Accelerator(cpu=True)
        steps = optimizer(self.layer.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(steps, lambda step: 1 / (1 + step))
        self.optimizer, self.schedule = self.accelerator.prepare(steps, schedule)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.layer(torch.nn.functional.dropout(torch.ones(2, 300))).square().sum()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path, position: Position, fingerprint: dict[str, str] | None = None) -> None:
        saving.save_state(folder, self.accelerator, self.layer.state_dict(), position, fingerprint or {})

    def load(self, folder: Path, fingerprint: dict[str, str] | None = None, seed: int | None = None) -> Position:
        return saving.load_state(folder, self.accelerator, self.layer.load_state_dict, fingerprint or {}, seed)


HERE = Position(epoch=2, batch=3, step=5, seed=77)


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    complete = Run()
    complete.train(5)
    complete.save(tmp_path / "x-state", HERE)
    complete.train(5)
    resumed = Run(seed=1)
    assert resumed.load(tmp_path / "x-state") == HERE
    resumed.train(5)
    assert torch.equal(resumed.layer.weight, complete.layer.weight)
    assert resumed.schedule.get_last_lr() == complete.schedule.get_last_lr()


def test_a_state_says_where_the_run_stands(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE, {"learning_rate": "0.1"})
    assert saving.peek_state(tmp_path / "x-state") == (HERE, {"learning_rate": "0.1"})
    assert {path.name for path in tmp_path.iterdir()} == {"x-state"}
    assert {path.name for path in (tmp_path / "x-state").iterdir()} == {
        "network.safetensors", "train_state.json", "optimizer.bin", "scheduler.bin", "random_states_0.pkl",
    }  # fmt: skip


def test_a_newer_state_of_the_name_replaces_the_older(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE)
    (tmp_path / "x-state" / "left over").touch()
    run.save(tmp_path / "x-state", Position(3, 0, 6, 77))
    assert saving.peek_state(tmp_path / "x-state")[0].step == 6
    assert not (tmp_path / "x-state" / "left over").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "x-state"]


@pytest.mark.parametrize("size", [200, 2000, 5000])
def test_when_the_disk_is_full_the_older_state_stays(tmp_path: Path, size: int) -> None:
    run = Run()
    run.train(1)
    run.save(tmp_path / "x-state", HERE)
    with files_no_larger_than(size), pytest.raises(OutputError):
        run.save(tmp_path / "x-state", Position(3, 0, 6, 77))
    assert list(tmp_path.iterdir()) == [tmp_path / "x-state"]
    assert Run().load(tmp_path / "x-state") == HERE


def test_a_state_with_nan_does_not_replace_the_older(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE)
    torch.nn.init.constant_(run.layer.bias, float("nan"))
    with pytest.raises(NonFinite, match="bias"):
        run.save(tmp_path / "x-state", HERE)
    assert Run().load(tmp_path / "x-state") == HERE


def test_a_killed_save_leaves_nothing_to_resume(tmp_path: Path) -> None:
    run = Run()
    run.train(1)
    unfinished = tmp_path / ".x-state.unfinished"
    run.accelerator.save_state(str(unfinished))
    for folder in (unfinished, tmp_path / "x-state"):
        with pytest.raises(InputError, match="--resume"):
            saving.peek_state(folder)
    (unfinished / "random_states_9.pkl").touch()
    run.save(tmp_path / "x-state", HERE)
    assert list(tmp_path.iterdir()) == [tmp_path / "x-state"]
    assert not (tmp_path / "x-state" / "random_states_9.pkl").exists()


@pytest.mark.parametrize(
    "file", ["network.safetensors", "train_state.json", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"]
)
def test_a_damaged_state_is_refused(tmp_path: Path, file: str) -> None:
    run = Run()
    run.train(1)
    run.save(tmp_path / "x-state", HERE)
    complete = (tmp_path / "x-state" / file).read_bytes()
    (tmp_path / "x-state" / file).write_bytes(complete[: len(complete) // 2])
    with pytest.raises(InputError) as error:
        Run().load(tmp_path / "x-state")
    assert "x-state" in str(error.value)


@pytest.mark.parametrize("file", ["network.safetensors", "train_state.json", "optimizer.bin", "scheduler.bin"])
def test_a_state_that_lacks_a_file_is_refused(tmp_path: Path, file: str) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE)
    (tmp_path / "x-state" / file).unlink()
    with pytest.raises(InputError, match=f"--resume .*x-state.*{file}"):
        Run().load(tmp_path / "x-state")


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": "5"}, {"seed": None}, {"options": []}, {"batch": 1.5}],
)
def test_a_train_state_of_the_wrong_kind_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    Run().save(tmp_path / "x-state", HERE)
    path = tmp_path / "x-state" / "train_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=r"train_state\.json: damaged"):
        saving.peek_state(tmp_path / "x-state")


def test_a_train_state_of_an_earlier_build_is_refused_as_such(tmp_path: Path) -> None:
    Run().save(tmp_path / "x-state", HERE)
    old = {"current_epoch": 2, "current_step": 5, "batch": 3, "seed": 77, "version": "0.0.9", "options": {}}
    (tmp_path / "x-state" / "train_state.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match=r"train_state\.json: .*another build of lorashrink.*has no 'epoch'"):
        saving.peek_state(tmp_path / "x-state")


def test_a_state_of_another_optimizer_or_network_is_refused(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE)
    different = Run()
    different.layer = torch.nn.Linear(300, 8)
    with pytest.raises(InputError, match="another network or optimizer"):
        different.load(tmp_path / "x-state")
    different = Run(torch.optim.SGD)
    different.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(InputError, match="another network or optimizer"):
        different.load(tmp_path / "x-state")


def test_what_changed_is_named_and_the_seed_is_that_of_the_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE, {"learning_rate": "0.1", "gone": "1", "network_dim": "8"})
    with caplog.at_level(logging.WARNING, logger="lorashrink"):
        position = run.load(tmp_path / "x-state", {"learning_rate": "0.2", "network_dim": "8", "new": "x"}, seed=5)
    assert position.seed == 77
    first, second = (record.message for record in caplog.records if record.name.startswith("lorashrink"))
    assert "learning_rate 0.2 (was 0.1); new x (was None); gone None (was 1)" in first
    assert "network_dim" not in first
    assert "--seed 5 is ignored" in second
    assert "77" in second


@pytest.mark.parametrize("seed", [None, 77])
def test_an_unchanged_run_resumes_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int | None
) -> None:
    run = Run()
    run.save(tmp_path / "x-state", HERE, {"learning_rate": "0.1"})
    run.load(tmp_path / "x-state", {"learning_rate": "0.1"}, seed)
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []


def _pictures(folder: Path, caption: str = "a, b") -> Path:
    tiny_sdxl.write_pictures(folder / "2_cat", {"a.png": (64, 64), "b.png": (64, 96)}, {"a.png": caption, "b.png": "c"})
    return folder


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--output_name=b", "--save_every_n_steps=4", "--logging_dir=x", "--sample_sampler=euler"], []),
        (["--max_data_loader_n_workers=0", "--cache_latents_to_disk", "--resume=x", "--seed=4", "--lowram"], []),
        (["--learning_rate=1"], ["learning_rate"]),
        (["--network_args", "algo=loha"], ["network_args"]),
        (["--train_batch_size=2", "--shuffle_caption"], ["train_batch_size", "shuffle_caption"]),
        (["--max_train_steps=9"], ["max_train_steps"]),
        (["--resolution=96"], ["resolution", "pictures and captions"]),
    ],
)
def test_the_fingerprint_holds_what_changes_the_result_and_nothing_else(
    tmp_path: Path, more: list[str], expected: list[str]
) -> None:
    arguments = [f"--train_data_dir={_pictures(tmp_path)}", "--resolution=64", "--caption_extension=.txt"]
    before, after = parse(arguments), parse([*arguments, *more])
    first, second = (saving.fingerprint(options, scan(options), 1) for options in (before, after))
    assert sorted(key for key in first if first[key] != second[key]) == sorted(expected)


def test_the_fingerprint_follows_pictures_and_captions_and_not_their_place(tmp_path: Path) -> None:
    def of(folder: Path, processes: int = 1) -> dict[str, str]:
        options = parse([f"--train_data_dir={folder}", "--resolution=64", "--caption_extension=.txt"])
        return saving.fingerprint(options, scan(options), processes)

    here = of(_pictures(tmp_path / "here"))
    assert of(_pictures(tmp_path / "there")) == here
    other, two = of(_pictures(tmp_path / "other", "a, x")), of(tmp_path / "here", processes=2)
    assert [key for key in here if here[key] != other[key]] == ["pictures and captions"]
    assert {key: two[key] for key in here if here[key] != two[key]} == {"processes": "2"}


def _in_one_of_two_processes(folder: Path) -> None:
    torch.set_num_threads(1)
    run = Run()
    run.train(2)
    torch.manual_seed(100 + run.accelerator.process_index)
    run.save(folder, HERE)
    after = torch.rand(3)
    assert saving.load_state(folder, run.accelerator, run.layer.load_state_dict, {}) == HERE
    assert torch.equal(torch.rand(3), after)


def test_each_of_two_processes_gets_its_own_random_state_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    debug_launcher(_in_one_of_two_processes, (tmp_path / "x-state",), num_processes=2)
    assert {"random_states_0.pkl", "random_states_1.pkl", "network.safetensors", "train_state.json"} <= {
        path.name for path in (tmp_path / "x-state").iterdir()
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "x-state"]
