"""Ernie 4.5 VL: a text router and a vision router in each layer, each given only the tokens of its modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from moe_route.modules.intercept import Removable
from moe_route.routers.adapter import Adapter, Hook, Place

_PARTS = {"text_moe": "text", "vision_moe": "vision"}
_MASK = "moe_mm_token_type_ids"  # second argument of the module above the two: nonzero for tokens of an image or video


class Ernie(Adapter):
    """(logits, weights, ids) as usual, of some of the tokens. Where the model has one modality, an ordinary router."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        above = place.above
        self._part = next((part for piece, part in _PARTS.items() if getattr(above, piece, None) is self.block), "")
        self.keeps = not self._part
        self._image: Tensor | None = None  # the mask by which the running layer splits its tokens

    @property
    def part(self) -> str:
        """The modality."""
        return self._part

    @property
    def patches(self) -> bool:
        """The vision router is given tokens of the call."""
        return not self._part and super().patches

    def listen(self, hook: Hook) -> Sequence[Removable]:
        """See the mask of modalities too."""
        above, listening = self.place.above, list(super().listen(hook))
        if self._part and above is not None:
            listening.append(above.register_forward_pre_hook(self._enter, with_kwargs=True))
            listening.append(above.register_forward_hook(self._leave, always_call=True))
        return listening

    def _enter(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        mask = args[1] if len(args) > 1 else kwargs.get(_MASK)
        self._image = mask if isinstance(mask, Tensor) else None

    def _leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self._image = None

    def rows(self) -> Tensor | None:
        """The tokens of this modality, where there are others in the call."""
        if self._image is None:
            return None
        image = self._image.flatten().bool()
        return (image if self._part == "vision" else ~image).nonzero().flatten()
