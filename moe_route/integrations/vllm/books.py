"""The books of an engine core: statistics that are saved while it runs and when it ends, and read when it starts.

The core also knows what no worker does: which requests run, which have ended since the latest step, and which of those
were given up.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from moe_route.base import files
from moe_route.base.table import number_of
from moe_route.integrations.serving.answers import Failure, answer, failed, joined, loaded, replica_path, saved
from moe_route.integrations.serving.books import added, newest_of, ranked
from moe_route.integrations.serving.options import EngineNotSupportedError, Options
from moe_route.integrations.vllm.options import CHANGING, PATIENCE, PREFIX, find
from moe_route.integrations.vllm.prefixes import Prefixes
from moe_route.integrations.vllm.returned import AskedExperts
from moe_route.integrations.vllm.texts import aborted_of, texts_of
from moe_route.recording.metadata import config_hash_of
from moe_route.recording.statistics import RecordingError, RoutingStatistics

BETWEEN_WARNINGS = 60.0  # seconds
logger = logging.getLogger("vllm.moe_route")  # vLLM shows what its own loggers say


class Books:
    """What one engine core keeps of its recording, and the verbs on its workers."""

    def __init__(self, core: Any, options: Options, rpc: Callable[..., list[Any]]):
        """``rpc(core, method, timeout, args, kwargs)`` calls a method of all workers."""
        self._core, self._options, self._rpc = core, options, rpc
        caches = core.vllm_config.cache_config.enable_prefix_caching
        self.prefixes = Prefixes(core, options) if caches else None
        model = core.vllm_config.model_config
        self._asked = None
        if options.routed_experts:
            self._asked = AskedExperts(model.get_total_num_hidden_layers(), model.get_num_experts())
        self._base: RoutingStatistics | None = None  # of earlier runs, and of earlier recordings of this one
        self._target: Path | None = None
        self._descriptors: list[int] = []  # of locks
        self._generation = 0
        self._recorded, self._dirty = options.record, False
        self._due, self._warned = time.monotonic() + options.every, -BETWEEN_WARNINGS

    # ---- verbs

    def call(self, verb: str, timeout: float | None = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        """Call a verb of all workers; one that reads or changes is preceded by what the core knows."""
        self._tell()
        try:
            if verb == "statistics" and self._base is not None:
                return [self._whole(*args, **(kwargs or {}))]
            adds = verb == "record" and self._target is not None and self._recorded
            before = self._total() if adds else self._base
            answers = self._rpc(self._core, PREFIX + verb, timeout, args, kwargs)
            if verb == "steer" and failed(answers):
                self._rpc(self._core, f"{PREFIX}take_back")  # from workers that did not refuse it: all steer alike
            whole = joined(answers)
            self._base = before  # a new recording adds to the books
            self._recorded |= verb == "record"
            self._dirty |= verb in CHANGING
            return whole
        finally:
            if self.prefixes is not None and verb in CHANGING:
                self.prefixes.called(verb)

    def answer(self, verb: str, args: Any, kwargs: Any) -> list[Any]:
        """What ``call`` or ``save`` gives, as ``["done", answer]``, or ``["refused", words]`` for what they raise."""
        made = answer(lambda: self._save_now() if verb == "save" else self.call(verb, None, tuple(args), kwargs))
        return ["refused", made.text] if isinstance(made, Failure) else ["done", made]

    def arrived(self, request: Any) -> None:
        """A request comes to the core."""
        if self._asked is not None:
            self._asked.add(request)
        if self.prefixes is not None:
            self.prefixes.prepare(request)

    def answered(self, outputs: Any) -> None:
        """The outputs of a step are about to leave the core: those that ask for their experts get them."""
        ended = self._asked.ended(outputs) if self._asked is not None and self._asked.requests else None
        if ended and self._asked is not None:
            places = self._asked.places(ended)
            self._asked.fill(ended, joined(self._rpc(self._core, f"{PREFIX}routed", None, (places,))))

    def _tell(self) -> None:
        scheduler = self._core.scheduler
        texts = texts_of(scheduler)
        ended = set(scheduler.finished_req_ids)
        aborted = ended & aborted_of(scheduler)
        if texts is not None or ended:
            news = {} if texts is None else texts.news()
            joined(self._rpc(self._core, f"{PREFIX}known", None, (news, ended, aborted)))

    def _whole(self, path: str | None = None, *, partial: bool = False, sequences: bool = True) -> str | bytes:
        """The verb ``statistics``, with what earlier runs counted."""
        made = self._total(partial=partial, sequences=sequences)
        made.verify(partial=partial)
        parallel = self._core.vllm_config.parallel_config
        if path is not None and parallel.data_parallel_size > 1:
            path = replica_path(path, parallel.data_parallel_rank)
        return saved(made, path)

    def _total(self, *, partial: bool = True, sequences: bool = True) -> RoutingStatistics:
        """What this run counted, and earlier ones did."""
        if not self._recorded:
            assert self._base is not None
            return self._base
        given = {"partial": partial, "sequences": sequences}
        answers = joined(self._rpc(self._core, f"{PREFIX}statistics", None, (None,), given))
        made = loaded(RoutingStatistics, next(one for one in answers if one is not None))
        return made if self._base is None else added(self._base, made, sequences=sequences)

    # ---- the file

    def open(self) -> None:
        """Claim the file, read it, and say in the log what is on. The workers hold the model; nothing ran yet.

        Raises ``EngineNotSupportedError`` for a file that another core writes, or of another model.
        """
        reports = joined(self._rpc(self._core, f"{PREFIX}report"))
        layers = list(dict.fromkeys(layer[0] for report in reports for layer in report["layers"]))
        if self._options.save is not None:
            try:
                self._open_file(Path(os.path.abspath(self._options.save)), reports[0]["config_hash"], layers)
            except BaseException:
                self._release()
                raise
        plans = [f"{name} ({digest[:12]})" for name, digest in reports[0]["plans"].items()]
        logger.info(
            "moe_route: %s, %s (%s), %s, %s, %s",
            number_of(len(layers), "MoE layer"),
            number_of(len(self._options.groups), "group"),
            ", ".join(self._options.groups),
            f"plans {', '.join(plans)}" if plans else "no plan",
            "recording" if self._recorded else "not recording",
            f"saves to {self._target} every {self._options.every:g} s" if self._target else "saves nothing",
        )
        if self._target is not None and hasattr(self._core, "input_queue"):
            threading.Thread(target=self._wake, daemon=True, name="moe_route books").start()
            parent = multiprocessing.parent_process()
            if parent is not None:
                threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()

    def _open_file(self, path: Path, config_hash: str, layers: list[str]) -> None:
        parallel = self._core.vllm_config.parallel_config
        rank, together = parallel.data_parallel_rank, parallel.data_parallel_size > 1
        target = ranked(path, rank) if together else path
        if rank:
            self._claim(target)
        else:
            self._claim(path)  # of the generation before, whatever the number of its ranks
            try:
                self._base, newest = newest_of(path)
                if self._base is not None:
                    self._check(path, config_hash, layers)
                    self._base.metadata["generation"] = str(newest + 1)
                    self._base.save(target)
                else:
                    files.check_writable(target)
                self._generation = newest + 1
            except Exception:
                if together:
                    _agreed(self._core, -1)
                raise
        if together:
            self._generation = _agreed(self._core, self._generation)
            if self._generation < 0:
                raise EngineNotSupportedError(f"moe_route: rank 0 could not open {path}: see its error")
        self._target = target

    def _claim(self, path: Path) -> None:
        """Keep other cores from a file; wait for one that is about to end."""
        lock = path.with_name(f".{path.name}.lock")
        if not path.parent.is_dir():
            raise EngineNotSupportedError(f'moe_route: "save": there is no folder {path.parent}: make it first')
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        self._descriptors.append(descriptor)
        deadline = time.monotonic() + PATIENCE
        while files.lock(descriptor) is False:
            if time.monotonic() > deadline:
                raise EngineNotSupportedError(
                    f'moe_route: another engine writes to {path} still: end it, or give "save" another file'
                )
            time.sleep(0.2)

    def _release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _check(self, path: Path, config_hash: str, layers: list[str]) -> None:
        """Raise an error for a file whose statistics do not add up with those of this engine."""
        assert self._base is not None
        what = None
        if config_hash_of(self._base.metadata) != config_hash or list(self._base.layers) != layers:
            what = "statistics of another model"
        elif (self._base.store is not None) != self._options.sequences:
            what = f"statistics {'without' if self._base.store is None else 'with'} sequences"
        if what is not None:
            raise EngineNotSupportedError(f'moe_route: {path} holds {what}: give "save" another file')
        if self._recorded:
            self._total()  # raises what keeps them from adding up

    def stepped(self, *, ran: bool) -> None:
        """A step ended, or time has passed: save what is due. ``ran``: whether tokens were routed."""
        self._dirty |= ran
        if self._target is not None and time.monotonic() >= self._due:
            self.save()

    def save(self) -> int | None:
        """Write the file, if there is something new; returns its tokens. What goes wrong is told in the log alone."""
        self._due = time.monotonic() + self._options.every
        if not self._recorded or not (self._dirty or self._core.scheduler.finished_req_ids):
            return None
        try:
            return self._write()
        except Exception as error:  # an engine serves on without its books; the last whole file stays
            if time.monotonic() - self._warned >= BETWEEN_WARNINGS:
                self._warned = time.monotonic()
                logger.warning("moe_route: the statistics were not saved: %s: %s", type(error).__name__, error)
            return None

    def _write(self) -> int:
        assert self._target is not None  # whoever calls asks for it
        self._tell()
        made = self._total()
        made.metadata["generation"] = str(self._generation)
        made.save(self._target)
        self._dirty = False
        return int(made.tokens().max(axis=1, initial=0).sum())

    def _save_now(self) -> dict[str, Any]:
        """The verb ``save``: as ``save`` does, but whatever is due, and with its errors."""
        if self._target is None:
            raise EngineNotSupportedError('moe_route: this engine saves nothing: start it with the option "save"')
        if not self._recorded:
            raise RecordingError("nothing is recorded, so there is nothing to save: call moe_route_record")
        return {"file": self._target.name, "tokens": self._write()}

    def close(self) -> None:
        """The engine core ends: save for the last time."""
        if self._target is None:
            return
        self._dirty = True
        tokens = self.save()
        if tokens is not None:
            logger.info("moe_route: saved %s, %s", self._target, number_of(tokens, "token"))
        self._target = None
        self._release()

    def _wake(self) -> None:
        """Wake a core that waits for requests, so that it saves what is due."""
        wake = find("vllm.v1.engine:EngineCoreRequestType").WAKEUP
        while self._target is not None:
            time.sleep(self._options.every)
            self._core.input_queue.put_nowait((wake, None))


def _end_with(sentinel: Any) -> None:
    """End this process, as a signal would, once the process of this sentinel is gone: nobody else reaches the core."""
    connection.wait([sentinel])
    logger.info("moe_route: the front end is gone: the engine core saves and ends")
    os.kill(os.getpid(), signal.SIGTERM)


def _agreed(core: Any, generation: int) -> int:
    """The generation that rank 0 opened; all ranks wait for it here."""
    number = torch.tensor([generation if core.vllm_config.parallel_config.data_parallel_rank == 0 else -1])
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=core.dp_group)
    return int(number)
