"""Finding routers, and refusing by name what cannot be attached to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tiny_models import tiny_model

from moe_route.patching import Attachment, ModelNotSupported, find_sites


def test_sites_in_forward_order() -> None:
    model = tiny_model("deepseek_v3", head=True)  # its first layer is dense
    sites = find_sites(model)
    assert [site.name for site in sites] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert [site.layer for site in sites] == [0, 1]
    for site in sites:
        assert site.module is model.get_submodule(site.name)
        assert (site.num_experts, site.top_k, site.engine, site.steerable) == (8, 3, "observed", True)
        assert site.spec.score == "sigmoid"
        assert site.spec.groups == 4
    called = []
    for site in sites:
        site.module.register_forward_hook(lambda *_, layer=site.layer: called.append(layer))
    model(input_ids=torch.tensor([[5, 6]]))
    assert called == [0, 1]


def test_dense_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(
        ModelNotSupported, match=r"LlamaForCausalLM has no router.*dense.*Attach to a Mixture-of-Experts"
    ):
        find_sites(LlamaForCausalLM(config))


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module is needed, not str"):
        find_sites("Qwen/Qwen3-30B-A3B")


def test_unknown_router_beside_experts() -> None:
    model = tiny_model("qwen3_moe")
    model.layers[1].mlp.gate = nn.Linear(64, 8)  # the layout of transformers 4
    with pytest.raises(
        ModelNotSupported, match=r"Qwen3MoeSparseMoeBlock at 'layers.1.mlp'.*gate Linear.*transformers 5"
    ):
        find_sites(model)


@pytest.mark.parametrize("name", ["jetmoe", "llama4_text", "switch_transformers", "nllb-moe"])
def test_specials_are_refused_by_name(name: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModel

    shape = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 16}
    shape |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    shape |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_sparse_step": 1}
    shape |= {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 1}
    shape |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts": 4,
        "head_dim": 16,
    }
    config = CONFIG_MAPPING[name](vocab_size=32, **shape)
    with pytest.raises(ModelNotSupported, match=r"cannot be attached to: (it|its|a)"):
        find_sites(AutoModel.from_config(config))


def test_hash_layers_are_refused() -> None:
    with pytest.raises(ModelNotSupported, match=r"DeepseekV4HashRouter.*a table of token ids chooses"):
        find_sites(tiny_model("deepseek_v4", mlp_layer_types=["hash_moe", "moe", "moe"]))


def test_blocks_that_go_round_their_router() -> None:
    model = tiny_model("gpt_oss")
    block = model.layers[0].mlp
    block.forward = block.forward  # what kernels.kernelize leaves: a forward of the instance
    with pytest.raises(ModelNotSupported, match=r"GptOssMLP above 'layers.0.mlp.router'.*use_kernels=False"):
        find_sites(model)
    del block.forward
    from transformers.integrations.mxfp4 import Mxfp4GptOssMLP

    model.layers[0].mlp = Mxfp4GptOssMLP(block.router, block.experts)
    with pytest.raises(ModelNotSupported, match=r"Mxfp4GptOssMLP.*dequantize=True"):
        find_sites(model)


def test_changed_router_is_refused_by_the_check() -> None:
    """A router that no longer does what its class did: transformers of another version, or an edit."""
    model = tiny_model("mixtral")
    router = type(model.layers[0].mlp.gate)

    class Doubled(router):
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits, 2 * weights, ids

    class Probabilities(router):  # what transformers 5.0 to 5.5 returned
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits.softmax(-1), weights, ids

    class Reordered(router):
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits, ids, weights

    for changed, message in (
        (Doubled, "does not weigh"),
        (Probabilities, "does not weigh"),
        (Reordered, "returns shapes"),
    ):
        model.layers[0].mlp.gate.__class__ = changed
        with pytest.raises(ModelNotSupported, match=message):
            Attachment(model)
        assert not model.layers[0].mlp.gate._forward_hooks
    Attachment(model, check=False).detach()


def test_weights_that_cannot_be_read_are_not_checked_and_say_so() -> None:
    with torch.device("meta"):
        from transformers import AutoModel, Qwen3MoeConfig

        model = AutoModel.from_config(Qwen3MoeConfig(hidden_size=16, num_hidden_layers=1, num_experts=4, head_dim=8))
    attachment = Attachment(model)
    assert attachment.sites[0].notes == ("not checked: its weights are on the meta device",)
    attachment.detach()
