"""Make routers: turn a dense model into a sparse one whose experts belong to language families, and train it.

    model, plan = mr.training.upcycle(dense, families=mr.data.families_of(["eng_Latn", "swh_Latn"]))
    with mr.attach(model) as routed, routed.steer(plan), routed.labels(groups=languages):
        loss = model(**batch).loss

An upcycled model is attached to, recorded and steered like any other. The method is that of ApolloMoE
[arXiv 2410.10626].
"""

from moe_route.training.checkpoint import is_upcycled, load_upcycled, with_sparse_blocks
from moe_route.training.dense import UpcyclingError
from moe_route.training.losses import own_expert_loss
from moe_route.training.upcycling import Upcycled, family_plan, upcycle

__all__ = [
    "Upcycled",
    "UpcyclingError",
    "family_plan",
    "is_upcycled",
    "load_upcycled",
    "own_expert_loss",
    "upcycle",
    "with_sparse_blocks",
]
