"""Register moe-route as an experts implementation of transformers, and switch a model to it.

transformers has two registries. Floating-point experts run in `forward.experts_forward`. Experts that transformers
quantized to FP8 hold packed weights with scales. Under the name "moe_route" they run the FP8 implementation that
transformers would have used, and the log reports that.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moe_route.experts.forward import call_of, experts_forward
from moe_route.experts.layout import DEFAULTS, UNKNOWN_FLAGS, compute_dtype, obstacle
from moe_route.experts.packing import ATTRIBUTE, PackedWeights, packed_bytes, packing_obstacle
from moe_route.modules.intercept import ReplacedAttribute
from moe_route.nn import Experts
from moe_route.ops.expert_paths import limits
from moe_route.routers.discovery import ModelNotSupportedError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """A configuration set to "moe_route" now: its former value, and the switches that share it."""

    before: str | None
    forget: weakref.finalize[..., Any]
    holders: weakref.WeakSet[ExpertsSwitch] = field(default_factory=weakref.WeakSet)


NAME = "moe_route"
OWN_FORWARD = "own forward"
_SETTING = "_experts_implementation_internal"  # configuration attribute that the experts read in every call
_BEFORE = "_moe_route_before"  # attribute of an FP8 module: its former implementation
_KNOWN = {*DEFAULTS, "experts_class", "experts_interface"}
_said: set[str] = set()
_held: dict[int, _Held] = {}  # by id of the configuration


def register_experts() -> None:
    """Register "moe_route" with transformers. Safe to call twice.

    `model.set_experts_implementation("moe_route")` and `from_pretrained(..., experts_implementation="moe_route")` then
    work.

    Raises `ImportError` without transformers, or with a version without the experts interface (before 5.0).
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "experts_implementation='moe_route' needs transformers: pip install 'moe-route[hf]'"
        ) from error
    try:
        interface = import_module("transformers.integrations.moe")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"transformers {transformers.__version__} has no experts interface; install transformers 5.0 or later"
        ) from error
    parameters = inspect.signature(interface.use_experts_implementation).parameters
    UNKNOWN_FLAGS.clear()
    UNKNOWN_FLAGS.update({name: p.default for name, p in parameters.items() if name not in _KNOWN})
    interface.ExpertsInterface.register(NAME, experts_forward)
    fp8 = _fp8("FP8ExpertsInterface")
    if fp8 is not None:  # without a registry for FP8 experts, the name does not reach them
        fp8.register(NAME, fp8_forward)


def experts_implementations(block: nn.Module) -> tuple[str, ...]:
    """The implementations that run the experts inside a block now, each once.

    They are names of transformers' experts interface ("eager", "grouped_mm", "moe_route", ...), or "own forward" if no
    experts module uses the interface.
    """
    names = {_runs_as(module) for module in block.modules() if _decorated(module)}
    return tuple(sorted(names)) or (OWN_FORWARD,)


def experts_paths(block: nn.Module) -> str:
    """How "moe_route" runs the experts inside a block without gradients, and up to how many slots (T * k) each way.

    "" if they are not run as "moe_route", or cannot be.
    """
    paths = set()
    module: Any
    for module in block.modules():
        if _decorated(module) and _runs_as(module) == NAME and not _is_fp8(module) and obstacle(module) is None:
            hidden = module.down_proj.new_empty(0, dtype=compute_dtype(module))
            with torch.no_grad():
                ways = limits(call_of(module, hidden, 0))
            said = ", then ".join(name if most is None else f"{name} up to {most} slots" for name, most in ways)
            copied = packed_bytes(module)
            paths.add(f"{said} ({copied / 1e6:.4g} MB of packed copies)" if copied else said)
    return "; ".join(sorted(paths))


class ExpertsSwitch:
    """Runs a model's experts as "moe_route" from `install` to `remove`. FP8 experts keep their implementation.

    The setting is stored in the model's configuration. Models built on the same configuration object are switched
    together, until the last of them is switched back.

    With `pack` every module gets a packed copy of its weights, as large as they are, until `remove`.

    Raises `ModelNotSupportedError` if a module cannot be run or packed so, or if no module uses the experts interface.
    """

    def __init__(self, model: nn.Module, *, pack: bool = False) -> None:
        register_experts()
        modules = [(name, module) for name, module in model.named_modules() if _decorated(module)]
        self._configurations = _configurations(model)
        _refuse(model, modules, [getattr(config, _SETTING) for config in self._configurations])
        self._to_pack = [module for _, module in modules] if pack else []
        self._copies: list[ReplacedAttribute] = []
        if pack:
            _refuse_packing(modules)
        for kind in _undecorated(model):
            said = "%s have a forward of their own and keep it: %r runs what goes through transformers' interface"
            logger.warning(said, kind, NAME)
        self._names = [
            ReplacedAttribute(module, _BEFORE, _before(module.config)) for _, module in modules if _is_fp8(module)
        ]

    def install(self) -> None:
        """Set "moe_route", and pack."""
        for module in self._to_pack:
            self._copies.append(ReplacedAttribute(module, ATTRIBUTE, PackedWeights(module)))
            self._copies[-1].install()
        for name in self._names:
            name.install()
        for config in self._configurations:
            _hold(config, self)

    def remove(self) -> None:
        """Restore the former setting. A setting that somebody else made meanwhile stays. Safe to call twice."""
        for config in self._configurations:
            _let_go(config, self)
        for name in self._names:
            name.remove()
        while self._copies:
            self._copies[-1].remove()
            self._copies.pop()


