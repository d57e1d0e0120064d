"""Commands under faults: `python tests/cli/faults.py kill|disk|twice FOLDER [COMMAND ...] [--times N]`.

Each command runs in processes that are forked here. It is killed at random moments, given a disk (a tmpfs, which needs
the right to mount) that fills up, or started twice at once. Afterwards its result must be absent, the old one, or the
whole new one, and the same command must then make what an undisturbed run makes and leave nothing beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moe_route.cli import main as command_line
from moe_route.data import demo_model_folder

SMALL = ("--languages", "eng_Latn,deu_Latn", "--limit", "3", "--batch-size", "4")


def prepared(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> the words of a command without --out, and the name of its result."""
    folder.mkdir(exist_ok=True)
    demo, general, weight = str(demo_model_folder()), folder / "general.safetensors", folder / "weight.npy"
    if not (folder / "dense").is_dir():
        assert run(["record", *SMALL, "--out", str(general)], folder / "log") == 0
        np.save(weight, np.full((8, 4000), 6))
        _dense(folder / "dense")
    return {
        "convert": (["convert", str(weight), "--top-k", "2", "--to", "eplb"], "weight.npy"),
        "report": (["report", str(general)], "page.html"),
        "vectors": (["record", *SMALL, "--vectors", "mean", "--force"], "vectors.safetensors"),
        "merge": (["merge", demo, demo, "--method", "linear"], "merged"),
        "merge again": (["merge", demo, demo, "--method", "linear", "--force"], "merged"),
        "prune": (["prune", str(general), "--keep", "0.5", "--criterion", "frequency"], "smaller"),
        "upcycle": (["upcycle", str(folder / "dense"), "--languages", "eng_Latn,swh_Latn"], "sparse"),
        "experiment": (["experiment", "knockout", *SMALL, "--layers", "5"], "knockout"),
    }


def _dense(folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_folder())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def started(words: Sequence[str], log: Path) -> int:
    """Run a command in a forked process; returns its id."""
    child = os.fork()
    if child:
        return child
    # The lock of tqdm is shared with the parent, which would wait for ever for a child that was killed holding it.
    tqdm.set_lock(threading.RLock())
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        code = command_line(list(words))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(words: Sequence[str], log: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(started(words, log), 0)[1])


_MOMENT = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC")


def content(path: Path) -> Mapping[str, str] | None:
    """The SHA-256 of a file, or of each file of a folder, without the moment that a report names; None if absent."""
    if not path.exists():
        return None
    parts = [path] if path.is_file() else [part for part in sorted(path.rglob("*")) if part.is_file()]
    return {
        str(part.relative_to(path)): hashlib.sha256(_MOMENT.sub(b"", part.read_bytes())).hexdigest() for part in parts
    }


def beside(path: Path) -> list[str]:
    return sorted(one.name for one in path.parent.iterdir() if one != path)


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def kill(words: list[str], out: Path, whole: Mapping[str, str], seconds: float, times: int) -> int:
    """Kill the command at random moments; returns how many processes were killed."""
    log, killed = out.parents[1] / "log", 0
    resumed = out.name == "knockout"
    for _ in range(times):
        old = content(out)
        child = started(words, log)
        time.sleep(random.random() * seconds * 1.1)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = content(out)
        assert resumed or found in (None, old, whole), f"half a result: {sorted(found or ())}"
        assert old is None or found is not None, "the old result is gone"
        if found == whole and "--force" not in words:
            clear(out)
    assert run(words, log) == 0, log.read_text()
    assert content(out) == whole, "another result than that of an undisturbed run"
    assert beside(out) == [], f"left beside it: {beside(out)}"
    return killed


def disk(words: list[str], out: Path, whole: Mapping[str, str], size: int, times: int) -> int:
    """Run the command on disks that are too small, then on one with room."""
    log, full = out.parents[1] / "log", 0
    for number in range(times):
        small = out.parent / "disk"
        small.mkdir()
        room = 4096 * max(1, int(size * (number + 0.5) / times) // 4096)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", small], check=True)
        try:
            child = started([*words, "--out", str(small / out.name)], log)
            until = time.monotonic() + 60
            code = None
            while code is None and time.monotonic() < until:
                ended, status = os.waitpid(child, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
                if code is None and "as soon as there is room" in log.read_text():
                    subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
                time.sleep(0.02)
            said = log.read_text()
            assert code in (0, 2), said
            if code == 2:
                full += 1
                assert "free some space" in said or "left:" in said, said
                assert "Traceback" not in said, said
                assert out.name == "knockout" or content(small / out.name) is None, "half a result"
                subprocess.run(["mount", "-o", "remount,size=64m", small], check=True)
                assert run([*words, "--out", str(small / out.name)], log) == 0, log.read_text()
            assert content(small / out.name) == whole
            assert beside(small / out.name) == [], beside(small / out.name)
        finally:
            subprocess.run(["umount", "-l", small], check=True)
            small.rmdir()
    return full


def twice(words: list[str], out: Path, whole: Mapping[str, str], times: int) -> int:
    """Start the command twice at once: one ends, the other ends or is refused, and the result is whole."""
    log, refused = out.parents[1] / "log", 0
    for _ in range(times):
        children = [started(words, log.with_name(f"log{number}")) for number in range(2)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        said = "".join(log.with_name(f"log{number}").read_text() for number in range(2))
        assert codes in ([0, 0], [0, 2]), said
        assert "Traceback" not in said, said
        refused += codes[1] == 2
        assert content(out) == whole
        assert beside(out) == [], beside(out)
        clear(out)
    return refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault", choices=("kill", "disk", "twice"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # One thread, or a forked process waits for those of its parent. Not torch.set_num_threads: it has every new
        # thread of a forked process make torch's pool of threads, which two of them at once cannot.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"})
    folder = options.folder.resolve()
    folder.mkdir(exist_ok=True)
    commands = prepared(folder / "inputs")
    met = {}
    for name in options.commands or commands:
        words, result = commands[name]
        there = folder / "out"
        shutil.rmtree(there, ignore_errors=True)
        there.mkdir()
        out = there / result
        with_out = [*words, "--out", str(out)]
        assert run(with_out, folder / "log") == 0, (folder / "log").read_text()  # loads what is loaded once
        began = time.monotonic()
        clear(out)
        assert run(with_out, folder / "log") == 0
        seconds = time.monotonic() - began
        whole = content(out)
        assert whole is not None
        size = sum(part.stat().st_size for part in ([out] if out.is_file() else out.rglob("*")) if part.is_file())
        if name != "merge again":
            clear(out)
        if options.fault == "kill":
            met[name] = kill(with_out, out, whole, seconds, options.times)
        elif options.fault == "disk":
            met[name] = disk(words, out, whole, size, options.times)
        else:
            met[name] = twice(with_out, out, whole, options.times)
    sys.stdout.write(json.dumps(met) + "\n")


if __name__ == "__main__":
    main()
