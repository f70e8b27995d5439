"""Collections: leftovers of killed runs, the journal, groups by base, space on the disk, memory."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures import random_tensors, shapes, write_base, write_styles, write_tensors
from typer.testing import CliRunner

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.cli import app, streams
from lorashrink.errors import OutputError, UsageError
from lorashrink.results.shown import plain
from lorashrink.results.shrinking import FileResult, Space
from lorashrink.shrinking import journal, outputs, pipeline, plan, request, reuse
from lorashrink.shrinking.grouping import family_in
from lorashrink.shrinking.run import resize


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal trusts files that are new."""
    monkeypatch.setattr(journal, "SETTLED_SECONDS", 0.0)


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are opened or hashed from now on."""
    seen: list[Path] = []
    for module, name in ((reuse, "contents_sha256"), (request, "open_adapter"), (reuse, "read_header")):
        original = getattr(module, name)

        def noted(what, *arguments, original=original, **options):
            seen.append(getattr(what, "path", what))
            return original(what, *arguments, **options)

        monkeypatch.setattr(module, name, noted)
    return seen


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != journal.NAME
    }


def entries(folder: Path) -> dict[str, journal.Entry]:
    with journal.Journal(folder) as opened:
        return {entry.output: entry for entry in opened.entries()}


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.stdout


# --- leftovers ----------------------------------------------------------------------------------


def leftover(output: Path) -> Path:
    path = output.with_name(f".{output.stem}.abcd_123.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a file")
    return path


def test_leftovers_of_the_same_outputs_are_deleted(tmp_path: Path) -> None:
    (source,) = write_styles(tmp_path / "in", 1)
    output = tmp_path / "out" / "style000_rank2.safetensors"
    ours = leftover(output)
    others = [leftover(output.with_name("other.safetensors")), output.with_name(f".{output.stem}.abc.tmp")]
    others[1].write_bytes(b"")
    resize(source, recipes="rank=2", output=output.parent, dry_run=True)
    assert ours.exists()
    resize(source, recipes="rank=2", output=output.parent)
    assert not ours.exists()
    assert all(path.exists() for path in others)


def test_files_of_a_living_process_are_not_deleted(tmp_path: Path) -> None:
    (source,) = write_styles(tmp_path / "in", 1)
    output = tmp_path / "out" / "style000_rank2.safetensors"
    code = (
        "import sys; from pathlib import Path; from lorashrink.files.writing import SafetensorsWriter\n"
        "with SafetensorsWriter(Path(sys.argv[1]), {}, {}) as writer: print(writer.temporary, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        its = Path(process.stdout.readline().strip())
        resize(source, recipes="rank=2", output=output.parent)
        assert its.exists()
        process.kill()
    assert its.exists()
    resize(source, recipes="rank=2", output=output.parent, force=True)
    assert not its.exists()


def test_a_half_written_peft_folder_is_completed(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "in" / "adapter")
    leftover(tmp_path / "out" / "adapter_rank2" / "adapter_config.json")
    leftover(tmp_path / "out" / "adapter_rank2" / "adapter_model.safetensors")
    (result,) = resize(source, recipes="rank=2", output=tmp_path / "out", skip_existing=True).results
    names = {path.name for path in Path(result.output).iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


# --- reruns by the journal ------------------------------------------------------------------------


@pytest.mark.usefixtures("settled")
def test_a_rerun_opens_nothing_and_reports_the_same(tmp_path: Path, touched: list[Path]) -> None:
    write_styles(tmp_path / "in", 3)
    options = {"recipes": "rank=2:energy=0.9", "output": tmp_path / "out", "skip_existing": True}
    first = resize(tmp_path / "in", **options)
    touched.clear()
    again = resize(tmp_path / "in", **options)
    assert touched == []
    assert all(result.skipped for result in again.results)
    assert [replace(result, seconds=0.0, skipped=True).brief() for result in first.results] == list(again.results)


def peft_folder(folder: Path, alpha: int = 16) -> Path:
    up, down = torch.randn(24, 8), torch.randn(8, 40)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_config(folder, alpha)
    return folder


def write_config(folder: Path, alpha: int) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("journalled", [True, False], ids=["journal", "no journal"])
def test_a_peft_folder_with_another_alpha_is_another_source(tmp_path: Path, journalled: bool) -> None:
    """Only the configuration beside the weights changes."""
    source = peft_folder(tmp_path / "adapter")
    options = {"recipes": "rank=2", "output": tmp_path / "out", "skip_existing": True}
    assert not resize(source, **options).results[0].skipped
    assert resize(source, **options).results[0].skipped
    write_config(source, 4)
    if not journalled:
        (tmp_path / "out" / journal.NAME).unlink()
    assert "made from another source" in resize(source, **options).failed[0].error


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "change",
    [
        {"recipes": "rank=3"},
        {"dtype": "bf16"},
        {"form": "same"},
        {"unmapped": "drop"},
    ],
    ids=str,
)
def test_another_request_is_not_skipped(tmp_path: Path, change: dict[str, str]) -> None:
    (source,) = write_styles(tmp_path / "in", 1)
    options = {"recipes": "rank=2", "output": tmp_path / "out", "skip_existing": True}
    resize(source, **options)
    report = resize(source, **options | change)
    if "recipes" in change:
        assert [result.skipped for result in report.results] == [False]
    else:
        assert "made from another source, base, recipe, options or version" in report.failed[0].error


@pytest.mark.usefixtures("settled")
def test_a_replaced_output_is_checked_by_its_metadata(tmp_path: Path) -> None:
    first, second = write_styles(tmp_path / "in", 2)
    options = {"recipes": "rank=2", "output": tmp_path / "out", "skip_existing": True}
    resize([first, second], **options)
    shutil.copy(tmp_path / "out" / "style001_rank2.safetensors", tmp_path / "out" / "style000_rank2.safetensors")
    report = resize([first, second], **options)
    assert [Path(failure.source) for failure in report.failed] == [first]
    assert [result.skipped for result in report.results] == [True]


@pytest.mark.usefixtures("settled")
def test_the_journal_records_failures_and_their_reasons(tmp_path: Path) -> None:
    write_styles(tmp_path / "in", 2)
    (tmp_path / "in" / "bad.safetensors").write_bytes(b"broken")
    resize(tmp_path / "in", recipes="rank=2", output=tmp_path / "out", skip_existing=True)
    states = {name: (entry.state, bool(entry.message)) for name, entry in entries(tmp_path / "out").items()}
    assert states == {
        "bad_rank2.safetensors": (journal.FAILED, True),
        "style000_rank2.safetensors": (journal.DONE, False),
        "style001_rank2.safetensors": (journal.DONE, False),
    }
    entry = entries(tmp_path / "out")["style000_rank2.safetensors"]
    output = tmp_path / "out" / entry.output
    assert (entry.bytes_after, entry.output_mtime_ns) == (output.stat().st_size, output.stat().st_mtime_ns)
    assert entry.source_sha256 == open_adapter(output).store.metadata["lorashrink.source_sha256"]


def test_a_rerun_without_its_journal_reads_the_files(tmp_path: Path, touched: list[Path]) -> None:
    write_styles(tmp_path / "in", 2)
    options = {"recipes": "rank=2", "output": tmp_path / "out", "skip_existing": True}
    resize(tmp_path / "in", **options)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / journal.NAME).unlink()
    touched.clear()
    assert all(result.skipped for result in resize(tmp_path / "in", **options).results)
    assert len(touched) > 2
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("options", [{}, {"skip_existing": True, "dry_run": True}], ids=["plain", "dry run"])
def test_without_skip_existing_no_journal_is_kept(tmp_path: Path, options: dict[str, bool]) -> None:
    write_styles(tmp_path / "in", 2)
    resize(tmp_path / "in", recipes="rank=2", output=tmp_path / "out", **options)
    resize(tmp_path / "in" / "style000.safetensors", recipes="rank=2", skip_existing=True)
    assert not list(tmp_path.rglob(journal.NAME))


# --- groups by base -----------------------------------------------------------------------------

BASES = {"sdxl": "sdxl UNet in LDM names", "sd15": "sd15 UNet in diffusers names"}
ADAPTERS = {"flux": "flux_lora_kohya", "sd15": "sd15_lora_kohya", "sdxl": "sdxl_lora_kohya_te1_te2"}
AGAINST_BASE = "fro_ckpt,thr=-1.5"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder "in" with adapters for three models, the bases of two of them, and tables of these."""
    folder = tmp_path_factory.mktemp("mixed")
    for seed, (family, name) in enumerate(ADAPTERS.items()):
        listed = shapes(name)
        layers = list(dict.fromkeys(key.partition(".")[0] for key in listed if "_attn" in key))[:8]
        tensors = {key: shape for key, shape in listed.items() if key.partition(".")[0] in layers}
        write_tensors(folder / "in" / f"{family}.safetensors", random_tensors(tensors, seed))
        if family in BASES:
            fill(write_base(folder, BASES[family]).rename(folder / f"{family}-base.safetensors"), layers)
    table = {family: f"{family}-base.safetensors" for family in BASES}
    (folder / "bases.json").write_text(json.dumps(table))
    (folder / "bases.toml").write_text("\n".join(f"{family} = '{path}'" for family, path in table.items()))
    return folder


