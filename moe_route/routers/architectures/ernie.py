"""Ernie 4.5: the vision-language model has a text router and a vision router per layer, the text model one router.

Each of the two routers is given only the tokens of its modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import Change, ForwardHook, ForwardPreHook
from moe_route.routers.adapter import Adapter, OutputHook, Place
from moe_route.routers.family import Family

_ROLES = {"text_moe": "text", "vision_moe": "vision"}
_MASK = "moe_mm_token_type_ids"  # argument of the module that owns both routers: nonzero for image and video tokens


class Ernie(Adapter):
    """Reads (logits, weights, ids) for the tokens of one modality, or for all tokens in a model with one modality."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        above = place.above
        self._role = next((role for piece, role in _ROLES.items() if getattr(above, piece, None) is self.block), "")
        self.output_is_complete = not self._role
        self._image: Tensor | None = None  # the mask by which the running layer splits its tokens

    @property
    def role(self) -> str:
        """The modality of the router, "text" or "vision"; "" in a model with one modality."""
        return self._role

    @property
    def patches(self) -> bool:
        """False for the vision router: it is given image tokens of the call, not patches."""
        return not self._role and super().patches

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """The usual changes, and hooks that read the modality mask of each layer."""
        above, changes = self.place.above, list(super().changes(hook))
        if self._role and above is not None:
            changes.append(ForwardPreHook(above, self._enter, with_kwargs=True))
            changes.append(ForwardHook(above, self._leave, always_call=True))
        return changes

    def _enter(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        mask = args[1] if len(args) > 1 else kwargs.get(_MASK)
        self._image = mask if isinstance(mask, Tensor) else None

    def _leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self._image = None

    def token_subset(self) -> Tensor | None:
        """Indices of the tokens of this modality, int64 [T], or None where no modality mask was passed."""
        if self._image is None:
            return None
        image = self._image.flatten().bool()
        return (image if self._role == "vision" else ~image).nonzero().flatten()


FAMILY = Family(
    "softmax with correction bias",
    ("Ernie4_5_MoeTopKRouter", "Ernie4_5_VLMoeMoeTopKRouter"),
    RouterSpec(score="softmax", renormalize="clamp"),
    read={"eps": "norm_min"},
    num_experts="weight",
    correction_bias="moe_statics.e_score_correction_bias",
    weights="input",
    unfused="it switches autocast off",
    adapter=Ernie,
)
