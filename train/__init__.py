"""The trainer: sd-scripts' flags in, LyCORIS adapters for SDXL out.

`command` is the program. `flags` reads and checks what is asked for, `data` finds pictures and makes batches, `model`
loads SDXL and puts the network on it, `run` plans and trains, and `output` writes adapters, states, samples and logs.
"""
