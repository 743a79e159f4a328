"""Models nobody here wrote: diffusers and transformers, random weights, small configurations, no download.

Each entry builds its model and inputs and says how many attention sites a trace must find, and how many of them the
policy `exact` rewrites; the rest have the named word in their reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Built = tuple[torch.nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. `dense` maps a word of the reason to the number of sites left dense for it."""

    name: str
    build: Callable[[], Built]
    sites: int
    rewritten: int
    dense: dict[str, int]


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _wan() -> Built:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {"hidden_states": _normal(1, 4, 2, 16, 16), "encoder_hidden_states": _normal(1, 12, 16)}
    return model, {**inputs, "timestep": torch.tensor([1]), "return_dict": False}


def _cogvideox() -> Built:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8, use_rotary_positional_embeddings=False,
    )  # fmt: skip
    inputs = {"hidden_states": _normal(1, 2, 4, 8, 8), "encoder_hidden_states": _normal(1, 8, 8)}
    return model, {**inputs, "timestep": torch.tensor([1]), "return_dict": False}


def _hunyuan_video() -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    inputs = {"hidden_states": _normal(1, 4, 3, 8, 8), "encoder_hidden_states": _normal(1, 12, 16)}
    more = {"encoder_attention_mask": torch.ones(1, 12), "pooled_projections": _normal(1, 8)}
    return model, {
        **inputs, **more, "timestep": torch.tensor([1]), "guidance": torch.tensor([6.0]), "return_dict": False,
    }  # fmt: skip


def _flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {"hidden_states": _normal(1, 16, 4), "encoder_hidden_states": _normal(1, 8, 32)}
    ids = {"img_ids": _normal(16, 3), "txt_ids": _normal(8, 3), "pooled_projections": _normal(1, 32)}
    return model, {**inputs, **ids, "timestep": torch.tensor([1.0]), "return_dict": False}


def _sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=96, qk_norm="rms_norm",
    )  # fmt: skip
    inputs = {"hidden_states": _normal(1, 4, 16, 16), "encoder_hidden_states": _normal(1, 10, 32)}
    return model, {
        **inputs, "pooled_projections": _normal(1, 64), "timestep": torch.tensor([1.0]), "return_dict": False,
    }  # fmt: skip


def _ltx() -> Built:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    inputs = {"hidden_states": _normal(1, 128, 4), "encoder_hidden_states": _normal(1, 16, 16)}
    size = {"num_frames": 2, "height": 8, "width": 8, "return_dict": False}
    return model, {
        **inputs, **size, "timestep": torch.tensor([1]), "encoder_attention_mask": torch.ones(1, 16).bool(),
    }  # fmt: skip


_TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 16,
    "patch_size": 4,
}


def _tokens(length: int = 16) -> torch.Tensor:
    return torch.randint(1, 90, (2, length), generator=torch.Generator().manual_seed(0))


def _from_config(model: type, config: Any) -> torch.nn.Module:
    built: torch.nn.Module = model._from_config(config, attn_implementation="sdpa")
    return built


def _llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = _from_config(LlamaForCausalLM, LlamaConfig(**_TEXT, num_key_value_heads=2))
    return model, {"input_ids": _tokens(), "use_cache": False}


def _qwen3() -> Built:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = _from_config(Qwen3ForCausalLM, Qwen3Config(**_TEXT, num_key_value_heads=2, head_dim=8))
    return model, {"input_ids": _tokens(), "use_cache": False}


def _bert() -> Built:
    from transformers import BertConfig, BertModel

    return _from_config(BertModel, BertConfig(**_TEXT)), {"input_ids": _tokens()}


def _vit() -> Built:
    from transformers import ViTConfig, ViTModel

    return _from_config(ViTModel, ViTConfig(**_IMAGE)), {"pixel_values": _normal(2, 3, 16, 16)}


def _clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    text = {**_TEXT, "max_position_embeddings": 32, "eos_token_id": 98}
    model = _from_config(CLIPModel, CLIPConfig(text_config=text, vision_config=_IMAGE))
    ids = _tokens()
    return model, {"input_ids": ids, "pixel_values": _normal(2, 3, 16, 16), "attention_mask": torch.ones_like(ids)}


def _whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = _from_config(WhisperForConditionalGeneration, config)
    return model, {"input_features": _normal(2, 8, 32), "decoder_input_ids": _tokens(12), "use_cache": False}


ZOO = (
    Entry("wan", _wan, sites=4, rewritten=4, dense={}),
    Entry("cogvideox", _cogvideox, sites=2, rewritten=2, dense={}),
    Entry("hunyuan_video", _hunyuan_video, sites=3, rewritten=0, dense={"mask": 3}),
    Entry("flux", _flux, sites=2, rewritten=2, dense={}),
    Entry("sd3", _sd3, sites=2, rewritten=2, dense={}),
    Entry("ltx", _ltx, sites=4, rewritten=2, dense={"mask": 2}),
    Entry("llama", _llama, sites=2, rewritten=2, dense={}),
    Entry("qwen3", _qwen3, sites=2, rewritten=2, dense={}),
    Entry("bert", _bert, sites=2, rewritten=2, dense={}),
    Entry("vit", _vit, sites=2, rewritten=2, dense={}),
    Entry("clip", _clip, sites=4, rewritten=2, dense={"mask": 2}),
    Entry("whisper", _whisper, sites=6, rewritten=6, dense={}),
)


def build(entry: Entry) -> Built:
    """The model in evaluation mode, and its inputs, from a fixed seed."""
    torch.manual_seed(0)
    model, inputs = entry.build()
    return model.eval(), inputs
