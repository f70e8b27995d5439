"""The samplers of prompt files, as diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from lorashrink.errors import UsageError
from lorashrink.pictures.prompts import OWN, Prompt

# The noise schedule of SD and SDXL.
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# Two settings differ from sd-scripts': there clip_sample cuts DDIM's latents to ±1, which washes pictures out, and
# dpmsolver cannot run, because it needs a last sigma above zero.
_KINDS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "pndm": (PNDMScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {"clip_sample": False}),
    "dpm_2": (KDPM2DiscreteScheduler, {}),
    "dpm_2_a": (KDPM2AncestralDiscreteScheduler, {}),
    "dpmsolver": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": (DPMSolverSinglestepScheduler, {}),
}


def scheduler(sampler: str, *, v_parameterization: bool) -> Any:
    """diffusers' scheduler for one of `SAMPLERS`, with the noise schedule of SD and SDXL.

    `k_` is an alias, not Karras' sigmas.
    """
    kind, settings = _KINDS[sampler.removeprefix("k_")]
    return kind(
        num_train_timesteps=1000,
        prediction_type="v_prediction" if v_parameterization else "epsilon",
        **NOISE_SCHEDULE,
        **settings,
    )


def check_samplers(prompts: Sequence[Prompt], *, flow: str = "") -> None:
    """Check that every prompt can be drawn with its sampler.

    flow: what to call the model if it is one of flow matching, for which only its own sampler is right.

    Raises:
        UsageError: a sampler cannot draw in so many steps, or not with this model.
    """
    for number, prompt in enumerate(prompts):
        if prompt.sampler == OWN:
            continue
        what = f"sample {number:02d}: the sampler {prompt.sampler}"
        if flow:
            raise UsageError(
                f"{what} is for models that predict noise, and {flow} is drawn by flow matching; leave --ss out"
            )
        try:
            scheduler(prompt.sampler, v_parameterization=False).set_timesteps(prompt.steps)
        except ValueError:
            raise UsageError(f"{what} cannot draw in {prompt.steps} steps; give it another --s") from None
