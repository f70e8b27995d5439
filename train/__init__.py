"""The trainer: sd-scripts' flags in, LyCORIS adapters for SDXL out.

`options` and `checks` know the flags; `data`, `buckets`, `captions`, `caches` and `loader` pictures; `model`, `text`
and `network` what is trained, `objective` and `optimizers` how; `saving` and `metadata` what is written; `samples` and
`logs` what can be watched meanwhile. `preparing` and `loop` put them together, and `plan` tells what it would take.
"""
