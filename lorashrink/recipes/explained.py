"""What each key of a recipe means, in a sentence for help texts."""

from lorashrink.recipes.grammar import keys

# In the order of help: scores, selections, modifiers.
_SENTENCES: dict[str, str] = {
    "fro_ckpt": "Score: relative to the Frobenius norm of the base weight.",
    "spn_ckpt": "Score: relative to the spectral norm of the base weight.",
    "fro_lora": "Score: relative to the Frobenius norm of the layer's own change.",
    "spn_lora": "Score: relative to the largest singular value of the layer.",
    "subspace": "Score: relative to what the base weight does in the same direction.",
    "params": "Score: relative to the numbers stored per rank.",
    "calib": "Score: by the effect on pictures; needs --calibration.",
    "bytes": "Compare ranks by their effect per byte.",
    "thr": "Keep what scores above this, in log10: -3.55; higher is smaller.",
    "size": "Keep the best that fits into this many MiB.",
    "quality": "Keep as much as pictures within this many dB of the original's need: 40.",
    "error": "Keep as few ranks as this error of the whole file allows: 0.05.",
    "rank": "Keep this many ranks in each layer.",
    "energy": "Keep this share of the squared singular values: 0.99.",
    "sv_fro": "Keep this share of the norm, as sd-scripts counts: 0.95.",
    "sv_cumulative": "Keep this share of the sum of singular values.",
    "sv_ratio": "Keep singular values down to the largest divided by this.",
    "conv_rank": "With rank: the rank of convolutions larger than 1×1.",
    "max_rank": "No layer above this rank.",
    "min_rank": "No layer below this rank.",
    "multiple": "Round ranks up to a multiple of this.",
    "pow2": "Round ranks up to powers of two.",
    "uniform": "Give all layers the same rank.",
    "rescale": "Multiply the strength of the whole adapter by this.",
    "clip": "No singular value above this many times the base layer's largest.",
    "fro_limit": "No layer's norm above this share of the base layer's norm.",
}

# Those that recipes may have here; a key without a sentence stands at the end.
KEYS: dict[str, str] = {key: text for key, text in _SENTENCES.items() if key in keys()} | {
    key: "" for key in keys() if key not in _SENTENCES
}
