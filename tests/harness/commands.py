"""What tests of commands share: options of a small recording, and what a refusal looks like."""

from __future__ import annotations

__all__ = ["SMALL", "refused"]

SMALL = ("--languages", "eng_Latn,deu_Latn,swh_Latn", "--limit", "4", "--batch-size", "4")


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on standard output, one short line that says what is wrong."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("moe-route: ")
    for word in words:
        assert word in err
