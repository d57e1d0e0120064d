"""A model for lm-eval that records and steers its routing, registered there as ``moe-route``.

    from moe_route.integrations import lm_eval as integration
    integration.register()
    lm_eval.simple_evaluate(model="moe-route", model_args={"plan": "plan.safetensors"}, tasks=["hellaswag"])

``MoeRouteLM`` is the class. ``TASKS`` is the folder of the tasks that moe-route brings.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_route.integrations.lm_eval.model import MoeRouteLM

__all__ = ["NAME", "TASKS", "MoeRouteLM", "register"]

NAME = "moe-route"
TASKS = Path(__file__).resolve().parent / "tasks"


def register() -> None:
    """Make the model known to lm-eval under ``moe-route``; safe to call again.

    Raises ``ImportError`` if lm-eval is missing.
    """
    model = _model()
    from lm_eval.api.registry import register_model

    register_model(NAME)(model)


def _model() -> type[MoeRouteLM]:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ImportError("evaluation needs lm-eval: pip install 'moe-route[hf,eval]'") from error
    from moe_route.integrations.lm_eval.model import MoeRouteLM

    return MoeRouteLM


def __getattr__(name: str) -> Any:
    if name == "MoeRouteLM":
        return _model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
