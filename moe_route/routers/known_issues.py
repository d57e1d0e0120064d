"""Known bugs of the installed transformers that concern a router; `describe` shows them with the version."""

from __future__ import annotations

import sys

from moe_route.contract.spec import RouterSpec
from moe_route.modules.attributes import modeling_of
from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family


def known_issues(family: Family, adapter: Adapter, spec: RouterSpec) -> tuple[str, ...]:
    """One sentence per bug, opening with the version; empty for a router that is not from transformers."""
    modeling = modeling_of(adapter.module)
    if modeling is None:
        return ()
    texts = [*family.known_issues, *adapter.known_issues()]
    loss = getattr(modeling, "load_balancing_loss_func", None)
    if loss is not None and "gate_logits" in loss.__code__.co_varnames:  # Switch's loss takes the choice
        texts.append(_balancing_loss(family, spec))
    version = sys.modules["transformers"].__version__
    return tuple(f"transformers {version}: {text}" for text in texts)


def _balancing_loss(family: Family, spec: RouterSpec) -> str:
    """Describe the loss: it takes the softmax of the logits and its k largest, whatever the router did."""
    unseen = ["steering"]
    if family.has_bias:
        unseen.append("the correction bias")
    if spec.groups > 1:
        unseen.append("the groups")
    if spec.score not in ("softmax", "sparsemixer"):
        unseen.append(f"the {spec.score.replace('_', '-')} score")
    return f"the balancing loss (aux_loss) chooses anew from the router logits and does not see {' or '.join(unseen)}"
