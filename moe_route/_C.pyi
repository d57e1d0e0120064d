from typing import Any, TypedDict

__version__: str
MAX_EXPERTS: int
MAX_CHOSEN: int
MAX_ROWS: int

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str
    instruction_sets: list[str]
    cuda: bool
    cuda_architectures: list[str]
    nvcc: str

class CudaDevice(TypedDict):
    name: str
    capability: tuple[int, int]

class CudaRuntime(TypedDict):
    runtime: int
    driver: int
    devices: list[CudaDevice]
    problem: str

def build_info() -> BuildInfo: ...
def cuda_runtime() -> CudaRuntime: ...
def tunables() -> dict[str, dict[str, int | str]]: ...
def tune(name: str, value: int) -> None: ...
def load_kernels(device: int, experts: int) -> None: ...
def register_cuda() -> None: ...
def set_required(required: bool) -> None: ...
def set_allowed_here(allowed: bool) -> None: ...
def mark(device: int, experts: int) -> None: ...
def withdraw(kernels: str) -> None: ...
def report(problem: str) -> None: ...
def forget() -> None: ...
def instruction_set() -> str: ...
def best_instruction_set() -> str: ...
def supported_instruction_sets() -> list[str]: ...
def set_instruction_set(name: str) -> None: ...

class GateArgs:
    def __init__(
        self, logits: int, dtype: int, tokens: int, experts: int, k: int, weights: int, ids: int, **rest: Any
    ) -> None: ...
    def run(self) -> None: ...
    def run_cuda(self, stream: int) -> None: ...

def dispatch(
    ids: int,
    ids_type: int,
    slots: int,
    experts: int,
    block: int,
    capacity: int,
    offsets: int,
    ends: int,
    counts: int,
    order: int,
    inverse: int,
) -> None: ...
def dispatch_workspace_bytes(slots: int, experts: int) -> int: ...
def dispatch_cuda(
    ids: int,
    ids_type: int,
    slots: int,
    experts: int,
    block: int,
    capacity: int,
    offsets: int,
    ends: int,
    counts: int,
    order: int,
    inverse: int,
    workspace: int,
    stream: int,
) -> None: ...
def permute(
    x: int, order: int, inverse: int, rows: int, tokens: int, k: int, row_bytes: int, capacity: int
) -> None: ...
def permute_cuda(
    x: int, order: int, inverse: int, rows: int, tokens: int, k: int, row_bytes: int, capacity: int, stream: int
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
def combine_cuda(
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
    stream: int,
) -> None: ...
