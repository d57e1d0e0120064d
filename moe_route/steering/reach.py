"""``Reach``: which rules of a plan have reached a token of the calls that ran, and what labels these calls had."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe_route.base.devices import capturing
from moe_route.base.schema import misspelt
from moe_route.calls.call import PHASES, Call
from moe_route.calls.token_table import broadcast_rows, columns, rows_on_device
from moe_route.steering.rule import Rule

_SHOWN = 8  # names in a warning


class GroupLabels(Protocol):
    """The groups of the sequences of a batch, as `recording.LabelBlock` holds them."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def codes(self) -> np.ndarray: ...

    def values(self, of_name: Sequence[int]) -> np.ndarray: ...


class UnreachedWarning(RuntimeWarning):
    """Given for rules of a plan that reached no token."""


class Reach:
    """Follows the calls that a plan steers, and says at the end which of its rules reached no token.

    Phases and groups are known on the host. Positions are looked up on the device of the call, for rules that have
    reached nothing yet, and are read when the labels change and when the block ends. A call that is captured into a
    CUDA graph counts as reached by every rule, since its replays are not seen.

    Args:
        rules: the rules of the plan.
        group_of: translates the names of groups in labels to those that the rules know.

    Attributes:
        calls: number of calls that ran.
        partial: whether a part of the work ran elsewhere, so that nothing can be said about what is missing here.
    """

    def __init__(self, rules: Iterable[Rule], *, group_of: Callable[[str], str] = str) -> None:
        self.calls, self.partial, self._group_of = 0, False, group_of
        self._pending = list(rules)
        self._named = {name for rule in self._pending for name in rule.groups or ()}
        self._possible: list[Rule] = []  # pending rules that some token of such calls may be reached by
        self._hits: dict[int, tuple[Rule, Tensor]] = {}  # bool [] on a device, whether a rule reached a token
        self._key: tuple[str, bool, GroupLabels | None] | None = None
        self._here: tuple[str, ...] = ()  # groups of the labels now
        self._names: dict[str, None] = {}
        self._phases: set[str] = set()
        self._length = 0

    @classmethod
    def of_counts(cls, rules: Iterable[Rule], groups: Sequence[str], tokens: np.ndarray) -> Reach:
        """What rules reached in a recording of ``groups`` with ``tokens`` [phase, group]; positions are not known."""
        made = cls(rules)
        made.calls = int(tokens.sum() > 0)
        for name, of_phase in zip(groups, tokens.T, strict=True):
            phases: set[str] = {phase for phase, count in zip(PHASES, of_phase, strict=True) if count}
            made._names |= {name: None} if phases else {}
            made._phases |= phases
            for rule in [rule for rule in made._pending if phases and _possible(rule, phases, (name,))]:
                made._reached(rule)
        return made

    def note(self, call: Call, block: GroupLabels | None) -> None:
        """Look which rules reach a token of a call that is about to run with these labels."""
        self.calls += 1
        if not self._pending and self._named <= self._names.keys():
            return
        phases = {call.phase, *(["prefill"] if call.prompt else [])}
        self._length = max(self._length, call.past_length + call.length)
        key = (call.phase, bool(call.prompt), block)
        if key != self._key:
            if self._key is not None and block is not self._key[2]:
                self._read()
            self._key = key
            self._phases |= phases
            self._here = () if block is None else tuple(map(self._group_of, block.names))
            self._names |= dict.fromkeys(self._here)
            self._possible = [rule for rule in self._pending if _possible(rule, phases, self._here)]
        if not self._possible:
            return
        captured = capturing(call.device)
        for rule in list(self._possible):
            per_token = block is not None and block.codes.ndim == 2 and rule.groups is not None
            if captured or (rule.spans is None and not per_token):
                self._reached(rule)
            elif not _too_far(rule, call):
                hit = _reaches(rule, call, block, self._here)
                if hit.device.type != "cpu":
                    before = self._hits.get(id(rule))
                    self._hits[id(rule)] = (rule, hit if before is None else hit | before[1].to(hit.device))
                elif hit:
                    self._reached(rule)

    @property
    def unreached(self) -> list[Rule]:
        """The rules that have reached no token; none before the first call."""
        self._read()
        return list(self._pending) if self.calls and not self.partial else []

    def warn(self, stacklevel: int = 2) -> None:
        """Give an ``UnreachedWarning`` for rules that reached no token, which names what the calls had.

        Rules under the same conditions share one warning.
        """
        alike: dict[object, list[Rule]] = {}
        for rule in self.unreached:
            alike.setdefault((rule.groups, rule.phase, rule.spans), []).append(rule)
        self._warn_of_misspelt(stacklevel + 1)
        for rule, *others in alike.values():
            seen = [f"phase {' and '.join(name for name in PHASES if name in self._phases)}"]
            if rule.groups is not None:
                names = list(self._names)
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                shown = f"groups {', '.join(names[:_SHOWN])}{more}"
                seen.insert(0, shown if names else "no labels (routed.labels names groups)")
            if rule.spans is not None:
                seen += [f"positions 0 to at most {self._length - 1}"] if self._length else []
            number = 1 + len(others)
            which = f"{number} rules of the plan reached no token, as" if others else "a rule reached no token:"
            warnings.warn(
                f"{which} {rule}. The calls had {', '.join(seen)}",
                UnreachedWarning,
                stacklevel=stacklevel,
            )

    def _warn_of_misspelt(self, stacklevel: int) -> None:
        """Warn of a group beside others of a rule that never came, and differs by a letter from one that did."""
        near = misspelt(sorted(self._named), list(self._names)) if self.calls and not self.partial else None
        if near is not None and not any(near[0] in (rule.groups or ()) for rule in self._pending):
            warnings.warn(
                f'a rule of the plan names group "{near[0]}", of which no token came: did you mean "{near[1]}"?',
                UnreachedWarning,
                stacklevel=stacklevel,
            )

    def _reached(self, rule: Rule) -> None:
        self._pending = [other for other in self._pending if other is not rule]
        self._possible = [other for other in self._possible if other is not rule]

    def _read(self) -> None:
        """Read what the devices have found."""
        hits, self._hits = self._hits, {}
        for rule, hit in hits.values():
            if hit:
                self._reached(rule)


