"""Two processes: data parallelism (FSDP), whose counts add up, and tensor and expert parallelism, whose do not.

The processes are started once for many architectures; `walked` asks them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import MECHANISMS
from harness.whole_models import ROWS
from torch import Tensor, distributed

import moe_route as mr
from moe_route.recording import MergeError, all_reduce
from paths.oracle import assert_counted, assert_forbidden, everything, favorites, watching
from paths.registry import path
from paths.subject import NotApplicableError, Subject, by_transformers, first_sentence, run

RANKS = 2
PATIENCE = timedelta(seconds=1200)


# ---- inside a rank


def batch_of(subject: Subject, model: Any, rank: int) -> dict[str, Tensor]:
    """Another batch for each rank: sequences 2 * rank and 2 * rank + 1 of one larger batch."""
    given = subject.inputs(model, 2 * RANKS)
    return {name: value[2 * rank : 2 * rank + 2] for name, value in given.items()}


def recorded(routed: mr.RoutedModel, given: dict[str, Tensor]) -> mr.RoutingStatistics:
    """One call, recorded and compared with what the experts were given on this rank; and a steered one."""
    with watching(routed.routers) as seen, routed.record(sequences=True) as recorder:
        run(routed.model, given)
    assert_counted(recorder.statistics(), routed.routers, seen, everything)
    experts = favorites(routed.routers, seen)
    if experts:
        with watching(routed.routers) as steered, routed.record() as again, routed.steer(mr.Plan.forbid(experts)):
            run(routed.model, given)
        assert_counted(again.statistics(), routed.routers, steered, everything)
        assert_forbidden(routed.routers, steered, experts, everything)
    return recorder.statistics()


def fully_sharded(subject: Subject, rank: int, folder: File) -> None:
    """FSDP2: the sum over ranks is what one process counts of both batches."""
    from torch.distributed.fsdp import fully_shard

    def sharded() -> Any:
        model = subject.fresh()
        for module in model.modules():
            if type(module).__name__ in (model._no_split_modules or ()):
                fully_shard(module)
        return fully_shard(model)

    whole = subject.model
    if "input_ids" not in subject.inputs(whole):
        raise NotApplicableError("the model takes no token ids")
    given = batch_of(subject, whole, rank)
    plain = by_transformers(lambda: run(sharded(), given))
    expected = np.zeros(())
    with mr.attach(whole) as routed, routed.record(sequences=True) as recorder:
        for each in range(RANKS):
            run(whole, batch_of(subject, whole, each))
    expected = recorder.statistics()
    model = sharded()
    with mr.attach(model) as routed:
        mine = recorded(routed, given)
        assert torch.equal(run(model, given), plain)
    total = all_reduce(mine)
    np.testing.assert_array_equal(total.token_sum("counts"), expected.token_sum("counts"))
    assert total.metadata["fingerprint"] == expected.metadata["fingerprint"]
    assert total.sequences().tolist() == [2 * RANKS]
    assert total.store is not None
    assert len(total.store) == 2 * RANKS


def parallel(subject: Subject, folder: File, **sizes: int) -> None:
    """Every rank routes every token: counts are those of one rank, and are not added up."""
    from transformers.distributed import DistributedConfig

    whole = subject.model
    plan = getattr(whole, "_ep_plan" if "ep_size" in sizes else "_tp_plan", None)
    if not plan:
        raise NotApplicableError("transformers has no plan for it")
    place = folder / subject.name
    if distributed.get_rank() == 0 and not place.exists():
        whole.save_pretrained(place)
    distributed.barrier()
    given = subject.inputs(whole)

    def loaded() -> Any:
        model = type(whole).from_pretrained(place, distributed_config=DistributedConfig(**sizes))
        return model.eval()

    model = by_transformers(loaded)
    plain = by_transformers(lambda: run(model, given))
    with mr.attach(model) as routed:
        mine = recorded(routed, given)
        torch.testing.assert_close(run(model, given), plain)
    alone = [distributed.new_group([each]) for each in range(RANKS)][distributed.get_rank()]
    assert all_reduce(mine, alone) == mine
    with pytest.raises(MergeError, match="same tokens"):
        all_reduce(mine)


MODES: dict[str, Callable[[Subject, int, File], None]] = {
    "FSDP": fully_sharded,
    "tensor parallel": lambda subject, rank, folder: parallel(subject, folder, tp_size=RANKS),
    "expert parallel": lambda subject, rank, folder: parallel(subject, folder, tp_size=RANKS, ep_size=RANKS),
}


def one_rank(rank: int, names: Sequence[str], folder: str) -> None:
    """What one process does: every mode of every architecture, its findings in a file."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    rendezvous = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=PATIENCE)
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        subject = Subject(name)
        for mode, walk in MODES.items():
            torch.manual_seed(0)
            try:
                walk(subject, rank, File(folder))
                found[f"{name}, {mode}"] = ("passed", "")
            except NotApplicableError as reason:
                found[f"{name}, {mode}"] = ("none", str(reason))
            except Exception as error:  # told to the test, which fails
                found[f"{name}, {mode}"] = ("failed", f"{first_sentence(error)}\n{traceback.format_exc()}")
            distributed.barrier()
    File(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


# ---- outside


@cache
def walked(names: tuple[str, ...]) -> list[dict[str, tuple[str, str]]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (names, folder), nprocs=RANKS)
        return [json.loads(File(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]


def tier_of(name: str) -> tuple[str, ...]:
    """The architectures that are walked together with `name`: one a mechanism, or all others."""
    return MECHANISMS if name in MECHANISMS else tuple(each for each in ROWS if each not in MECHANISMS)


def check(subject: Subject, mode: str) -> None:
    if sys.platform == "win32":
        raise NotApplicableError("transformers distributes on Linux")
    for rank, found in enumerate(walked(tier_of(subject.name))):
        kind, reason = found[f"{subject.name}, {mode}"]
        if kind == "none":
            raise NotApplicableError(reason)
        assert kind == "passed", f"rank {rank}: {reason}"


@path(
    "Ranks",
    "FSDP",
    "torch's fully_shard over two gloo ranks: `all_reduce` is the count of one process",
    cost="costly",
)
def fsdp(subject: Subject) -> None:
    check(subject, "FSDP")


@path(
    "Ranks",
    "tensor parallel",
    "transformers' tp_size=2 over two gloo ranks: every rank counts every token, adding up is refused",
    cost="costly",
)
def tensor_parallel(subject: Subject) -> None:
    check(subject, "tensor parallel")


@path(
    "Ranks",
    "expert parallel",
    "transformers' ep_size=2 over two gloo ranks: every rank counts every token, adding up is refused",
    cost="costly",
)
def expert_parallel(subject: Subject) -> None:
    check(subject, "expert parallel")
