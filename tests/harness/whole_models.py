"""Tiny random whole models: a language model of `tiny_models` with its towers, in the class that users load, and what
it is called with: text alone, or text with one picture a sequence."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness.tiny_models import BASE, EVERY, configuration, made_ready, tokens
from torch import Tensor, nn

VOCABULARY = 160  # ids of text are below 128; what stands for a picture, a video or a sound is not
IMAGE, VIDEO, AUDIO, BEGIN, END, OTHER_BEGIN, OTHER_END = range(130, 137)
CANVAS = 4  # tokens that are denoised together
PATCHES = 4  # patches to a token, in vision towers that route
_SPECIAL = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
    "image_start_token_id": BEGIN,
    "image_end_token_id": END,
    "video_start_token_id": OTHER_BEGIN,
    "video_end_token_id": OTHER_END,
    "audio_start_token_id": OTHER_BEGIN,
    "boi_token_id": BEGIN,
    "eoi_token_id": END,
    "boa_token_id": OTHER_BEGIN,
    "eoa_token_index": OTHER_END,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "image_size": 16,
    "spatial_merge_size": 2,
    "initializer_range": 0.1,
}
# of those whose configuration has other names for some of these
_QWEN = {name: _TOWER[name] for name in ("hidden_size", "intermediate_size", "patch_size", "spatial_merge_size")} | {
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "initializer_range": 0.1,
}
_SAM = _TOWER | {
    "output_channels": 16,
    "window_size": 2,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "downsample_channels": [16, 32],
    "image_size": 64,
}
_GEMMA = _TOWER | {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 16}
_POSITIONS = [[x, y] for y in range(4) for x in range(4)]
_MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}

_SOUND = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 64,
    "num_mel_bins": 16,
    "downsample_hidden_size": 8,
}

Picture = Callable[[torch.Generator, int], dict[str, Tensor]]


@dataclass(frozen=True)
class Whole:
    """A whole class: where it is, what its configuration says besides the text model's, and what a picture is to it.

    `towers` are the values of its other configurations by name, `text` what the text model's row has otherwise,
    `values` its own; `picture` draws pixels (and grids) for a batch, one picture a sequence, of `length` tokens.
    """

    folder: str
    model: str
    config: str
    picture: Picture
    towers: dict[str, Any]
    of: str = ""  # the row of the text model, where it has another name
    text: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    length: int = 4
    types: tuple[str, ...] = ()  # arguments that tell the tokens of pictures from text
    generation: dict[str, Any] = field(default_factory=dict)  # what its generation configuration says


def _pixels(*shape: int, patches: int = 1, **same: Any) -> Picture:
    """Pixels [batch * patches, *shape]; each of `same` is what is said of every picture."""

    def draw(generator: torch.Generator, batch: int) -> dict[str, Tensor]:
        said = {name: torch.tensor([value] * batch) for name, value in same.items()}
        return {"pixel_values": torch.rand((batch * patches, *shape), generator=generator), **said}

    return draw


def _on_grid(*patch: int) -> Picture:
    """16 patches of this shape, four to a token."""
    return _pixels(*patch, patches=16, image_grid_thw=[1, 4, 4])


def _qwen(folder: str, name: str, **more: Any) -> Whole:
    """The classes that follow Qwen-VL: patches on a grid, four to a token, positions in three dimensions."""
    return Whole(
        folder,
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        _on_grid(more.pop("patch", 96)),
        more.pop("towers", {}) | {"vision_config": _QWEN | more.pop("vision", {})},
        types=more.pop("types", ("mm_token_type_ids",)),
        **more,
    )


# By row of the support table. Rows that `tiny_models` does not have are of classes whose text model has a row there.
WHOLE: dict[str, Whole] = {
    "qwen3_vl_moe_text": _qwen(
        "qwen3_vl_moe",
        "Qwen3VLMoe",
        vision={"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        text={"rope_parameters": _MULTIMODAL_ROPE},
    ),
    "glm4v_moe_text": _qwen("glm4v_moe", "Glm4vMoe", vision={"image_size": 16}),
    "mistral4": Whole(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        _pixels(3, 16, 16, image_sizes=[16, 16]),
        {"vision_config": _TOWER | {"model_type": "pixtral"}},
    ),
    "mistral_large4_text": Whole(
        "mistral_large4",
        "MistralLarge4ForConditionalGeneration",
        "MistralLarge4Config",
        _pixels(3, 16, 16, image_sizes=[16, 16]),
        {"vision_config": _TOWER | {"model_type": "pixtral"}},
    ),
    "muse_spark_text": Whole(
        "muse_spark",
        "MuseSparkForConditionalGeneration",
        "MuseSparkConfig",
        _on_grid(96),
        {
            "vision_config": _TOWER | {"pos_emb_height": 4, "pos_emb_width": 4},
            "audio_config": {"hidden_sizes": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "out_hidden_size": 64},
        },
        values={"out_hidden_size": 128, "projector_hidden_size": 32},
    ),
    "ernie4_5_vl_moe": _qwen(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoe", patch=48, types=("mm_token_type_ids", "moe_mm_token_type_ids")
    ),
    "step3p7": Whole(
        "step3p7",
        "Step3p7ForConditionalGeneration",
        "Step3p7Config",
        _pixels(3, 32, 32),
        {"vision_config": _TOWER | {"image_size": 32, "mlp_ratio": 1.5}},
    ),
    "unlimited_ocr": Whole(
        "unlimited_ocr",
        "UnlimitedOcrForConditionalGeneration",
        "UnlimitedOcrConfig",
        _pixels(3, 64, 64),
        {"vision_config": {"sam_config": _SAM, "encoder_config": _TOWER | {"patch_size": 4}}},
        length=21,
    ),
    "deepseek_ocr2": Whole(
        "deepseek_ocr2",
        "DeepseekOcr2ForConditionalGeneration",
        "DeepseekOcr2Config",
        _pixels(3, 64, 64),
        {"vision_config": {"sam_config": _SAM, "encoder_config": _TOWER | {"num_key_value_heads": 2}}},
        length=145,
    ),
    "glm5_next": _qwen("glm5_next", "Glm5Next", vision={"image_size": 16, "projection_intermediate_size": 48}),
    "diffusion_gemma": Whole(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        "DiffusionGemmaConfig",
        _pixels(16, 48, image_position_ids=_POSITIONS),
        {"vision_config": _GEMMA | {"model_type": "gemma4_vision"}},
        values={"canvas_length": CANVAS},
        generation={"max_denoising_steps": 3},
    ),
    "qwen3_omni_moe": _qwen(
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinker",
        vision={"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        text={"rope_parameters": _MULTIMODAL_ROPE},
        towers={"audio_config": _SOUND},
        values={"vision_start_token_id": BEGIN, "vision_end_token_id": END},
        types=(),
    ),
    "qwen4_exp": _qwen("qwen4_exp", "Qwen4Exp", vision={"num_position_embeddings": 16}),
    "dots3_note_with_vision": Whole(
        "dots3_note",
        "Dots3NoteForConditionalGeneration",
        "Dots3NoteConfig",
        _on_grid(48),
        {
            "vision_config": BASE
            | _TOWER
            | EVERY["dots3_note_with_vision"]
            | {"adapter_in_dim": 32, "num_hidden_layers": 3},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "adapter_input_size": 32,
                "adapter_out_dim": 64,
                "feature_size": 16,
                "downsample_hidden_size": 8,
            },
        },
        of="dots3_note_text",
    ),
    "gemma4": Whole(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        _pixels(16, 48, image_position_ids=_POSITIONS),
        {"vision_config": _GEMMA},
        of="gemma4_text",
        text={"vocab_size_per_layer_input": VOCABULARY},
        types=("mm_token_type_ids",),
    ),
    "llama4": Whole(
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        _pixels(3, 16, 16),
        {
            "vision_config": _TOWER
            | {
                "intermediate_size": 128,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            }
        },
        of="llama4_text",
    ),
    "qwen3_5_moe": _qwen("qwen3_5_moe", "Qwen3_5Moe", of="qwen3_5_moe_text", vision={"num_position_embeddings": 16}),
    "aria": Whole(
        "aria",
        "AriaForConditionalGeneration",
        "AriaConfig",
        _pixels(3, 16, 16),
        {"vision_config": _TOWER | {"model_type": "idefics3_vision"}},
        of="aria_text",
        values={"projector_patch_to_query_dict": {16: 4}},
    ),
    "minimax_m3_vl": Whole(
        "minimax_m3_vl",
        "MiniMaxM3SparseForConditionalGeneration",
        "MiniMaxM3VLConfig",
        _on_grid(96),
        {"vision_config": _TOWER},
        of="minimax_m3_vl_text",
        values={"projector_hidden_size": 32},
    ),
    "inkling": Whole(
        "inkling",
        "InklingForConditionalGeneration",
        "InklingConfig",
        _pixels(2, 8, 8, 3),
        {
            "vision_config": {"text_hidden_size": 64, "hidden_size": 32, "patch_size": 8, "n_layers": 2},
            "audio_config": {"text_hidden_size": 64},
        },
        of="inkling_text",
        length=1,
    ),
    "inkling2": Whole(
        "inkling2",
        "Inkling2ForConditionalGeneration",
        "Inkling2Config",
        _pixels(8, 8, 3, patches=4, image_grid_thw=[1, 2, 2]),
        {"vision_config": _TOWER | {"text_hidden_size": 64, "posemb_grid_size": 4, "projection_hidden_dim": 32}},
        of="inkling2_text",
    ),
    "kimi_k25": Whole(
        "kimi_k25",
        "Kimi_K25ForConditionalGeneration",
        "Kimi_K25Config",
        _on_grid(3, 4, 4),
        {"vision_config": _TOWER | {"pos_emb_height": 4, "pos_emb_width": 4}},
        of="deepseek_v3",
        values={"projection_hidden_size": 32},
    ),
    "nemotron_h_omni": Whole(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        "NemotronH_Omni_Reasoning_V3_Config",
        _pixels(48, patches=16, image_grid_hw=[4, 4]),
        {"vision_config": _TOWER | {"model_type": "radio", "video_temporal_patch_size": 2, "max_img_size": 16}},
        of="nemotron_h",
        values={"vision_hidden_size": 32, "projector_hidden_size": 32},
    ),
}


ROWS = tuple(EVERY | WHOLE)  # of the support table


def whole_configuration(name: str, **changes: Any) -> Any:
    """The tiny configuration of a whole class; `changes` are of its text model."""
    whole = WHOLE[name]
    found = importlib.import_module(f"transformers.models.{whole.folder}.configuration_{whole.folder}")
    kind = getattr(found, whole.config)
    text = configuration(whole.of or name, **{"vocab_size": VOCABULARY} | whole.text | changes)
    known = {key: value for key, value in _SPECIAL.items() if key in kind.__dataclass_fields__}
    return kind(text_config=text, **known, **whole.towers, **whole.values)


def whole_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A random whole model in evaluation mode, made ready like a text model (`tiny_models.made_ready`); it generates
    ids of text only."""
    whole = WHOLE[name]
    found = importlib.import_module(f"transformers.models.{whole.folder}.modeling_{whole.folder}")
    torch.manual_seed(seed)
    model = made_ready(
        name, getattr(found, whole.model)._from_config(whole_configuration(name, **changes), dtype=dtype)
    )
    settings = {"suppress_tokens": list(range(BASE["vocab_size"], VOCABULARY))} | whole.generation
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    return model


