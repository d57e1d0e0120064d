"""A model for recordings without the compiled library: its routers count logits that a test gives."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_route import reference
from moe_route.calls import Call
from moe_route.calls.token_table import build_table
from moe_route.contract.spec import RouterSpec
from moe_route.recording import Recorder


class StubModel:
    """What `Recorder` sees of an attached model: layers with these numbers of experts, of which a token takes `top_k`.

    A call counts logits by the reference in torch. With ``silent``, the model runs and reaches no router.
    """

    def __init__(self, experts: Sequence[int], *, top_k: int = 2, silent: bool = False) -> None:
        self.top_k, self.silent = top_k, silent
        self.routers = [
            SimpleNamespace(name=f"layers.{i}", num_experts=n, top_k=top_k, role="", device=torch.device("cpu"))
            for i, n in enumerate(experts)
        ]
        self.on_choice: Any = None
        self.tables: Any = None

    def set_statistics(self, tables: Any, *, lag: int = 0) -> None:
        self.tables = tables

    def flush(self) -> None:
        """This model counts at once."""

    def __call__(
        self, recorder: Recorder, logits: Sequence[Tensor], phase: Any = "prefill", valid: Tensor | None = None
    ) -> None:
        """One call of the model; logits of each layer, float32 [S, E] or [B, S, E]. ``valid``: bool [B, S]."""
        batched = [values if values.dim() == 3 else values[None] for values in logits]
        batch, length = batched[0].shape[:2]
        call = Call(batch, length, 0, valid, phase, torch.device("cpu"))
        labels = recorder._counting.labels_of(call)
        assert labels is not None
        table = build_table(call, labels, -1)
        for layer, values in enumerate([] if self.silent else batched):
            weights, ids = reference.route(
                values.reshape(batch * length, -1),
                self.top_k,
                RouterSpec(),
                tokens=table,
                statistics=self.tables[layer],
            )
            if self.on_choice is not None:
                self.on_choice(layer, ids, weights)
        recorder._counting.after_call(call)
