"""What tests of commands share: options of a small recording, and what a refusal looks like."""

from __future__ import annotations

__all__ = ["SMALL", "refused"]

SMALL = ("--languages", "eng_Latn,deu_Latn,swh_Latn", "--limit", "4", "--batch-size", "4")


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on standard output, and last one short line that says what is wrong.

    Before it, lines may say how texts were read.
    """
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    *told, last = err.strip().splitlines()
    assert last.startswith("moe-route: "), err
    assert all(line.startswith("moe-route: ") and "items: " in line for line in told), err
    for word in words:
        assert word in last
