"""Running a router by itself on random hidden states, without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

PROBES = 64


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags, random states, numbers that a router keeps about its last call, and the
    dtype of parameters that it casts, as before afterwards."""
    flags = [(inner, inner.training) for inner in module.modules()]
    kept = [(vars(inner), {k: v for k, v in vars(inner).items() if not k.startswith("_")}) for inner, _ in flags]
    data = [(parameter, parameter.data) for parameter in module.parameters()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            for inner, _ in flags:
                inner.training = False
            yield
    finally:
        for attributes, values in kept:
            for name in [name for name in attributes if not name.startswith("_") and name not in values]:
                del attributes[name]
            attributes.update(values)
        for parameter, before in data:
            if parameter.dtype != before.dtype:
                parameter.data = before
        for inner, training in flags:
            inner.training = training
