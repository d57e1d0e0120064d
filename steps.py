"""Run steps of `make`: a line for each with its seconds, and the output of one that fails.

    python steps.py [--shown] STEP COMMAND [STEP COMMAND ...]

A step is "name: what it does". The steps of one call run at once. While they run, a line moves if standard output is a
terminal. What a step prints is kept in build/steps/<name>.log; lines that begin with "moe-route: " are shown after it.
With --shown a step writes where `make` does.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LOGS = Path("build/steps")
SHOWN_LINES = 60  # of the output of a step that fails
_OURS = re.compile(r"\W*moe-route: (.*)")


class Step:
    """A command that runs in a process group of its own, so that nothing of it is left when it is ended."""

    def __init__(self, step: str, command: str, shown: bool) -> None:
        self.name, _, self.what = step.partition(": ")
        self.log = LOGS / f"{self.name}.log"
        self.shown = shown
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            kept = {} if shown else {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, shell=True, start_new_session=not shown, **kept)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def end(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                (os.kill if self.shown else os.killpg)(self.process.pid, signal.SIGTERM)
            self.process.wait()

    def told(self) -> list[str]:
        return self.log.read_text("utf-8", "replace").splitlines()


def run(steps: list[Step]) -> int:
    """Wait for all steps, and end the others where one fails. Returns the exit code of that one, or 0."""
    clear = "\r\033[K" if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else ""
    running = list(steps)
    while running:
        time.sleep(0.1)
        print(clear, end="")
        for step in [step for step in running if step.process.poll() is not None]:
            running.remove(step)
            if step.process.returncode:
                for other in running:
                    other.end()
                return refuse(step)
            print(f"{step.name:<12} {step.what:<62} {step.seconds:4.0f} s")
            for line in dict.fromkeys(match[1] for match in map(_OURS.match, step.told()) if match):
                print(f"{'':<12} {line}")
        if clear and running and not running[0].shown:
            names = ", ".join(step.name for step in running)
            line = f"{names} ... {max(step.seconds for step in running):.0f} s"
            print(line[: shutil.get_terminal_size().columns - 1], end="")
        sys.stdout.flush()
    return 0


def refuse(step: Step) -> int:
    """Show the end of what a step printed that failed. Returns its exit code."""
    if step.shown:
        return step.process.returncode
    lines = step.told()
    above = [f"[{len(lines) - SHOWN_LINES} lines before]"] if len(lines) > SHOWN_LINES else []
    print("\n".join([*above, *lines[-SHOWN_LINES:]]), file=sys.stderr)
    print(
        f"moe-route: the step {step.name!r} failed after {step.seconds:.0f} s. All that it printed is in {step.log}; "
        "the same command goes on from here.",
        file=sys.stderr,
    )
    return step.process.returncode


def main(words: list[str]) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036  (this runs before pip can say so)
        print("moe-route needs Python 3.10 or newer: name one, as in make demo PYTHON=python3.12", file=sys.stderr)
        return 2
    shown = words[:1] == ["--shown"]
    words = words[shown:]
    if not words or len(words) % 2:
        print(__doc__, file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    steps: list[Step] = []
    try:
        for step, command in zip(words[::2], words[1::2], strict=True):
            steps.append(Step(step, command, shown))
        return run(steps)
    except KeyboardInterrupt:
        if not shown:
            print("\nmoe-route: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        for step in steps:
            step.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
