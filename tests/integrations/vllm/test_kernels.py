"""vLLM prefers kernels that choose their experts inside: an engine with moe-route takes the next one."""

from __future__ import annotations

import gc
import os
from types import SimpleNamespace
from typing import Any

import pytest
from harness.vllm_demo import engine

import moe_route as mr
from moe_route.integrations.vllm.sites import find_sites

vllm: Any = None
if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
pytestmark = pytest.mark.skipif(vllm is None, reason="needs vLLM in an environment of its own: make test-vllm")


def inside() -> type:
    """A class of experts that supports everything, and routes inside."""
    from vllm.model_executor.layers.fused_moe import modular_kernel as mk

    class Inside(mk.FusedMoEExpertsMonolithic):
        _supports_current_device = staticmethod(lambda: True)
        _supports_no_act_and_mul = staticmethod(lambda: True)
        _supports_activation = staticmethod(lambda activation: True)
        _supports_quant_scheme = staticmethod(lambda *keys: True)
        _supports_parallel_config = staticmethod(lambda config: True)
        _supports_routing_method = staticmethod(lambda *arguments: True)
        _supports_router_logits_dtype = staticmethod(lambda *arguments: True)
        _supports_shape = staticmethod(lambda hidden: True)
        activation_format = staticmethod(lambda: mk.FusedMoEActivationFormat.Standard)

    return Inside


def test_an_engine_takes_the_kernel_that_is_given_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    kernel, natural = inside(), unquantized.backend_to_kernel_cls
    monkeypatch.setattr(unquantized, "backend_to_kernel_cls", lambda backend: [kernel, *natural(backend)])
    llm = engine({"record": True})
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], vllm.SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert (mr.vllm.statistics(llm).tokens() == 4).all()
    (config,) = llm.collective_rpc(moe_config_of)
    chosen = []
    for additional in ({"moe_route": {}}, {}):
        with set_current_vllm_config(SimpleNamespace(additional_config=additional)):  # type: ignore[arg-type]
            chosen.append(unquantized.select_unquantized_moe_backend(config)[1])
    assert chosen[0] is not kernel
    assert chosen[1] is kernel
    config.moe_backend = "triton"  # asked for, so that vLLM tells its reason
    with set_current_vllm_config(SimpleNamespace(additional_config={"moe_route": {}})):  # type: ignore[arg-type]
        monkeypatch.setattr(unquantized, "backend_to_kernel_cls", lambda backend: [kernel])
        with pytest.raises(Exception, match="it chooses experts inside, where moe_route can neither count nor steer"):
            unquantized.select_unquantized_moe_backend(config)
    del llm
    gc.collect()


def moe_config_of(worker: Any) -> Any:
    model = worker.model_runner.model
    return find_sites(model, "")[0].module.moe_config
