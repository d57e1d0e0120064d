from typing import Any, TypedDict

__version__: str

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str
    instruction_sets: list[str]
    cuda: bool
    cuda_architectures: list[str]

def build_info() -> BuildInfo: ...
def instruction_set() -> str: ...
def best_instruction_set() -> str: ...
def supported_instruction_sets() -> list[str]: ...
def set_instruction_set(name: str) -> None: ...

class GateArgs:
    def __init__(
        self, logits: int, dtype: int, tokens: int, experts: int, k: int, weights: int, ids: int, **rest: Any
    ) -> None: ...
    def run(self) -> None: ...

def dispatch(
    ids: int,
    ids_type: int,
    slots: int,
    experts: int,
    block: int,
    capacity: int,
    offsets: int,
    counts: int,
    order: int,
    inverse: int,
) -> None: ...
def permute(
    x: int, order: int, inverse: int, rows: int, tokens: int, k: int, row_bytes: int, capacity: int
) -> None: ...
def combine(
    rows: int,
    weights: int,
    inverse: int,
    residual: int,
    out: int,
    dtype: int,
    tokens: int,
    k: int,
    hidden: int,
    capacity: int,
) -> None: ...
