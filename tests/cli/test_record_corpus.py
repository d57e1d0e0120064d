"""Recordings of a corpus into a folder: streams, checkpoints, resuming after kill -9, and several ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness.commands import refused

import moe_route as mr
from moe_route.base.ranks import ModelParallelGroup
from moe_route.data import CorpusStream, demo_corpus
from moe_route.data.batches import Text
from moe_route.runs.corpus import CorpusRecording, Progress
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts

LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    corpus = demo_corpus().subset(LANGUAGES, 40)
    return [
        {"group": language, "item": item, "text": text}
        for item, *texts in zip(corpus.items, *(corpus[language] for language in LANGUAGES), strict=True)
        for language, text in zip(LANGUAGES, texts, strict=True)
    ]


@pytest.fixture(scope="module")
def corpus(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load()


def run(language_model: LanguageModel, folder: Path, corpus: Path, **options) -> Progress:
    """One run of the program; `stop_after` windows it is asked to stop."""
    windows = iter(range(options.pop("stop_after", 10**6)))
    options = {"batch_size": 1, "checkpoint_seconds": 0.0, "record": {"sequences": True}, **options}
    with language_model.attach() as routed:
        recording = CorpusRecording(folder, CorpusStream(str(corpus)), **options)
        return recording.run(language_model, routed, stop=lambda: next(windows, None) is None)


def same(a: Path, b: Path) -> None:
    """The statistics of two folders are equal, and so is every sequence."""
    mine, theirs = (mr.RoutingStatistics.load(folder / "statistics.safetensors") for folder in (a, b))
    assert mine == theirs
    assert mine.store.content_hash() == theirs.store.content_hash()
    cut = [sorted((folder / "cut.jsonl").read_text().splitlines()) for folder in (a, b)]
    assert cut[0] == cut[1]


@pytest.fixture(scope="module")
def whole(language_model: LanguageModel, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(language_model, folder, corpus, checkpoint_seconds=1e9, max_length=30).finished
    return folder


class TestRun:
    def test_counts_what_record_counts(self, language_model: LanguageModel, rows, whole: Path):
        """Batches differ, and with them the last bits; tokens and sequences do not."""
        with language_model.attach() as routed, routed.record(sequences=True) as recorder:
            texts = [Text(row["group"], row["item"], row["text"]) for row in rows]
            encoded = record_texts(recorder, language_model, texts, batch_size=1, max_length=30)
        direct, found = recorder.statistics(), mr.RoutingStatistics.load(whole / "statistics.safetensors")
        assert direct == found
        assert direct.store.content_hash() == found.store.content_hash()
        cut = [json.loads(line) for line in (whole / "cut.jsonl").read_text().splitlines()]
        assert [entry["item"] for entry in cut] == [encoded.texts[i].item for i in encoded.shortened] != []

    def test_a_plan_for_a_group_that_the_table_lacks(self, moe_route, language_model: LanguageModel, tmp_path: Path):
        table = tmp_path / "texts.tsv"
        table.write_text("item\teng_Latn\tdeu_Latn\n1\tA text.\tEin Text.\n", encoding="utf-8")
        plan = mr.Plan.forbid({0: [1]}).only(groups=["eng_Latn", "deu_Latm"])
        with language_model.attach() as routed, routed.steer(plan):
            for corpus in (CorpusStream(str(table)), CorpusStream(str(table), groups=("eng_Latn",))):
                with pytest.raises(mr.steering.PlanError, match='"deu_Latm"'):
                    CorpusRecording(tmp_path / "run", corpus).run(language_model, routed)
        plan.save(tmp_path / "plan.json")
        arguments = ["record", "--data", str(table), "--plan", str(tmp_path / "plan.json"), "--out", f"{tmp_path}/run/"]
        for engine in ("hook", "vllm"):
            code, _, err = moe_route(*arguments, "--engine", engine)
            assert code
            assert '"deu_Latm"' in err
        assert not (tmp_path / "run").exists()

    def test_stopped_and_resumed(self, language_model: LanguageModel, corpus: Path, whole: Path, tmp_path: Path):
        folder = tmp_path / "run"
        for _ in range(3):
            part = run(language_model, folder, corpus, max_length=30, stop_after=2)
            assert not part.finished
            assert not (folder / "statistics.safetensors").exists()
        last = run(language_model, folder, corpus, max_length=30)
        assert last.finished
        assert last.texts == 120
        assert last.resumed == "resumed: 96 of 120 texts were there"
        same(folder, whole)
        again = run(language_model, folder, corpus, max_length=30)
        assert (again.new_tokens, again.resumed) == (0, "resumed: 120 of 120 texts were there")
        assert run(language_model, folder, corpus, max_length=30, force=True).resumed == ""
        same(folder, whole)

    def test_a_checkpoint_killed_between_its_files(
        self, language_model: LanguageModel, corpus: Path, whole: Path, tmp_path: Path
    ):
        """The sequences were written and the sums were not: they are of the old checkpoint."""
        folder = tmp_path / "run"
        run(language_model, folder, corpus, max_length=30, stop_after=2)
        part = folder / "rank-00000"
        sums = (part / "sums.safetensors").read_bytes()
        run(language_model, folder, corpus, max_length=30, stop_after=2)
        (part / "sums.safetensors").write_bytes(sums)
        run(language_model, folder, corpus, max_length=30)
        same(folder, whole)

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_ranks_equal_one(self, language_model: LanguageModel, corpus: Path, whole: Path, tmp_path: Path, ranks):
        folder = tmp_path / "run"
        run(language_model, folder, corpus, max_length=30, group=ModelParallelGroup(1, ranks), stop_after=1)
        for rank in range(ranks):
            assert not (folder / "statistics.safetensors").exists()
            run(language_model, folder, corpus, max_length=30, group=ModelParallelGroup(rank, ranks))
        same(folder, whole)

    def test_another_run_is_refused(self, language_model: LanguageModel, corpus: Path, tmp_path: Path):
        folder, texts = tmp_path / "run", tmp_path / "texts.jsonl"
        texts.write_bytes(corpus.read_bytes())
        run(language_model, folder, texts, stop_after=3)
        with pytest.raises(ValueError, match=r"batch_size: 1 there, 2 now"):
            run(language_model, folder, texts, batch_size=2)
        with pytest.raises(ValueError, match=r"ranks: 1 there, 2 now"):
            run(language_model, folder, texts, group=ModelParallelGroup(0, 2))
        lines = texts.read_text("utf-8").splitlines(keepends=True)
        for changed in (lines[:20], ['{"text": "Another."}\n', *lines[1:]]):
            texts.write_text("".join(changed), encoding="utf-8")
            with pytest.raises(ValueError, match="is not what it was"):
                run(language_model, folder, texts)

    def test_an_item_that_comes_twice_is_refused(self, language_model: LanguageModel, tmp_path: Path):
        texts = tmp_path / "texts.jsonl"
        texts.write_text('{"text": "A.", "item": "a"}\n' * 40)
        with pytest.raises(ValueError, match="'a' of group 'texts' comes twice"):
            run(language_model, tmp_path / "run", texts)
        assert run(language_model, tmp_path / "sums", texts, record={}).texts == 40

    def test_blank_texts_are_left_out(self, language_model: LanguageModel, tmp_path: Path):
        texts = tmp_path / "texts.jsonl"
        texts.write_text('{"text": " "}\n' * 20 + '{"text": "A."}\n')
        found = run(language_model, tmp_path / "run", texts)
        assert (found.texts, found.empty) == (1, 20)


def command(out: Path, corpus: Path, *more: str) -> list[str]:
    options = ["--batch-size", "1", "--max-length", "30", "--checkpoint-seconds", "0"]
    return ["record", "--data", str(corpus), "--out", str(out), *options, *more]


QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# module and options of each launcher; the number of ranks follows
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node"],
    # without GPUs, accelerate starts one process unless it is told to start several
    "accelerate": [
        "accelerate.commands.launch",
        *("--multi-gpu", "--num-machines=1", "--mixed-precision=no", "--dynamo-backend=no", "--num-processes"),
    ],
}


class TestCommand:
    def test_a_corpus(self, answer, corpus: Path, whole: Path, tmp_path: Path):
        data = answer(*command(tmp_path / "run", corpus))
        assert (data["complete"], data["texts"]) == (True, 120)
        same(tmp_path / "run", whole)

    def test_finished_parts_are_added_up_where_the_corpus_is_missing(self, answer, corpus: Path, tmp_path: Path):
        texts = tmp_path / "texts.jsonl"
        texts.write_bytes(corpus.read_bytes())
        answer(*command(tmp_path / "run", texts))
        (tmp_path / "run" / "statistics.safetensors").unlink()
        texts.unlink()
        assert answer(*command(tmp_path / "run", texts))["complete"]

    def test_refusals(self, moe_route, corpus: Path, tmp_path: Path):
        refused(moe_route(*command(tmp_path / "run", corpus, "--trace", "t")), "--trace", "into a file")

    def test_refusals_before_the_model_is_loaded(self, moe_route, corpus: Path, tmp_path: Path):
        model = ["--model", "nobody/no-model"]
        refused(moe_route(*command(tmp_path / "run", tmp_path / "none.jsonl", *model)), "none.jsonl does not exist")
        refused(
            moe_route(*command(tmp_path / "run", corpus, "--languages", "xyz_Latn", *model)), "no language 'xyz_Latn'"
        )
        refused(
            moe_route(*command(tmp_path / "no-folder" / "run", corpus, *model)),
            "no-folder does not exist: make it first",
        )

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("launcher", LAUNCHERS)
    @pytest.mark.parametrize("ranks", [2, 4])
    def test_launchers(self, corpus: Path, whole: Path, tmp_path: Path, launcher: str, ranks: int):
        """The commands of docs/scale.md; the second one finds everything done."""
        if launcher == "accelerate":
            pytest.importorskip("accelerate")
        start, out = LAUNCHERS[launcher], tmp_path / "run"
        line = [sys.executable, "-m", *start, str(ranks), "-m", "moe_route", *command(out, corpus), "--json"]
        for _ in range(2):
            done = subprocess.run(line, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
        assert len(list(out.glob("rank-*"))) == ranks
        same(out, whole)

    @pytest.mark.exhaustive
    @pytest.mark.parametrize("ranks", [1, 2, 4])
    def test_killed_at_random_moments(self, tmp_path: Path, ranks: int):
        """One rank is killed each time; its launcher ends the others, and the same command goes on."""
        parallel, corpus = demo_corpus(), tmp_path / "texts.jsonl"
        rows = [{"group": code, "text": text} for code in parallel.languages for text in parallel[code]]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        whole, out, killed = tmp_path / "whole", tmp_path / "run", 0
        assert started(whole, corpus, 1)[0].wait() == 0  # a process like the others: with as many threads
        for _ in range(5):
            processes = started(out, corpus, ranks)
            aim = checkpoints(out) + random.randint(1, 3)
            while checkpoints(out) < aim and any(process.poll() is None for process in processes):
                time.sleep(0.005)
            time.sleep(random.random() * 0.05)
            victim = random.choice(processes)
            killed += victim.poll() is None
            for process in [victim, *processes]:
                process.kill()
                process.wait()
        assert killed >= 2, "most runs ended before they were killed"
        assert [process.wait() for process in started(out, corpus, ranks)] == [0] * ranks
        same(out, whole)


class TestRanksThatShareAModel:
    """Tensor and expert parallelism over gloo: groups of two ranks, each of which is counted once."""

    @pytest.mark.exhaustive
    @pytest.mark.parametrize(("how", "ranks"), [("tensor", 2), ("tensor", 4), ("expert", 4)])
    def test_groups_equal_one_rank(self, corpus: Path, whole: Path, tmp_path: Path, how: str, ranks: int):
        start, out = LAUNCHERS["torchrun"], tmp_path / "run"
        options = [*command(out, corpus), f"--{how}-parallel", "2"]
        line = [sys.executable, "-m", *start, str(ranks), "-m", "moe_route", *options]
        for _ in range(2):
            done = subprocess.run(line, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            assert done.stdout.count("written to") + done.stdout.count("this part is done") == ranks // 2
            assert done.stdout.count("each rank held 50 % of the weights") == ranks // 2
        assert len(list(out.glob("rank-*"))) == ranks // 2
        equal_but_for_rounding(out, whole)

    @pytest.mark.exhaustive
    def test_killed_at_random_moments(self, corpus: Path, whole: Path, tmp_path: Path):
        """The other rank of its group ends with it, and the other group goes on."""
        undisturbed, out, killed = tmp_path / "undisturbed", tmp_path / "run", 0
        assert [process.wait() for process in started(undisturbed, corpus, 4, together=2)] == [0] * 4
        part = out / "rank-00001"
        for number, victim in ((signal.SIGTERM, 3), (signal.SIGKILL, 3), (signal.SIGKILL, 2)):
            processes = started(out, corpus, 4, together=2)
            aim = checkpoints(part) + 1
            while checkpoints(part) < aim and processes[victim].poll() is None:
                time.sleep(0.005)
            time.sleep(random.random() * 0.05)
            if processes[victim].poll() is None:
                killed += 1
                processes[victim].send_signal(number)
            codes = [process.wait() for process in processes]
            assert codes[:2] == [0, 0]
            if number == signal.SIGTERM:
                assert codes[2:] in ([130, 130], [0, 0])  # asked to end, they write a checkpoint together
            elif codes[victim] == -signal.SIGKILL:
                assert codes[5 - victim] >= 0
        assert killed >= 2, "most runs ended before they were killed"
        assert [process.wait() for process in started(out, corpus, 4, together=2)] == [0] * 4
        same(out, undisturbed)
        equal_but_for_rounding(out, whole)

    def test_refusals(self, moe_route, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        record = ("record", "--data", corpus, "--out", tmp_path / "run", "--tensor-parallel", "2")
        refused(moe_route(*record), "2 ranks run a model together, and there are 1", "torchrun --nproc-per-node 2")
        for name, value in {"RANK": "2", "WORLD_SIZE": "3"}.items():
            monkeypatch.setenv(name, value)
        refused(moe_route(*record), "there are 3")
        assert moe_route(*record, "--expert-parallel", "2")[0] == 2
        with pytest.raises(ValueError, match="leave out device and map"):
            LanguageModel.load(group=ModelParallelGroup(0, 1, 0, 2, "tensor"), device="cpu")
        refused(
            moe_route("record", "--out", tmp_path / "one.safetensors", "--tensor-parallel", "2"),
            "--tensor-parallel is for a folder",
        )


def equal_but_for_rounding(a: Path, b: Path) -> None:
    """The same texts, counts and tokens in every sequence, and sums of probabilities to the rounding of a model."""
    mine, theirs = (mr.RoutingStatistics.load(folder / "statistics.safetensors") for folder in (a, b))
    assert mine.metadata["fingerprint"] == theirs.metadata["fingerprint"]
    whole = dict(theirs.metadata["model"])
    assert whole["weights_hash"] != "unknown"
    assert mine.metadata["model"] == whole | {"weights_hash": "unknown"}  # no rank has all weights
    assert mine.metrics == theirs.metrics
    for metric in mine.metrics:
        sums = [found.select(theirs.groups).token_sum(metric) for found in (mine, theirs)]
        np.testing.assert_allclose(
            *sums, rtol=0 if metric == "counts" else 1e-5, atol=0 if metric == "counts" else 1e-4
        )
    assert set(mine.store.keys()) == set(theirs.store.keys())
    for item, group in theirs.store:
        np.testing.assert_array_equal(mine.store.counts(item, group), theirs.store.counts(item, group))
    cut = [sorted((folder / "cut.jsonl").read_text().splitlines()) for folder in (a, b)]
    assert cut[0] == cut[1]


def started(out: Path, corpus: Path, ranks: int, *, together: int = 1) -> list[subprocess.Popen[bytes]]:
    """One process per rank, with the environment that a launcher gives them; `together` of them share a model."""
    line = [sys.executable, "-m", "moe_route", *command(out, corpus)]
    line += ["--tensor-parallel", str(together)] if together > 1 else []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {**os.environ, **QUIET, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(line, env={**environment, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(ranks)
    ]


def checkpoints(out: Path) -> int:
    """Number of files of sequences that checkpoints have written."""
    return len(list(out.rglob("sequences-*.safetensors")))
