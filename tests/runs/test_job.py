"""A folder belongs to one command: it is claimed, locked, resumed, and refused with the first difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_route.runs.job import ForeignFolderError, Job, made_folder, refuse_made

INPUTS = {"model": {"name": "a", "layers": [1, 2]}, "batch_size": 4}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_job_is_resumed_by_the_same_command_and_inputs(tmp_path: Path):
    with Job(tmp_path / "out", "eval", INPUTS) as job:
        assert (job.resumed, job.done) == (False, False)
    with Job(tmp_path / "out", "eval", {"batch_size": 4, "model": {"name": "a", "layers": (1, 2)}}) as job:
        assert (job.resumed, job.done) == (True, False)
        job.finish()
    with Job(tmp_path / "out", "eval", INPUTS) as job:
        assert (job.resumed, job.done) == (True, True)


def test_another_command_and_other_inputs_are_refused_with_the_first_difference(tmp_path: Path):
    with Job(tmp_path / "out", "eval", INPUTS):
        pass
    for command, inputs, message in (
        ("record", INPUTS, "results of `eval`.*--force"),
        ("eval", {**INPUTS, "model": {"name": "b", "layers": [1, 2]}}, r'model\.name: "a" there, "b" now'),
        ("eval", {"model": INPUTS["model"]}, "batch_size: 4 there, null now"),
    ):
        with pytest.raises(ForeignFolderError, match=message), Job(tmp_path / "out", command, inputs):
            pass


def test_other_content_is_refused_and_stays(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(ForeignFolderError, match=r"thesis\.tex"), Job(tmp_path, "eval", {}, force=force):
            pass
    assert names(tmp_path) == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ForeignFolderError, match='"moe_route": "run"'), Job(tmp_path, "eval", {}):
        pass
    (tmp_path / "run.json").write_text('{"moe_route"')
    with pytest.raises(ForeignFolderError, match="damaged"), Job(tmp_path, "eval", {}):
        pass


def test_force_removes_what_the_job_made_and_nothing_else(tmp_path: Path):
    out = tmp_path / "out"
    with Job(out, "eval", INPUTS) as job:
        job.step("one", {}).finish()
        job.lock("rank-00000")
        (out / "sum.txt").write_text("1")
        (out / "notes.txt").write_text("mine")
        job.finish(["sum.txt"])
    with Job(out, "other", {}, force=True) as job:
        assert (job.resumed, names(out)) == (False, ["notes.txt", "run.json"])


def test_other_processes_stay_out(tmp_path: Path):
    code = (
        "import sys; from moe_route.runs.job import Job\n"
        "with Job(sys.argv[1], 'eval', {}, shared=len(sys.argv) > 2) as job:\n    job.lock('part')\n"
    )
    with Job(tmp_path / "whole", "eval", {}):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "whole"], capture_output=True, text=True)
    assert "another process writes" in done.stderr
    with Job(tmp_path / "shared", "eval", {}, shared=True) as job:
        job.lock("part")
        line = [sys.executable, "-c", code, str(tmp_path / "shared"), "shared"]
        done = subprocess.run(line, capture_output=True, text=True)
    assert "another process writes" in done.stderr
    assert subprocess.run(line, capture_output=True).returncode == 0


class TestSteps:
    def test_a_finished_step_is_kept_and_hashed(self, tmp_path: Path):
        with Job(tmp_path / "out", "eval", {}) as job:
            step = job.step("record", INPUTS)
            assert not step.done
            (step.folder / "a.txt").write_text("A")
            step.finish()
            made = step.results_hash
            assert job.step("record", INPUTS).done
            assert job.step("record", INPUTS).results_hash == made
            said = json.loads((step.folder / "step.json").read_text())
            assert list(said["results"]) == ["a.txt"]
            (step.folder / "a.txt").write_text("B")
            with pytest.raises(ForeignFolderError, match=r"a\.txt was removed or altered"):
                job.step("record", INPUTS)

    def test_other_inputs(self, tmp_path: Path):
        with Job(tmp_path / "out", "eval", {}) as job:
            for name in ("record", "report"):
                step = job.step(name, {"seed": 1})
                (step.folder / "a.txt").write_text("A")
                step.finish()
            with pytest.raises(ForeignFolderError, match="seed: 1 there, 2 now"):
                job.step("record", {"seed": 2})
            again = job.step("report", {"seed": 2}, cheap=True)
            assert (again.done, names(again.folder)) == (False, ["step.json"])


class TestMadeFolders:
    def test_made_kept_refused_and_made_again(self, tmp_path: Path):
        out = tmp_path / "model"
        for force, content in ((False, "one"), (True, "two")):
            with made_folder(out, "merge", INPUTS, force=force) as inside:
                assert inside is not None
                (inside / "weights").write_text(content)
            assert (out / "weights").read_text() == content
            assert names(out) == ["run.json", "weights"]
            assert names(tmp_path) == ["model"]
            (out / "notes.txt").write_text("mine")
            with made_folder(out, "merge", INPUTS) as inside:
                assert inside is None
            (out / "notes.txt").unlink()
        with (
            pytest.raises(ForeignFolderError, match="batch_size"),
            made_folder(out, "merge", {**INPUTS, "batch_size": 5}),
        ):
            pass
        with pytest.raises(ForeignFolderError, match="results of `merge`"), made_folder(out, "upcycle", INPUTS):
            pass

    def test_nothing_is_left_of_one_that_fails(self, tmp_path: Path):
        def fail() -> None:
            with made_folder(tmp_path / "model", "merge", INPUTS) as inside:
                assert inside is not None
                (inside / "weights").write_text("half")
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert names(tmp_path) == []

    def test_a_result_is_not_written_over(self, tmp_path: Path):
        path = tmp_path / "recording.safetensors"
        refuse_made(path, "record")
        path.write_text("made")
        with pytest.raises(FileExistsError, match="--force"):
            refuse_made(path, "record")
        refuse_made(path, "record", force=True)
        with pytest.raises(ForeignFolderError, match=r"recording\.safetensors"):
            refuse_made(tmp_path, "record", force=True)
        with Job(tmp_path / "out", "record", {}):
            pass
        refuse_made(tmp_path / "out", "record")
        with pytest.raises(ForeignFolderError, match="`record`"):
            refuse_made(tmp_path / "out", "eval")

    def test_checking_imports_no_torch(self, tmp_path: Path):
        (tmp_path / "file").write_text("made")
        code = (
            "import sys; from moe_route.runs.job import refuse_made\n"
            "try:\n    refuse_made(sys.argv[1], 'record')\n"
            "except FileExistsError:\n    assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
