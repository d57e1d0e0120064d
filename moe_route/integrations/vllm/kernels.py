"""Keep an engine with moe-route from kernels that choose their experts inside, where nothing can be counted or steered.

vLLM asks each class of experts whether it supports a layer, in its order of preference, and takes the first that does.
"""

from __future__ import annotations

import functools
from typing import Any

from moe_route.integrations.vllm.options import Options

__all__ = ["avoid_monolithic"]


def avoid_monolithic(experts: Any) -> None:
    """Wrap ``FusedMoEExperts.is_supported_config``, which all classes of experts ask too."""
    natural = experts.is_supported_config

    @functools.wraps(natural)
    def is_supported_config(cls: Any, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        if cls.is_monolithic() and _on():
            return False, "it chooses experts inside, where moe_route can neither count nor steer"
        answer: tuple[bool, str | None] = natural(cls, *args, **kwargs)
        return answer

    experts.is_supported_config = staticmethod(is_supported_config)


def _on() -> bool:
    """Whether the engine whose model is being made has moe-route."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and Options.of(config.additional_config) is not None