def fill(base: Path, layers: list[str]) -> None:
    """Give numbers to the weights of a base that these layers change."""
    with open_base(base) as opened, open(base, "r+b") as handle:
        assert opened.store
        for (view,) in (opened.find(layer) for layer in layers):
            handle.seek(opened.store.tensors[view.key].offset)
            handle.write(torch.randn(view.shape).half().numpy().tobytes())


@pytest.mark.parametrize("table", ["bases.toml", "bases.json"])
def test_each_adapter_is_shrunk_against_its_own_base(mixed: Path, tmp_path: Path, table: str) -> None:
    options = {"recipes": AGAINST_BASE, "output": tmp_path / "out", "group_by_base": mixed / table}
    report = resize(mixed / "in", **options)
    assert report.base is None
    assert [(base.family, Path(base.path).name) for base in report.bases] == [
        ("sdxl", "sdxl-base.safetensors"),
        ("sd15", "sd15-base.safetensors"),
    ]
    (failure,) = report.failed
    assert failure.source == str(mixed / "in" / "flux.safetensors")
    assert "is for flux, and the table of bases has only sdxl, sd15. Add a line for flux." in failure.error
    for family, result in zip(("sd15", "sdxl"), report.results, strict=True):
        base = mixed / f"{family}-base.safetensors"
        assert result.base == str(base)
        alone = resize(result.source, base=base, recipes=AGAINST_BASE, output=tmp_path / "alone").results[0]
        assert Path(alone.output).read_bytes() == Path(result.output).read_bytes()
        assert 0 < alone.bytes_after < alone.bytes_before
    again = resize(mixed / "in", **options, skip_existing=True)
    assert [(result.skipped, result.base) for result in again.results] == [
        (True, result.base) for result in report.results
    ]


