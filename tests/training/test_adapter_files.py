"""Adapters in files: saved and loaded, written and read as LoRA folders of PEFT, merged into weights; shard pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.adapted_models import CONFIGS, GROUPS, adapted_model, as_trained, batch, logits, model_of
from safetensors.torch import load, load_file, save_file

from moe_route.base.files import FileRefusedError
from moe_route.training import (
    AdapterConfig,
    AdapterError,
    ShardPool,
    add_adapters,
    add_peft_folders,
    load_adapters,
    save_peft_folder,
)

transformers = pytest.importorskip("transformers")

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_2_7B: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
LLAMA_3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


# ---- shard pools


@pytest.mark.parametrize(
    ("sizes", "options", "published"),  # arXiv 2410.00938, tables 1 and 2
    [
        (LLAMA_2_7B, {"rank": 8, "pool": ShardPool(rank=2)}, 4_997_120),
        (LLAMA_2_7B, {"rank": 32, "pool": ShardPool(rank=8)}, 19_988_480),
        (LLAMA_2_7B, {"rank": 8}, 19_988_480),
        (LLAMA_2_7B, {"rank": 64}, 159_907_840),
        (LLAMA_3_8B, {"rank": 4, "pool": ShardPool(rank=1)}, 2_621_440),
        (LLAMA_3_8B, {"rank": 8, "pool": ShardPool(rank=2)}, 5_242_880),
    ],
)
def test_as_many_parameters_as_published(sizes: dict[str, Any], options: dict[str, Any], published: int) -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=32, **sizes))
    if options.get("pool") and options["pool"].rank == 1:
        options["pool"] = ShardPool(rank=1, private=0)
    adapted = add_adapters(model, AdapterConfig(target_modules=LINEAR, **options))
    assert adapted.trainable_parameters().trainable == published
    assert all(parameter.is_meta for parameter in adapted.adapter_parameters().values())


@pytest.mark.parametrize(
    "options", [{}, {"experts": 3, "router": "token"}, {"router": "group", "groups": ("eng", "swh")}]
)
def test_pools_of_private_ranks_alone_are_lora(options: dict[str, Any]) -> None:
    """p = e = r: the same logits and gradients as factors of their own, to the bit."""
    own = add_adapters(model_of(), AdapterConfig(rank=2, **options))
    shared = add_adapters(model_of(), AdapterConfig(rank=2, pool=ShardPool(rank=2, private=2), **options))
    as_trained(own)
    with torch.no_grad():
        for key, parameter in shared.adapter_parameters().items():
            if ".router." in key:
                parameter.copy_(own.adapter_parameters()[key])
        for number, name in enumerate(own.layers):
            module = shared.model.get_submodule(name).adapter.factors
            (pools,) = module._pools
            a, b = own.factors(number)
            pools.a[module.shards_a] = a.reshape(-1, a.shape[-1] // 4)
            pools.b[module.shards_b] = b.reshape(-1, b.shape[-1] // 4)
    assert torch.equal(logits(own), logits(shared))
    for adapted in (own, shared):
        with adapted.labels(GROUPS):
            adapted.model(**batch(), labels=batch()["input_ids"]).loss.backward()
    for number, name in enumerate(own.layers):
        module = shared.model.get_submodule(name).adapter.factors
        expected = own.model.get_submodule(name).adapter.factors.a.grad
        assert torch.equal(module._pools[0].a.grad[module.shards_a].reshape(expected.shape), expected), number


def test_shards_are_drawn_once_and_apart() -> None:
    adapted = add_adapters(model_of(), AdapterConfig(rank=4, pool=ShardPool(rank=2, shards=4, private=1)))
    drawn = {name: adapted.model.get_submodule(name).adapter.factors for name in adapted.layers if "q_proj" in name}
    public = (2 - 1) * 3 * 4
    private = []
    for factors in drawn.values():
        for rows in (factors.shards_a, factors.shards_b):
            assert rows.shape == (16,)
            assert len(set(rows.tolist())) == 16  # without replacement
            assert (rows[:12] < public).all()
            assert (rows[12:] >= public).all()
        assert not torch.equal(factors.shards_a, factors.shards_b)
        private += factors.shards_a[12:].tolist()
    assert sorted(private) == list(range(public, public + 12))  # nobody else's


def test_gathered_rows_follow_the_pool() -> None:
    """Outside training rows are gathered once, and again as soon as the pool changes."""
    adapted = adapted_model("shards")
    before = logits(adapted)
    factors = adapted.model.model.layers[0].self_attn.q_proj.adapter.factors
    kept = factors._kept
    assert torch.equal(logits(adapted), before)
    assert factors._kept is kept
    with torch.no_grad():
        factors._pools[0].b.mul_(2)
    assert not torch.equal(logits(adapted), before)
    with torch.inference_mode():
        adapted.model(**batch())
    assert logits(adapted).isfinite().all()


# ---- our own file


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_adapters_give_the_same_logits(name: str, tmp_path: Path) -> None:
    adapted = adapted_model(name, "qwen3_moe")
    adapted.save(tmp_path / "adapters.safetensors")
    loaded = load_adapters(model_of("qwen3_moe"), tmp_path / "adapters.safetensors")
    assert loaded.config == adapted.config
    assert torch.equal(logits(loaded), logits(adapted))


def test_a_file_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    adapted_model("token").save(path)
    other = model_of("gpt2")
    with pytest.raises(AdapterError, match="LlamaForCausalLM whose layers have other names or sizes"):
        load_adapters(other, path)
    assert other.state_dict().keys() == model_of("gpt2").state_dict().keys()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FileRefusedError):
        load_adapters(model_of(), path)


def test_the_whole_model_is_saved_and_resumed_with_its_adapters(tmp_path: Path) -> None:
    """What a trainer's checkpoint holds: the model's own weights under their own names, and the adapters."""
    adapted = adapted_model("shards by token")
    adapted.model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with adapted.disabled():
        torch.testing.assert_close(plain(**batch()).logits, logits(adapted), rtol=0, atol=0)
    fresh = add_adapters(model_of(), adapted.config)
    fresh.model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(fresh), logits(adapted))


# ---- folders of PEFT


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["none", "shards", "group"])
def test_a_written_folder_loads_in_peft(name: str, kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = adapted_model(name, kind)
    group = "swh" if name == "group" else None
    save_peft_folder(adapted, tmp_path / "lora", group=group)
    loaded = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "lora")
    with torch.no_grad(), adapted.labels("swh"):
        expected = adapted.model(**batch()).logits
        torch.testing.assert_close(loaded(**batch()).logits, expected, rtol=0, atol=1e-6)


def test_embeddings_are_written_to_peft_and_read_from_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = peft_folder(tmp_path / "a", 1, r=4, target_modules=["q_proj", "embed_tokens"])
    adapted = add_peft_folders(model_of(), [folder])
    assert adapted.embeddings == ("model.embed_tokens",)
    expected = peft.PeftModel.from_pretrained(model_of(), folder)(**batch()).logits
    torch.testing.assert_close(logits(adapted), expected.detach(), rtol=0, atol=1e-5)
    save_peft_folder(adapted, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(model_of(), tmp_path / "b")(**batch()).logits
    torch.testing.assert_close(again.detach(), expected.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("none", "llama"), ("none", "gpt2"), ("shards", "llama"), ("group", "llama")]
)
def test_merged_weights_give_the_same_logits(name: str, kind: str) -> None:
    adapted = adapted_model(name, kind)
    group = "swh" if name == "group" else None
    with torch.no_grad(), adapted.labels("swh"):
        expected = adapted.model(**batch()).logits
        merged = adapted.merge(group)
        torch.testing.assert_close(merged(**batch()).logits, expected, rtol=0, atol=1e-5)
    assert merged.state_dict().keys() == model_of(kind).state_dict().keys()


def peft_folder(path: Path, seed: int, **options: Any) -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    peft.get_peft_model(model_of(), peft.LoraConfig(**settings)).save_pretrained(path)
    return path


@pytest.mark.parametrize("rslora", [False, True])
def test_folders_of_peft_become_adapters(rslora: bool, tmp_path: Path) -> None:
    """Of different ranks, scales and layers; each group's logits are those of PEFT with its folder."""
    peft = pytest.importorskip("peft")
    folders = [
        peft_folder(tmp_path / "a", 1, r=4, lora_alpha=8, use_rslora=rslora),
        peft_folder(tmp_path / "b", 2, r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]),
    ]
    adapted = add_peft_folders(model_of(), folders, router="group", groups=("eng", "swh"))
    with torch.no_grad():
        for group, folder in zip(("eng", "swh"), folders, strict=True):
            expected = peft.PeftModel.from_pretrained(model_of(), folder)(**batch()).logits
            with adapted.labels(group):
                torch.testing.assert_close(adapted.model(**batch()).logits, expected, rtol=0, atol=1e-5)


