"""LoRA folders of PEFT: read as adapters to mix, and written from adapters.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Neither needs PEFT here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_route.base.files import new_folder
from moe_route.base.schema import FileMissingError, FileRefusedError, load_json
from moe_route.training.adapters.config import AdapterConfig, AdapterError, AdapterFileError, RouterKind
from moe_route.training.adapters.handle import AdaptedModel, add_adapters

_PREFIX = "base_model.model."
_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEYS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}  # of an embedding?
_PARTS = {key: part for keys in _KEYS.values() for key, part in zip(keys, "AB", strict=True)}
# Settings that change what an adapter computes, with the values that mean that it is plain LoRA.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True, eq=False)
class _Lora:
    """One LoRA folder: layer -> (A [r, d_in], B [d_out, r]), and the factor alpha / r.

    `weights` are those of the model itself, by name: PEFT writes them beside adapters of embeddings.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    weights: dict[str, Tensor]
    scale: float
    rank: int


def add_peft_folders(
    model: nn.Module,
    folders: Sequence[str | os.PathLike[str]],
    *,
    router: RouterKind = "none",
    groups: Sequence[str] = (),
    **options: Any,
) -> AdaptedModel:
    """Put the LoRAs of PEFT folders on a model, each as one adapter of a mixture.

    Folders of different ranks and scales are brought to one: rows of zeros are added, and B takes the scale. A layer
    that a folder has no factors for gets zeros.

    Args:
        folders: one for `router="none"`, one for each group for "group", two or more for routers.
        router, groups: as in `AdapterConfig`.
        options: further fields of `AdapterConfig` (`pooling`, `top_k`, `dropout`, `seed`).

    Raises `AdapterError` for a folder that is not plain LoRA (DoRA, trained biases or whole modules, pickled weights),
    or whose layers the model does not have.
    """
    fixed = {"rank", "experts", "alpha", "target_modules", "pool"} & set(options)
    if fixed:
        raise AdapterError(f"{', '.join(sorted(fixed))}: the folders say that, leave it out")
    loras = [_read(Path(folder)) for folder in folders]
    if not loras:
        raise AdapterError("folders is empty: name one LoRA folder or more")
    for folder, lora in zip(folders, loras, strict=True):
        _check_weights(model, lora, folder)
    rank = max(lora.rank for lora in loras)
    config = AdapterConfig(
        rank=rank,
        experts=len(loras),
        router=router,
        groups=tuple(groups),
        target_modules=tuple(dict.fromkeys(name for lora in loras for name in lora.factors)),
        alpha=loras[0].scale * rank,
        **options,
    )
    if config.experts != len(loras):
        raise AdapterError(f"{len(loras)} folders for {config.experts} groups: give one for each")
    adapted = add_adapters(model, config)
    try:
        with torch.no_grad():
            for number, name in enumerate(adapted.layers):
                for expert, lora in enumerate(loras):
                    if name in lora.factors:
                        _fill(adapted.factors(number), expert, lora, name, config.scale)
                    else:
                        for factor in adapted.factors(number):
                            factor[expert].zero_()
    except BaseException:
        adapted.remove()
        raise
    return adapted


