"""Record what a report needs: statistics of all texts, and the experts of the tokens of a few."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

from moe_route.data.batches import Text
from moe_route.recording import RoutingStatistics, Trace
from moe_route.report.content import Inputs
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts
from moe_route.steering import Plan


def record_inputs(
    language_model: LanguageModel,
    texts: Sequence[Text],
    *,
    plan: Plan | None = None,
    traced_items: int = 4,
    engine: Literal["hook", "fused"] = "hook",
    progress: bool = False,
    **options: Any,
) -> Inputs:
    """Run texts through a model, and with a plan once more under it, and keep what a report shows.

    Args:
        texts: the texts, with the group of each; translations share their item.
        plan: also record under this plan; the traces are then shown side by side.
        traced_items: number of items, the first ones of the texts, whose tokens are traced in every group.
        engine: how to attach, as in ``LanguageModel.attach``.
        progress: show progress bars on standard error.
        options: of ``record_texts``: ``batch_size``, ``max_length``.
    """
    if not texts:
        raise ValueError("there is no text to record: pass at least one")
    if plan is not None:
        plan.check_groups(text.group for text in texts)
    recordings: dict[str, RoutingStatistics] = {}
    traces: dict[str, Trace] = {}
    with language_model.attach(engine) as routed:
        for name, rules in (("natural", None), ("steered", plan)):
            if name == "steered" and rules is None:
                continue
            with ExitStack() as stack:
                if rules is not None:
                    stack.enter_context(routed.steer(rules))
                caption = f"recording, {name}" if progress else None
                recordings[name], traces[name] = _recorded(
                    language_model, routed, texts, traced_items, progress=caption, **options
                )
    return Inputs(recordings, traces, plans={} if plan is None else {"plan": plan})


def _recorded(
    language_model: LanguageModel, routed: Any, texts: Sequence[Text], traced_items: int, **options: Any
) -> tuple[RoutingStatistics, Trace]:
    groups = list(dict.fromkeys(text.group for text in texts))
    first = list(dict.fromkeys(text.item for text in texts))[:traced_items]
    with routed.record(groups, sequences=True) as recorder:
        record_texts(recorder, language_model, texts, **options)
    with routed.record(groups, sequences=False, trace=True) as tracer:
        record_texts(tracer, language_model, [text for text in texts if text.item in first], **options)
    return recorder.statistics(), tracer.trace()
