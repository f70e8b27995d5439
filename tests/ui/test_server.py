"""`lorashrink ui` as programs use it: a real process, asked over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fixtures import write_tensors
from running import TOKEN, Server, until
from safetensors.torch import load_file
from typer.testing import CliRunner

import lorashrink as ls
import lorashrink_example
from lorashrink.cli import app

Start = Callable[..., Server]

EXAMPLE = lorashrink_example.path()
STYLE, HEART = EXAMPLE / "loras" / "style.safetensors", EXAMPLE / "loras" / "heart.safetensors"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two LoRAs, one of them in a subfolder, a PEFT adapter, a damaged file and a link to the outside."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copy(STYLE, folder)
    (folder / "people").mkdir()
    shutil.copy(HEART, folder / "people")
    shutil.copy(EXAMPLE / "base.safetensors", folder / "model.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"no tensors in here")
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    shutil.copy(HEART, outside)
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "inside.safetensors").symlink_to(folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server([library], cache=tmp_path_factory.mktemp("cache"))
    yield started
    assert started.stop()[0] == 0


# --- who may ask ------------------------------------------------------------------------------------


def test_the_address_with_the_token_is_printed_first(server: Server) -> None:
    assert server.first_line == f"http://127.0.0.1:{server.port}/?token={TOKEN}"
    status, headers, body = server.request("/", token=None)
    assert status == 200
    assert b"<!DOCTYPE html>" in body
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


PATHS = ("state", "adapters/0", "adapters/0/curve", "adapters/0/at", "jobs/0", "files/0", "pictures/0/0-before")


@pytest.mark.parametrize("path", PATHS)
def test_nothing_below_api_answers_without_the_token(server: Server, path: str) -> None:
    for token in (None, "wrong", TOKEN[:-1], f"{TOKEN}x"):
        assert server.request(f"/api/{path}", token=token)[0] == 401
    assert server.request(f"/api/{path}?token=wrong", token=None)[0] == 401


@pytest.mark.parametrize("path", ["rescan", "measure", "shrink", "pictures", "jobs/0/cancel", "jobs/0/undo"])
def test_nothing_is_done_without_the_token(server: Server, path: str) -> None:
    assert server.request(f"/api/{path}", data=b"{}", token=None)[0] == 401
    assert server.request("/api/upload?name=a.safetensors", data=b"x", method="PUT", token=None)[0] == 401


def test_the_token_may_stand_in_the_query_too(server: Server) -> None:
    assert server.request(f"/api/state?token={TOKEN}", token=None)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.7:80", "", "a]b", "localhost.x"])
def test_other_hosts_are_refused(server: Server, host: str) -> None:
    for path in ("/", "/static/app.js", "/api/state"):
        status, _, body = server.request(path, headers={"Host": host})
        assert status == 403, path
        assert "lorashrink ui printed" in json.loads(body)["hint"]


@pytest.mark.parametrize("host", ["localhost:9999", "127.0.0.1", "[::1]:80", "127.8.9.1"])
def test_all_names_of_this_machine_are_served(server: Server, host: str) -> None:
    """A forwarded port has another number."""
    assert server.request("/api/state", headers={"Host": host})[0] == 200


def test_requests_from_other_sites_are_refused(server: Server) -> None:
    own = f"127.0.0.1:{server.port}"
    for origin in ("https://evil.example", "null", f"https://{own}", f"http://127.0.0.1:{server.port + 1}"):
        assert server.request("/api/state", headers={"Origin": origin})[0] == 403
    assert server.request("/api/state", headers={"Origin": f"http://{own}"})[0] == 200


@pytest.mark.parametrize("path", ["..%2fapi.py", "%2e%2e%2f%2e%2e%2fpy.typed", "../api.py", "app.js%00", "nothing"])
def test_only_the_files_of_the_page_are_served(server: Server, path: str) -> None:
    assert server.request(f"/static/{path}")[0] == 404


@pytest.mark.parametrize("body", [b"[]", b"{", b"\xff", b"1", b"[" * 100_000, b" " * (2 << 20)])
def test_requests_that_are_no_json_object_are_refused(server: Server, body: bytes) -> None:
    status, _, answer = server.request("/api/shrink", data=body)
    assert status == 400
    assert "request" in json.loads(answer)["error"]


# --- the library ------------------------------------------------------------------------------------


def test_every_file_of_the_folder_is_listed_with_its_facts(server: Server) -> None:
    rows = {row["name"]: row for row in server.rows()}
    style = rows["style.safetensors"]
    assert (style["kind"], style["family"], style["algo"]) == ("adapter", "sdxl", "lora")
    assert style["bytes"] == STYLE.stat().st_size
    assert rows["heart.safetensors"]["folder"] == "people"
    assert rows["model.safetensors"]["kind"] == "model"
    assert rows["damaged.safetensors"]["state"] == "failed"
    assert "damaged.safetensors" in rows["damaged.safetensors"]["error"]


def test_links_out_of_the_folder_are_left_out_and_counted(server: Server) -> None:
    names = {row["name"] for row in server.rows()}
    assert "inside.safetensors" in names
    assert "link.safetensors" not in names
    assert server.get("state")["library"]["outside"] == 1


def test_folders_with_links_to_the_outside_are_left_out(start: Start, tmp_path: Path) -> None:
    folder, outside = tmp_path / "loras", tmp_path / "outside"
    shutil.copytree(EXAMPLE / "model", folder / "model")
    outside.mkdir()
    for name in ("adapter", "own"):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    shutil.copy(HEART, outside / "adapter_model.safetensors")
    shutil.copy(HEART, folder / "own" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    server = start(folder)
    assert {row["name"] for row in server.rows()} == {"model", "own"}
    assert server.get("state")["library"]["outside"] == 1
    shutil.move(folder / "model" / "unet", outside)
    (folder / "model" / "unet").symlink_to(outside / "unet")
    server.post("rescan")
    assert {row["name"] for row in server.rows()} == {"own"}


def test_a_file_that_became_a_link_to_the_outside_is_not_read(server: Server, library: Path, tmp_path: Path) -> None:
    path = library / "swapped.safetensors"
    shutil.copy(HEART, path)
    server.post("rescan")
    identity = server.row("swapped.safetensors")["id"]
    assert server.request(f"/api/files/{identity}")[0] == 200
    secret = tmp_path / "secret.safetensors"
    shutil.copy(HEART, secret)
    path.unlink()
    path.symlink_to(secret)
    for url in (f"files/{identity}", f"adapters/{identity}", f"adapters/{identity}/curve"):
        status, _, body = server.request(f"/api/{url}")
        assert status == 400
        assert "outside" in json.loads(body)["error"]
    path.unlink()
    server.post("rescan")
    assert "swapped.safetensors" not in {row["name"] for row in server.rows()}


def test_only_what_changed_is_sent_again(server: Server) -> None:
    server.rows()
    revision = until(lambda: server.get("state"), lambda state: True)["library"]["revision"]
    assert server.get(f"state?since={revision}")["library"]["rows"] == []
    identity = server.row("heart.safetensors")["id"]
    server.post("measure", ids=[identity])
    changes = until(lambda: server.get(f"state?since={revision}")["library"], lambda library: library["rows"])
    assert [row["id"] for row in changes["rows"]] == [identity]
    assert 0 < changes["rows"][0]["saving"]["bytes"] < HEART.stat().st_size


def test_pipes_and_circular_links_do_not_stop_the_list(start: Start, tmp_path: Path) -> None:
    """Pipes, deep folders, folders without rights, links in a circle."""
    folder = tmp_path / "loras"
    deep = folder.joinpath(*["d"] * 100)
    deep.mkdir(parents=True)
    shutil.copy(HEART, deep / "deep.safetensors")
    os.mkfifo(folder / "pipe.json")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "circle").symlink_to(folder)
    (folder / "empty.safetensors").touch()
    (folder / "closed").mkdir(mode=0)
    server = start(folder)
    rows = {row["name"]: row for row in server.rows()}
    assert set(rows) == {"deep.safetensors", "pipe.safetensors", "empty.safetensors"}
    assert rows["deep.safetensors"]["kind"] == "adapter"
    assert (rows["pipe.safetensors"]["state"], rows["empty.safetensors"]["state"]) == ("failed", "failed")


def test_names_that_are_no_text_are_listed_and_shrunk(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    path = folder / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(HEART, path)
    server = start(folder)
    (row,) = server.rows()
    assert row["name"] == path.name
    assert server.request(f"/api/files/{row['id']}")[2] == HEART.read_bytes()
    job = server.finished(server.post("shrink", ids=[row["id"]], by="rank", value=2))
    assert job["state"] == "done"
    assert [failure["error"] for failure in job["failed"] if "UTF-8" not in failure["error"]] == []


# --- one adapter ------------------------------------------------------------------------------------


def test_header_facts_are_those_of_inspect(server: Server) -> None:
    about = server.get(f"adapters/{server.row('style.safetensors')['id']}")
    table = ls.inspect(STYLE, header=True).files[0]
    assert about["notes"] == dict(table.notes)
    assert about["loads"] == table.loads.lines
    assert [block["block"] for block in about["blocks"]] == [row.block for row in table.blocks]
    assert [base["name"] for base in about["bases"]] == ["model.safetensors"]


def test_points_of_the_curve_are_what_resize_writes(server: Server, tmp_path: Path) -> None:
    curve = server.get(f"adapters/{server.row('style.safetensors')['id']}/curve")
    sizes = [point["bytes"] for point in curve["points"]]
    errors = [point["error"] for point in curve["points"]]
    assert sizes == sorted(set(sizes))
    assert errors == sorted(errors, reverse=True)
    point = curve["points"][len(sizes) // 2]
    recipe = f"bytes,size={point['bytes'] / 2**20:.7f}"
    written = ls.resize(STYLE, recipes=recipe, dtype="auto", output=tmp_path).results[0]
    assert written.relative_error == pytest.approx(point["error"], rel=0.02)
    for name, most in (("same", 0.03), ("high", 0.1), ("small", 0.22)):
        assert curve["qualities"][name]["error"] <= most


def test_a_goal_tells_size_error_and_the_line_for_a_shell(server: Server, library: Path) -> None:
    identity = server.row("style.safetensors")["id"]
    point = server.get(f"adapters/{identity}/at?by=size&value=500000")
    assert 490_000 < point["bytes"] <= 500_000
    assert point["command"].startswith("lorashrink resize -r ")
    assert str(library / "style.safetensors") in point["command"]
    assert {block["block"] for block in point["blocks"]} >= {"MID", "IN01"}
    rank = server.get(f"adapters/{identity}/at?by=rank&value=4")
    assert all(block["after"] <= 4 for block in rank["blocks"])
    for query, text in (
        ("by=recipe&value=ranks=4", "ranks"),
        ("by=size&value=x", "goal"),
        ("by=size&value=-1", "goal"),
    ):
        status, _, body = server.request(f"/api/adapters/{identity}/at?{query}")
        assert status == 400
        assert text in json.loads(body)["error"]


# --- shrinking and undoing ----------------------------------------------------------------------------


def test_shrinking_writes_what_shrink_writes_and_undo_deletes_only_that(
    server: Server, library: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in library.rglob("*.safetensors")}
    identities = [server.row(name)["id"] for name in ("style.safetensors", "heart.safetensors", "damaged.safetensors")]
    job = server.finished(server.post("shrink", ids=identities, by="quality", value="small"))
    assert (job["state"], job["counts"]) == ("done", {"results": 2, "failed": 1})
    assert (len(job["results"]), len(job["failed"])) == (2, 1)
    outputs = [Path(result["output"]) for result in job["results"]]
    assert outputs == [library / "shrunk/style.safetensors", library / "shrunk/people/heart.safetensors"]
    expected = ls.shrink(STYLE, base=library / "model.safetensors", quality="small", output=tmp_path).results[0]
    assert outputs[0].read_bytes() == Path(str(expected.output)).read_bytes()
    assert job["results"][0]["bytes_after"] == outputs[0].stat().st_size
    assert job["bytes_after"] == sum(path.stat().st_size for path in outputs)
    again = server.finished(server.post("shrink", ids=identities[:1], by="rank", value=2))
    assert again["results"][0]["output"] == str(library / "shrunk/style-2.safetensors")
    server.rows()
    (library / "shrunk/own.txt").write_text("not of lorashrink")
    outputs[1].write_bytes(b"changed by somebody")
    undone = server.post(f"jobs/{job['id']}/undo")
    assert (undone["deleted"], undone["undone"]) == (1, True)
    assert not outputs[0].exists()
    assert outputs[1].read_bytes() == b"changed by somebody"
    assert (library / "shrunk/style-2.safetensors").exists()
    assert server.request(f"/api/jobs/{job['id']}/undo", data=b"{}")[0] == 400
    outputs[1].unlink()
    (library / "shrunk/own.txt").unlink()
    server.post(f"jobs/{again['id']}/undo")
    assert {path: path.read_bytes() for path in library.rglob("*.safetensors")} == before


@pytest.mark.parametrize("table_folder", ["cache/lorashrink/tables", "loras"])
def test_the_table_that_shrink_takes_is_the_default(start: Start, tmp_path: Path, table_folder: str) -> None:
    folder, tables = tmp_path / "loras", tmp_path / table_folder
    folder.mkdir()
    tables.mkdir(parents=True, exist_ok=True)
    shutil.copy(STYLE, folder)
    shutil.copytree(EXAMPLE / "model", folder / "model")
    shutil.copy(EXAMPLE / "table.safetensors", tables / "any.safetensors")
    server = start(folder)
    identity = server.row("style.safetensors")["id"]
    about = server.get(f"adapters/{identity}")
    assert [table["name"] for table in about["calibrations"]] == ["any.safetensors"]
    assert about["calibration"] == about["calibrations"][0]["id"]
    help = {"base": about["bases"][0]["id"], "calibration": about["calibration"]}
    query = f"base={help['base']}&calibration={help['calibration']}"
    point = server.get(f"adapters/{identity}/at?by=quality&value=high&{query}")
    assert point["predicted_db"] >= 40
    assert f"--calibration {tables / 'any.safetensors'} -t auto" in point["command"]
    qualities = server.get(f"adapters/{identity}/curve?dtype=fp8&{query}")["qualities"]
    assert qualities["same"] is None
    assert qualities["high"]["predicted_db"] >= 40
    jobs = [server.post("shrink", ids=[identity], by="quality", value="high", **files) for files in (help, {})]
    (result,), (without_files,) = (server.finished(job)["results"] for job in jobs)
    assert Path(result["output"]).read_bytes() == Path(without_files["output"]).read_bytes()
    expected = ls.shrink(STYLE, calibration=EXAMPLE / "table.safetensors", output=tmp_path / "out").results[0]
    assert Path(result["output"]).read_bytes() == Path(str(expected.output)).read_bytes()
    assert result["predicted_db"] == point["predicted_db"] == expected.predicted_db


def test_a_table_that_became_a_link_to_the_outside_is_not_read(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(STYLE, folder)
    shutil.copytree(EXAMPLE / "model", folder / "model")
    shutil.copy(EXAMPLE / "table.safetensors", folder / "model")
    server = start(folder)
    identity = server.row("style.safetensors")["id"]
    table = server.get(f"adapters/{identity}")["calibration"]
    assert table
    shutil.move(folder / "model" / "table.safetensors", tmp_path)
    (folder / "model" / "table.safetensors").symlink_to(tmp_path / "table.safetensors")
    assert server.request(f"/api/adapters/{identity}/at?by=rank&value=2&calibration={table}")[0] == 400


def test_what_lies_beside_a_lora_is_copied_and_undone(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(STYLE, folder)
    (folder / "style.preview.png").write_bytes(b"a picture")
    (tmp_path / "secret.txt").write_text("of somebody")
    (folder / "style.txt").symlink_to(tmp_path / "secret.txt")
    server = start(folder)
    job = server.finished(server.post("shrink", ids=[server.row("style.safetensors")["id"]], by="rank", value=2))
    assert {path.name for path in (folder / "shrunk").iterdir()} == {"style.safetensors", "style.preview.png"}
    assert (folder / "shrunk" / "style.preview.png").read_bytes() == b"a picture"
    assert server.post(f"jobs/{job['id']}/undo")["deleted"] == 2
    assert not (folder / "shrunk").exists()
    assert (folder / "style.preview.png").exists()


def test_a_peft_folder_is_shrunk_into_a_folder_and_undone(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    down, up = torch.randn(8, 32), torch.randn(32, 8)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    path = folder / "adapter"
    path.mkdir()
    write_tensors(path / "adapter_model.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
    server = start(folder)
    job = server.finished(server.post("shrink", ids=[server.row("adapter")["id"]], by="rank", value=2))
    assert job["failed"] == []
    output = folder / "shrunk" / "adapter"
    assert job["results"][0]["output"] == str(output)
    assert sorted(os.listdir(output)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_file(output / "adapter_model.safetensors")[f"{name}.lora_A.weight"].shape == (2, 32)
    assert server.post(f"jobs/{job['id']}/undo")["deleted"] == 2
    assert os.listdir(folder) == ["adapter"]


def test_a_job_that_is_cancelled_keeps_what_is_finished(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for number in range(30):
        shutil.copy(STYLE, folder / f"{number:02d}.safetensors")
    server = start(folder)
    identities = [row["id"] for row in server.rows()]
    job = server.post("shrink", ids=identities, by="quality", value="high")
    until(lambda: server.get(f"jobs/{job['id']}"), lambda job: len(job["results"]) >= 1)
    server.post(f"jobs/{job['id']}/cancel")
    ended = server.finished(job)
    assert ended["state"] == "cancelled"
    written = sorted(str(path) for path in (folder / "shrunk").iterdir())
    assert written == sorted(result["output"] for result in ended["results"])
    assert len(written) < 30
    assert server.post(f"jobs/{job['id']}/undo")["deleted"] == len(written)
    assert not (folder / "shrunk").exists()


def test_drawing_ends_after_the_picture_that_is_being_drawn(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copy(STYLE, folder)
    shutil.copytree(EXAMPLE / "model", folder / "model")
    server = start(folder)
    prompts = "\n".join(f"a red circle --w 64 --h 64 --s 1 --d {seed}" for seed in range(16))
    request = {"id": server.row("style.safetensors")["id"], "model": server.row("model")["id"], "prompts": prompts}
    job = server.post("pictures", **request, by="rank", value=2)
    until(lambda: server.get(f"jobs/{job['id']}"), lambda job: job["done"] >= 1)
    server.post(f"jobs/{job['id']}/cancel")
    ended = server.finished(job)
    assert (ended["state"], ended["results"]) == ("cancelled", [])
    kept = len(list((tmp_path / "cache" / "lorashrink" / "pictures").glob("*.png")))
    assert ended["done"] <= kept <= ended["done"] + 1 < 16
    for prompts, steps, text in (("", 1, "nothing to draw"), ("a\n" * 17, 1, "at most 16"), ("a", 0, "steps")):
        body = json.dumps({**request, "prompts": prompts, "steps": steps, "by": "rank", "value": 2}).encode()
        status, _, answer = server.request("/api/pictures", data=body)
        assert status == 400
        assert text in json.loads(answer)["error"]


# --- files that are dropped -------------------------------------------------------------------------


def test_a_dropped_file_is_listed_and_its_outputs_go_to_the_folder(server: Server, library: Path) -> None:
    status, _, body = server.request("/api/upload?name=dropped.safetensors", data=HEART.read_bytes(), method="PUT")
    assert status == 200
    row = server.row("dropped.safetensors")
    assert row["id"] == json.loads(body)["id"]
    job = server.finished(server.post("shrink", ids=[row["id"]], by="quality", value="small"))
    result = job["results"][0]
    assert result["output"] == str(library / "shrunk/dropped.safetensors")
    server.rows()
    status, headers, data = server.request(f"/api/files/{result['output_id']}")
    assert status == 200
    assert "attachment" in headers["content-disposition"]
    assert data == Path(result["output"]).read_bytes()
    server.post(f"jobs/{job['id']}/undo")


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "run.py", "", ".safetensors", "a.safetensors.exe", "..", "a/"])
def test_only_safetensors_can_be_dropped(server: Server, name: str) -> None:
    status, _, body = server.request(f"/api/upload?name={name}", data=b"x", method="PUT")
    assert status == 400
    assert "only .safetensors" in json.loads(body)["error"]


def test_the_name_of_a_dropped_file_cannot_lead_anywhere(server: Server, library: Path) -> None:
    for name in ("../../up.safetensors", "..%5C..%5Cback.safetensors", "/etc/root.safetensors"):
        assert server.request(f"/api/upload?name={name}", data=HEART.read_bytes(), method="PUT")[0] == 200
    rows = [row for row in server.rows() if row["name"] in ("up.safetensors", "back.safetensors", "root.safetensors")]
    assert [row["folder"] for row in rows] == ["dropped here"] * 3
    assert not list(library.parent.glob("*.safetensors"))


def test_an_upload_that_breaks_off_leaves_nothing(server: Server) -> None:
    server.rows()
    head = (
        f"PUT /api/upload?name=half.safetensors&token={TOKEN} HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{server.port}\r\nContent-Length: 1000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"x" * 10_000)
    server.post("rescan")
    assert "half.safetensors" not in {row["name"] for row in server.rows()}


# --- start and stop ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_it_cleanly(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder, temporary = tmp_path / "loras", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    shutil.copy(HEART, folder)
    server = start(folder)
    server.request("/api/upload?name=a.safetensors", data=HEART.read_bytes(), method="PUT")
    assert list(temporary.iterdir())
    status, errors = server.stop(number)
    assert status == 0
    assert "Traceback" not in errors
    assert list(temporary.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port))


def test_a_stop_during_work_leaves_no_unfinished_file(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    for number in range(30):
        shutil.copy(STYLE, folder / f"{number:02d}.safetensors")
    server = start(folder)
    job = server.post("shrink", ids=[row["id"] for row in server.rows()], by="quality", value="high")
    until(lambda: server.get(f"jobs/{job['id']}"), lambda job: job["results"])
    assert server.stop()[0] == 0
    files = list((folder / "shrunk").iterdir())
    assert files
    for path in files:
        assert path.suffix == ".safetensors"
        load_file(path)


def test_folders_and_ports_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    missing = invoke(app, ["ui", str(tmp_path / "none"), "--no-browser"])
    assert missing.exit_code == 2
    assert "does not exist" in missing.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = invoke(app, ["ui", str(tmp_path), "--no-browser", "--port", str(taken.getsockname()[1])])
    assert busy.exit_code == 2
    assert "--port" in busy.output


def test_without_its_packages_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    result = CliRunner().invoke(app, ["ui", str(tmp_path), "--no-browser"])
    assert result.exit_code == 2
    assert "pip install 'lorashrink[ui]'" in result.output


def test_json_on_the_command_line_names_the_address(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorashrink", "ui", str(tmp_path), "--no-browser", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        document = json.loads(process.stdout.readline())
        process.terminate()
    assert (document["version"], document["command"]) == (ls.__version__, "ui")
    assert document["url"].startswith(f"http://127.0.0.1:{document['port']}/?token=")
    assert len(document["url"].partition("token=")[2]) >= 32
    assert process.returncode == 0


def test_a_public_address_is_served_with_a_warning(start: Start, tmp_path: Path) -> None:
    server = start(tmp_path, "--host", "0.0.0.0")
    assert server.first_line.startswith("http://127.0.0.1:")
    assert server.request("/api/state", headers={"Host": "192.168.0.7"})[0] == 200
    assert server.request("/api/state", headers={"Host": "evil.example"})[0] == 403
    status, errors = server.stop()
    assert status == 0
    assert "everybody who reaches this machine" in errors


def test_other_commands_do_not_import_the_server() -> None:
    code = "import sys, lorashrink.cli; print([m for m in sys.modules if m in ('starlette', 'uvicorn', 'anyio')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
