"""Gate, dispatch, permute and combine under pytest-benchmark: `python -m pytest bench`.

With --experts, --top-k, --tokens or --dtype the gate alone, in that shape. Interleaved ratios come from
`moe-route bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import pytest

from bench.cpu.dispatch import SHAPES as DISPATCH_SHAPES
from bench.cpu.dispatch import Dispatching
from bench.cpu.dispatch import Shape as DispatchShape
from moe_route.bench.gate import ONE_ROW, SHAPES, Gate
from moe_route.bench.timing import Contender, Shape
from moe_route.cli.bench import shape_of

DISPATCH_NAMES = tuple(Dispatching(DispatchShape(8, 8, experts=8, k=2)).contenders())
NAMES = tuple(Gate(Shape(8, 2, tokens=8)).contenders())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test its shapes: the one that is asked for, or all."""
    try:
        asked = shape_of(metafunc.config.option)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    kind = metafunc.function.__name__
    if kind == "test_gate":
        shapes = SHAPES if asked is None else (asked,)
    elif kind == "test_one_row":
        shapes = (replace(asked or Shape(), tokens=1),)
    else:
        shapes = DISPATCH_SHAPES if asked is None else ()
    metafunc.parametrize("shape", shapes, ids=lambda shape: shape.title.replace(" ", "-"))


def rotating(contender: Contender) -> Callable[[], object]:
    """The contender on a new input at each call."""
    turn = count()
    return lambda: contender(next(turn))


@pytest.mark.parametrize("name", NAMES)
def test_gate(benchmark, shape: Shape, name: str):
    benchmark.group = shape.title
    benchmark.pedantic(rotating(Gate(shape).contenders()[name]), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row(benchmark, shape: Shape, name: str):
    benchmark.group = shape.title
    benchmark.pedantic(rotating(Gate(shape).contenders()[name]), rounds=500, warmup_rounds=50)


@pytest.mark.parametrize("name", DISPATCH_NAMES)
def test_dispatch(benchmark, shape: DispatchShape, name: str):
    benchmark.group = shape.title
    benchmark.pedantic(rotating(Dispatching(shape).contenders()[name]), rounds=10, warmup_rounds=2)
