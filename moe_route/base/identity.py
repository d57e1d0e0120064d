"""Identity of a model: name, class, hashes of its configuration and its weights, and versions of the libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from moe_route import __version__
from moe_route.base import files

_SAMPLED = 1024  # elements per tensor that enter the hash of the weights
_SAMPLED_OF_EXPERT = 64  # and per matrix of one expert, of which a model has thousands
UNKNOWN = (
    "unknown"  # a hash of weights that cannot be compared: quantized, float16, on meta, divided, changed meanwhile
)

# settings of a configuration that affect how a model is run, not which model it is
_RUN_OPTIONS = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "architectures",
    "distributed_config",
)
_LIBRARIES = ("torch", "transformers", "accelerate", "numpy")


def config_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the model's configuration, the same for the same architecture and sizes on any machine.

    Settings that only affect how the model is run (dtype, caching, library version, names) are left out. Without a
    configuration, class and parameter shapes are hashed.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        content: Any = _what_it_is(config.to_dict())
    else:
        content = [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    text = files.canonical_json([type(model).__name__, content])
    return hashlib.sha256(text.encode()).hexdigest()


def _what_it_is(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {
            str(k): v for k, v in value.items() if not str(k).startswith(("_", "output_")) and k not in _RUN_OPTIONS
        }
        return {key: _what_it_is(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_what_it_is(item) for item in value]
    # JSON has no infinities
    return value if value is None or isinstance(value, (str, bool, int)) else repr(value)


def identity_of(model: nn.Module) -> dict[str, Any]:
    """``name`` (None if the model was not loaded by name), ``class`` and ``config_hash``."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {"name": name, "class": type(model).__name__, "config_hash": config_hash(model)}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the weights: name, dtype and shape of each tensor, and up to 1024 evenly spaced elements of it.

    So that it takes seconds for any model, a change of few elements may stay unseen; another checkpoint does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(files.canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLED))].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


# ---- which checkpoint it is, whatever the dtype it was loaded in


def checkpoint_of(model: nn.Module, routers: Iterable[Sequence[torch.Tensor]]) -> dict[str, str]:
    """``router_hash`` and ``weights_hash`` of a model, whose ``routers`` each have these tensors, in order.

    They are equal for one checkpoint in bfloat16 and in float32, on any device: elements are rounded to bfloat16.
    ``router_hash`` covers every element of the routers. ``weights_hash`` covers up to 1024 elements of each tensor, and
    up to 64 of each matrix of an expert, so that it takes a second for a large model. It is "LAYOUT-VALUES", two
    SHA-256: hashes of two layouts cannot be compared (``same_weights``). Parameters of adapters are among the values
    alone. Weights in float16, float64 or quantized, on the meta device or divided among ranks are ``UNKNOWN``.
    """
    return {"router_hash": _router_hash(routers), "weights_hash": _values_hash(model)}


def same_weights(one: str | None, other: str | None) -> bool | None:
    """Whether two hashes of weights, or of routers, are equal; None if they cannot be compared."""
    if not one or not other or UNKNOWN in (one, other):
        return None
    if one.partition("-")[0] != other.partition("-")[0] and "-" in one + other:
        return None  # tensors of other names
    return one == other


