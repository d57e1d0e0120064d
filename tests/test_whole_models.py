"""Whole models on what no column of docs/support.csv asks: a model of models, and towers that route."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from harness.tiny_models import tokens
from harness.whole_models import (
    BEGIN,
    CANVAS,
    END,
    IMAGE,
    PATCHES,
    VIDEO,
    omni_model,
    picture_inputs,
    spoken_to,
    text_inputs,
    whole_model,
)
from paths.oracle import assert_counted, assert_phases, watching
from paths.subject import run

import moe_route as mr
from moe_route.calls.reader import placeholder_ids, tokens_of_patches
from moe_route.routers import RouterInfo

# ---- Qwen3-Omni


class Speaker:
    """A whole Qwen3-Omni that answers two users, and what its talker was given and said."""

    def __init__(self) -> None:
        self.model = omni_model()
        self.given = spoken_to(self.model)
        self.masks: list[Tensor] = []  # of the talker's calls
        self.said: list[Tensor] = []  # [batch] codes, step by step
        self.model.talker.register_forward_pre_hook(self._look, with_kwargs=True)
        self.model.talker.codec_head.register_forward_hook(self._listen)

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.masks.append(kwargs["attention_mask"])

    def _listen(self, module: Any, args: Any, logits: Tensor) -> None:
        self.said.append(logits[:, -1, :100].argmax(-1))

    def speak(self, **options: Any) -> list[Tensor]:
        self.masks.clear()
        self.said.clear()
        torch.manual_seed(3)
        limits = {"thinker_max_new_tokens": 4, "thinker_eos_token_id": None, "talker_max_new_tokens": 6}
        text, sounds = self.model.generate(
            **self.given, **limits | options, talker_do_sample=False, talker_repetition_penalty=1.0
        )
        return [text, *sounds]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


def test_thinker_and_talker_are_parts_of_one_recording(speaker: Speaker) -> None:
    plain = speaker.speak()
    with mr.attach(speaker.model) as routed:
        assert [router.role for router in routed.routers] == ["thinker"] * 3 + ["talker"] * 3
        assert "(talker)" in str(mr.describe(speaker.model))
        with (
            watching(routed.routers) as seen,
            routed.record(sequences=True) as recorder,
            recorder.labels(["x", "y"], items=[0, 0]),
        ):
            language_model = speaker.speak()
    assert all(torch.equal(now, then) for now, then in zip(language_model, plain, strict=True))
    masks = {"thinker": speaker.given["attention_mask"].bool(), "talker": speaker.masks[0].bool()}
    assert not masks["talker"].all()

    def valid(router: RouterInfo, number: int) -> Tensor | None:
        return None if number else masks[router.role]

    statistics = recorder.statistics()
    assert_phases(statistics, routed.routers, seen, valid)
    assert statistics.sequences().tolist() == [1, 1]
    for row, group in enumerate("xy"):

        def of_row(router: RouterInfo, number: int, row: int = row) -> Tensor:
            mine = torch.zeros(2, len(seen[router.layer][number][0]) // 2, dtype=torch.bool)
            mine[row] = True
            return mine if number else mine & masks[router.role]

        assert_counted(statistics.select(groups=[group]), routed.routers, seen, of_row)


def test_the_talker_is_not_counted_past_the_end_of_a_speech(speaker: Speaker) -> None:
    speaker.speak()
    said = torch.stack(speaker.said[:-1], 1)  # [batch, steps]: what is fed back
    lengths = {stop: (said != stop).long().cumprod(1).sum(1) for stop in said.flatten().tolist()}
    stop = next(stop for stop, length in lengths.items() if len(length.unique()) > 1)
    with mr.attach(speaker.model) as routed, routed.record() as recorder, recorder.labels(["x", "y"]):
        speaker.speak(talker_eos_token_id=stop)
    talked = recorder.statistics().tokens("decode")[:, [router.role == "talker" for router in routed.routers]]
    np.testing.assert_array_equal(talked, np.broadcast_to(lengths[stop][:, None], talked.shape))


# ---- vision towers that route


@pytest.fixture
def seeing() -> tuple[Any, dict[str, Tensor]]:
    model = whole_model("dots3_note_with_vision")
    return model, picture_inputs("dots3_note_with_vision", model)


def test_a_patch_has_the_labels_of_its_token(seeing: tuple[Any, dict[str, Tensor]]) -> None:
    model, given = seeing
    of_pictures = (given["input_ids"] == IMAGE).nonzero().tolist()
    labels = [["rest"] * given["input_ids"].shape[1] for _ in range(2)]
    for name, (row, column) in {"first": of_pictures[0], "last": of_pictures[-1]}.items():
        labels[row][column] = name
    with mr.attach(model) as routed:
        with watching(routed.routers) as seen, routed.record() as recorder, recorder.labels(labels):
            run(model, given)
        vision = [router.layer for router in routed.routers if router.role == "vision"]
        statistics = recorder.statistics()
        assert statistics.groups == ("rest", "first", "last")
        rest = (len(of_pictures) - 2) * PATCHES
        assert statistics.tokens()[:, vision].tolist() == [[rest] * 2, [PATCHES] * 2, [PATCHES] * 2]
        counts = statistics.select(groups=["last"]).token_sum("counts")[0]
        for layer in vision:
            assert counts[layer].tolist() == seen[layer][0][0][-PATCHES:].sum(0).tolist()


def test_generate_lets_a_tower_see_pictures_ahead_of_the_prompt(seeing: tuple[Any, dict[str, Tensor]]) -> None:
    """What is recorded of the prompt is that of one call, fingerprint and all."""
    model, given = seeing
    found = []
    for call in (lambda: run(model, given), lambda: model.generate(**given, max_new_tokens=1, do_sample=False)):
        with mr.attach(model) as routed, routed.record(sequences=True) as recorder:
            call()
        found.append(recorder.statistics())
    np.testing.assert_array_equal(*(each.token_sum("counts") for each in found))
    assert found[0].metadata["fingerprint"] == found[1].metadata["fingerprint"]
    assert found[1].sequences().tolist() == [2]


def test_a_tower_that_fails_ahead_of_the_prompt_leaves_its_sequences_out(seeing: tuple[Any, dict[str, Tensor]]) -> None:
    model, given = seeing
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with mr.attach(model) as routed:
        last = [router for router in routed.routers if router.role == "vision"][-1].block
        with routed.record(sequences=True) as recorder:
            handle = last.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model.generate(**given, **options)
            handle.remove()
            model.generate(**given, **options)
    statistics = recorder.statistics()
    assert statistics.sequences().tolist() == [2]
    assert statistics.metadata["abandoned_sequences"] == 2


def test_a_picture_in_a_second_turn_continues_the_first(seeing: tuple[Any, dict[str, Tensor]]) -> None:
    model, given = seeing
    first = {"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
    with mr.attach(model) as routed, routed.record(sequences=True) as recorder:
        answer = model.generate(**first, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        whole = {
            "input_ids": torch.cat([answer.sequences[:, :-1], given["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones(2, 5, dtype=torch.int64), given["attention_mask"]], 1),
            "past_key_values": answer.past_key_values,
        }
        model.generate(**given | whole, max_new_tokens=1, do_sample=False)
    statistics = recorder.statistics()
    assert statistics.sequences().tolist() == [2]
    text = int(given["attention_mask"].sum())
    vision = [router.role == "vision" for router in routed.routers]
    assert statistics.tokens()[0].tolist() == [2 * 4 * PATCHES if sees else 2 * 5 + text for sees in vision]


def test_a_drawn_plan_steers_patches_too(seeing: tuple[Any, dict[str, Tensor]]) -> None:
    model, given = seeing
    plan = mr.Plan.forbid({layer: [0] for layer in range(4)}).random_per_token(5)
    with mr.attach(model) as routed, routed.record() as recorder, routed.steer(plan):
        run(model, given)
    statistics = recorder.statistics()
    assert (statistics.scalar("steered") == statistics.tokens()).all()


def test_pictures_and_videos_beside_each_other() -> None:
    """As many patches to each token; where two kinds would come out even, it is not known whose they are."""
    ids = torch.tensor([[BEGIN, IMAGE, IMAGE, END, VIDEO, VIDEO, VIDEO]])
    assert tokens_of_patches(ids, (IMAGE, VIDEO), 4).tolist() == [1, 1, 2, 2]
    assert tokens_of_patches(ids, (IMAGE, VIDEO), 9).tolist() == [4] * 3 + [5] * 3 + [6] * 3
    assert tokens_of_patches(ids, (IMAGE, VIDEO), 12) is None
    assert tokens_of_patches(ids, (IMAGE, VIDEO), 5) is None
    assert tokens_of_patches(None, (IMAGE,), 4) is None
    assert placeholder_ids(whole_model("dots3_note_with_vision")) == (IMAGE, VIDEO)
    assert placeholder_ids(torch.nn.Linear(1, 1)) == ()


def test_a_tower_that_is_shown_nothing_is_no_surprise(
    seeing: tuple[Any, dict[str, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    model, given = seeing
    with mr.attach(model) as routed, routed.record() as recorder:
        run(model, text_inputs("dots3_note_with_vision"))
    recorder.statistics()
    assert not caplog.records
    with mr.attach(model) as routed, routed.record() as recorder:
        model.model.language_model.layers[1].mlp.forward = lambda hidden: hidden  # one layer goes round its router
        run(model, given)
        del model.model.language_model.layers[1].mlp.forward
    recorder.statistics()
    assert "1 of 4 layers counted no token: model.language_model.layers.1" in caplog.text


# ---- blocks that are denoised


def test_a_diffusion_is_not_compiled_while_it_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its static cache makes `generate` compile each half as one graph, in which nobody can be asked about a call."""
    model = whole_model("diffusion_gemma")

    def compiled(*args: Any) -> None:
        raise RuntimeError("compiled")

    monkeypatch.setattr(model, "_compile_functions", compiled)
    given = {"input_ids": tokens(2, 5), "cache_implementation": "static", "max_new_tokens": CANVAS}
    with mr.attach(model) as routed:
        with pytest.raises(RuntimeError, match="compiled"):
            model.generate(**given)
        with routed.record() as recorder:
            model.generate(**given)
    steps = model.generation_config.max_denoising_steps
    assert recorder.statistics().tokens("decode").max() == 2 * CANVAS * steps
    assert recorder.statistics().tokens("prefill").max() == 2 * 5
