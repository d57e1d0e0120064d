"""The command line on the demo model: every verb, `--json`, and what a user can get wrong."""

from __future__ import annotations

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
from moe_route.base import files
from moe_route.cli import parser
from moe_route.cli.completion import SCRIPTS, candidates
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
        code, text, _ = moe_route("record", "--out", out, *SMALL)
        assert code == 130
        assert "interrupted: these are 8 of 12 texts" in text
        statistics = mr.RoutingStatistics.load(out)
        assert statistics.sequences().sum() == 8  # the call that ran went through to its end
        statistics.verify()
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
        result = answer("analyze", "entropy", files["general"])
        token, sequence = np.array(result["token"]), np.array(result["sequence"])
        assert ((token > 0) & (token < sequence) & (sequence < np.log(16))).all()

    def test_experts_make_a_plan_for_the_layers_asked_for(self, answer, files, tmp_path: Path):
        out = tmp_path / "plan.safetensors"
        given = ("--task", files["task"], "--baseline", files["general"], "--group", "eng_Latn", "--threshold", "0.05")
        result = answer("analyze", "experts", *given, "--layers", "2-5", "--plan", out)
        assert set(map(int, result["experts"])) <= {2, 3, 4, 5}
        assert mr.Plan.load(out)

    def test_statistics_of_two_files_add_up(self, answer, files):
        both = answer("analyze", "entropy", files["general"], files["task"])
        assert both["groups"] == ["eng_Latn", "deu_Latn", "swh_Latn"]
        one, other = answer("analyze", "entropy", files["general"]), answer("analyze", "entropy", files["task"])
        low, high = np.minimum(one["token"], other["token"]), np.maximum(one["token"], other["token"])
        assert ((low <= both["token"]) & (both["token"] <= high)).all()


class TestPlot:
    @pytest.mark.parametrize("kind", ["divergence", "entropy", "experts"])
    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_writes_a_picture(self, answer, files, tmp_path: Path, kind: str, suffix: str):
        out = tmp_path / f"{kind}.{suffix}"
        answer("plot", kind, files["general"], "--out", out)
        start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
        assert out.read_bytes().startswith(start)

    def test_options_that_the_picture_does_not_take_are_refused(self, moe_route, files, tmp_path: Path):
        out = ("--out", tmp_path / "x.png")
        refused(moe_route("plot", "experts", files["general"], *out, "--layers", "2-5"), "experts", "--layers")
        refused(moe_route("plot", "entropy", files["general"], *out, "--group", "deu_Latn"), "entropy", "--group")
        refused(moe_route("plot", "matrix", files["general"], *out, "--layers", "2-9"), "8 layers")
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
            ("plot", "entropy", "none.safetensors"),
            ("analyze", "experts", "--task", "none.safetensors", "--baseline", "none.safetensors"),
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
        found = ("--task", files["task"], "--baseline", files["general"], "--group", "eng_Latn")
        refused(moe_route("analyze", "experts", *found, *one, "--plan", tmp_path / "a.safetensors"), "one file")
        assert not list(tmp_path.iterdir())

    def test_a_demo_whose_folder_is_a_file(self, moe_route, monkeypatch, tmp_path: Path):
        monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        (tmp_path / "demo").write_text("", encoding="utf-8")
        refused(moe_route("demo", "--out", tmp_path / "demo"), "demo")

    def test_a_folder_that_is_not_there(self, moe_route, tmp_path: Path):
        refused(moe_route("describe", "--model", tmp_path / "nothing"), "there is no folder", "nothing")

    def test_an_option_that_is_not_there(self, moe_route, tmp_path: Path):
        code, out, err = moe_route("record", "--langages=eng_Latn", "-x", "--out", tmp_path / "s.safetensors")
        assert (code, out) == (2, "")
        assert "usage: moe-route record" in err
        assert "unrecognized arguments: --langages=eng_Latn -x (did you mean --languages?)" in err
        code, _, err = moe_route("analyze", "divergence", "none.safetensors", "--zzz")
        assert code == 2
        assert err.endswith("moe-route analyze divergence: error: unrecognized arguments: --zzz\n")

    def test_task_experts_of_several_groups_without_a_name(self, moe_route, files):
        given = ("analyze", "experts", "--task", files["task"], "--baseline", files["general"])
        refused(moe_route(*given), "3 groups", "swh_Latn", "--group")

    def test_statistics_that_are_not_there(self, moe_route, tmp_path: Path):
        refused(moe_route("analyze", "entropy", tmp_path / "no.safetensors"), "no.safetensors", "does not exist")

    def test_a_truncated_file(self, moe_route, files, tmp_path: Path):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(files["general"].read_bytes()[:-100])
        refused(moe_route("analyze", "entropy", cut), "truncated")

    def test_a_file_of_another_kind(self, moe_route, files):
        refused(moe_route("analyze", "entropy", files["plan"]), "plan", "statistics")

    def test_a_dense_model(self, moe_route, tmp_path: Path):
        from transformers import LlamaConfig, LlamaForCausalLM

        _, tokenizer = mr.data.load_demo_model()
        tokenizer.save_pretrained(tmp_path)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(tmp_path)
        refused(moe_route("describe", "--model", tmp_path), "LlamaForCausalLM", "no router")

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
        assert f"argument --limit: {number!r} is not a whole number from 1" in err

    def test_a_model_on_the_hub_without_a_network(self, moe_route, monkeypatch):
        pytest.importorskip("huggingface_hub")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
        monkeypatch.setattr("moe_route.base.hub.getproxies", dict)
        refused(moe_route("describe", "--model", "nobody/nothing"), "nobody/nothing")

    def test_traceback_on_demand(self, moe_route, tmp_path: Path):
        with pytest.raises(files.FileRefusedError):
            moe_route("analyze", "entropy", tmp_path / "no.safetensors", "--traceback")