def test_the_command_fails_in_part_where_a_base_is_missing(mixed: Path, tmp_path: Path) -> None:
    table = mixed / "bases.toml"
    text = run("resize", "--group-by-base", table, "-r", AGAINST_BASE, "-o", tmp_path, "--json", mixed / "in", status=1)
    document = json.loads(text)
    assert [Path(result["base"]).name for result in document["results"]] == [
        "sd15-base.safetensors",
        "sdxl-base.safetensors",
    ]
    assert [base["family"] for base in document["bases"]] == ["sdxl", "sd15"]
    assert document["base"] is None


def test_metadata_tells_the_family_if_layers_do_not(mixed: Path, tmp_path: Path) -> None:
    tensors = random_tensors({"lora_unet_a.lora_up.weight": (8, 2), "lora_unet_a.lora_down.weight": (2, 8)})
    for name, version in (("known", "sdxl_base_v1-0"), ("unknown", "mine")):
        write_tensors(tmp_path / f"{name}.safetensors", tensors, {"ss_base_model_version": version})
    assert family_in(tmp_path / "known.safetensors") == "sdxl"
    options = {"recipes": "rank=1", "group_by_base": mixed / "bases.toml", "output": tmp_path / "out"}
    (failure,) = resize(tmp_path / "unknown.safetensors", **options).failed
    assert "neither its layers nor its metadata tell which model it is for" in failure.error


