"""Low-rank adapters whose mixture is chosen by a router, by a label, or not at all."""

from moe_route.training.adapters.config import AdapterConfig, AdapterError, ShardPool
from moe_route.training.adapters.handle import STAGES, AdaptedModel, Stage, add_adapters, freeze, load_adapters
from moe_route.training.adapters.peft_folders import add_peft_folders, save_peft_folder

__all__ = [
    "STAGES",
    "AdaptedModel",
    "AdapterConfig",
    "AdapterError",
    "ShardPool",
    "Stage",
    "add_adapters",
    "add_peft_folders",
    "freeze",
    "load_adapters",
    "save_peft_folder",
]
