"""The trainer: sd-scripts' flags in, LyCORIS adapters for SDXL out.

`options` and `checks` know the flags. `data` finds pictures and makes batches, `model` loads SDXL and puts the network
on it, `run` trains, and `output` writes adapters, states and samples.
"""