TABLES = {
    "sdxl = 'a' sd15 = 'b'": "neither TOML nor JSON",
    "sdxl = 3": "not a table of bases",
    "": "not a table of bases",
    "sd9 = 'model.safetensors'": "'sd9' is no family of models; known are .*sd15, sd2",
}


@pytest.mark.parametrize("text", TABLES)
def test_an_unreadable_table_of_bases_is_an_error(adapter: Path, tmp_path: Path, text: str) -> None:
    table = tmp_path / "bases.toml"
    table.write_text(text)
    with pytest.raises(UsageError, match=TABLES[text]):
        resize(adapter, recipes="rank=1", output=tmp_path / "out", group_by_base=table)


def test_a_wrong_table_of_bases_is_an_error_before_any_work(mixed: Path, tmp_path: Path) -> None:
    options = {"recipes": "rank=1", "output": tmp_path / "out"}
    with pytest.raises(UsageError, match="cannot be read"):
        resize(mixed / "in", **options, group_by_base=tmp_path / "none.toml")
    with pytest.raises(UsageError, match="and not both"):
        resize(mixed / "in", **options, group_by_base=mixed / "bases.toml", base=mixed / "sd15-base.safetensors")
    (tmp_path / "swapped.json").write_text(json.dumps({"sdxl": str(mixed / "sd15-base.safetensors")}))
    with pytest.raises(UsageError, match="is for sd15, and the table of bases says sdxl"):
        resize(mixed / "in", **options, group_by_base=tmp_path / "swapped.json")
    assert not (tmp_path / "out").exists()


# --- space on the disk ----------------------------------------------------------------------------


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> int:
    """The bytes that every disk reports as free."""
    free = 300_000
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    return free


def test_a_disk_that_may_be_too_small_stops_the_run_first(tmp_path: Path, small_disk: int) -> None:
    sources = write_styles(tmp_path / "in", 20)
    most = sum(source.stat().st_size for source in sources)
    assert most > small_disk
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=f"may need {most / 1e9:.2f} GB.* {small_disk / 1e9:.2f} GB are free"):
        resize(tmp_path / "in", recipes="rank=1", output=out)
    assert not out.exists()
    planned = resize(tmp_path / "in", recipes="rank=1", output=out, dry_run=True)
    needed = sum(result.bytes_after for result in planned.results)
    assert planned.space == Space(needed, small_disk)
    assert "kB are free" in run("resize", "-r", "rank=1", "-o", out, "--dry-run", tmp_path / "in")
    assert needed < most
    # what is certain to fit, by a size or because it is there, needs no more room
    assert len(resize(tmp_path / "in", recipes="size=0.01", output=out).results) == 20
    run("resize", "-r", "rank=1", "-o", out, "--no-space-check", tmp_path / "in")
    assert len(resize(tmp_path / "in", recipes="rank=1", output=out, skip_existing=True).results) == 20


def test_room_is_counted_on_each_disk(tmp_path: Path) -> None:
    second_disk = Path("/dev/shm")
    if not second_disk.is_dir() or second_disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one disk only")
    sizes = {tmp_path / "new" / "a": 1, tmp_path / "b": 2, second_disk / "new" / "c": 2**60}
    space = outputs.space_for(sizes)
    assert space
    assert space.needed == 2**60
    assert outputs.space_for({}) is None


# --- many files ---------------------------------------------------------------------------------


def test_each_gets_every_result_and_the_report_is_short(tmp_path: Path) -> None:
    write_styles(tmp_path / "in", 5)
    got: list[FileResult] = []
    report = resize(tmp_path / "in", recipes="rank=2:rank=3", output=tmp_path / "out", each=got.append)
    whole_report = resize(tmp_path / "in", recipes="rank=2:rank=3", output=tmp_path / "out", force=True)
    assert all(len(result.layers) == 12 for result in got)
    assert [result.layers for result in report.results] == [()] * 10
    by_output = {result.output: result for result in got}
    for short, full in zip(report.results, whole_report.results, strict=True):
        assert replace(by_output[short.output], seconds=full.seconds) == full
        assert replace(full, seconds=short.seconds).brief() == short


