"""Which of the library's ways runs a call of experts: `PATHS`, in the order of preference.

| path | what runs | where |
|---|---|---|
| packed | as streamed, from a packed copy of the weights | any number of slots on a CPU, where there is one |
| streamed | dispatch, `expert_rows`, combine | few slots on CUDA, more on a CPU with AVX2; nothing to train |
| grouped, one activation | as grouped, with `expert_activation` between the products | more slots on CUDA |
| grouped | dispatch, permute, two grouped products around the module's own activation, combine | everything else |

With few slots, a decode step, reading the weights of the chosen experts is what takes time, and the streamed path reads
nothing else. The limits are the numbers of slots up to which it was measured to be the faster one (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_route.ops import library

PACKED, STREAMED, ACTIVATED, GROUPED = "packed", "streamed", "grouped, one activation", "grouped"
# Without vectors the CPU's expert_rows is right, not fast; with AVX-512 it passes torch's products everywhere. On NEON
# the gate has vectors, but expert_rows has none.
_CPU_HAS_VECTORS = library.best_instruction_set().startswith("avx")
_CPU_HAS_WIDE_VECTORS = library.best_instruction_set().startswith("avx512")
# With matrix instructions, torch's products pass expert_rows at fewer slots.
_CPU_HAS_MATRICES: bool = torch.cpu._is_amx_tile_supported()
_CUDA = frozenset({"cuda"})
_FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})
PACKED_DTYPES = _FLOATS


@dataclass(frozen=True)
class Call:
    """One call of experts, as far as the choice of a path needs it."""

    device: str
    """Type of the device of the hidden states."""
    dtype: torch.dtype | None
    """That of everything, and None if not all is in one dtype, on one device and contiguous."""
    slots: int
    """T * k."""
    experts: int
    transposed: bool
    """Whether the weights are stored [E, in, out]."""
    trains: bool
    """Whether a gradient is wanted."""
    row_bytes: int
    """Of the longest row of a weight [out, in]."""
    known_gate: bool
    """Whether `expert_rows` and `expert_activation` can compute what stands between the products."""
    packed: bool = False
    """Whether there is a packed copy of the weights."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        slots: int,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
        known_gate: bool = True,
        packed: bool = False,
    ) -> Call:
        """Describe a call; `weights` are all weights and biases as they are stored, `dtype` is that of the products."""
        tensors = [hidden, *weights]
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
        trains = trains or forward_ad._current_level >= 0
        alike = all(each.dtype == dtype and each.device == hidden.device for each in tensors)
        dense = all(each.is_contiguous() for each in weights)
        kind = hidden.device.type
        one = dtype if alike and dense and not torch.is_autocast_enabled(kind) else None
        row = max(each.shape[2] * each.element_size() for each in weights if each.dim() == 3)
        return cls(kind, one, slots, weights[0].shape[0], transposed, trains, row, known_gate, packed)


@dataclass(frozen=True)
class Path:
    """A way to run experts, and the calls that it is for; None: all of them."""

    name: str
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    transposed: bool | None = None
    """Weights [E, in, out] or [E, out, in]."""
    most_row_bytes: int | None = None
    """Of the longest row of a weight [out, in]."""
    most_slots: int | None = None
    """Largest T * k."""
    most_slots_per_expert: int | None = None
    """Largest T * k / E."""
    trains: bool = True
    """Whether gradients flow through it."""
    any_gate: bool = True
    """Whether the module's own activation runs; otherwise it must be a known one."""
    packed: bool = False
    """Whether it reads a packed copy of the weights."""
    here: bool = True
    """Whether this machine can take it."""

    def takes(self, call: Call) -> bool:
        """Whether a call may run this way."""
        return self.serves(call) and (
            (self.most_slots is None or call.slots <= self.most_slots)
            and (self.most_slots_per_expert is None or call.slots <= self.most_slots_per_expert * call.experts)
        )

    def serves(self, call: Call) -> bool:
        """Whether a call may run this way if it has few enough slots."""
        return (
            self.here
            and (self.devices != _CUDA or not library.serves_cuda())
            and (self.devices is None or call.device in self.devices)
            and (self.dtypes is None or call.dtype in self.dtypes)
            and (self.transposed is None or call.transposed == self.transposed)
            and (self.most_row_bytes is None or call.row_bytes <= self.most_row_bytes)
            and (self.trains or not call.trains)
            and (self.any_gate or call.known_gate)
            and (call.packed or not self.packed)
        )

    def limit(self, experts: int) -> int | None:
        """The most slots that it takes, with this many experts; None: any number."""
        each = None if self.most_slots_per_expert is None else self.most_slots_per_expert * experts
        return min((limit for limit in (self.most_slots, each) if limit is not None), default=None)


_STREAMED_CUDA = Path(
    STREAMED,
    devices=_CUDA,
    dtypes=_FLOATS,
    most_slots=256,
    most_slots_per_expert=8,  # as many share a reading of the weights
    trains=False,
    any_gate=False,
)
_STREAMED_CPU = Path(
    STREAMED,
    devices=frozenset({"cpu"}),
    dtypes=_FLOATS,
    transposed=False,
    most_row_bytes=16 << 10,  # 64 of them fit the second-level cache, or nearly
    most_slots_per_expert=16 if _CPU_HAS_MATRICES else None if _CPU_HAS_WIDE_VECTORS else 128,
    trains=False,
    any_gate=False,
    here=_CPU_HAS_VECTORS,
)
_PACKED_CPU = Path(
    PACKED,
    devices=frozenset({"cpu"}),
    dtypes=PACKED_DTYPES,
    trains=False,
    any_gate=False,
    packed=True,
    here=library.native() is not None,
)
PATHS: Sequence[Path] = (
    _PACKED_CPU,
    _STREAMED_CUDA,
    _STREAMED_CPU,
    replace(_STREAMED_CPU, most_row_bytes=None, most_slots_per_expert=8),
    replace(
        _STREAMED_CPU,
        transposed=True,
        most_row_bytes=None,
        most_slots_per_expert=None if _CPU_HAS_WIDE_VECTORS and not _CPU_HAS_MATRICES else 16,
    ),
    replace(_STREAMED_CUDA, name=ACTIVATED, most_slots=None, most_slots_per_expert=None),
    Path(GROUPED),
)


def choose(call: Call) -> Path:
    """The first path of `PATHS` that takes a call."""
    return next(path for path in PATHS if path.takes(call))


def limits(call: Call) -> list[tuple[str, int | None]]:
    """Every path that serves calls like this one, and the most slots that it is chosen for (None: any number)."""
    bounds: list[tuple[str, int | None]] = []
    for path in PATHS:
        if path.serves(call) and path.name not in dict(bounds):
            bounds.append((path.name, path.limit(call.experts)))
            if bounds[-1][1] is None:
                break
    return bounds


@contextmanager
def only(name: str) -> Iterator[None]:
    """Run every call that `name` can run that way, whatever its device and number of slots. Not for several threads.

    For benchmarks, which find out from how many slots on a path pays.
    """
    global PATHS
    before = PATHS
    wanted = next(path for path in before if path.name == name)
    anything = replace(wanted, devices=None, transposed=None, here=True)
    anything = replace(anything, most_row_bytes=None, most_slots=None, most_slots_per_expert=None)
    PATHS = (anything, *before)
    try:
        yield
    finally:
        PATHS = before
