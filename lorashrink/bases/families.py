"""The registry of model families, in the order in which they are tried."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorashrink.bases import diffusers_only, encoders, flux, images, language, stable_diffusion, video
from lorashrink.bases.family import DENOISER, BaseFamily, Header
from lorashrink.names import DIFFUSERS_PARTS

# Endings and beginnings that only adapters have, and control networks that are shaped like them.
_ADAPTER = re.compile(
    r"lora\d?[._]|lokr_|hada_|oft_|ia3_|vera_|\.(?:alpha|on_input|diff|dora_scale|[ab][12]\.weight)$|^lllite_"
)


# Parts lie as they do elsewhere, and every weight has the name that the file gives it.
UNKNOWN = BaseFamily(
    "unknown",
    "an unknown family",
    {
        **{prefix: part for prefix, part in DENOISER.items() if prefix not in ("model.", "module.", "net.")},
        **{f"{part}.": part for part in DIFFUSERS_PARTS},
        "text_encoder.": "te1",
        "text_encoder_2.": "te2",
        "text_encoder_3.": "te3",
    },
    lambda header: header.has_weights(),
)
FAMILIES: tuple[BaseFamily, ...] = (
    *stable_diffusion.FAMILIES,
    *diffusers_only.FAMILIES,
    *video.FAMILIES,
    *flux.FAMILIES,
    *images.FAMILIES,
    *encoders.FAMILIES,
    *language.FAMILIES,
    UNKNOWN,
)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> BaseFamily | None:
    """The family of a checkpoint, from its tensor names and shapes; None if it is none, or an adapter."""
    header = Header(shapes)
    family = next((family for family in FAMILIES if family.recognise(header)), None)
    return None if family is UNKNOWN and any(_ADAPTER.search(key) for key in shapes) else family


def family_named(name: str) -> BaseFamily | None:
    """The family of this name, None if there is none."""
    return next((family for family in FAMILIES if family.name == name), None)


def family_title(name: str) -> str:
    """What people call the family of this name; the name itself where it is not known."""
    family = family_named(name)
    return family.title if family else name
