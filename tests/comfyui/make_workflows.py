"""Makes comfyui/example_workflows: workflows as ComfyUI saves them, and a picture of each after it ran.

    COMFYUI_PATH=... python tests/comfyui/make_workflows.py

The pictures are taken in Chromium from a real ComfyUI, where the example model stands for the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from server import Server

from lorashrink.node_pack import install

FOLDER = Path(__file__).parents[2] / "comfyui" / "example_workflows"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")

LORA = {"lora_name": "style.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
TARGET = {"target": "size in MB", "quality": "high", "megabytes": 50.0, "rank": 16, "dtype": "same"}
TARGET |= {"recipe": "fro_ckpt=1,thr=-3.55"}
SAMPLER = {"seed": 3, "steps": 20, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
SIZE = {"width": 1024, "height": 1024, "batch_size": 1}
STACK = {"lora_1": "style.safetensors", "strength_1": 0.8, "lora_2": "heart.safetensors", "strength_2": 0.6}
STACK |= {"lora_3": "none", "strength_3": 1.0, "lora_4": "none", "strength_4": 1.0}


def drawing(number: int, model: tuple[str, int], clip: tuple[str, int], column: int, row: int) -> dict:
    """Nodes that draw a picture; the last one is `decoded{number}`."""
    y = 620 * row
    return {
        f"prompt{number}": ("CLIPTextEncode", (column, y), (300, 130), {"text": "a red circle", "clip": clip}),
        f"negative{number}": ("CLIPTextEncode", (column, y + 180), (300, 100), {"text": "", "clip": clip}),
        f"sampler{number}": (
            "KSampler",
            (column + 330, y),
            (270, 320),
            {
                **{"model": model, "positive": (f"prompt{number}", 0), "negative": (f"negative{number}", 0)},
                **{"latent_image": ("empty", 0), **SAMPLER},
            },
        ),
        f"decoded{number}": (
            "VAEDecode",
            (column + 630, y),
            (160, 60),
            {"samples": (f"sampler{number}", 0), "vae": ("checkpoint", 2)},
        ),
    }


CHECKPOINT = {"checkpoint": ("CheckpointLoaderSimple", (0, 0), (290, 110), {"ckpt_name": "model.safetensors"})}
EMPTY = {"empty": ("EmptyLatentImage", (0, 180), (290, 120), SIZE)}
MODEL = {"model": ("checkpoint", 0), "clip": ("checkpoint", 1)}

# name -> node: (type, position, size, widgets and links (node, output))
WORKFLOWS = {
    "shrink_and_save": {
        **CHECKPOINT,
        **EMPTY,
        "shrink": ("LorashrinkShrink", (330, 0), (340, 440), {**MODEL, **LORA, **TARGET}),
        "curve": ("PreviewImage", (330, 500), (480, 320), {"images": ("shrink", 4)}),
        "save": ("LorashrinkSave", (850, 500), (330, 170), {"shrunk": ("shrink", 2), "name": "", "overwrite": False}),
        **drawing(1, ("shrink", 0), ("shrink", 1), 710, 0),
        "picture": ("PreviewImage", (1340, 120), (320, 340), {"images": ("decoded1", 0)}),
    },
    "compare_full_and_shrunk": {
        **CHECKPOINT,
        **EMPTY,
        "compare": ("LorashrinkCompare", (330, 0), (340, 440), {**MODEL, **LORA, **TARGET}),
        **drawing(1, ("compare", 0), ("compare", 1), 710, 0),
        **drawing(2, ("compare", 2), ("compare", 3), 710, 0.6),
        "grid": (
            "LorashrinkGrid",
            (1560, 0),
            (220, 170),
            {"images_full": ("decoded1", 0), "images": ("decoded2", 0), "shrunk": ("compare", 4)},
        ),
        "picture": ("PreviewImage", (1560, 240), (480, 360), {"images": ("grid", 0)}),
    },
    "merge": {
        **CHECKPOINT,
        **EMPTY,
        "merge": ("LorashrinkMerge", (330, 0), (340, 560), {**MODEL, **STACK, **TARGET}),
        "save": ("LorashrinkSave", (710, 380), (330, 170), {"shrunk": ("merge", 2), "name": "", "overwrite": False}),
        **drawing(1, ("merge", 0), ("merge", 1), 710, 0),
        "picture": ("PreviewImage", (1340, 120), (320, 340), {"images": ("decoded1", 0)}),
    },
    "look_inside": {
        **CHECKPOINT,
        "inspect": ("LorashrinkInspect", (330, 0), (460, 400), {"lora_name": "style.safetensors", **MODEL}),
        "norms": ("PreviewImage", (830, 0), (560, 400), {"images": ("inspect", 1)}),
        "overlap": ("LorashrinkOverlap", (330, 460), (460, 420), {**STACK, **MODEL}),
        "likeness": ("PreviewImage", (830, 460), (560, 420), {"images": ("overlap", 1)}),
    },
}


def saved_form(nodes: dict, info: dict) -> dict:
    """A workflow as ComfyUI saves it."""
    numbers = {name: number for number, name in enumerate(nodes, 1)}
    outputs = {name: [] for name in nodes}
    items, links = [], []
    for name, (kind, position, size, values) in nodes.items():
        spec = info[kind]
        sockets, widgets = [], []
        for group in ("required", "optional"):
            for key, (type_, *options) in spec["input"].get(group, {}).items():
                if isinstance(type_, list) or type_ in WIDGETS:
                    widgets.append(values[key])
                    if options and options[0].get("control_after_generate"):
                        widgets.append("fixed")
                    continue
                link = None
                if key in values:
                    source, slot = values[key]
                    link = len(links) + 1
                    links.append([link, numbers[source], slot, numbers[name], len(sockets), type_])
                    outputs[source].append((slot, link))
                sockets.append({"name": key, "type": type_, "link": link})
        items.append(
            {
                **{"id": numbers[name], "type": kind, "pos": list(position), "size": list(size), "flags": {}},
                **{"order": len(items), "mode": 0, "inputs": sockets, "outputs": [], "widgets_values": widgets},
                "properties": {"Node name for S&R": kind},
            }
        )
    for name, item in zip(nodes, items, strict=True):
        spec = info[item["type"]]
        for slot, (type_, title) in enumerate(zip(spec["output"], spec["output_name"], strict=True)):
            of_slot = [link for index, link in outputs[name] if index == slot] or None
            item["outputs"].append({"name": title, "type": type_, "links": of_slot, "slot_index": slot})
    return {"last_node_id": len(items), "last_link_id": len(links), "nodes": items, "links": links, "groups": []} | {
        "config": {},
        "extra": {},
        "version": 0.4,
    }


# Loads a workflow into the browser, as large as it fits beside the bars.
SHOW = """async (workflow) => {
    await window.app.loadGraphData(workflow);
    const right = Math.max(...workflow.nodes.map((node) => node.pos[0] + node.size[0]));
    const bottom = Math.max(...workflow.nodes.map((node) => node.pos[1] + node.size[1]));
    const view = window.app.canvas.ds;
    view.scale = Math.min(1640 / right, 730 / (bottom + 30));
    view.offset = [75 / view.scale, 110 / view.scale];
    window.app.canvas.setDirty(true, true);
}"""

# No tour, and no map over the workflow.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}


def picture(page, server: Server, workflow: dict, path: Path) -> None:
    """Run the workflow in the browser, and take its picture."""
    shown = json.loads(json.dumps(workflow).replace("CheckpointLoaderSimple", "SmallModelLoader"))
    for item in shown["nodes"]:
        # at the size of the example model
        small = {"SmallModelLoader": [], "EmptyLatentImage": [128, 128, 1]}
        item["widgets_values"] = small.get(
            item["type"], [0.5 if value == 50.0 else value for value in item.get("widgets_values", [])]
        )
    page.evaluate(SHOW, shown)
    page.wait_for_timeout(1000)
    before = len(server.get("history"))
    page.evaluate("() => window.app.queuePrompt(0)")
    for _ in range(240):
        page.wait_for_timeout(500)
        if len(server.get("history")) > before:
            break
    page.wait_for_timeout(4000)
    page.screenshot(path=path.with_suffix(".png"))
    Image.open(path.with_suffix(".png")).convert("RGB").save(path, quality=82)
    path.with_suffix(".png").unlink()


def main() -> None:
    """Write all workflows, and their pictures."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(folder, install)
        settings = Path(folder) / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS))
        try:
            info = server.wait()
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1760, "height": 860})
            page.goto(f"http://127.0.0.1:{server.port}/")
            page.wait_for_function("() => window.app && window.app.graph && window.app.canvas", timeout=120_000)
            page.wait_for_timeout(5000)
            page.keyboard.press("Escape")
            for name, nodes in WORKFLOWS.items():
                workflow = saved_form(nodes, info)
                (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")
                picture(page, server, workflow, FOLDER / f"{name}.jpg")
            browser.close()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
