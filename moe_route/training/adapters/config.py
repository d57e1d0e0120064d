"""What adapters are made of, as data that is saved with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from moe_route.base.schema import FileRefusedError

RouterKind = Literal["none", "token", "sequence", "group"]
Pooling = Literal["first", "prefix", "mean"]


class AdapterError(ValueError):
    """Raised if adapters cannot be made, loaded or used as asked; the message names the fix."""


class AdapterFileError(AdapterError, FileRefusedError):
    """Raised for a file of adapters that is damaged, of another kind, or wrong."""


@dataclass(frozen=True, kw_only=True)
class ShardPool:
    """Factors gathered from pools that all layers share (Mixture of Shards, arXiv 2410.00938 section 3).

    Each kind of linear layer has one pool of shards for A and one for B. Every layer draws its shards once, at the
    start, for A and B apart; then they are fixed.

    Attributes:
        rank: e, the rank that is paid for: the pools hold as many parameters as LoRA of this rank in every layer.
        shards: l, shards in a row of A or B; it must divide both sizes of every adapted layer.
        private: p, ranks of each layer whose shards no other layer draws.
    """

    rank: int
    shards: int = 4
    private: int = 1

    def __post_init__(self) -> None:
        for name in ("rank", "shards"):
            _check_number(f"ShardPool.{name}", getattr(self, name), 1)
        _check_number("ShardPool.private", self.private, 0)
        if self.private > self.rank:
            raise AdapterError(f"private={self.private} ranks are more than the rank={self.rank} that is paid for")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters on the linear layers of a model: ``y = W x + sum_i w_i (alpha / rank) B_i A_i dropout(x)``.

    Attributes:
        rank: r, of each adapter that is mixed.
        experts: n, adapters of each linear layer. 1 for `router="none"`; the number of groups for "group".
        router: who gives the weights w. "none": one adapter, weight 1. "token" and "sequence": a router per linear
            layer, which reads what the block around it gets (MT4CrossOIE, arXiv 2308.06552 section 3.2). "group": the
            label of a sequence names its adapter, weight 1 (X-MOD, arXiv 2205.06266).
        groups: the labels, for `router="group"`.
        pooling: what a "sequence" router reads. "first": the first token; decided once, also while generating.
            "prefix": the mean of all tokens up to each one, decided anew at each. "mean": the mean of the whole
            sequence; refused for causal models, where it would show every token those that come after it.
        top_k: adapters mixed for each decision; None mixes all.
        renormalize: whether the weights of the `top_k` chosen are divided by their sum ("sum") or not ("none").
        target_modules: names of linear layers or embeddings, whole or from a dot on ("q_proj"); or one regular
            expression that the whole name must match. None: every linear layer of the model's blocks, without routers
            and experts. Adapters of an embedding are mixed by numbers that are trained, and do not see the text.
        pool: gather the factors from shard pools; None: each adapter has factors of its own.
        alpha: scale of the adapters, divided by the rank.
        dropout: probability with which inputs of A are dropped in training.
        seed: of the first factors, routers and shards.
    """

    rank: int
    experts: int = 1
    router: RouterKind = "none"
    groups: tuple[str, ...] = ()
    pooling: Pooling = "first"
    top_k: int | None = None
    renormalize: Literal["sum", "none"] = "sum"
    target_modules: tuple[str, ...] | str | None = None
    pool: ShardPool | None = None
    alpha: float = 16.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("rank", self.rank, 1)
        _check_number("experts", self.experts, 1)
        _check_number("seed", self.seed, 0)
        _check_choice("router", self.router, get_args(RouterKind))
        _check_choice("pooling", self.pooling, get_args(Pooling))
        _check_choice("renormalize", self.renormalize, ("sum", "none"))
        if not isinstance(self.alpha, (int, float)) or not 0 <= self.dropout < 1:
            raise AdapterError(f"alpha is a number and dropout lies in [0, 1), got {self.alpha!r} and {self.dropout!r}")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules))
        object.__setattr__(self, "groups", _names("groups", self.groups) if self.groups else ())
        self._check_mixture()
        if self.pool is not None and self.rank < self.pool.private:
            raise AdapterError(f"private={self.pool.private} ranks are more than rank={self.rank}")

    def _check_mixture(self) -> None:
        if (self.router == "group") != bool(self.groups):
            raise AdapterError("groups= names the adapters of router='group', and of no other router")
        if self.router == "group":
            if self.experts not in (1, len(self.groups)):
                raise AdapterError(f"{len(self.groups)} groups have as many adapters, not experts={self.experts}")
            object.__setattr__(self, "experts", len(self.groups))
        if self.router == "none" and self.experts != 1:
            raise AdapterError(
                f"router='none' has one adapter, not {self.experts}: choose router='token', 'sequence' or 'group'"
            )
        if not self.routed:
            if self.top_k is not None:
                raise AdapterError(f"router={self.router!r} chooses nothing: leave out top_k")
            return
        if self.experts < 2:
            raise AdapterError(f"router={self.router!r} needs experts= of 2 or more to choose among")
        if self.top_k is not None:
            _check_number("top_k", self.top_k, 1)
            if self.top_k > self.experts:
                raise AdapterError(f"top_k={self.top_k} is more than the {self.experts} adapters")
        if self.top_k == 1 and self.renormalize == "sum":
            raise AdapterError(
                "with top_k=1 and renormalize='sum' every weight is 1, so the router gets no gradient and never "
                "learns. Use top_k=2 or renormalize='none'"
            )

    @property
    def routed(self) -> bool:
        """Whether routers decide."""
        return self.router in ("token", "sequence")

    @property
    def scale(self) -> float:
        """The factor on the adapters' sum, alpha / rank."""
        return self.alpha / self.rank

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        kept = asdict(self)
        kept["groups"] = list(self.groups)
        if not isinstance(self.target_modules, str) and self.target_modules is not None:
            kept["target_modules"] = list(self.target_modules)
        return kept

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> AdapterConfig:
        """The config of `as_dict`. Raises `AdapterError` for anything else."""
        if not isinstance(kept, Mapping) or set(kept) != {field.name for field in fields(cls)}:
            raise AdapterFileError("the adapters' config is damaged, or of another version: save them again")
        try:
            pool = None if kept["pool"] is None else ShardPool(**kept["pool"])
            return cls(**{**kept, "pool": pool})
        except TypeError as error:
            raise AdapterFileError(f"the adapters' config is damaged ({error}): save them again") from error


def _check_number(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AdapterError(f"{name} is an integer of at least {least}, got {value!r}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise AdapterError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _names(what: str, given: object) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise AdapterError(f"{what} must be different names, got {given!r}")
    return names
