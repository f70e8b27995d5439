"""The registry: all families of layers, and the tensors that belong to none.

A new family is a file beside `lora.py` whose rows stand in `FAMILIES`.
"""

from __future__ import annotations

from lorashrink.adapters import adalora, embedding, full, glora, ia3, loha, lokr, lora, miss, oft, other_trainers, vera
from lorashrink.adapters.family import Family

# Of families with the same suffixes the first one whose marks are there wins.
FAMILIES: tuple[Family, ...] = (
    *adalora.FAMILIES,
    *lora.FAMILIES,
    *loha.FAMILIES,
    *lokr.FAMILIES,
    *glora.FAMILIES,
    *full.FAMILIES,
    *oft.FAMILIES,
    *ia3.FAMILIES,
    *vera.FAMILIES,
    *miss.FAMILIES,
    *embedding.FAMILIES,
    *other_trainers.FAMILIES,
)

# Tensors that only adapters have but that are no weight matrix's ΔW: ending -> why they stay as they are.
CARRIED: tuple[tuple[str, str], ...] = (
    (r"\.diff_b|\.b_norm", "a difference of a bias"),
    (r"\.diff_m", "a difference of a modulation"),
    (r"\.w_norm", "a difference of a normalisation layer"),
    (r"\.(?:set|reshape)_weight", "replaces a weight of the base"),
    (r"\.(?:[pq]_layer\.weight|lambda_layer)", "T-LoRA, whose ΔW depends on the base model's time step"),
    (r"\.fourierft_spectrum(?:\.[^.]+)*", "FourierFT, which has no factors"),
    (
        r"\.?vblora_(?:logits_[AB](?:_topk_(?:indices|weights))?|vector_bank)(?:\.[^.]+)*",
        "VB-LoRA, whose layers share one bank of vectors",
    ),
    (r"\.hra_u(?:\.[^.]+)*", "HRA, a product of reflections"),
    (r"\.boft_[Rs](?:\.[^.]+)*", "BOFT as PEFT stores it, which multiplies the base weight"),
    (r"\.(?:shira_weight|randlora_(?:lambda|gamma)|c3a_kernel)(?:\.[^.]+)*", "has no factors"),
    (r"\.lokr_t1", "a reserved tensor of LoKr"),
    (r"\.ln_tuning_layers\.(?:weight|bias)", "a whole normalisation layer"),
)
# Tensors that come with adapters and that bases have too: they do not tell an adapter from a base.
COMPANIONS: tuple[tuple[str, str], ...] = (
    (r"\.base_layer\.[^.]+$", "a tensor of the base model, saved beside its adapter"),
    (r"^base_model\.model\..+\.(?:weight|bias)$", "a whole weight that was trained or saved with the adapter"),
    (r"\.(?:query|key)_norm\.scale$", "replaces a normalisation layer's scale"),
    (r"^bundle_emb\.|(?:^|\.)emb_params$|^string_to_param", "an embedding that comes with the adapter"),
)
