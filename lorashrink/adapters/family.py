"""The row of the adapter table: what one family of layers looks like in a file, and what it adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from lorashrink.files.store import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import AnyDelta

# Roles that any family may have beside its own. DoRA's magnitude multiplies the direction of W + ΔW
# (https://arxiv.org/abs/2402.09353); it stays what it is when ΔW shrinks.
SHARED = {
    "alpha": r"\.alpha",
    "magnitude": r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)*)",
}

Shape = tuple[int, ...]
# role ("up", "down", ...) -> what the header says of the tensor that plays it
Infos = Mapping[str, TensorInfo]
Carried = Callable[[Infos, Mapping[str, Any]], str | None]


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """What the ΔW of one layer is made of."""

    tensors: Mapping[str, Tensor]  # role -> tensor, as stored; without the roles of `SHARED`
    scale: float  # what `Family.scale` says
    shape: Shape  # of the base weight
    weight: Tensor | None = None  # the base weight, float32 [out, in·kh·kw], for families that need it
    config: Mapping[str, Any] = field(default_factory=dict)  # PEFT's settings, {} if the file has none

    @property
    def base_weight(self) -> Tensor:
        """`weight` of a family that needs it."""
        assert self.weight is not None, "Family.needs asks for it"
        return self.weight


class Needs(Enum):
    """What a family needs the base weight for."""

    NOTHING = "nothing"
    ADDITION = "a part of ΔW is made of the base weight"
    SHAPE = "only the base weight tells how wide its layers are"
    MULTIPLICATION = "it multiplies the base weight, so that ΔW exists only together with it"


def unscaled(infos: Infos, alpha: float | None, config_scale: float) -> float:
    """The scale of families that store ΔW, or what makes it, at full strength."""
    return 1.0


@dataclass(frozen=True, eq=False, slots=True)
class Family:
    """One way to write a layer.

    `suffixes` maps each role to a regular expression for the end of its tensor's name. A layer belongs to the first
    family that has all its suffixes and at least one of its `marks`; it must have all roles of one of the
    sets in `required`. Roles of `SHARED` may come on top.
    """

    name: str
    suffixes: Mapping[str, str]
    required: tuple[frozenset[str], ...]
    check: Callable[[Infos], str | None]  # what is wrong with the shapes, if anything
    # Shape of the base weight. Without the kernel of a convolution, (out, in·kh·kw), where the file does not hold it
    # (`flat`); families that multiply the base weight know (out,) or ().
    shape: Callable[[Infos], Shape]
    rank: Callable[[Infos], int]  # stored rank, as shown to users
    delta: Callable[[Stored], AnyDelta]
    delta_rank: Callable[[Infos], int] | None = None  # rank of what `delta` returns, where it is not the stored one
    # (infos, alpha or None, PEFT's scale) -> scale, where it is not alpha / rank
    own_scale: Callable[[Infos, float | None, float], float] | None = None
    marks: frozenset[str] = frozenset()  # roles that prove the family; empty means all of its own
    flat: Callable[[Infos], bool] = lambda infos: False
    # (infos, PEFT's settings) -> why a complete layer is no ΔW of a matrix, and is copied; None if it is one
    carried: Carried = lambda infos, config: None
    needs: Needs = Needs.NOTHING
    changed_base: str = ""  # the initialisation by which PEFT changes the base at load; "" if it does not
    experts: int = 1  # weights of one shape, one below another; they and others of their module have one rank
    # (PEFT's settings, shape of the base weight) -> whether without them its tensors mean something else
    needs_settings: Callable[[Mapping[str, Any], Shape], bool] = lambda config, shape: False
    becomes_lora: bool = False  # its own form needs what outputs do not have, so that it is always written as LoRA
    # role -> shape when the layer is written with another rank, in its own form; roles left out are folded away.
    # None: the family has no form of a chosen rank, and its layers are written as LoRA or stay as they are.
    written: Callable[[Infos, int], Mapping[str, Shape]] | None = None
    # (up [out, r], down [r, in·kh·kw]) -> the tensors of the roles in `written`, if these are not just "up" and "down"
    pack: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None
    # role -> regular expression for the whole name of a tensor that all layers of the file have in common
    common: Mapping[str, str] = field(default_factory=dict)

    def scale(self, infos: Infos, alpha: float | None, config_scale: float) -> float:
        """What ΔW is multiplied with: alpha / stored rank, and `config_scale` where the file has no alpha tensor."""
        if self.own_scale:
            return self.own_scale(infos, alpha, config_scale)
        return config_scale if alpha is None else alpha / self.rank(infos)

    def width(self, infos: Infos) -> int:
        """Rank of what `delta` returns, as far as the header tells."""
        return (self.delta_rank or self.rank)(infos)

    @property
    def proofs(self) -> frozenset[str]:
        """The roles that prove that a layer is of this family."""
        return self.marks or frozenset(self.suffixes)