def test_folders_of_peft_are_mixed_by_a_router(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / str(seed), seed, r=4) for seed in (1, 2)]
    adapted = add_peft_folders(model_of(), folders, router="token")
    assert adapted.config.experts == 2
    assert logits(adapted).isfinite().all()
    save_peft_folder(adapted, tmp_path / "again", expert=1)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folders[1], tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "IA3"}, "is of 'IA3': only LORA is read"),
        ({"use_dora": True}, "use_dora=True is not plain LoRA"),
        ({"bias": "all"}, "bias='all' is not plain LoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"r": 3}, r"ranks \[4\], its settings say 3"),
        ({"r": None}, "no rank and alpha"),
    ],
)
def test_a_folder_that_is_not_plain_lora_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1, r=4)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changed}))
    with pytest.raises(AdapterError, match=message):
        add_peft_folders(model_of(), [folder])


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", 1, r=4)
    weights = folder / "adapter_model.safetensors"
    whole, tensors = weights.read_bytes(), load(weights.read_bytes())
    model = model_of()

    def refused(message: str) -> None:
        with pytest.raises(AdapterError, match=message):
            add_peft_folders(model, [folder])

    weights.write_bytes(whole[:100])
    refused("is damaged")
    first = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, weights)
    refused("half of a pair")
    save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, weights)
    refused("brings a 'lm_head.weight' that is not the model's")
    save_file({**tensors, "base_model.model.score.weight": torch.zeros(2, 2)}, weights)
    refused("no factor of a layer")
    save_file(
        {key: tensor[:, :3].contiguous() if "lora_A" in key else tensor for key, tensor in tensors.items()}, weights
    )
    refused("has 32 inputs and 32 outputs, the LoRA 3 and 32")
    save_file({key.replace("q_proj", "w"): tensor for key, tensor in tensors.items()}, weights)
    refused("no linear layer or embedding is named 'model.layers.0.self_attn.w'")
    weights.rename(folder / "adapter_model.bin")
    refused("pickled weights are not read")
    (folder / "adapter_config.json").write_text("{")
    refused("cannot be read")
    (folder / "adapter_config.json").unlink()
    refused("no LoRA folder of PEFT")
    with pytest.raises(AdapterError, match="folders is empty"):
        add_peft_folders(model, [])
    with pytest.raises(AdapterError, match="rank: the folders say that"):
        add_peft_folders(model, [folder], rank=3)
    assert model.state_dict().keys() == model_of().state_dict().keys()


def test_what_depends_on_the_input_is_not_merged_or_written(tmp_path: Path) -> None:
    adapted = adapted_model("token")
    with pytest.raises(AdapterError, match="mixes anew for every input"):
        adapted.merge()
    with pytest.raises(AdapterError, match="mixes anew for every input"):
        save_peft_folder(adapted, tmp_path / "lora")
    with pytest.raises(AdapterError, match="expert is 0 to 2, got 3"):
        save_peft_folder(adapted, tmp_path / "lora", expert=3)
    adapted = adapted_model("group")
    with pytest.raises(AdapterError, match="group= must be one of eng, swh, got None"):
        adapted.merge()
    with pytest.raises(AdapterError, match="have no groups"):
        adapted_model("none").merge("eng")
    tied = model_of()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(AdapterError, match="'lm_head' is shared with another layer"):
        add_adapters(tied, AdapterConfig(rank=2, target_modules=("lm_head",))).merge()