def text_inputs(name: str, batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Text alone, and the block that is denoised after it where there is one."""
    given = {"input_ids": tokens(batch, length, seed)}
    return given | (
        {"decoder_input_ids": tokens(batch, CANVAS, seed + 1)} if "canvas_length" in WHOLE[name].values else {}
    )


def picture_inputs(name: str, model: nn.Module, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Text, a picture between the tokens of its beginning and its end, and three tokens of text in each sequence; in
    the first one, padding in place of the text in front."""
    whole = WHOLE[name]
    given = text_inputs(name, batch, 7 + whole.length, seed)
    ids = given["input_ids"]
    ids[0, :2] = 0
    ids[:, 2], ids[:, 3 : 3 + whole.length], ids[:, 3 + whole.length] = BEGIN, IMAGE, END
    dtype = next(model.parameters()).dtype
    drawn = whole.picture(torch.Generator().manual_seed(seed), batch)
    given |= {key: value.to(dtype) if value.is_floating_point() else value for key, value in drawn.items()}
    return given | {"attention_mask": (ids != 0).long()} | {key: (ids == IMAGE).long() for key in whole.types}


# ---- Qwen3-Omni as a whole: a thinker that writes, a talker that says it, and what makes a sound of that

_CODES = 100  # of speech, below 1024 ids that the talker never says
_CODE_GROUPS = 4
_TURN, _END_OF_TURN, _USER, _ASSISTANT = 140, 141, 146, 147


def omni_model(seed: int = 0) -> Any:
    """A random `Qwen3OmniMoeForConditionalGeneration`; it has `generate` and no forward."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    talker = configuration("qwen3_omni_moe_with_talker", vocab_size=_CODES + 1024, rope_parameters=_MULTIMODAL_ROPE)
    predictor = {name: value for name, value in BASE.items() if "expert" not in name and not name.startswith("moe")}
    config = Qwen3OmniMoeConfig(
        thinker_config=whole_configuration("qwen3_omni_moe").to_dict(),
        talker_config={
            "text_config": talker.to_dict(),
            "code_predictor_config": predictor | {"num_hidden_layers": 1, "num_code_groups": _CODE_GROUPS},
            "thinker_hidden_size": 64,
            "accept_hidden_layer": 1,
            "num_code_groups": _CODE_GROUPS,
            "codec_eos_token_id": 1,
            "codec_nothink_id": 2,
            "codec_think_bos_id": 3,
            "codec_think_eos_id": 4,
            "codec_pad_id": 5,
            "codec_bos_id": 6,
            "speaker_id": {"ethan": 7},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
            "vision_start_token_id": BEGIN,
            "spatial_merge_size": 2,
        },
        code2wav_config={
            "codebook_size": BASE["vocab_size"],
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 1,
            "num_quantizers": _CODE_GROUPS,
            "upsample_rates": (2, 2),
            "upsampling_ratios": (2,),
            "decoder_dim": 16,
            "sliding_window": 4,
        },
        im_start_token_id=_TURN,
        im_end_token_id=_END_OF_TURN,
        tts_pad_token_id=142,
        tts_bos_token_id=143,
        tts_eos_token_id=144,
        user_token_id=_USER,
        assistant_token_id=_ASSISTANT,
    )
    torch.manual_seed(seed)
    model = made_ready("qwen3_omni_moe_with_talker", Qwen3OmniMoeForConditionalGeneration._from_config(config))
    model.thinker.generation_config.suppress_tokens = list(range(BASE["vocab_size"], VOCABULARY))
    return model


def spoken_to(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    """A user's turn with a picture in it, and the beginning of the assistant's; the first row is padded in front."""
    given = picture_inputs("qwen3_omni_moe", model, batch)
    ids = given["input_ids"]
    first, last = (torch.tensor([turn] * batch) for turn in ([_TURN, _USER], [_END_OF_TURN, _TURN, _ASSISTANT]))
    first[0], ids[0, :2] = 0, torch.tensor([_TURN, _USER])
    ids = torch.cat([first, ids, last], dim=1)
    return given | {"input_ids": ids, "attention_mask": (ids != 0).long()}
