"""The methods of vLLM that are wrapped in the engine core and in front ends.

This module is imported wherever vLLM loads its plug-ins, and imports nothing that is large: what an engine with
moe-route needs is imported when there is one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from moe_route.integrations.serving.options import Options
from moe_route.integrations.vllm.options import LEFT, OFF, PATIENCE, PREFIX, options_of

if TYPE_CHECKING:
    from moe_route.integrations.serving.plans import PlannedItems
    from moe_route.integrations.vllm.books import Books

# ---- the engine core


def follow_core(core: Any, process: Any) -> None:
    """Wrap the methods of vLLM's engine core: its verbs, its requests, its steps, its beginning and its end."""
    add_request, collective_rpc, shutdown = core.add_request, core.collective_rpc, core.shutdown
    post_step, initialize = core.post_step, core._initialize_kv_caches
    handle, runs_on = process._handle_client_request, process._handle_shutdown

    def books_of(self: Any) -> Books | None:
        if not hasattr(self, "moe_route_books"):
            options = options_of(self)
            self.moe_route_books = None
            if options is not None:
                from moe_route.integrations.vllm.books import Books

                self.moe_route_books = Books(self, options, collective_rpc)
        books: Books | None = self.moe_route_books
        return books

    @functools.wraps(initialize)
    def initialized(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = initialize(self, *args, **kwargs)
        if (books := books_of(self)) is not None:
            books.open()
        return made

    @functools.wraps(add_request)
    def salted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (books := books_of(self)) is not None:
            books.arrived(request)
        return add_request(self, request, *args, **kwargs)

    @functools.wraps(collective_rpc)
    def called(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        books = books_of(self)
        if books is None or not isinstance(method, str) or not method.startswith(PREFIX):
            return collective_rpc(self, method, timeout, args, kwargs)
        return books.call(method.removeprefix(PREFIX), timeout, args, kwargs)

    def answering(step: Any) -> Any:
        @functools.wraps(step)
        def answered(self: Any) -> Any:
            outputs, ran = step(self)
            if (books := books_of(self)) is not None:
                books.answered(outputs)
            return outputs, ran

        return answered

    @functools.wraps(post_step)
    def stepped(self: Any, model_executed: bool) -> None:
        post_step(self, model_executed)
        if (books := books_of(self)) is not None:
            books.stepped(ran=model_executed)

    @functools.wraps(handle)
    def handled(self: Any, request_type: Any, request: Any) -> Any:
        if (books := books_of(self)) is not None:
            books.stepped(ran=False)
        return handle(self, request_type, request)

    @functools.wraps(runs_on)
    def ending(self: Any) -> bool:
        runs: bool = runs_on(self)
        if not runs:  # shutdown() is late: vLLM has given up its handlers then, and one more signal ends the process
            close(self)
        return runs

    @functools.wraps(shutdown)
    def ended(self: Any) -> None:
        close(self)
        shutdown(self)

    def close(self: Any) -> None:
        if (books := books_of(self)) is not None:
            books.close()

    def answered(self: Any, verb: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        books = books_of(self)
        return ["refused", OFF] if books is None else books.answer(verb, args, kwargs)

    core.add_request, core.collective_rpc, core.shutdown = salted, called, ended
    core.step, core.step_with_batch_queue = answering(core.step), answering(core.step_with_batch_queue)
    core.post_step, core._initialize_kv_caches, core.moe_route_answer = stepped, initialized, answered
    process._handle_client_request, process._handle_shutdown = handled, ending


def follow_scheduler(scheduler: Any) -> None:
    """Tell the workers with every step which tokens became text, and which requests were given up."""
    schedule, finish_requests = scheduler.schedule, scheduler.finish_requests

    @functools.wraps(schedule)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if options_of(self) is None:
            return schedule(self, *args, **kwargs)
        from moe_route.integrations.vllm.texts import ABORTED, aborted_of, texts_of

        texts = texts_of(self)
        news = None if texts is None else texts.news()
        step = schedule(self, *args, **kwargs)
        if texts is not None and news is not None:
            texts.attach(news, step, self.requests)
        if aborted_of(self):
            setattr(step, ABORTED, set(aborted_of(self)))
            aborted_of(self).clear()
        return step

    @functools.wraps(finish_requests)
    def finished(self: Any, request_ids: Any, finished_status: Any) -> Any:
        if request_ids is not None and not isinstance(request_ids, str):
            request_ids = list(request_ids)
        if options_of(self) is not None and finished_status.name == "FINISHED_ABORTED":
            from moe_route.integrations.vllm.texts import note_aborted

            names = [request_ids] if isinstance(request_ids, str) else request_ids
            known = [self.requests.get(name) for name in (list(self.requests) if names is None else names)]
            note_aborted(self, names, [one for one in known if one is not None and not one.is_finished()])
        return finish_requests(self, request_ids, finished_status)

    scheduler.schedule, scheduler.finish_requests = told, finished


# ---- the front end


def follow_front(engine: Any, async_engine: Any, output_processor: Any, manager: Any) -> None:
    """Let front ends say which requests they give up, and give a core that saves the time to do so."""
    abort, abort_async, ids_of = engine.abort_request, async_engine.abort, output_processor.abort_requests
    start, shutdown = manager.__init__, manager.shutdown

    @functools.wraps(abort)
    def aborted(self: Any, request_ids: Any, internal: bool = False) -> Any:
        self.output_processor.moe_route_marks = options_of(self) is not None
        return abort(self, request_ids, internal)

    @functools.wraps(abort_async)
    async def aborted_async(self: Any, request_id: Any, internal: bool = False) -> Any:
        self.output_processor.moe_route_marks = options_of(self) is not None
        return await abort_async(self, request_id, internal)

    @functools.wraps(ids_of)
    def marked(self: Any, request_ids: Any, internal: bool) -> Any:
        names = ids_of(self, request_ids, internal)
        if not getattr(self, "moe_route_marks", False):
            return names
        return [*names, *(LEFT + name for name in names if not name.startswith(LEFT))]

    @functools.wraps(start)
    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("vllm_config") or next(one for one in args if hasattr(one, "additional_config"))
        options = Options.of(config.additional_config)
        self.moe_route_saves = options is not None and options.save is not None
        start(self, *args, **kwargs)

    @functools.wraps(shutdown)
    def ended(self: Any, timeout: float | None = None) -> None:
        if getattr(self, "moe_route_saves", False):
            timeout = max(timeout or 0.0, PATIENCE)  # vLLM's own is 0: it kills a core at once
        shutdown(self, timeout)

    engine.abort_request, async_engine.abort, output_processor.abort_requests = aborted, aborted_async, marked
    manager.__init__, manager.shutdown = started, ended


def planned_items(processor: Any, options: Options) -> PlannedItems:
    """What a front end knows of its plans."""
    from moe_route.integrations.serving.plans import PlannedItems

    if not hasattr(processor, "moe_route_items"):
        processor.moe_route_items = PlannedItems(options)
    items: PlannedItems = processor.moe_route_items
    return items


def split_weights(model_config: Any) -> None:
    """From now on, let answers over HTTP have the weights of routed experts beside their ids."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponseChoice
    from vllm.entrypoints.openai.completion.protocol import CompletionResponseChoice

    from moe_route.integrations.vllm.returned import split

    experts = model_config.get_num_experts()
    for kind in (CompletionResponseChoice, ChatCompletionResponseChoice):
        natural = kind.__init__
        if getattr(natural, "moe_route", False):
            continue

        @functools.wraps(natural)
        def made(self: Any, *, natural: Any = natural, **data: Any) -> None:
            natural(self, **data)
            split(self, experts)

        setattr(made, "moe_route", True)  # noqa: B010
        kind.__init__ = made
