"""The nodes in a real ComfyUI on the CPU: workflows go through its API, and latents are compared."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from server import Server

import lorashrink as ls
import lorashrink_example
from lorashrink.node_pack import install

pytestmark = pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no ComfyUI")

TARGET = {"target": "rank", "quality": "high", "megabytes": 0.5, "rank": 3, "recipe": "rank=2", "dtype": "same"}
STRENGTHS = {"strength_model": 0.8, "strength_clip": 0.6}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("comfyui"), install)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def sampled(loader, path, *, model=("2", 0), clip=("2", 1)):
    """A workflow that draws with what node 2 gives, and keeps the latents."""
    return {
        "1": {"class_type": "SmallModelLoader", "inputs": {}},
        "2": loader,
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": list(clip)}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": list(clip)}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                **{"model": list(model), "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]},
                **{"seed": 1, "steps": 4, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
            },
        },
        "7": {"class_type": "SaveTensors", "inputs": {"samples": ["6", 0], "path": str(path)}},
    }


def latents(server, loader, tmp_path, **sockets):
    """What ComfyUI draws with a node that gives MODEL and CLIP."""
    path = tmp_path / "latents.pt"
    path.unlink(missing_ok=True)
    history = server.run(sampled(loader, path, **sockets))
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    return torch.load(path)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": {"model": ["1", 0], "clip": ["1", 1], **inputs}}


def stock(name):
    return node("LoraLoader", lora_name=name, **STRENGTHS)


def shrink(name, **target):
    return node("LorashrinkShrink", lora_name=name, **STRENGTHS, **{**TARGET, **target})


def test_the_shrunk_lora_draws_what_its_file_draws(server, tmp_path):
    for target in (
        {"rank": 3},
        {"target": "quality", "quality": "small", "dtype": "auto"},
        {"target": "size in MB", "megabytes": 0.4, "dtype": "bf16"},
        {"target": "recipe", "recipe": "fro_ckpt=1,thr=-2.5"},
    ):
        loader = shrink("style.safetensors", **target)
        drawn = latents(server, loader, tmp_path)
        saving = {"class_type": "LorashrinkSave", "inputs": {"shrunk": ["2", 2], "name": "saved", "overwrite": True}}
        server.run({"1": {"class_type": "SmallModelLoader", "inputs": {}}, "2": loader, "3": saving})
        assert torch.equal(drawn, latents(server, stock("saved.safetensors"), tmp_path)), target
        (server.loras / "saved.safetensors").unlink()


def test_at_full_rank_it_draws_what_the_source_draws(server, tmp_path):
    source = latents(server, stock("style.safetensors"), tmp_path)
    full = latents(server, shrink("style.safetensors", target="recipe", recipe="energy=1", dtype="fp32"), tmp_path)
    nothing = latents(server, stock("style.safetensors") | {"class_type": "LoraLoader"}, tmp_path)
    without = node("LoraLoader", lora_name="style.safetensors", strength_model=0.0, strength_clip=0.0)
    effect = (source - latents(server, without, tmp_path)).norm()
    assert torch.equal(nothing, source)
    assert (full - source).norm() < 1e-3 * effect


def test_the_model_in_memory_judges_as_its_file(server, tmp_path):
    recipe = "fro_ckpt=1,thr=-2.5"
    model = lorashrink_example.path("model")
    (expected,) = ls.resize(
        server.loras / "style.safetensors", base=model, recipes=recipe, output=tmp_path / "by_file.safetensors"
    ).results
    saving = {"class_type": "LorashrinkSave", "inputs": {"shrunk": ["2", 2], "name": "by_model", "overwrite": True}}
    loader = shrink("style.safetensors", target="recipe", recipe=recipe)
    server.run({"1": {"class_type": "SmallModelLoader", "inputs": {}}, "2": loader, "3": saving})
    saved, by_file = load_file(server.loras / "by_model.safetensors"), load_file(expected.output)
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: t.shape for key, t in by_file.items()}


def test_full_and_shrunk_come_from_one_queue(server, tmp_path):
    loader = node("LorashrinkCompare", lora_name="style.safetensors", **STRENGTHS, **TARGET)
    full = latents(server, loader, tmp_path)
    assert torch.equal(full, latents(server, stock("style.safetensors"), tmp_path))
    shrunk = latents(server, loader, tmp_path, model=("2", 2), clip=("2", 3))
    assert torch.equal(shrunk, latents(server, shrink("style.safetensors"), tmp_path))


def test_a_merge_draws_what_its_saved_file_draws(server, tmp_path):
    stack = {"lora_1": "style.safetensors", "strength_1": 0.7, "lora_2": "heart.safetensors", "strength_2": 0.4}
    stack |= {"lora_3": "none", "strength_3": 1.0, "lora_4": "none", "strength_4": 1.0}
    loader = node("LorashrinkMerge", **stack, **TARGET)
    merged = latents(server, loader, tmp_path)
    saving = {"class_type": "LorashrinkSave", "inputs": {"shrunk": ["2", 2], "name": "merged", "overwrite": True}}
    server.run({"1": {"class_type": "SmallModelLoader", "inputs": {}}, "2": loader, "3": saving})
    loader = node("LoraLoader", lora_name="merged.safetensors", strength_model=1.0, strength_clip=1.0)
    assert torch.equal(merged, latents(server, loader, tmp_path))


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("sd15", "lora_unet_down_blocks"),
        ("flux", "lora_unet_"),
        ("flux", "transformer."),
        ("wan", "diffusion_model."),
        ("qwen", "transformer."),
    ],
)
def test_loras_of_other_families_change_the_weights_as_their_files_do(server, tmp_path, family, prefix):
    model = {"class_type": "RandomModelLoader", "inputs": {"family": family}}
    writing = {"class_type": "WriteLora", "inputs": {"model": ["1", 0], "prefix": prefix, "name": "r.safetensors"}}
    history = server.run({"1": model, "2": writing})
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    layers = int(history["outputs"]["2"]["text"][0])
    assert layers >= 16

    def weights(loader):
        path = tmp_path / "weights.pt"
        saving = {"class_type": "SaveWeights", "inputs": {"model": ["2", 0], "path": str(path)}}
        history = server.run({"1": model, "2": loader, "3": saving})
        assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
        return torch.load(path)

    def lora(name, strength=0.8):
        inputs = {"model": ["1", 0], "lora_name": name, "strength_model": strength}
        return {"class_type": "LoraLoaderModelOnly", "inputs": inputs}

    def shrunk(**target):
        inputs = {"model": ["1", 0], "lora_name": "r.safetensors", **STRENGTHS, **TARGET, **target}
        return {"class_type": "LorashrinkShrink", "inputs": inputs}

    plain, source = weights(lora("r.safetensors", 0.0)), weights(lora("r.safetensors"))
    changed = {key for key in plain if not torch.equal(plain[key], source[key])}
    assert changed
    full = weights(shrunk(target="recipe", recipe="energy=1", dtype="fp32"))
    for key in changed:
        assert (full[key] - source[key]).norm() < 1e-3 * (source[key] - plain[key]).norm(), key
    for target in (
        {"rank": 3},
        {"rank": 3, "dtype": "auto"},
        {"target": "recipe", "recipe": "fro_ckpt,bytes,error=0.2"},
        {"target": "quality", "quality": "small", "dtype": "auto"},
    ):
        saving = {"class_type": "LorashrinkSave", "inputs": {"shrunk": ["2", 2], "name": "small", "overwrite": True}}
        applied = weights(shrunk(**target))
        server.run({"1": model, "2": shrunk(**target), "3": saving})
        from_file = weights(lora("small.safetensors"))
        assert {key for key in plain if not torch.equal(plain[key], applied[key])} == changed, target
        for key in plain:
            assert torch.equal(applied[key], from_file[key]), (target, key)
        (server.loras / "small.safetensors").unlink()


def test_errors_are_words_on_the_node(server, tmp_path):
    with pytest.raises(ValueError, match="Did you mean rank"):
        latents(server, shrink("style.safetensors", target="recipe", recipe="rnk=3"), tmp_path)
    history = server.run(sampled(shrink("style.safetensors", target="size in MB", megabytes=0.02), tmp_path / "x"))
    message = history["status"]["messages"][-1][1]
    assert message["node_type"] == "LorashrinkShrink"
    assert "smallest possible" in message["exception_message"]


def test_every_other_node_answers(server):
    stack = {"lora_1": "style.safetensors", "strength_1": 0.7, "lora_2": "heart.safetensors", "strength_2": 0.4}
    stack |= {"lora_3": "none", "strength_3": 1.0, "lora_4": "none", "strength_4": 1.0}
    history = server.run(
        {
            "1": {"class_type": "SmallModelLoader", "inputs": {}},
            "2": node("LorashrinkInspect", lora_name="style.safetensors"),
            "3": node("LorashrinkOverlap", **stack),
            "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 1]}},
            "5": {"class_type": "PreviewImage", "inputs": {"images": ["3", 1]}},
        }
    )
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
    assert "layers of rank" in history["outputs"]["2"]["text"][0]
    assert history["outputs"]["3"]["text"][0]


EXAMPLES = sorted((Path(__file__).parents[2] / "comfyui" / "example_workflows").glob("*.json"))


def api_form(workflow, info):
    """A saved workflow as the API takes it: links by node, widgets by name, as the browser makes it."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for item in workflow["nodes"]:
        if item["type"] not in info:  # notes
            continue
        inputs, values = {}, list(item.get("widgets_values", []))
        for group in ("required", "optional"):
            for name, spec in info[item["type"]]["input"].get(group, {}).items():
                socket = next((entry for entry in item.get("inputs", []) if entry["name"] == name), None)
                is_widget = isinstance(spec[0], list) or spec[0] in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
                value = values.pop(0) if is_widget else None
                if is_widget and len(spec) > 1 and spec[1].get("control_after_generate"):
                    values.pop(0)
                if socket is not None and socket.get("link") is not None:
                    inputs[name] = links[socket["link"]]
                elif is_widget:
                    inputs[name] = value
        assert not values, item
        prompt[str(item["id"])] = {"class_type": item["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_workflow_runs(server, path):
    workflow = api_form(json.loads(path.read_text()), server.get("object_info"))
    for item in workflow.values():  # the example model in place of a checkpoint, at its size
        if item["class_type"] == "CheckpointLoaderSimple":
            item |= {"class_type": "SmallModelLoader", "inputs": {}}
        if item["class_type"] == "EmptyLatentImage":
            item["inputs"] |= {"width": 128, "height": 128}
        for name, value in copy.copy(item["inputs"]).items():
            if name.startswith("lora_") and value not in ("none", "heart.safetensors"):
                item["inputs"][name] = "style.safetensors"
            if name == "megabytes":
                item["inputs"][name] = 0.4
            if name == "steps":
                item["inputs"][name] = 4
    history = server.run(workflow)
    assert history["status"]["status_str"] == "success", history["status"]["messages"][-1]
