"""Small models with an image or an encoder in front: what goes through the tower or encoder is never packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

from .shrink import VOCABULARY, build, head_dim_of

IMAGE_TOKEN = 120
IMAGE_TOKENS = 4
"""Tokens that each image becomes."""
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


class Fronted(NamedTuple):
    """A model and what ``generate`` needs beside the cache."""

    model: Any
    inputs: dict[str, Tensor]
    own_head_dim: int | None
    is_encoder_decoder: bool = False


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def _prompt(image_token: int = IMAGE_TOKEN, *, before: tuple[int, ...] = (5,)) -> dict[str, Tensor]:
    """A left-padded batch of two; an image stands in each."""
    text = torch.randint(2, 100, (2, 8), generator=torch.Generator().manual_seed(6)).tolist()
    image = [*before, *[image_token] * IMAGE_TOKENS]
    ids = torch.tensor([[*image, *text[0]], [0, 0, 0, *image, *text[1][:5]]])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _llava() -> Fronted:
    vision = hf.CLIPVisionConfig(**TOWER)
    config = hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=vision, image_token_id=IMAGE_TOKEN)
    model = build(config, factory=hf.LlavaForConditionalGeneration._from_config)
    own = head_dim_of(hf.LlamaConfig())
    return Fronted(model, {**_prompt(), "pixel_values": _noise(2, 3, 16, 16)}, own)


def _internvl() -> Fronted:
    tower = {**TOWER, "image_size": (16, 16), "patch_size": (4, 4)}
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.InternVLVisionConfig(**tower),
        image_token_id=IMAGE_TOKEN,
    )
    model = build(config, factory=hf.InternVLForConditionalGeneration._from_config)
    own = head_dim_of(hf.Qwen2Config())
    return Fronted(model, {**_prompt(), "pixel_values": _noise(2, 3, 16, 16)}, own)


def _gemma3() -> Fronted:
    text = hf.Gemma3TextConfig(
        **TEXT, head_dim=64, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    vision = hf.SiglipVisionConfig(**{**TOWER, "patch_size": 4})
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
    )
    inputs = _prompt()
    types = (inputs["input_ids"] == IMAGE_TOKEN).long()
    model = build(config, factory=hf.Gemma3ForConditionalGeneration._from_config)
    inputs |= {"pixel_values": _noise(2, 3, 16, 16), "token_type_ids": types}
    return Fronted(model, inputs, head_dim_of(hf.Gemma3TextConfig()))


def _qwen_vl(config_class: Any, text_class: Any, model_class: Any, tower: dict[str, Any]) -> Fronted:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    text = text_class(**TEXT, rope_parameters=rope)
    tokens = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 121, "vision_end_token_id": 122}
    tokens["video_token_id"] = 123
    config = config_class(text_config=text.to_dict(), vision_config=tower, **tokens)
    inputs = _prompt(before=(5, 121))
    # 4 by 4 patches of 14 by 14 pixels, two frames each, merged two by two.
    inputs |= {"pixel_values": _noise(2 * 16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return Fronted(build(config, factory=model_class._from_config), inputs, head_dim_of(text_class()))


def _qwen2_vl() -> Fronted:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 1}
    return _qwen_vl(hf.Qwen2VLConfig, Qwen2VLTextConfig, hf.Qwen2VLForConditionalGeneration, tower)


def _qwen2_5_vl() -> Fronted:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    tower = {"depth": 2, "hidden_size": 32, "out_hidden_size": 256, "num_heads": 2, "intermediate_size": 32}
    tower["fullatt_block_indexes"] = [1]
    return _qwen_vl(hf.Qwen2_5_VLConfig, Qwen2_5_VLTextConfig, hf.Qwen2_5_VLForConditionalGeneration, tower)


def _source() -> dict[str, Tensor]:
    """A right-padded batch for an encoder."""
    ids = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def _t5() -> Fronted:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=256, d_kv=64, d_ff=64, num_layers=2, num_heads=4, eos_token_id=None,
        pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    model = build(config, factory=hf.T5ForConditionalGeneration._from_config)
    return Fronted(model, _source(), hf.T5Config().d_kv, True)


def _bart() -> Fronted:
    model = build(hf.BartConfig(**SEQ2SEQ), factory=hf.BartForConditionalGeneration._from_config)
    return Fronted(model, _source(), head_dim_of(hf.BartConfig()), True)


def _whisper() -> Fronted:
    config = hf.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = build(config, factory=hf.WhisperForConditionalGeneration._from_config)
    return Fronted(model, {"input_features": _noise(2, 8, 40)}, head_dim_of(hf.WhisperConfig()), True)


FRONTED: dict[str, Callable[[], Fronted]] = {
    "llava": _llava,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "t5": _t5,
    "bart": _bart,
    "whisper": _whisper,
}