def test_layers_of_earlier_files_do_not_stay_in_memory(tmp_path: Path) -> None:
    """Only the files in work have tables of layers in memory."""
    write_styles(tmp_path / "in", 12)
    alive: list[int] = []
    tables: list[weakref.ref] = []

    class Watched(list):
        """A list that can be watched."""

    def each(result: FileResult) -> None:
        gc.collect()
        alive.append(sum(table() is not None for table in tables))

    original = plan.file_result

    def watched(*arguments, **options):
        result = original(*arguments, **options)
        table = Watched(result.layers)
        tables.append(weakref.ref(table))
        return replace(result, layers=table)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "file_result", watched)
        resize(tmp_path / "in", recipes="rank=2", output=tmp_path / "out", each=each)
    assert len(alive) == 12
    assert max(alive) <= 3


def test_json_of_many_files_equals_the_report(tmp_path: Path) -> None:
    write_styles(tmp_path / "in", 4)
    (tmp_path / "in" / "bad.safetensors").write_bytes(b"broken")
    command = ["resize", "-r", "rank=2", "-r", "rank=3", "--json", tmp_path / "in"]
    document = json.loads(run(*command, "-o", tmp_path / "out", status=1))
    expected = resize(tmp_path / "in", recipes="rank=2:rank=3", output=tmp_path / "out", force=True)
    document_of_report = {"command": "resize", **json.loads(json.dumps(plain(expected)))}
    for result in (*document["results"], *document_of_report["results"]):
        del result["seconds"]
    assert document == document_of_report
    assert list(document) == list(document_of_report)
    nothing = json.loads(run("resize", "-r", "rank=2", "--json", tmp_path / "in" / "bad.safetensors", status=2))
    assert (nothing["results"], len(nothing["failed"])) == ([], 1)


def test_the_csv_lists_layers_in_the_order_of_files(tmp_path: Path) -> None:
    write_styles(tmp_path / "in", 3)
    table = tmp_path / "table.csv"
    document = json.loads(
        run("resize", "-r", "rank=2", "-o", tmp_path / "out", "--json", "--csv", table, tmp_path / "in")
    )
    with open(table, newline="") as handle:
        rows = list(csv.DictReader(handle))
    layers = [(result["output"], layer) for result in document["results"] for layer in result["layers"]]
    assert [(row["output"], row["name"], float(row["energy"]), json.loads(row["shape"])) for row in rows] == [
        (output, layer["name"], layer["energy"], layer["shape"]) for output, layer in layers
    ]


def test_many_files_are_listed_only_with_verbose(tmp_path: Path) -> None:
    write_styles(tmp_path / "in", streams.LINES + 3, layers=1)
    command = ["resize", "-r", "rank=2", "--force", "-o", tmp_path / "out", tmp_path / "in"]
    text = run(*command)
    assert text.count("_rank2.safetensors") == streams.LINES
    assert "and 3 more; -v lists them" in text
    assert f"{streams.LINES + 3} files written" in text
    verbose = run(*command, "-v")
    assert verbose.count("_rank2.safetensors") == streams.LINES + 3
    assert "more; -v lists them" not in verbose
    kept = run(*command, "--skip-existing")
    assert f"0 files written to {tmp_path / 'out'}, {streams.LINES + 3} already there" in kept


# --- the page about scale -----------------------------------------------------------------------


def test_the_page_about_scale_quotes_its_simulation() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "scale.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed in (root / "docs" / "scale.md").read_text()


def test_the_simulation_is_that_of_a_line_of_servers() -> None:
    """Two readers feed one writer, which waits for the first file only."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from scale import Stage, simulate
    finally:
        del sys.path[0]
    line = [Stage("read", 2, 1.0), Stage("write", 1, 1.0)]
    seconds, work = simulate(line, [1.0] * 6, in_flight=6)
    assert (seconds, work) == (7.0, {"read": 3.0, "write": 6.0})
    assert simulate(line, [1.0] * 6, in_flight=1)[0] == 12.0
