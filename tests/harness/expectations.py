"""How far a backend may be from the oracle, and the oracle itself.

The oracle is the reference in float64. Ids must agree wherever the values that selection compares differ by more than
the rounding of float32; where selection compares the logits themselves they must agree always.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from harness.backends import BACKENDS
from harness.problems import Problem, RoutedModel
from torch import Tensor

from moe_route import reference
from moe_route.contract.tables import FIXED_POINT
from moe_route.reference import gate, steering

EPS = torch.finfo(torch.float32).eps
TINY = torch.finfo(torch.float32).tiny
REFERENCE = BACKENDS[0]


def assert_ulp(actual: Tensor, expected: Tensor, ulp: float) -> None:
    """float32 `actual` within `ulp` units in the last place of `expected`; results below 2^-126 may be 0."""
    expected = expected.double()
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(0.0), expected[~finite].nan_to_num(0.0))
    error = (actual - expected).abs()[finite]
    allowed = ulp * EPS * expected.abs()[finite] + TINY
    assert (error <= allowed).all(), f"off by up to {(error / allowed * ulp).max().item():.1f} ulp, {ulp} allowed"


class Oracle:
    """A problem in float64: the choice, and the values it was made by."""

    def __init__(self, problem: Problem) -> None:
        self.problem = replace(problem, logits=problem.logits.double())
        self.routed = self.problem.run(REFERENCE)
        tokens = steering.read_tokens(problem.tokens, problem.logits.shape[0], problem.logits.device)
        raw = torch.where(tokens.valid[:, None], self.problem.logits, 0.0)
        row = steering.read_steering(problem.steering_tables(), tokens, raw)
        self.z = steering.steer(raw, row)
        self.forbidden = row.forbidden
        self.force = row.force
        self.value = gate._selection_value(self.z, problem.spec, problem.correction_bias, row)
        # The largest number that went into a steered logit: what its rounding error is relative to.
        terms = raw.abs() + self.z.abs()
        for name in ("bias", "std", "magnitude"):
            if name in row.planes:
                terms = terms + row.planes[name].abs() * (raw.abs() + 1)
        terms = torch.where(terms.isfinite(), terms, 0.0)
        self.rounding = EPS * terms.amax(1, keepdim=True) if terms.numel() else terms[:, :1]
        # Tokens whose scores nearly all underflow in float32 may be left unscored there.
        scores = gate._score(self.z, problem.spec.score, ~row.forbidden).sum(1)
        self.faint = bool(((scores > 0) & (scores < (1e-17 if problem.spec.score == "sqrt_softplus" else 1e-30))).any())
        # The weights before they are renormalized, and how much renormalizing magnifies their errors.
        plain = replace(problem.spec, renormalize="none", scale=1.0)
        weights = gate._weigh(self.z, self.routed.ids.long(), plain, None, row)
        total, net = weights.abs().sum(1, keepdim=True), weights.sum(1, keepdim=True).abs()
        renormalized = problem.spec.renormalize in ("sum", "clamp")
        self.amplification = torch.where(net > 0, 2 * total / net, 1.0).nan_to_num(1.0) if renormalized else 1 + 0 * net
        # Scores below this are 0 in float32 (exp below 2^-126 is), and renormalizing magnifies that too. A sum that is
        # near it, or whose squares are, says nothing.
        smallest = TINY**0.5 if problem.spec.score == "sqrt_softplus" else TINY
        least = 1e-13 if problem.spec.renormalize == "norm" else 1e6 * smallest
        self.vanishes = total < least
        self.underflows = self.vanishes & (problem.spec.renormalize != "none")
        self.absolute = (
            4 * smallest / net.clamp(min=least) if problem.spec.renormalize != "none" else smallest + 0 * net
        )

    def tolerance(self) -> Tensor:
        """Relative error allowed in the weights of each token, [T, 1]."""
        return 2e-6 + 4 * self.rounding

    def check_ids(self, routed: RoutedModel) -> Tensor:
        """Ids equal up to near ties; returns bool [T], the rows whose ids are the very same."""
        ids, expected = routed.ids.long(), self.routed.ids.long()
        same = (ids == expected).all(1)
        assert torch.equal(ids < 0, expected < 0)
        if self._compares_logits():
            assert same.all(), f"rows {(~same).nonzero().flatten().tolist()}"
        filled = ids >= 0
        one, other = (torch.where(filled, self.value.gather(1, at.clamp(min=0)), 0.0) for at in (ids, expected))
        if self.force is not None:
            codes = [torch.where(filled, self.force.gather(1, at.clamp(min=0)).sign(), 0) for at in (ids, expected)]
            assert torch.equal(codes[0][~same], codes[1][~same])
        scale = torch.where(one.isfinite() & other.isfinite(), torch.maximum(one.abs(), other.abs()), 0.0)
        near = (one - other).abs() <= 4 * EPS * scale + 4 * self.rounding * scale.clamp(min=1.0) + TINY
        near = near | (one == other) | (one.isnan() & other.isnan())
        if self.problem.spec.groups == 1 and "remap" not in (self.problem.steering or {}):
            assert (near | same[:, None]).all()
        return same

    def _compares_logits(self) -> bool:
        """Selection compares numbers that were given, without arithmetic."""
        problem = self.problem
        plain = problem.steering is None and problem.correction_bias is None
        by_group = problem.spec.order == "topk_then_score" and problem.spec.group_score == "max"
        return plain and (problem.spec.groups == 1 or by_group)

    def check_weights(self, routed: RoutedModel, rows: Tensor) -> None:
        """Weights of the given rows (same ids) within the bounds of float32."""
        rows = rows & ~self.underflows[:, 0]
        expected, actual = self.routed.weights[rows], routed.weights.double()[rows]
        rows_tolerance = self.tolerance()[rows] * self.amplification[rows]
        assert torch.equal(actual.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num())
        largest = (
            torch.where(finite, expected.abs(), 0.0).amax(1, keepdim=True) if expected.numel() else expected[:, :1]
        )
        allowed = rows_tolerance * (expected.abs() + EPS * largest) + self.absolute[rows] * largest.clamp(min=4.0)
        error = torch.where(finite, (actual - expected).abs(), 0.0)
        bad = (error > allowed).nonzero()
        assert not bad.numel(), f"rows {bad[:3].tolist()}: {actual[bad[0, 0]]} is not {expected[bad[0, 0]]}"

    def check_statistics(self, routed: RoutedModel, same: Tensor) -> None:
        """Counts exact and masses within 1e-6 relative (plus the steering's rounding), where all ids agree."""
        statistics, expected = routed.statistics, self.routed.statistics
        rounding = 1e-6 + 4 * (self.rounding.max().item() if self.rounding.numel() else 0.0)
        for of in ("groups", "segments"):
            for name in ("tokens", "slots", "empty", "steered") + (() if self.faint else ("unscored",)):
                assert torch.equal(statistics.scalar(name, of=of), expected.scalar(name, of=of)), name
            names = [name for name in statistics.metrics if (same.all() or name == "probability") and not self.faint]
            if self.problem.steering is not None and "natural_counts" in names:
                names.remove("natural_counts")  # of a choice that was not returned, so that its ties are not known
            for name in names:
                got, want = statistics.metric(name, of=of), expected.metric(name, of=of)
                if name in ("counts", "natural_counts"):
                    assert torch.equal(got, want), name
                elif name == "probability" or ((self.amplification <= 2) & ~self.vanishes).all():
                    _assert_mass(got, want, rounding, name)
            if self.faint:
                continue
            _assert_mass(
                statistics.scalar("entropy", of=of), expected.scalar("entropy", of=of), 4 * rounding, "entropy"
            )


def _assert_mass(got: Tensor, want: Tensor, relative: float, name: str) -> None:
    """Fixed point within `relative`, half a unit and the float32 rounding of each token."""
    got, want = got.double() * FIXED_POINT, want.double() * FIXED_POINT
    # A sum over several tokens may cancel nothing: all terms are of one sign up to the weights of identity scores.
    allowed = relative * (want.abs() + 1.0) + 64 * FIXED_POINT
    bad = ((got - want).abs() > allowed).nonzero()
    assert not bad.numel(), f"{name}: {got[tuple(bad[0])]} is not {want[tuple(bad[0])]}"


__all__ = ["EPS", "Oracle", "REFERENCE", "TINY", "assert_ulp", "reference"]
