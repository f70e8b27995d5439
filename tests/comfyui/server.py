"""A real ComfyUI on the CPU, on a loopback port, and workflows that are queued through its API."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import lorashrink_example

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLE = lorashrink_example.path()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """ComfyUI with the node pack and the test's loader, in folders of its own.

    Environment: COMFYUI_PATH is a checkout of ComfyUI, COMFYUI_PACKAGES a folder with what it needs beside
    lorashrink's own packages.
    """

    def __init__(self, folder, install):
        self.folder, self.port = Path(folder), free_port()
        self.log = self.folder / "server.log"
        for name in ("custom_nodes", "models/loras", "input", "output", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.loras = self.folder / "models" / "loras"
        for path in (EXAMPLE / "loras").glob("*.safetensors"):
            shutil.copy(path, self.loras)
        install(self.folder)
        (self.folder / "custom_nodes" / "small_model").symlink_to(HERE / "small_model")
        packages = os.environ.get("COMFYUI_PACKAGES", "")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (packages, str(ROOT)))),
            "LORASHRINK_EXAMPLE_MODEL": str(EXAMPLE / "model"),
        }
        options = ["--cpu", "--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(self.folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve.py"), os.environ["COMFYUI_PATH"], *options, "--disable-api-nodes"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def wait(self, seconds=300):
        """Until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                return self.get("object_info")
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI does not answer: {self.log.read_text()[-4000:]}")

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as answer:
            return json.load(answer)

    def run(self, workflow, seconds=300):
        """The history of a workflow in API form that was queued and is done. Raises ValueError if it is refused."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/prompt", json.dumps({"prompt": workflow}).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                identifier = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if history := self.get(f"history/{identifier}").get(identifier):
                return history
            time.sleep(0.1)
        raise RuntimeError(f"a workflow does not end: {self.log.read_text()[-4000:]}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
