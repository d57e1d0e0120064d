"""What the two model runners of vLLM know of a step: the order of its requests, and their token ids.

``V1`` is ``vllm.v1.worker.gpu_model_runner``, which the CPU uses too; ``V2`` is ``vllm.v1.worker.gpu.model_runner``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from moe_route.integrations.serving.requests import Batch


class RunnerView(Protocol):
    """What is read of a runner."""

    prepare: str
    """Name of the method that lays out a step."""

    def batch(self, scheduled: Any, prepared: Any) -> Batch:
        """The step that ``prepare(scheduled)`` laid out, and answered with ``prepared``."""
        ...

    def token_ids(self, name: str, end: int) -> np.ndarray | None:
        """The first ``end`` token ids of a request, int32; None if the runner does not hold them."""
        ...


class V1:
    """``GPUModelRunner`` of ``vllm.v1.worker.gpu_model_runner``."""

    prepare = "_prepare_inputs"

    def __init__(self, runner: Any):
        self._runner = runner

    def batch(self, scheduled: Any, prepared: Any) -> Batch:
        rows = self._runner.input_batch
        names = list(rows.req_ids)
        counts = np.array([scheduled.num_scheduled_tokens[name] for name in names], np.int64)
        starts = np.asarray(rows.num_computed_tokens_cpu[: len(names)], np.int64)
        return Batch(names, counts, starts, self._runner.input_ids.gpu, _drafts(scheduled, names))

    def token_ids(self, name: str, end: int) -> np.ndarray | None:
        state = self._runner.requests.get(name)
        if state is None or state.prompt_token_ids is None:
            return None
        return np.asarray([*state.prompt_token_ids, *state.output_token_ids][:end], np.int32)


class V2:
    """``GPUModelRunner`` of ``vllm.v1.worker.gpu.model_runner``."""

    prepare = "prepare_inputs"

    def __init__(self, runner: Any):
        self._runner = runner

    def batch(self, scheduled: Any, prepared: Any) -> Batch:
        count = len(prepared.req_ids)
        return Batch(
            list(prepared.req_ids),
            np.asarray(prepared.num_scheduled_tokens[:count], np.int64),
            np.asarray(prepared.num_computed_tokens_np[:count], np.int64),
            prepared.input_ids,
            _drafts(scheduled, prepared.req_ids),
        )

    def token_ids(self, name: str, end: int) -> np.ndarray | None:
        states = self._runner.req_states
        index = states.req_id_to_index.get(name)
        if index is None:
            return None
        return states.all_token_ids.gpu[index, :end].cpu().numpy().astype(np.int32)


def _drafts(scheduled: Any, names: Sequence[str]) -> np.ndarray | None:
    drafts = scheduled.scheduled_spec_decode_tokens
    return np.array([len(drafts.get(name, ())) for name in names], np.int64) if drafts else None


def view_of(runner: Any) -> RunnerView:
    """The view that fits a runner, by the method that lays out its steps."""
    return V2(runner) if hasattr(runner, V2.prepare) else V1(runner)


def follow(
    runner: Any,
    view: RunnerView,
    *,
    before: Callable[[Any], None],
    laid_out: Callable[[Batch], None],
    after: Callable[[], None],
    dummy: Callable[[], None],
) -> None:
    """Wrap a runner's methods.

    ``before(scheduled)`` is called before a step changes the runner's requests, ``laid_out(batch)`` before its forward,
    ``after()`` after it, and ``dummy()`` before a run without requests (warm-up, capture, an idle rank).
    """
    prepare, execute, dummy_run = getattr(runner, view.prepare), runner.execute_model, runner._dummy_run

    @functools.wraps(prepare)
    def prepared(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        answer = prepare(scheduler_output, *args, **kwargs)
        laid_out(view.batch(scheduler_output, answer))
        return answer

    @functools.wraps(execute)
    def executed(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return execute(scheduler_output, *args, **kwargs)
        before(scheduler_output)
        answer = execute(scheduler_output, *args, **kwargs)
        after()
        return answer

    @functools.wraps(dummy_run)
    def without_requests(*args: Any, **kwargs: Any) -> Any:
        dummy()
        return dummy_run(*args, **kwargs)

    setattr(runner, view.prepare, prepared)
    runner.execute_model, runner._dummy_run = executed, without_requests
