"""Ernie 4.5: in the vision-language model a text router and a vision router per layer; elsewhere one ordinary router.

Each of the two is given only the tokens of its modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import Change, ForwardHook, ForwardPreHook
from moe_route.routers.adapter import Adapter, OutputHook, Place
from moe_route.routers.family import Family

_ROLES = {"text_moe": "text", "vision_moe": "vision"}
_MASK = "moe_mm_token_type_ids"  # second argument of the module above the two: nonzero for tokens of an image or video


class Ernie(Adapter):
    """(logits, weights, ids) as usual, of some of the tokens. Where the model has one modality, an ordinary router."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        above = place.above
        self._role = next((role for piece, role in _ROLES.items() if getattr(above, piece, None) is self.block), "")
        self.output_is_complete = not self._role
        self._image: Tensor | None = None  # the mask by which the running layer splits its tokens

    @property
    def role(self) -> str:
        """The modality."""
        return self._role

    @property
    def patches(self) -> bool:
        """The vision router is given tokens of the call."""
        return not self._role and super().patches

    def changes(self, hook: OutputHook) -> Sequence[Change]:
        """Hooks that see the mask of modalities too."""
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
        """The tokens of this modality, where there are others in the call."""
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
