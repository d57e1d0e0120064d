"""The command line on the demo model: every verb, `--json`, and what a user can get wrong."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.commands import SMALL, refused

import moe_route as mr
from moe_route import experiments
from moe_route.base import files
from moe_route.cli import parser
from moe_route.cli.analyze import QUESTIONS
from moe_route.cli.completion import SCRIPTS, candidates
from moe_route.cli.experiment import EXPERIMENTS
from moe_route.cli.options import Parser
from moe_route.data.batches import Text
from moe_route.runs.language_model import LanguageModel


class TestDescribe:
    def test_names_every_layer(self, answer):
        described = answer("describe")
        assert [layer["layer"] for layer in described["layers"]] == list(range(8))
        assert {layer["experts"] for layer in described["layers"]} == {16}
        assert {layer["engine"] for layer in described["layers"]} == {"hook"}

    def test_engine_is_shown(self, answer):
        assert {layer["engine"] for layer in answer("describe", "--engine", "fused")["layers"]} == {"fused"}

    def test_text(self, moe_route):
        code, out, _ = moe_route("describe")
        assert code == 0
        assert "8 MoE layers" in out


class TestRecord:
    def test_counts_what_the_model_routed(self, answer, tmp_path: Path):
        out = tmp_path / "statistics.safetensors"
        recorded = answer("record", "--out", out, *SMALL)
        statistics = mr.RoutingStatistics.load(out)
        assert statistics.groups == ("eng_Latn", "deu_Latn", "swh_Latn")
        assert recorded["groups"] == dict(zip(statistics.groups, statistics.tokens()[:, 0].tolist(), strict=True))
        assert recorded["sequences"] == [4, 4, 4]
        chosen = statistics.token_sum("counts").sum(-1)
        assert (chosen == statistics.tokens() * np.array(statistics.top_k)).all()

    def test_batches_do_not_change_what_is_counted(self, answer, tmp_path: Path):
        counts = []
        for size in (1, 4):
            out = tmp_path / f"{size}.safetensors"
            answer("record", "--out", out, *SMALL, "--batch-size", size)
            counts.append(mr.RoutingStatistics.load(out))
        assert (counts[0].tokens() == counts[1].tokens()).all()
        # another batch shape is another matrix product: a near tie may fall the other way, and nothing more
        moved = np.abs(counts[0].token_sum("counts") - counts[1].token_sum("counts")).sum()
        assert moved <= 0.01 * counts[0].token_sum("counts").sum()

    def test_reads_a_folder_like_flores(self, answer, tmp_path: Path):
        split = tmp_path / "flores" / "devtest"
        split.mkdir(parents=True)
        (split / "eng_Latn.devtest").write_text("A sentence.\nAnother sentence.\n", encoding="utf-8")
        (split / "deu_Latn.devtest").write_text("Ein Satz.\nNoch ein Satz.\n", encoding="utf-8")
        recorded = answer("record", "--data", tmp_path / "flores", "--out", tmp_path / "s.safetensors")
        assert list(recorded["groups"]) == ["eng_Latn", "deu_Latn"]

    def test_steered_recording_says_so(self, answer, files, tmp_path: Path):
        out = tmp_path / "steered.safetensors"
        answer("record", "--out", out, "--plan", files["plan"], *SMALL)
        statistics = mr.RoutingStatistics.load(out)
        assert statistics.metadata["plans"] == [mr.Plan.load(files["plan"]).hash]
        assert statistics.scalar("steered").sum() > 0

    def test_what_was_recorded_before_ctrl_c_is_kept(self, moe_route, monkeypatch, tmp_path: Path):
        out = tmp_path / "statistics.safetensors"
        interrupt_in_call(monkeypatch, 2)
        code, text, _ = moe_route("record", "--out", out, "--metrics", tmp_path / "m.prom", *SMALL)
        assert code == 130
        assert "interrupted: these are 8 of 12 texts" in text
        statistics = mr.RoutingStatistics.load(out)
        assert statistics.sequences().sum() == 8  # the call that ran went through to its end
        statistics.verify()
        total = f'moe_route_tokens_total{{group="",layer="{statistics.layers[0]}"}} {statistics.tokens()[:, 0].sum()}.0'
        assert total in (tmp_path / "m.prom").read_text().splitlines()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_second_ctrl_c_ends_at_once(self, moe_route, monkeypatch, tmp_path: Path):
        interrupt_in_call(monkeypatch, 2, times=2)
        code, out, err = moe_route("record", "--out", tmp_path / "s.safetensors", *SMALL)
        assert (code, out) == (130, "")
        assert "interrupted" in err
        assert not list(tmp_path.iterdir())

    def test_texts_of_every_length_come_early(self):
        model = LanguageModel.load()
        texts = [Text("g", str(n), "word " * (n + 1)) for n in range(64)]
        lengths = [batch.inputs["input_ids"].shape[1] for batch in model.batches(texts, batch_size=4)]
        assert lengths[0] == max(lengths)
        assert lengths != sorted(lengths, reverse=True)
        assert min(lengths[1:6]) < np.median(lengths) < max(lengths[1:6])


def interrupt_in_call(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    """Press Ctrl-C while the model runs its batch of that number."""
    run, calls = LanguageModel.run, []

    def interrupted(self: LanguageModel, batch: Any, positions: Any = None) -> Any:
        calls.append(batch)
        if len(calls) == number:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return run(self, batch, positions)

    monkeypatch.setattr(LanguageModel, "run", interrupted)


class TestAnalyze:
    def test_divergence(self, answer, files):
        result = answer("analyze", "divergence", files["general"], "--reference", "eng_Latn")
        assert result["groups"] == ["deu_Latn", "swh_Latn"]
        assert result["pairs"] == 4
        values = np.array(result["values"])
        assert values.shape == (2, 8)
        assert ((values > 0) & (values < 1)).all()

    def test_entropy(self, answer, files):
        result = answer("analyze", "layers", files["general"], "--of", "entropy")
        token, sequence = np.array(result["token"]), np.array(result["sequence"])
        assert ((token > 0) & (token < sequence) & (sequence < np.log(16))).all()

    def test_experts_make_a_plan_for_the_layers_asked_for(self, answer, files, tmp_path: Path):
        out = tmp_path / "plan.safetensors"
        given = (files["task"], "--baseline", files["general"], "--group", "eng_Latn", "--threshold", "0.05")
        result = answer("analyze", "experts", *given, "--layers", "2-5", "--plan", out)
        assert set(map(int, result["experts"])) <= {2, 3, 4, 5}
        assert mr.Plan.load(out)

    def test_statistics_of_two_files_add_up(self, answer, files):
        both = answer("analyze", "layers", files["general"], files["task"], "--of", "entropy")
        assert both["groups"] == ["eng_Latn", "deu_Latn", "swh_Latn"]
        one, other = (answer("analyze", "layers", files[name], "--of", "entropy") for name in ("general", "task"))
        low, high = np.minimum(one["token"], other["token"]), np.maximum(one["token"], other["token"])
        assert ((low <= both["token"]) & (both["token"] <= high)).all()


class TestPlot:
    @pytest.mark.parametrize("kind", ["divergence", "entropy", "heat-map"])
    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_writes_a_picture(self, answer, files, tmp_path: Path, kind: str, suffix: str):
        out = tmp_path / f"{kind}.{suffix}"
        answer("plot", kind, files["general"], "--out", out)
        start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
        assert out.read_bytes().startswith(start)

    def test_options_that_the_picture_does_not_take_are_refused(self, moe_route, files, tmp_path: Path):
        out = ("--out", tmp_path / "x.png")
        refused(moe_route("plot", "heat-map", files["general"], *out, "--layers", "2-5"), "heat-map", "--layers")
        refused(moe_route("plot", "entropy", files["general"], *out, "--group", "deu_Latn"), "entropy", "--group")
        refused(moe_route("plot", "divergence-matrix", files["general"], *out, "--layers", "2-9"), "8 layers")
        assert not list(tmp_path.iterdir())


class TestSteer:
    def test_losses_by_language(self, answer, files):
        result = answer("steer", "--plan", files["plan"], *SMALL)
        assert [row["language"] for row in result["languages"]] == ["eng_Latn", "deu_Latn", "swh_Latn"]
        for row in result["languages"]:
            assert row["low"] <= row["change"] <= row["high"]
            assert row["steered"] == pytest.approx(row["loss"] + row["change"])
        assert any(row["change"] != 0 for row in result["languages"])

    def test_a_plan_of_strength_zero_changes_nothing(self, answer, files):
        result = answer("steer", "--plan", files["plan"], "--strength", "0", *SMALL)
        assert [row["change"] for row in result["languages"]] == [0, 0, 0]

    def test_prompt(self, answer, files):
        result = answer("steer", "--plan", files["plan"], "--prompt", "Anna has five", "--max-new-tokens", "4")
        assert result["natural"]
        assert result["steered"]


class TestDoctor:
    def test_is_well(self, answer):
        result = answer("doctor")
        assert all(check["ok"] for check in result["checks"])


class TestWhatAUserGetsWrong:
    @pytest.mark.parametrize(
        "verb",
        [
            ("record", *SMALL),
            ("plot", "entropy", __file__),
            ("analyze", "experts", __file__, "--baseline", __file__),
        ],
        ids=lambda verb: verb[0],
    )
    def test_an_output_that_cannot_be_written_is_refused_before_the_work(
        self, moe_route, monkeypatch, tmp_path: Path, verb: tuple[str, ...]
    ):
        monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        result = moe_route(*verb, "--out", tmp_path / "missing" / "x.png")
        refused(result, "missing")
        assert "Errno" not in result[2]
        assert not list(tmp_path.iterdir())

    def test_two_results_in_one_file(self, moe_route, files, tmp_path: Path):
        one = ("--out", tmp_path / "a.safetensors")
        refused(moe_route("record", *one, "--trace", tmp_path / "." / "a.safetensors", *SMALL), "one file")
        refused(moe_route("record", *one, "--metrics", tmp_path / "a.safetensors", *SMALL), "one file")
        found = ("--task", files["task"], "--baseline", files["general"], "--group", "eng_Latn")
        refused(moe_route("analyze", "experts", *found, *one, "--plan", tmp_path / "a.safetensors"), "one file")
        assert not list(tmp_path.iterdir())

    def test_a_demo_whose_folder_is_a_file(self, moe_route, monkeypatch, tmp_path: Path):
        monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        (tmp_path / "demo").write_text("", encoding="utf-8")
        refused(moe_route("demo", "--out", tmp_path / "demo"), "demo")

    def test_a_folder_that_is_not_there(self, moe_route, tmp_path: Path):
        refused(moe_route("describe", tmp_path / "nothing"), "there is no folder", "nothing")

    def test_an_option_that_is_not_there(self, moe_route, tmp_path: Path):
        code, out, err = moe_route("record", "--langages=eng_Latn", "-x", "--out", tmp_path / "s.safetensors")
        assert (code, out) == (2, "")
        assert err.startswith("moe-route: no option --langages, -x: did you mean --languages?")
        assert err.count("\n") == 1
        refused(moe_route("analyze", "divergence", "none.safetensors", "--zzz"), "no option --zzz", "divergence --help")
        refused(moe_route("analyse"), "no command 'analyse'", "did you mean analyze?")
        refused(moe_route("analyze", "divergences"), "no command", "did you mean divergence?")
        refused(moe_route("record", "--lang", "eng_Latn"), "no option --lang", "--languages")  # written in full

    def test_an_option_that_is_not_there_is_named_before_one_that_is_missing(self, moe_route):
        refused(moe_route("record", "--outt", "s.safetensors"), "no option --outt", "did you mean --out?")
        refused(moe_route("record"), "--out")

    def test_a_model_that_is_named_twice(self, moe_route):
        refused(moe_route("describe", "demo", "--model", "other"), "demo", "other", "leave one out")

    def test_a_recording_is_not_written_over(self, moe_route, answer, files, monkeypatch, tmp_path: Path):
        out = tmp_path / "s.safetensors"
        out.write_bytes(files["general"].read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
            refused(moe_route("record", "--out", out, *SMALL), "s.safetensors exists", "--force")
        answer("record", "--out", out, "--force", "--languages", "eng_Latn", "--limit", "2")
        assert mr.RoutingStatistics.load(out).groups == ("eng_Latn",)

    def test_options_that_would_be_ignored(self, moe_route, files):
        general = files["general"]
        refused(moe_route("analyze", "divergence", general, "--edge", "2"), "--edge", "leave it out")
        refused(moe_route("analyze", "layers", general, "--of", "consistency", "--pool"), "--pool", "consistency")
        refused(moe_route("analyze", "similarity", general, "--accuracy", "0.5"), "--accuracy", "all pairs")
        refused(moe_route("analyze", "geometry", general, "--device", "cpu"), "--device", "--weights")
        refused(moe_route("steer", "--plan", files["plan"], "--prompt", "a", "--limit", "2"), "--limit", "--prompt")
        refused(moe_route("steer", "--plan", files["plan"], "--controls", "2"), "--controls", "--strengths")
        refused(moe_route("plan", "show", files["plan"], "--groups", "eng_Latn"), "--groups", "--on")
        refused(moe_route("prune", general, "--keep", "0.5", "--limit", "2"), "--limit", "--measure")

    def test_task_experts_of_several_groups_without_a_name(self, moe_route, files):
        given = ("analyze", "experts", files["task"], "--baseline", files["general"])
        refused(moe_route(*given), "3 groups", "swh_Latn", "--group")

    def test_statistics_that_are_not_there(self, moe_route, tmp_path: Path):
        refused(
            moe_route("analyze", "layers", tmp_path / "no.safetensors", "--of", "entropy"),
            "no.safetensors",
            "does not exist",
        )

    def test_a_truncated_file(self, moe_route, files, tmp_path: Path):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(files["general"].read_bytes()[:-100])
        refused(moe_route("analyze", "layers", cut, "--of", "entropy"), "truncated")

    def test_a_file_of_another_kind(self, moe_route, files):
        refused(moe_route("analyze", "layers", files["plan"], "--of", "entropy"), "plan", "statistics")

    def test_a_dense_model(self, moe_route, tmp_path: Path):
        from transformers import LlamaConfig, LlamaForCausalLM

        _, tokenizer = mr.data.load_demo_model()
        tokenizer.save_pretrained(tmp_path)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(tmp_path)
        refused(moe_route("describe", tmp_path), "LlamaForCausalLM", "no router")

    def test_a_plan_for_another_model(self, moe_route, tmp_path: Path):
        plan = mr.Plan.activate({70: [3]}, strength=0.5)
        plan.save(tmp_path / "plan.safetensors")
        refused(moe_route("steer", "--plan", tmp_path / "plan.safetensors", *SMALL), "70")

    def test_a_language_that_is_not_there(self, moe_route, tmp_path: Path):
        result = moe_route("record", "--out", tmp_path / "s.safetensors", "--languages", "eng_Latn,xxx_Xxxx")
        refused(result, "xxx_Xxxx", "eng_Latn")
        assert not list(tmp_path.iterdir())

    def test_a_group_that_was_not_recorded(self, moe_route, files):
        refused(moe_route("analyze", "divergence", files["general"], "--reference", "fra_Latn"), "fra_Latn")

    def test_a_corpus_that_is_ragged(self, moe_route, tmp_path: Path):
        (tmp_path / "texts.tsv").write_text("item\teng_Latn\tdeu_Latn\n1\tonly one\n", encoding="utf-8")
        refused(moe_route("record", "--data", tmp_path / "texts.tsv", "--out", tmp_path / "s.safetensors"), "line 2")

    def test_a_device_that_is_not_there(self, moe_route):
        refused(moe_route("describe", "--load", "--device", "cuda:99"), "cuda:99", "cpu")
        refused(moe_route("describe", "--load", "--device", "abacus"), "abacus")

    def test_a_dtype_that_is_none(self, moe_route):
        refused(moe_route("describe", "--load", "--dtype", "bfloat15"), "bfloat15", "bfloat16")

    def test_a_device_without_kernels(self, moe_route, tmp_path: Path):
        refused(moe_route("record", "--device", "meta", "--out", tmp_path / "s.safetensors", *SMALL), "meta", "cpu")

    def test_a_picture_of_no_known_kind(self, moe_route, files, tmp_path: Path):
        refused(moe_route("plot", "entropy", files["general"], "--out", tmp_path / "x.gif"), "x.gif", ".png")

    @pytest.mark.parametrize(
        ("layers", "problem"),
        [("two", "write them as 2-5"), ("5-2", "write 2-5"), ("2-", "write them as"), ("1-2-3", "write them as")],
    )
    def test_layers_written_wrong(self, moe_route, files, layers: str, problem: str):
        code, out, err = moe_route("plot", "divergence", files["general"], "--out", "x.png", "--layers", layers)
        assert (code, out) == (2, "")
        assert f"{layers!r}" in err
        assert problem in err

    @pytest.mark.parametrize("number", ["x", "0", "-1", "1.5"])
    def test_a_number_written_wrong(self, moe_route, number: str):
        code, out, err = moe_route("record", "--out", "x", f"--limit={number}")
        assert (code, out) == (2, "")
        assert f"--limit: {number!r} is not a whole number from 1" in err

    def test_a_model_on_the_hub_without_a_network(self, moe_route, monkeypatch):
        pytest.importorskip("huggingface_hub")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
        monkeypatch.setattr("moe_route.base.hub.getproxies", dict)
        refused(moe_route("describe", "nobody/nothing"), "nobody/nothing")

    def test_traceback_on_demand(self, moe_route, tmp_path: Path):
        (tmp_path / "no.safetensors").write_bytes(b"none")
        with pytest.raises(files.FileRefusedError):
            moe_route("--traceback", "analyze", "pairs", tmp_path / "no.safetensors")


def leaves(tree: Parser, *words: str) -> list[tuple[str, ...]]:
    """The words of every command that runs something."""
    below = next((action for action in tree._actions if isinstance(action, argparse._SubParsersAction)), None)
    if below is None:
        return [words]
    return [leaf for name, under in below.choices.items() for leaf in leaves(under, *words, name)]


def parser_of(*words: str) -> Parser:
    """The parser of one command."""
    tree = parser()
    for word in words:
        below = next(action for action in tree._actions if isinstance(action, argparse._SubParsersAction))
        tree = below.choices[word]
    return tree


class TestTheProgram:
    def test_version(self, moe_route):
        assert moe_route("--version")[:2] == (0, f"moe-route {mr.__version__}\n")

    def test_every_command_has_help(self, moe_route):
        _, whole, _ = moe_route("--help")
        assert max(map(len, whole.splitlines())) <= 120
        for words in leaves(parser()):
            assert words[0] in whole
            code, out, _ = moe_route(*words, "--help")
            assert code == 0
            assert f"moe-route {' '.join(words)}" in out.partition("\nexample:\n")[2], words
            assert max(map(len, out.splitlines())) <= 120, words

    def test_the_number_of_commands(self):
        assert len(leaves(parser())) == 35

    def test_options_of_questions_are_keyword_arguments(self):
        for name, question in QUESTIONS.items():
            for variant in question.variants.values():
                keywords = inspect.signature(getattr(mr.analysis, variant.function)).parameters
                assert set(variant.takes) <= set(keywords), (name, variant)
            options = {action.dest for action in parser_of("analyze", name)._actions}
            assert question.options <= options, name

    def test_options_of_experiments_are_keyword_arguments(self):
        for name, experiment in EXPERIMENTS.items():
            keywords = inspect.signature(getattr(experiments, experiment.function)).parameters
            assert set(experiment.takes) <= set(keywords), name
            assert set(experiment.takes) <= {action.dest for action in parser_of("experiment", name)._actions}, name

    def test_a_model_and_texts_of_the_environment(self, moe_route, answer, monkeypatch, tmp_path: Path):
        monkeypatch.setenv("MOE_ROUTE_MODEL", str(tmp_path / "nothing"))
        code, _, err = moe_route("describe")
        assert code == 2
        assert f"MOE_ROUTE_MODEL: {tmp_path / 'nothing'}" in err
        assert "there is no folder" in err.splitlines()[-1]
        monkeypatch.setenv("MOE_ROUTE_MODEL", "demo")
        monkeypatch.setenv("MOE_ROUTE_TEXTS", "arithmetic")
        answer("record", "--out", tmp_path / "s.safetensors", *SMALL)
        code, _, err = moe_route("record", "--out", tmp_path / "t.safetensors", "--data", "general", *SMALL)
        assert code == 0
        assert "MOE_ROUTE_TEXTS" not in err
        recorded = [mr.RoutingStatistics.load(tmp_path / f"{name}.safetensors") for name in "st"]
        assert recorded[0].store.keys() != recorded[1].store.keys()
        assert answer("describe", "demo")["layers"]

    @pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
    def test_the_table_of_an_answer_is_kept(self, answer, files, tmp_path: Path, suffix: str):
        pandas = pytest.importorskip("pandas")
        out = tmp_path / f"table.{suffix}"
        printed = answer("analyze", "divergence", files["general"], "--out", out)
        assert printed["out"] == str(out)
        frame = mr.analysis.divergence(mr.RoutingStatistics.load(files["general"]), "eng_Latn").to_pandas()
        if suffix == "json":
            assert json.loads(out.read_text("utf-8"))["values"] == printed["values"]
        elif suffix == "csv":
            pandas.testing.assert_frame_equal(pandas.read_csv(out), frame, check_dtype=False)
        else:
            pytest.importorskip("pyarrow")
            pandas.testing.assert_frame_equal(pandas.read_parquet(out), frame, check_dtype=False)

    def test_the_table_of_a_question_is_of_a_known_kind(self, moe_route, files, tmp_path: Path):
        refused(moe_route("analyze", "divergence", files["general"], "--out", tmp_path / "t.txt"), ".txt", ".csv")

    def test_a_missing_file_is_told(self, moe_route, tmp_path: Path):
        out = tmp_path / "s.safetensors"
        refused(moe_route("record", "--data", tmp_path / "none.tsv", "--out", out), "none.tsv does not exist")

    def test_standard_output_of_a_process_is_json_alone(self, tmp_path: Path):
        command = [
            sys.executable,
            "-m",
            "moe_route",
            "record",
            "--out",
            str(tmp_path / "s.safetensors"),
            *SMALL,
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["sequences"] == [4, 4, 4]

    def test_a_reader_that_goes_away(self):
        done = subprocess.run(
            f"{sys.executable} -m moe_route describe --json | head -c 1",
            shell=True,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "{"
        assert "Traceback" not in done.stderr


class TestCompletion:
    @pytest.fixture
    def command_named_moe_route(self, tmp_path: Path) -> dict[str, str]:
        """An environment in which the command is this interpreter and this package."""
        program = tmp_path / "bin" / "moe-route"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m moe_route "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        package = str(Path(mr.__file__).parents[1])
        return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": package}

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("de", ["describe", "demo"]),
            ("analyze diver", ["divergence"]),
            ("plot t", ["tree"]),
            ("plot tree ", []),  # a file
            ("plot tree a.safetensors --la", ["--layers"]),
            ("record --engine ", ["hook", "fused", "vllm"]),
            ("record --engine fused --no-se", ["--no-sequences"]),
            ("record --out ", []),
            ("record --json --eng", ["--engine"]),
            ("analyze divergence x --pairing p", ["paired", "pooled"]),
            ("analyze experts a b --gr", ["--group"]),
            ("analyze experts a ", []),
            ("completion ", ["bash", "zsh", "fish"]),
            ("nothing ", []),
        ],
    )
    def test_what_may_come_next(self, line: str, expected: list[str]):
        assert candidates(parser(), line.split(" ")) == expected

    @pytest.mark.parametrize("shell", SCRIPTS)
    def test_the_shell_takes_the_code(self, moe_route, shell: str):
        if shutil.which(shell) is None:
            pytest.skip(f"needs {shell}")
        code, out, _ = moe_route("completion", shell)
        assert code == 0
        checked = subprocess.run([shell, "-n"], input=out, capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")

    def test_fish_completes(self, command_named_moe_route: dict[str, str], tmp_path: Path):
        if shutil.which("fish") is None:
            pytest.skip("needs fish")
        (tmp_path / "x.safetensors").touch()
        asked = (
            "moe-route completion fish | source; complete -C 'moe-route plot divergence-'; "
            "complete -C 'moe-route plot heat-map x'"
        )
        done = subprocess.run(
            ["fish", "-c", asked],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**command_named_moe_route, "HOME": str(tmp_path)},
            check=True,
        )
        assert done.stdout.split() == ["divergence-matrix", "x.safetensors"]

    def test_bash_completes(self, command_named_moe_route: dict[str, str]):
        if shutil.which("bash") is None:
            pytest.skip("needs bash")
        asked = """eval "$(moe-route completion bash)"
