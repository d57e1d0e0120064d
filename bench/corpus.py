"""A million tokens that `moe-route record` puts into a folder: once undisturbed, once killed five times, compared.

    python -m bench.corpus            # writes results/corpus.json; minutes on a core

Both runs are processes of one thread, with a checkpoint every few seconds. The corpus is made of the sentences that the
package brings, drawn by a seed and joined to texts of different lengths. The second run is killed with SIGKILL at
moments that the same seed draws. The last statistics and every kept sequence must equal those of the first run in
every bit; otherwise nothing is written. A moment is a number of recorded tokens and some seconds after it, so that the
speed of the machine does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import RESULTS
from moe_route.base import files
from moe_route.bench.results import BenchmarkResults, Fact, Measured, machine
from moe_route.data import demo_corpus, demo_model_folder
from moe_route.recording import RoutingStatistics

NAME = "corpus"
SECTION = "Recording of a corpus"
TOKENS, KILLS, SEED = 1_000_000, 5, 7
LONGEST = 6  # sentences of a text
CHECKPOINT_SECONDS = 5.0
_POLL_SECONDS = 0.25


@dataclass
class Session:
    """One run of the program.

    Attributes:
        seconds: of the whole program.
        samples: (seconds since its start, tokens in its last checkpoint, resident MB) as it went on.
    """

    seconds: float = 0.0
    samples: list[tuple[float, int, float]] = field(default_factory=list)

    @property
    def memory(self) -> float:
        """Largest resident memory that was seen, in MB."""
        return max((resident for _, _, resident in self.samples), default=0.0)


def texts(tokens: int, seed: int) -> Iterator[dict[str, str]]:
    """Texts of the shipped languages in turn, with at least `tokens` tokens in all, special tokens included."""
    from transformers import AutoTokenizer

    tokenizer, corpus, draw = AutoTokenizer.from_pretrained(demo_model_folder()), demo_corpus(), random.Random(seed)
    found = number = 0
    while found < tokens:
        group = corpus.languages[number % len(corpus.languages)]
        text = " ".join(draw.choices(corpus[group], k=draw.randint(1, LONGEST)))
        found += len(tokenizer(text)["input_ids"])
        yield {"group": group, "item": f"{number}", "text": text}
        number += 1


def recorded_tokens(out: Path) -> int:
    """Tokens that the last checkpoint holds, 0 before the first one. A damaged checkpoint is an error."""
    path = out / "rank-00000" / "sums.safetensors"
    if not path.exists():
        return 0
    header = files.read_header(path, "statistics")["header"]
    return int(header["metadata"]["corpus_run"]["progress"]["tokens"])


def resident(process: int) -> float:
    """Resident memory of a process in MB, 0 if it ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def session(corpus: Path, out: Path, *, kill_at: int | None = None, delay: float = 0.0) -> Session:
    """Run the command until it ends, or is killed `delay` seconds after a checkpoint holds `kill_at` tokens."""
    options = ["--data", str(corpus), "--out", str(out), "--checkpoint-seconds", str(CHECKPOINT_SECONDS)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    line = [sys.executable, "-m", "moe_route", "record", *options]
    process = subprocess.Popen(line, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    found, start = Session(), time.monotonic()
    while process.poll() is None:
        done, now = recorded_tokens(out), resident(process.pid)
        if now:
            found.samples.append((time.monotonic() - start, done, now))
        if kill_at is not None and done >= kill_at:
            time.sleep(delay)
            process.kill()
            process.wait()
            break
        time.sleep(_POLL_SECONDS)
    found.seconds = time.monotonic() - start
    said = process.stderr.read().decode() if process.stderr else ""
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        sys.exit(f"the command ended with {process.returncode}:\n{said}")
    return found


def compare(whole: Path, killed: Path) -> RoutingStatistics:
    """The statistics of both folders, which must be the same in every bit."""
    first, second = (RoutingStatistics.load(folder / "statistics.safetensors") for folder in (whole, killed))
    if first.store is None or second.store is None or len(first.store) != len(second.store):
        sys.exit("the killed run keeps other sequences than the undisturbed one")
    if first != second or first.store.content_hash() != second.store.content_hash():
        sys.exit("the killed run differs from the undisturbed one")
    return first


def measure(folder: Path, tokens: int, kills: int, seed: int) -> Measured:
    corpus, draw = folder / "texts.jsonl", random.Random(seed)
    corpus.write_text("".join(json.dumps(row) + "\n" for row in texts(tokens, seed)), encoding="utf-8")
    facts: list[Fact] = []

    def fact(case: str, what: str, value: float, unit: str) -> None:
        facts.append(Fact(SECTION, case, what, value, unit))

    undisturbed = session(corpus, folder / "whole")
    case = "undisturbed"
    every = max(len(undisturbed.samples) // 100, 1)
    for seconds, done, memory in undisturbed.samples[::every]:
        fact(case, f"tokens, at s = {seconds:.1f}", done, "tokens")
        fact(case, f"resident memory, at s = {seconds:.1f}", round(memory, 1), "MB")
    fact(case, "time of the program", round(undisturbed.seconds, 1), "s")
    fact(case, "largest resident memory", round(undisturbed.memory, 1), "MB")

    case, out = f"killed {kills} times", folder / "killed"
    seconds = 0.0
    for number, moment in enumerate(sorted(draw.uniform(0.02, 0.9) for _ in range(kills)), start=1):
        one = session(corpus, out, kill_at=round(moment * tokens), delay=draw.uniform(0, CHECKPOINT_SECONDS))
        fact(case, f"tokens in the last checkpoint before kill {number}", recorded_tokens(out), "tokens")
        fact(case, f"time until kill {number}", round(one.seconds, 1), "s")
        seconds += one.seconds
    last = session(corpus, out)
    fact(case, "time of the program, all its runs", round(seconds + last.seconds, 1), "s")
    fact(case, "largest resident memory of the last run", round(last.memory, 1), "MB")

    found = compare(folder / "whole", out)
    assert found.store is not None
    case, counted = "both", int(found.tokens().max(axis=1).sum())
    fact(case, "tokens", counted, "tokens")
    fact(case, "sequences", len(found.store), "sequences")
    fact(case, "rate undisturbed, loading included", round(counted / undisturbed.seconds), "tokens/s")
    fact(case, "sums and sequences that differ", 0, "")
    return Measured(facts=facts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.corpus", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the texts and of the moments of the kills")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.tokens, options.kills, options.seed)
    about = {**machine("python -m bench.corpus"), "threads used": "1"}
    print(BenchmarkResults(about, measured).save(options.out))


if __name__ == "__main__":
    main()