class TestTheProgram:
    def test_version(self, moe_route):
        assert moe_route("--version")[:2] == (0, f"moe-route {mr.__version__}\n")

    def test_every_command_has_help(self, moe_route):
        _, whole, _ = moe_route("--help")
        for verb in ("describe", "record", "analyze", "plot", "steer", "lm-eval", "demo", "doctor", "completion"):
            assert verb in whole
            code, out, _ = moe_route(verb, "--help")
            assert code == 0
            assert "\nexample:\n  " in out
            assert "moe-route " in out.partition("example:")[2]

    def test_help_loads_neither_torch_nor_numpy(self):
        heavy = "{'torch', 'numpy', 'transformers', 'matplotlib', 'pandas', 'scipy'}"
        code = f"import sys; from moe_route.cli import parser; parser(); print({heavy} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"

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
            ("plot m", ["matrix"]),
            ("plot matrix ", []),  # a file
            ("plot matrix a.safetensors --la", ["--layers"]),
            ("record --engine ", ["hook", "fused", "vllm"]),
            ("record --engine fused --no-se", ["--no-sequences"]),
            ("record --out ", []),
            ("record --json --eng", ["--engine"]),
            ("analyze divergence x --pairing p", ["paired", "pooled"]),
            ("analyze experts --task a b --gr", ["--group"]),
            ("analyze experts --task a ", []),
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
            "moe-route completion fish | source; complete -C 'moe-route plot m'; complete -C 'moe-route plot matrix x'"
        )
        done = subprocess.run(
            ["fish", "-c", asked],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**command_named_moe_route, "HOME": str(tmp_path)},
            check=True,
        )
        assert done.stdout.split() == ["matrix", "x.safetensors"]

    def test_bash_completes(self, command_named_moe_route: dict[str, str]):
        if shutil.which("bash") is None:
            pytest.skip("needs bash")
        asked = """eval "$(moe-route completion bash)"
complete -p moe-route
COMP_WORDS=(moe-route plot experts x.safetensors --re); COMP_CWORD=4; _moe_route; echo "${COMPREPLY[@]}"
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