def _router_hash(routers: Iterable[Sequence[torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for tensors in routers:
        if not tensors or not all(map(_comparable, tensors)):
            return UNKNOWN
        rows = sorted((list(tensor.shape), _bytes(tensor.detach().reshape(-1))) for tensor in tensors)
        for shape, content in rows:
            digest.update(files.canonical_json(shape).encode() + content)
        digest.update(b"|")
    return digest.hexdigest()


def _values_hash(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        return UNKNOWN
    layout, names, samples = [], [], []
    for name, tensor, sampled in _checkpoint_tensors(model):
        if not _comparable(tensor):
            return UNKNOWN
        rows = (
            tensor.detach().flatten(1) if tensor.dim() == 3 and sampled < _SAMPLED else tensor.detach().reshape(1, -1)
        )
        step = -(-rows.shape[1] // sampled) | 1  # odd, so that it does not stay in one column of a matrix
        adapter = _ADAPTER.search(name) is not None
        for index, row in enumerate(_numbers(rows[:, ::step])):
            of_expert = name.replace("{}", str(index))
            layout += [] if adapter else [[of_expert, list(tensor.shape[1:] if "{}" in name else tensor.shape)]]
            names.append(of_expert)
            samples.append(row)
    values = hashlib.sha256()
    of_device: dict[torch.device, list[int]] = {}
    for number, sample in enumerate(samples):
        of_device.setdefault(sample.device, []).append(number)
    content: dict[int, bytes] = {}
    for numbers in of_device.values():  # one copy to the host per device
        together = torch.cat([samples[number] for number in numbers]).cpu()
        parts = together.split([len(samples[number]) for number in numbers])
        content |= {number: part.numpy().tobytes() for number, part in zip(numbers, parts, strict=True)}
    for number in sorted(range(len(names)), key=names.__getitem__):
        values.update(names[number].encode() + b"\0" + content[number])
    shape = hashlib.sha256(files.canonical_json(sorted(layout)).encode()).hexdigest()
    return f"{shape[:16]}-{values.hexdigest()}"


_WRAPPED = re.compile(r"(^|\.)(_orig_mod|base_layer)(?=\.)")
_ADAPTER = re.compile(r"(^|\.)(lora_|adapters?(\.|$))")
_OF_EXPERT = re.compile(r"(?<=\.experts\.)(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name in the layout of published checkpoints, tensor, and number of elements to sample, for what is saved.

    A stack of matrices of all experts is given by part (gate, up, down), with "{}" for the expert.
    """
    tensors = dict(_saved(model))
    for name, tensor in tensors.items():
        if name.endswith(".experts.gate_up_proj") and tensor.dim() == 3:
            down = tensors.get(name.replace("gate_up_proj", "down_proj"))
            half = tensor.shape[1] // 2
            if down is not None and down.dim() == 3 and down.shape[1:] == (tensor.shape[2], half):
                stem = name.removesuffix("gate_up_proj")
                parts = (("gate_proj", tensor[:, :half]), ("up_proj", tensor[:, half:]), ("down_proj", down))
                for part, matrix in parts:
                    yield f"{stem}{{}}.{part}.weight", matrix, _SAMPLED_OF_EXPERT
                continue
        if name.endswith(".experts.down_proj") and name.replace("down_proj", "gate_up_proj") in tensors:
            up = tensors[name.replace("down_proj", "gate_up_proj")]
            if up.dim() == 3 and tensor.dim() == 3 and tensor.shape[1:] == (up.shape[2], up.shape[1] // 2):
                continue  # came with the other two
        of_expert = _OF_EXPERT.search(name)
        if of_expert is None:
            yield name, tensor, _SAMPLED
        else:
            part = _PARTS.get(of_expert[2], of_expert[2])
            yield f"{name[: of_expert.start()]}{of_expert[1]}.{part}.weight", tensor, _SAMPLED_OF_EXPERT


def _saved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, each once; ``state_dict`` would gather what is divided among ranks."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        named = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in named:
            if tensor is None or name in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            whole = f"{prefix}.{name}" if prefix else name
            yield _WRAPPED.sub("", whole).removeprefix(".").replace(".block_sparse_moe.", ".mlp."), tensor


def _comparable(tensor: torch.Tensor) -> bool:
    """Whether a tensor is whole, at hand, and of a dtype that keeps a checkpoint's values."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
    return plain and not tensor.is_meta and tensor.dtype in _KEPT


_KEPT = (torch.bfloat16, torch.float32, torch.int64, torch.int32, torch.bool)


def _numbers(values: torch.Tensor) -> torch.Tensor:
    """Values as int16: the bits in bfloat16, or an integer's lowest 16 bits."""
    return values.to(torch.bfloat16).contiguous().view(torch.int16) if values.is_floating_point() else values.short()


def _bytes(values: torch.Tensor) -> bytes:
    return _numbers(values).cpu().numpy().tobytes()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of what a tokenizer does to texts: vocabulary, rules and special tokens, without its name.

    How its last call was padded or cut, which a tokenizer keeps, is left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([content, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of python, moe-route, and the related libraries that are loaded."""
    versions = {"python": platform.python_version(), "moe-route": __version__}
    for name in _LIBRARIES:
        if name in sys.modules:
            versions[name] = version_of(name)
    return versions


def version_of(name: str) -> str:
    """Version of a library that is loaded, also where it runs from a source tree without installed metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(name), "__version__", UNKNOWN))
