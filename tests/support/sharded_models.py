"""Small video models and a language model whose tokens no number of ranks divides: 4 heads, batch 2, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Built = tuple[torch.nn.Module, dict[str, Any]]


def _wan() -> Built:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    video, text = torch.randn(2, 4, 3, 6, 10), torch.randn(2, 12, 16)
    return model, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([1, 3])}


def _cogvideox() -> Built:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=10, sample_height=6, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=7, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    video, text = torch.randn(2, 3, 4, 6, 10), torch.randn(2, 7, 8)
    angles = torch.randn(45, 8).repeat_interleave(2, dim=1)
    rotary = {"image_rotary_emb": (angles.cos(), angles.sin())}
    return model, {"hidden_states": video, "encoder_hidden_states": text, "timestep": torch.tensor([1, 3]), **rotary}


def _hunyuan_video() -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    words = torch.ones(2, 12)
    words[1, 7:] = 0
    inputs = {"hidden_states": torch.randn(2, 4, 3, 3, 5), "encoder_hidden_states": torch.randn(2, 12, 16)}
    more = {"encoder_attention_mask": words, "pooled_projections": torch.randn(2, 8)}
    return model, {**inputs, **more, "timestep": torch.tensor([1, 3]), "guidance": torch.tensor([6.0, 5.0])}


def _ltx() -> Built:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 45, 4), "encoder_hidden_states": torch.randn(2, 16, 16)}
    size = {"num_frames": 3, "height": 3, "width": 5, "timestep": torch.tensor([1, 3])}
    words = torch.ones(2, 16)
    words[1, 9:] = 0
    return model, {**inputs, **size, "encoder_attention_mask": words}


def _llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=37, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    return model, {"input_ids": torch.randint(1, 90, (2, 17)), "use_cache": False}


MODELS: dict[str, Callable[[], Built]] = {
    "cogvideox": _cogvideox,
    "hunyuan_video": _hunyuan_video,
    "llama": _llama,
    "ltx": _ltx,
    "wan": _wan,
}


def build(name: str) -> Built:
    """The model in evaluation mode and its inputs, from a fixed seed."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return model.eval(), inputs if name == "llama" else {**inputs, "return_dict": False}


def result(output: Any) -> Tensor:
    """The tensor of a model's output."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return tensor
