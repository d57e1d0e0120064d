"""HTTP routes and metrics of a server, by vLLM's entry points ``vllm.endpoint_plugins``: VLLM_PLUGINS=moe_route.

Routes lie under /v1, which vLLM's ``--api-key`` guards. No path of the server's disk comes from a client. What a client
asks for in vain is answered with 400 and the words of the error.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import tempfile
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from moe_route.analysis.load import LAYER_METRICS, layer_metrics
from moe_route.base.files import FileRefusedError
from moe_route.integrations.serving.options import Options
from moe_route.integrations.vllm.options import OFF
from moe_route.integrations.vllm.seams import planned_items
from moe_route.recording.statistics import RoutingStatistics

ROOT = "/v1/moe_route"
_LABELS = ("layer", "group")
_LARGEST_PLAN = 64 << 20  # bytes
logger = logging.getLogger("vllm.moe_route")


class RequestRefusedError(ValueError):
    """What a client asks for cannot be done; ``status`` is the code of the answer."""

    def __init__(self, words: str, status: int = 400):
        super().__init__(words)
        self.status = status


class Endpoints:
    """An ``EndpointPlugin`` of vLLM."""

    name = "moe_route"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to the server's application."""
        for path, method, act in (
            ("", "GET", _state),
            ("/statistics", "GET", _statistics),
            ("/report", "GET", _report),
            ("/save", "POST", _save),
            ("/plans/{name}", "PUT", _put_plan),
        ):
            app.add_route(ROOT + path, _answered(act), methods=[method], include_in_schema=False)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called once, when the server has its engine."""
        options = None if engine_client is None else Options.of(engine_client.vllm_config.additional_config)
        state.moe_route = None if options is None else Front(engine_client, options, args)
        if state.moe_route is not None and getattr(engine_client.engine_core, "client_index", 0) == 0:
            state.moe_route.follow_metrics()


class Front:
    """What one API server knows of its engine cores."""

    def __init__(self, engine_client: Any, options: Options, args: Any):
        self.options, self._client = options, engine_client
        keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        self.has_key = any(keys)
        self.servers: int = getattr(engine_client.engine_core, "client_count", 1)
        self._changing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def call(self, verb: str, *args: Any, **kwargs: Any) -> list[Any]:
        """What each engine core answers to a verb. Raises ``RequestRefusedError`` with the words of a refusal."""
        return self._done(await self._call(verb, args, kwargs))

    async def _call(self, verb: str, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
        core = self._client.engine_core
        engines = [*core.core_engines]
        calls = [
            core._call_utility_async("moe_route_answer", verb, list(args), dict(kwargs), engine=one) for one in engines
        ]
        return list(await asyncio.gather(*calls))

    @staticmethod
    def _done(answers: list[Any]) -> list[Any]:
        for kind, words in answers:
            if kind == "refused":
                raise RequestRefusedError(words)
        return [made for _, made in answers]

    async def statistics(self, *, partial: bool, sequences: bool = True) -> Any:
        """What all engine cores counted."""
        from moe_route.integrations.serving.answers import loaded

        answers = await self.call("statistics", partial=partial, sequences=sequences)
        contents = [next(one for one in answer if one is not None) for answer in answers]
        parts = [await asyncio.to_thread(loaded, RoutingStatistics, content) for content in contents]
        return reduce(lambda one, other: one + other, parts)

    async def put(self, name: str, body: bytes, client: str) -> str:
        """Steer by a plan from now on, in all cores or in none; returns its hash."""
        from moe_route.integrations.serving.plans import UNDECLARED, plan_of
        from moe_route.steering.model import PlanError

        if not self.options.admin:
            raise RequestRefusedError('plans are not changed over HTTP: start the server with "admin": true', 403)
        if not self.has_key:
            raise RequestRefusedError("plans are changed by clients with a key: start the server with --api-key", 403)
        if name not in self.options.plan_names:
            raise RequestRefusedError(
                f"there is no plan {name!r}; there are {', '.join(self.options.plan_names)}: reserve a name by the "
                'option "plans"'
            )
        try:
            plan = await asyncio.to_thread(plan_of, body)
            plan.check_groups(self.options.groups, UNDECLARED)
        except (FileRefusedError, PlanError) as error:
            raise RequestRefusedError(str(error)) from error
        if self.servers > 1 and any(rule.table for rule in plan.rules):
            raise RequestRefusedError(
                "the plan has values of single tokens, by item, of which other API servers would not know: start with "
                "--api-server-count 1"
            )
        change = {"client": client, "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        async with self._changing:
            answers = await self._call("steer", (body, name), {"change": change})
            if any(kind == "refused" for kind, _ in answers):
                await self._call("take_back", (), {})  # where it was not refused: all cores steer alike
                self._done(answers)
            planned_items(self._client.input_processor, self.options).steered(body, name)
        logger.info("moe_route: plan %s is now %s, as %s asked", name, plan.hash, client)
        return plan.hash

    def follow_metrics(self) -> None:
        """Bring the metrics up to date from now on."""
        if self.options.record or self.options.save:
            self._task = asyncio.get_running_loop().create_task(self._metrics())

    async def _metrics(self) -> None:
        metrics = RoutingMetrics(self.options.metrics_groups)
        while True:
            try:
                metrics.update(await self.statistics(partial=True, sequences=False))
            except RequestRefusedError as error:  # nothing is recorded
                logger.debug("moe_route: no metrics: %s", error)
            except Exception:
                logger.exception("moe_route: the metrics are no longer brought up to date")
                return
            await asyncio.sleep(self.options.every)


def _answered(act: Callable[[Front, Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """A route: what ``act`` returns, or its refusal in words."""
    from starlette.responses import JSONResponse

    async def route(request: Any) -> Any:
        front = getattr(request.app.state, "moe_route", None)
        try:
            if front is None:
                raise RequestRefusedError(OFF)
            return await act(front, request)
        except RequestRefusedError as error:
            return JSONResponse({"error": {"message": str(error), "code": error.status}}, error.status)

    return route


def _flag(request: Any, name: str) -> bool:
    given = request.query_params.get(name, "false")
    if given not in ("true", "false", "1", "0"):
        raise RequestRefusedError(f"{name}={given}: true or false")
    return given in ("true", "1")


async def _state(front: Front, request: Any) -> Any:
    from starlette.responses import JSONResponse

    reports = [replica[0] for replica in await front.call("report")]
    options = front.options
    saves = {"file": Path(options.save).name, "every": options.every} if options.save else None
    return JSONResponse({"replicas": reports, "saves": saves, "admin": options.admin, "groups": options.groups})


async def _statistics(front: Front, request: Any) -> Any:
    from starlette.responses import Response

    from moe_route.integrations.serving.answers import content_of

    made = await front.statistics(partial=_flag(request, "partial"))
    content = await asyncio.to_thread(content_of, made)
    given = {"Content-Disposition": "attachment; filename=statistics.safetensors"}
    return Response(content, media_type="application/octet-stream", headers=given)


async def _report(front: Front, request: Any) -> Any:
    from starlette.responses import HTMLResponse

    made = await front.statistics(partial=_flag(request, "partial"))
    return HTMLResponse(await asyncio.to_thread(_page, made))


def _page(statistics: Any) -> str:
    from moe_route import report

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "server.safetensors"
        statistics.save(file)
        try:
            return report.page_of(report.content_of(report.read([file]), title="What this server routed"))
        except ValueError as error:
            raise RequestRefusedError(str(error)) from error


async def _save(front: Front, request: Any) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse({"saved": await front.call("save")})


async def _put_plan(front: Front, request: Any) -> Any:
    from starlette.responses import JSONResponse

    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_PLAN:
            raise RequestRefusedError(f"the plan is larger than {_LARGEST_PLAN >> 20} MiB", 413)
    client = "unknown" if request.client is None else str(request.client.host)
    name = request.path_params["name"]
    return JSONResponse({"plan": name, "hash": await front.put(name, bytes(body), client)})


# ---- metrics


class RoutingMetrics:
    """Series by layer and group; "" is the group of all. Gauges are over the time between two updates.

    There is no label for an expert: a model has thousands of pairs of layer and expert.
    """

    def __init__(self, groups: Sequence[str]):
        from prometheus_client import Counter, Gauge

        self._groups = ("", *groups)
        self._tokens = Counter("moe_route_tokens", LAYER_METRICS["tokens"], _LABELS)
        self._gauges = {
            name: Gauge(f"moe_route_{name}", words, _LABELS, multiprocess_mode="mostrecent")
            for name, words in LAYER_METRICS.items()
            if name != "tokens"
        }
        self._unbalanced = Gauge(
            "moe_route_unbalanced_tokens",
            "Tokens that ran and that the layer did not count.",
            ("layer",),
            multiprocess_mode="mostrecent",
        )
        self._before: RoutingStatistics | None = None

    def update(self, now: RoutingStatistics) -> None:
        """Bring the series up to date; the first call tells where they begin."""
        for layer, law in now.metadata.get("unbalanced", {}).items():
            self._unbalanced.labels(layer).set(law["expected"] - law["counted"])
        before, self._before = self._before, now
        if before is None:
            return
        for group in self._groups:
            rows = [row for row, name in enumerate(now.groups) if group in ("", name)]
            values = layer_metrics(now, rows, before)
            for layer, name in enumerate(now.layers):
                self._tokens.labels(name, group).inc(int(values["tokens"][layer]))
                for kind, gauge in self._gauges.items():
                    gauge.labels(name, group).set(float(values[kind][layer]))