def fp8_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run FP8 experts under the name "moe_route": with their implementation before `attach`, else the default.

    The default is grouped_mm, or eager if the activations have static scales, which grouped_mm refuses.
    """
    name = _fp8_runs_as(module)
    if not torch.compiler.is_compiling() and name not in _said:
        _said.add(name)
        logger.warning(
            "%s hold FP8 weights with scales, which %r does not multiply: transformers' %r runs them",
            type(module).__name__,
            NAME,
            name,
        )
    if name == "eager":
        forward: Callable[..., Tensor] = inspect.unwrap(type(module).forward)
    else:
        forward = _fp8("ALL_FP8_EXPERTS_FUNCTIONS")[name]
    return forward(module, hidden_states, top_k_index, top_k_weights)


def _fp8_runs_as(module: nn.Module) -> str:
    static = getattr(module, "activation_scheme", None) == "static"
    return getattr(module, _BEFORE, None) or ("eager" if static else "grouped_mm")


def _runs_as(module: Any) -> str:
    """The implementation that a decorated module's next call uses; transformers takes "eager" if none is set."""
    name = getattr(module.config, _SETTING) or "eager"
    return _fp8_runs_as(module) if name == NAME and _is_fp8(module) else name


def _before(config: Any) -> str | None:
    """The implementation that was set before any switch."""
    held = _held.get(id(config))
    before: str | None = held.before if held else getattr(config, _SETTING)
    return before


def _hold(config: Any, switch: ExpertsSwitch) -> None:
    key = id(config)
    if key not in _held:
        forget = weakref.finalize(config, _held.pop, key, None)  # if the model goes unswitched
        _held[key] = _Held(getattr(config, _SETTING), forget)
    _held[key].holders.add(switch)
    setattr(config, _SETTING, NAME)


def _let_go(config: Any, switch: ExpertsSwitch) -> None:
    held = _held.get(id(config))
    if held is None:
        return
    held.holders.discard(switch)
    if not held.holders:
        if getattr(config, _SETTING) == NAME:
            setattr(config, _SETTING, held.before)
        held.forget.detach()
        del _held[id(config)]


def _refuse(model: nn.Module, modules: list[tuple[str, Any]], settings: list[str | None]) -> None:
    """Raise `ModelNotSupportedError` if the experts of a model cannot be switched."""
    if not modules:
        raise ModelNotSupportedError(_without_interface(model))
    for name, module in modules:
        why = None if _is_fp8(module) or _sharded(module) else obstacle(module)
        if why is not None:
            raise ModelNotSupportedError(
                f"{type(module).__name__} at {name!r} cannot run as {NAME!r}: {why}. "
                "Attach with experts_implementation=None."
            )
    if "deepgemm_megamoe" in settings:
        raise ModelNotSupportedError(
            "the experts run as 'deepgemm_megamoe', which rewrites their weights and cannot be left at run time. "
            "Attach with experts_implementation=None, or load the model with another experts_implementation."
        )


def _refuse_packing(modules: list[tuple[str, Any]]) -> None:
    """Raise `ModelNotSupportedError` if the weights of a module cannot be packed."""
    for name, module in modules:
        why = "it holds FP8 weights with scales" if _is_fp8(module) else packing_obstacle(module)
        if why is not None:
            raise ModelNotSupportedError(
                f"the weights of {type(module).__name__} at {name!r} cannot be packed: {why}. Attach with pack=False."
            )


def _without_interface(model: nn.Module) -> str:
    if any(isinstance(module, Experts) for module in model.modules()):
        return (
            f"the experts of {type(model).__name__} are moe_route.nn.Experts, which run on moe_route's kernels "
            "already. Attach with experts_implementation=None."
        )
    found = _undecorated(model)
    what = f"its experts ({', '.join(found)}) have a forward of their own" if found else "it has no experts"
    return (
        f"{type(model).__name__} cannot run its experts as {NAME!r}: nothing of it goes through transformers' experts "
        f"interface; {what}. Attach with experts_implementation=None."
    )


def _undecorated(model: nn.Module) -> list[str]:
    """Class names of the experts that do not use the registry."""
    experts = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"]
    return sorted({type(module).__name__ for module in experts if not _decorated(module)})


def _decorated(module: nn.Module) -> bool:
    """Whether a module's forward uses the registry; `use_experts_implementation` makes such forwards."""
    mine = vars(module)
    return "is_transposed" in mine and "has_bias" in mine and hasattr(mine.get("config"), _SETTING)


def _sharded(module: nn.Module) -> bool:
    """Whether the weights are stored as shards (tensor and expert parallelism, FSDP).

    The forward of such a module is given plain tensors, and checks them in every call.
    """
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False))


def _configurations(model: nn.Module) -> list[Any]:
    """Every configuration object of a model and of its parts, once."""
    configurations: dict[int, Any] = {}
    waiting = [vars(module).get("config") for module in model.modules()]
    while waiting:
        config: Any = waiting.pop()
        if hasattr(config, _SETTING) and id(config) not in configurations:
            configurations[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(configurations.values())


def _fp8(name: str) -> Any:
    """An object of transformers' FP8 integration, or None if this version does not have it."""
    return getattr(import_module("transformers.integrations.finegrained_fp8"), name, None)


def _is_fp8(module: nn.Module) -> bool:
    kind = _fp8("FP8Experts")
    return kind is not None and isinstance(module, kind)
