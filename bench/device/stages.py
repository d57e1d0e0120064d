"""The record of a run of `bench/gpu.sh`: one JSON file, written anew after every stage. Needs nothing but Python.

stages.py FILE begin                     a new file, with the machine as far as torch is there to tell
stages.py FILE add NAME STATUS SECONDS CODE LOG    one stage; LOG holds what it printed
stages.py FILE forget CHECKS NAME...     before checks run: takes their earlier outcomes out of the file CHECKS
stages.py FILE checks CHECKS SECONDS CODE LOG MISSING NAME...    a stage for each check, as the file CHECKS has it;
                         MISSING is the status of what needs a device
stages.py FILE end                       prints a table; exit code 1 if a stage failed
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run as a script: the folder of the script is on the path, not the repository
    sys.path.insert(0, str(ROOT))

# Every status a stage may have, and whether it is the run's failure.
STATUSES = {
    "ok": False,
    "failed": True,
    "timed out": True,
    "no time left": True,
    "not available": False,  # the machine has no such tool, or the tool refuses the device
    "needs a device": False,  # of a dry run
}
LAST_LINES = 30
NOT_HERE = 77  # exit code of what cannot run on this machine, as for CTest and automake


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: dict[str, Any]) -> None:
    """Renamed into place: whoever stops the run finds a whole file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def begin(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, {"machine": machine(), "stages": []})


def machine() -> dict[str, str]:
    try:
        from bench.device.environment import describe

        return describe()
    except ImportError as missing:
        return {"device": "unknown", "problem": f"torch cannot be imported: {missing}"}


def add(path: Path, name: str, status: str, seconds: float, code: int, log: Path) -> None:
    if status not in STATUSES:
        raise ValueError(f"no status {status!r}; there are {', '.join(STATUSES)}")
    text = log.read_bytes().decode("utf-8", errors="replace") if log.is_file() else ""
    stage = {"name": name, "status": status, "seconds": round(seconds, 1), "exit_code": code, "said": last(text)}
    content = read(path)
    content["stages"] = [old for old in content["stages"] if old["name"] != name] + [stage]
    write(path, content)


def forget(checks: Path, names: list[str]) -> None:
    if checks.is_file():
        write(checks, {name: outcome for name, outcome in read(checks).items() if name not in names})


def add_checks(path: Path, checks: Path, seconds: float, code: int, log: Path, missing: str, names: list[str]) -> None:
    """One stage for each check of a process. A check that left no outcome is where the process ended, or behind it."""
    outcomes = read(checks) if checks.is_file() else {}
    for name in names:
        if name not in outcomes:
            add(path, name, "timed out" if code in (124, 137) else "failed", seconds, code, log)
            continue
        outcome = outcomes[name]
        status = missing if outcome["status"] == "needs a device" else outcome["status"]
        exit_code = {"ok": 0, "failed": 1}.get(status, NOT_HERE)
        add(path, name, status, outcome["seconds"], exit_code, log)
        print(f"== {name:20} {status:15} {outcome['seconds']:4.0f} s  {outcome.get('reason', '')}"[:240].rstrip())


def last(text: str) -> list[str]:
    """The last lines, without progress bars and colors."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in plain.split("\n")]
    return [line[:500] for line in lines if line][-LAST_LINES:]


def table(content: dict[str, Any]) -> str:
    rows = [
        (stage["status"], f"{stage['seconds']:.0f} s", stage["name"], _reason(stage)) for stage in content["stages"]
    ]
    return "\n".join(f"{status:15} {seconds:>6}  {name:15} {reason}".rstrip() for status, seconds, name, reason in rows)


def _reason(stage: dict[str, Any]) -> str:
    return stage["said"][-1][:120] if stage["status"] != "ok" and stage["said"] else ""


def failed(content: dict[str, Any]) -> bool:
    return not content["stages"] or any(STATUSES[stage["status"]] for stage in content["stages"])


def main(arguments: list[str]) -> int:
    path, verb, rest = Path(arguments[0]), arguments[1], arguments[2:]
    if verb == "begin":
        begin(path)
        return 0
    if verb == "add":
        name, status, seconds, code, log = rest
        add(path, name, status, float(seconds), int(code), Path(log))
        return 0
    if verb == "forget":
        forget(Path(rest[0]), rest[1:])
        return 0
    if verb == "checks":
        checks, seconds, code, log, missing, *names = rest
        add_checks(path, Path(checks), float(seconds), int(code), Path(log), missing, names)
        return 0
    if verb == "end":
        content = read(path)
        print(table(content))
        return int(failed(content))
    raise ValueError(f"no verb {verb!r}; there are begin, add, forget, checks and end")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
