"""Starts ComfyUI's own `main.py` in this process: `serve.py COMFYUI OPTIONS...`."""

import contextlib
import os
import runpy
import sys

import torch

folder = sys.argv[1]
# Wheels of torchvision from PyPI bring no operators for a CPU build of torch, and do not import without these.
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv = [os.path.join(folder, "main.py"), *sys.argv[2:]]
sys.path.insert(0, folder)
os.chdir(folder)
runpy.run_path(sys.argv[0], run_name="__main__")