def _possible(rule: Rule, phases: set[str], groups: Sequence[str]) -> bool:
    """Whether some token of a call with these phases and groups may meet the conditions of a rule."""
    if rule.phase is not None and rule.phase not in phases:
        return False
    return rule.groups is None or not set(rule.groups).isdisjoint(groups)


def _too_far(rule: Rule, call: Call) -> bool:
    """Whether the positions of a rule all lie behind the tokens of a call, as far as the host knows."""
    if rule.spans is None or call.counter is not None or call.position_ids is not None:
        return False
    return rule.spans[0][0] >= call.past_length + call.length


def _reaches(rule: Rule, call: Call, block: GroupLabels | None, groups: Sequence[str]) -> Tensor:
    """bool []: whether a token of the call, labeled with these groups, meets the conditions of a rule."""
    hit = torch.ones((1, call.length), dtype=torch.bool, device=call.device)
    if rule.spans is not None:
        position = call.positions()
        spans = [(position >= start) & (True if stop is None else position < stop) for start, stop in rule.spans]
        hit = torch.stack([span.expand(position.shape) for span in spans]).any(0)
    if rule.groups is not None and block is not None:
        member = rows_on_device(block.values([int(name in rule.groups) for name in groups]), call.device)
        rows = broadcast_rows(columns(member, call), call, "group")
        hit = hit & (rows != 0 if isinstance(rows, int) else rows.bool())
    if call.prompt and rule.phase is not None:
        prompt = torch.arange(call.length, device=call.device) < call.prompt
        hit = hit & (prompt if rule.phase == "prefill" else ~prompt)
    if call.valid is not None:
        hit = hit & (call.valid if call.again is None else call.valid | call.again)
    return hit.any()