complete -p moe-route
COMP_WORDS=(moe-route plot heat-map x.safetensors --re); COMP_CWORD=4; _moe_route; echo "${COMPREPLY[@]}"
COMP_WORDS=(moe-route record ''); COMP_CWORD=2; _moe_route; echo "none: ${COMPREPLY[*]}"
"""
        done = subprocess.run(
            ["bash", "-c", asked], capture_output=True, text=True, env=command_named_moe_route, check=True
        )
        assert done.stdout.splitlines() == ["complete -o default -F _moe_route moe-route", "--reference", "none: "]


class TestDeferredInterrupt:
    def test_another_handler_stays(self):
        from moe_route.cli.interrupt import deferred_interrupt

        def ignored(*_: object) -> None:
            pass

        before = signal.signal(signal.SIGINT, ignored)
        try:
            with deferred_interrupt() as stop:
                signal.raise_signal(signal.SIGINT)
                assert not stop()
                assert signal.getsignal(signal.SIGINT) is ignored
        finally:
            signal.signal(signal.SIGINT, before)

    def test_other_threads_change_nothing(self):
        from moe_route.cli.interrupt import deferred_interrupt

        found = []

        def work() -> None:
            with deferred_interrupt() as stop:
                found.append((stop(), signal.getsignal(signal.SIGINT)))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [(False, signal.default_int_handler)]


class TestPlaces:
    def test_a_slash_makes_a_folder_of_a_name_with_a_suffix(self, moe_route, tmp_path: Path):
        code, _, err = moe_route("record", *SMALL, "--out", f"{tmp_path}/run.1/")
        assert code == 0, err
        assert (tmp_path / "run.1" / "statistics.safetensors").is_file()

    def test_a_trace_that_is_there_is_kept(self, moe_route, tmp_path: Path):
        trace = tmp_path / "t.safetensors"
        trace.write_bytes(b"before")
        refused(moe_route("record", "--out", tmp_path / "s.safetensors", "--trace", trace, *SMALL), "t.safetensors")
        assert trace.read_bytes() == b"before"

    def test_what_is_not_read_is_not_taken_from_the_environment(self, moe_route, files, monkeypatch):
        monkeypatch.setenv("MOE_ROUTE_TEXTS", "arithmetic")
        code, _, err = moe_route("steer", "--plan", files["plan"], "--prompt", "Anna", "--max-new-tokens", "1")
        assert (code, err) == (0, "")
        monkeypatch.setenv("MOE_ROUTE_MODEL", "no/such-model")
        code, _, err = moe_route("prune", files["general"], "--keep", "0.5", "--criterion", "frequency")
        assert (code, err) == (0, "")

    def test_pruning_twice_says_that_it_kept_the_first(self, moe_route, files, tmp_path: Path):
        given = ("prune", files["general"], "--keep", "0.5", "--criterion", "frequency", "--out", tmp_path / "small")
        assert "experts dropped" in moe_route(*given)[1]
        code, out, _ = moe_route(*given)
        assert code == 0
        assert "kept" in out
        assert "dropped;" not in out