def save_peft_folder(
    adapted: AdaptedModel, folder: str | os.PathLike[str], *, group: str | None = None, expert: int | None = None
) -> None:
    """Write one adapter of every layer as a LoRA folder that PEFT loads. Shards are laid together.

    Args:
        folder: a new folder.
        group: whose adapters, for `router="group"`.
        expert: number of the adapter, for a mixture. Its router stays behind: PEFT's format has no place for it.
    """
    chosen = adapted.expert_of(group) if expert is None else expert
    if not 0 <= chosen < adapted.config.experts:
        raise AdapterError(f"expert is 0 to {adapted.config.experts - 1}, got {chosen}")
    tensors = {}
    with torch.no_grad():
        for number, name in enumerate(adapted.layers):
            a, b = adapted.factors(number)
            of_a, of_b = _KEYS[name in adapted.embeddings]
            tensors[f"{_PREFIX}{name}.{of_a}"] = a[chosen].cpu().contiguous()
            tensors[f"{_PREFIX}{name}.{of_b}"] = b[chosen].t().cpu().contiguous()
    config = getattr(adapted.model, "config", None)
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": adapted.config.rank,
        "lora_alpha": adapted.config.alpha,
        "lora_dropout": adapted.config.dropout,
        "bias": "none",
        "fan_in_fan_out": adapted.transposed,
        "target_modules": list(adapted.layers),
    }
    from safetensors.torch import save_file

    with new_folder(folder) as made:
        (made / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        save_file(tensors, made / _WEIGHTS, metadata={"format": "pt"})


def _check_weights(model: nn.Module, lora: _Lora, folder: object) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in lora.weights.items():
        if name not in own or not torch.equal(own[name].detach().to(weight), weight):
            raise AdapterError(
                f"{folder} brings a {name!r} that is not the model's: it was trained, or its vocabulary was resized. "
                "Load the model that the folder was made with, or merge it with PEFT"
            )


def _fill(factors: tuple[Tensor, Tensor], expert: int, lora: _Lora, name: str, scale: float) -> None:
    (a, b), (of_a, of_b) = factors, lora.factors[name]
    if of_a.shape[1] != a.shape[2] or of_b.shape[0] != b.shape[2]:
        raise AdapterError(
            f"{name!r} has {a.shape[2]} inputs and {b.shape[2]} outputs, the LoRA {of_a.shape[1]} and {of_b.shape[0]}: "
            "load the model that it was trained on"
        )
    a[expert].zero_()
    b[expert].zero_()
    a[expert, : len(of_a)] = of_a
    b[expert, : len(of_a)] = of_b.t() * (lora.scale / scale)


def _read(folder: Path) -> _Lora:
    settings = _settings(folder)
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise AdapterFileError(f"{folder} has no {_WEIGHTS} (pickled weights are not read): save it again with PEFT")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{weights} is damaged ({error}): copy it again") from error
    parts: dict[str, dict[str, Tensor]] = {}
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(_PREFIX) and key.endswith((".base_layer.weight", "lm_head.weight")):
            own[key.removeprefix(_PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        name, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        part = f"lora_{part}"
        if not key.startswith(_PREFIX) or part not in _PARTS or tensor.dim() != 2:
            raise AdapterFileError(f"{weights} holds {key!r}, which is no factor of a layer: only plain LoRA is read")
        parts.setdefault(name, {})[_PARTS[part]] = tensor.float()
    half = next((name for name, pair in parts.items() if len(pair) < 2), None)
    if half is not None or not parts:
        raise AdapterFileError(f"{weights} holds half of a pair of factors, or none ({half}): copy it again")
    ranks = {len(pair["A"]) for pair in parts.values()} | {pair["B"].shape[1] for pair in parts.values()}
    rank = settings["r"]
    if ranks != {rank}:
        raise AdapterFileError(
            f"{weights} has factors of ranks {sorted(ranks)}, its settings say {rank}: one rank is read"
        )
    root = math.sqrt(rank) if settings.get("use_rslora") else rank
    factors = {name: (pair["A"], pair["B"]) for name, pair in parts.items()}
    return _Lora(factors, own, settings["lora_alpha"] / root, rank)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    try:
        settings = load_json(path, foreign=True)
    except FileMissingError:
        raise AdapterFileError(f"{folder} has no {_SETTINGS}: it is no LoRA folder of PEFT") from None
    except FileRefusedError as error:
        raise AdapterFileError(f"{path} cannot be read ({error}): copy it again") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else type(settings).__name__
        raise AdapterFileError(f"{path} is of {kind!r}: only LORA is read")
    for name, plain in _PLAIN.items():
        if settings.get(name) not in plain:
            raise AdapterFileError(f"{path}: {name}={settings[name]!r} is not plain LoRA, which is all that is read")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise AdapterFileError(f"{path} has no rank and alpha: save it again with PEFT")
    return settings
