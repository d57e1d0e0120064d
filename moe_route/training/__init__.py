"""Train routers: those of a dense model that becomes sparse, and those of adapters on a model.

A dense model becomes a sparse one whose experts belong to language families:

    model, plan = mr.training.upcycle(dense, families=mr.data.families_of(["eng_Latn", "swh_Latn"]))
    with mr.attach(model) as routed, routed.steer(plan), routed.labels(groups=languages):
        loss = model(**batch).loss

An upcycled model is attached to, recorded and steered like any other. The method is that of ApolloMoE
[arXiv 2410.10626].

Any model gets low-rank adapters that a router mixes:

    adapted = mr.training.add_adapters(model, mr.training.AdapterConfig(rank=8, experts=6, router="sequence"))
    with mr.attach(model) as routed, routed.record(groups=["eng_Latn", "swh_Latn"]) as recording:
        ...
"""

from moe_route.training.adapters import (
    STAGES,
    AdaptedModel,
    AdapterConfig,
    AdapterError,
    ShardPool,
    Stage,
    add_adapters,
    add_peft_folders,
    freeze,
    load_adapters,
    save_peft_folder,
)
from moe_route.training.dense import UpcyclingError
from moe_route.training.upcycling import (
    Upcycled,
    family_plan,
    is_upcycled,
    load_upcycled,
    own_expert_loss,
    upcycle,
    with_sparse_blocks,
)

__all__ = [
    "STAGES",
    "AdaptedModel",
    "AdapterConfig",
    "AdapterError",
    "ShardPool",
    "Stage",
    "Upcycled",
    "UpcyclingError",
    "add_adapters",
    "add_peft_folders",
    "family_plan",
    "freeze",
    "is_upcycled",
    "load_adapters",
    "load_upcycled",
    "own_expert_loss",
    "save_peft_folder",
    "upcycle",
    "with_sparse_blocks",
]
