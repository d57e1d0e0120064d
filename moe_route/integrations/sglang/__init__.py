"""moe-route inside stock SGLang: record and steer what its requests are routed to. Run on a CPU with stand-ins only.

SGLang calls ``register`` in every process, by the entry point ``moe_route`` of ``sglang.srt.plugins``. Nothing happens
until the environment holds options, ``options.Options`` as JSON:

    os.environ["MOE_ROUTE_SGLANG"] = '{"groups": ["a", "b"]}'
    engine = sglang.Engine(model_path=model, disable_overlap_schedule=True)
    mr.sglang.steer(engine, plan)
    mr.sglang.record(engine)
    engine.generate(prompts, [{"custom_params": {"moe_route_group": "a"}}, ...])
    statistics = mr.sglang.statistics(engine)
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.integrations.serving.options import DEFAULT_PLAN, EngineNotSupportedError
from moe_route.integrations.sglang.options import options_of

if TYPE_CHECKING:
    from moe_route.recording.statistics import RoutingStatistics
    from moe_route.recording.trace import Trace
    from moe_route.steering.plan import Plan

__all__ = ["EngineNotSupportedError", "pause", "record", "register", "statistics", "steer", "trace"]


def record(engine: Any) -> None:
    """Begin a new recording in a ``sglang.Engine``; requests carry their group in ``custom_params``."""
    engine.collective_rpc("moe_route_record")


def pause(engine: Any) -> None:
    """Stop counting; what was counted is kept."""
    engine.collective_rpc("moe_route_pause")


def steer(engine: Any, plan: Plan | None, *, name: str = DEFAULT_PLAN) -> None:
    """Steer by a plan from the next step on; None ends it.

    Requests that name no plan take "default". Another ``name`` must be among the option ``plans``. SGLang raises
    ``AssertionError`` with the words of a refusal.
    """
    from moe_route.integrations.sglang.seams import planned_items

    with tempfile.TemporaryDirectory() as folder:
        path = None
        if plan is not None:
            path = str(Path(folder) / "plan.safetensors")
            plan.save(path)
        engine.collective_rpc("moe_route_steer", plan=path, name=name)
        items = planned_items()
        if items is not None:
            items.steered(path, name)


def statistics(engine: Any) -> RoutingStatistics:
    """What was counted, in all layers. SGLang raises ``AssertionError`` with the words of a refusal."""
    from moe_route.integrations.serving.answers import held
    from moe_route.recording.statistics import RoutingStatistics

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "statistics.safetensors"
        engine.collective_rpc("moe_route_statistics", path=str(file))
        return held(RoutingStatistics.load(file))


def trace(engine: Any) -> Trace:
    """The experts and weights of every counted token, with its id, position and request; the option ``trace`` keeps it.

    SGLang raises ``AssertionError`` with the words of a refusal.
    """
    from moe_route.recording.trace import Trace

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.safetensors"
        engine.collective_rpc("moe_route_trace", path=str(file))
        return Trace.load(file)


def register() -> None:
    """Hook, once per process, the functions of SGLang through which an engine with options passes.

    SGLang logs what a plug-in raises and serves on, without it. So what is wrong ends the process: ``SystemExit``.
    """
    try:
        if options_of() is None:
            return
        from moe_route.integrations.sglang.seams import hook_all

        hook_all()
    except Exception as error:
        raise SystemExit(f"moe_route: {type(error).__name__}: {error}") from error
