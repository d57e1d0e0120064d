"""The callback for the Trainer: its scalars against recordings by hand, in the log history and in TensorBoard files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.tiny_models import tiny_model

from moe_route import attach
from moe_route.analysis import load_balance
from moe_route.recording import RoutingStatistics

transformers = pytest.importorskip("transformers")

from harness import trainers  # noqa: E402
from transformers import Trainer  # noqa: E402

from moe_route.integrations.trainer import RoutingCallback  # noqa: E402

NAMES = {
    "moe/normalized_entropy_mean",
    "moe/normalized_entropy_min",
    "moe/max_share_mean",
    "moe/max_share_max",
    "moe/dead_expert_frac",
    "moe/expert_diversity",
    "moe/max_vio",
}
STEPS, BATCH, LENGTH = 6, 2, 7


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts whose last two tokens are padding in every other one."""
    ids = torch.randint(3, 60, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return [{"input_ids": a, "attention_mask": b, "labels": c} for a, b, c in zip(ids, mask, labels, strict=True)]


def model() -> Any:
    return tiny_model("qwen3_moe", head=True)


class InOrder(trainers.InOrder, Trainer):
    pass


def trainer(subject: Any, folder: Path, count: int = STEPS * BATCH, **options: Any) -> Trainer:
    given: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 0.0,  # the routing of every step is that of the model at the start
        "logging_steps": 3,
    }
    data = rows(count, 0)
    return InOrder(
        subject, trainers.arguments(folder, **{**given, **options}), train_dataset=data, eval_dataset=rows(4, 1)
    )


def by_hand(subject: Any, texts: list[dict[str, torch.Tensor]]) -> RoutingStatistics:
    """A recording of the same texts, without the Trainer."""
    subject.eval()
    with attach(subject) as routed, routed.record() as recorder, torch.no_grad():
        for first in range(0, len(texts), BATCH):
            batch = texts[first : first + BATCH]
            subject(**{name: torch.stack([row[name] for row in batch]) for name in ("input_ids", "attention_mask")})
    return recorder.statistics()


def scalars(run: Trainer, prefix: str = "moe/") -> list[dict[str, float]]:
    """The logged values of the callback, window by window."""
    logged = [{k: v for k, v in entry.items() if k.startswith(prefix)} for entry in run.state.log_history]
    return [entry for entry in logged if entry]


def test_each_window_is_of_its_own_steps(tmp_path: Path):
    run = trainer(model(), tmp_path)
    run.add_callback(RoutingCallback(run))
    run.train()
    windows = scalars(run)
    assert [entry["step"] for entry in run.state.log_history if "moe/max_vio" in entry] == [3, 6]
    assert [set(window) for window in windows] == [NAMES, NAMES]
    texts = rows(STEPS * BATCH, 0)
    for window, part in zip(windows, (texts[: 3 * BATCH], texts[3 * BATCH :]), strict=True):
        assert window == pytest.approx(load_balance(by_hand(run.model, part)).scalars(), abs=1e-6)
    assert windows[0] != windows[1]


def test_an_unfinished_window_is_logged_at_the_end_and_the_model_is_let_go(tmp_path: Path):
    run = trainer(model(), tmp_path)
    run.add_callback(RoutingCallback(run, every=4, by_layer=True))
    run.train()
    windows = scalars(run)
    assert len(windows) == 2
    assert {"moe/max_share_layer_0", "moe/normalized_entropy_layer_0"} <= set(windows[0])
    rest = load_balance(by_hand(run.model, rows(STEPS * BATCH, 0)[4 * BATCH :])).scalars(by_layer=True)
    assert windows[1] == pytest.approx(rest, abs=1e-6)  # by_hand could attach: the callback has let go
    served = [entry for entry in run.state.log_history if "moe_route_tokens/0" in entry]
    assert len(served) == 2
    assert served[1]["moe_route_top_share/0"] == served[1]["moe/max_share_layer_0"]
    assert served[1]["moe_route_steered_share/0"] == 0


def test_evaluation_is_counted_apart(tmp_path: Path):
    run = trainer(model(), tmp_path, eval_strategy="steps", eval_steps=3)
    run.add_callback(RoutingCallback(run, every=6))
    run.train()
    assert len(scalars(run)) == 1
    whole = load_balance(by_hand(run.model, rows(STEPS * BATCH, 0))).scalars()
    assert scalars(run)[0] == pytest.approx(whole, abs=1e-6)
    held_out = load_balance(by_hand(run.model, rows(4, 1))).scalars()
    found = scalars(run, "eval_moe/")
    assert len(found) == 2
    for window in found:
        assert {k.removeprefix("eval_"): v for k, v in window.items()} == pytest.approx(held_out, abs=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_accumulation_count_every_token_once(
    reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[RoutingStatistics] = []

    def keep(statistics: RoutingStatistics) -> Any:
        seen.append(statistics)
        return load_balance(statistics)

    monkeypatch.setattr("moe_route.integrations.trainer.load_balance", keep)
    run = trainer(
        model(),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        gradient_accumulation_steps=3,
        logging_steps=1,
    )
    run.add_callback(RoutingCallback(run))
    run.train()
    assert [int(found.tokens().max()) for found in seen] == [3 * (BATCH * LENGTH - 2)] * 2
    whole = by_hand(run.model, rows(STEPS * BATCH, 0))
    assert ((seen[0] + seen[1]).token_sum("counts") == whole.token_sum("counts")).all()


def test_the_losses_are_those_without_the_callback(tmp_path: Path):
    losses = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        run = trainer(model(), tmp_path, learning_rate=1e-2)
        if with_callback:
            run.add_callback(RoutingCallback(run))
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_tensorboard_has_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run = trainer(model(), tmp_path, report_to=["tensorboard"])
    run.add_callback(RoutingCallback(run))
    run.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in NAMES:
        written = events.Scalars(f"train/{name}")
        assert [event.step for event in written] == [3, 6]
        assert [event.value for event in written] == pytest.approx([w[name] for w in scalars(run)], abs=1e-6)


def test_a_model_with_adapters(tmp_path: Path):
    peft = pytest.importorskip("peft")
    subject = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    run = trainer(subject, tmp_path)
    run.add_callback(RoutingCallback(run))
    run.train()
    first = load_balance(by_hand(subject, rows(STEPS * BATCH, 0)[: 3 * BATCH])).scalars()
    assert scalars(run)[0] == pytest.approx(first, abs=1e-6)


def test_training_again_after_an_error(tmp_path: Path):
    run = trainer(model(), tmp_path)
    callback = RoutingCallback(run)
    run.add_callback(callback)
    step, run.training_step = run.training_step, lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
    with pytest.raises(ZeroDivisionError):
        run.train()
    run.training_step = step  # type: ignore[method-assign]
    run.train()
    assert len(scalars(run)) == 2
    callback.detach()  # again, which does nothing


def test_windows_have_a_step_at_least(tmp_path: Path):
    with pytest.raises(ValueError, match="1 or more"):
        RoutingCallback(trainer(model(), tmp_path), every=0)
