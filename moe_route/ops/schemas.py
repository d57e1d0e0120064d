"""Schemas of the operators ``torch.ops.moe_route.*``, which every backend implements."""

from __future__ import annotations

from collections.abc import Mapping

# Every argument that is passed costs the caller 0.1 to 0.2 us, one left to its default next to nothing: what most calls
# leave out comes last.
_NUMBERS = "float group_fill=0.0, float eps=0.0, float norm_p=1.0, float scale=1.0, float jitter=0.0, float softcap=0.0"
_STATISTICS = "Tensor(a!)? group_statistics=None, int statistics=0, Tensor(b!)? segment_statistics=None"
_BETWEEN = "int activation, int pairing, float alpha, float limit, float shift"

SCHEMAS: Mapping[str, str] = {
    "route": (
        f"(Tensor logits, int k, int policy, Tensor? tokens=None, {_STATISTICS}, {_NUMBERS}, "
        "Tensor? correction_bias=None, Tensor? expert_scale=None, Tensor? steering=None, int steering_planes=0, "
        "Tensor? row_params=None, Tensor? remap=None, Tensor? choice_ids=None, Tensor? choice_weights=None, "
        "int choice_mode=0) -> (Tensor weights, Tensor ids)"
    ),
    "observe": (
        f"(Tensor logits, Tensor ids, Tensor? weights, int policy, Tensor? tokens=None, {_STATISTICS}, {_NUMBERS}, "
        "Tensor? expert_scale=None) -> ()"
    ),
    "observe_layers": (
        "(Tensor[] logits, Tensor[] ids, Tensor[] weights, int policy, Tensor? tokens, "
        f"Tensor(a!)[] group_statistics, int statistics, Tensor(b!)[] segment_statistics, {_NUMBERS}) -> ()"
    ),
    "route_weights": (
        f"(Tensor logits, Tensor ids, int policy, Tensor? tokens=None, {_NUMBERS}, Tensor? expert_scale=None, "
        "Tensor? steering=None, int steering_planes=0, Tensor? row_params=None) -> Tensor"
    ),
    "dispatch": (
        "(Tensor ids, int num_experts, int block) "
        "-> (Tensor offsets, Tensor ends, Tensor counts, Tensor order, Tensor inverse)"
    ),
    "permute": "(Tensor x, Tensor order, Tensor inverse) -> Tensor",
    "combine": "(Tensor rows, Tensor weights, Tensor order, Tensor inverse, Tensor? residual=None) -> Tensor",
    "expert_rows": (
        "(Tensor x, Tensor offsets, Tensor counts, Tensor order, int k, Tensor up, Tensor down, Tensor? up_bias, "
        f"Tensor? down_bias, {_BETWEEN}, Tensor? up_panels=None, Tensor? down_panels=None) -> Tensor"
    ),
    "expert_activation": f"(Tensor rows, Tensor offsets, Tensor? bias, {_BETWEEN}) -> Tensor",
    "pack_expert_weight": "(Tensor weight, int pairing) -> Tensor",
}
"""Name of an operator -> its arguments and results. The compiled library gives them kernels; it defines none."""
