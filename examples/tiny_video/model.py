"""The tiny video diffusion transformer: diffusers' Wan architecture, three million parameters, pixels to pixels.

One token is a 4 x 4 patch of one frame, so a clip of T frames has 256 T tokens: 4 frames are 1,024 and 16 frames 4,096.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from shapes import CANVAS, CAPTION_DIM

CHECKPOINT = Path(__file__).with_name("tiny_video.safetensors")
PATCH = 4
TOKENS_PER_FRAME = (CANVAS // PATCH) ** 2
NOISE_SHIFT = 3.0
"""Flow-matching time shift: smooth images need more of the high-noise steps (Esser et al. 2024, section 5.3.2)."""


def build_model() -> WanTransformer3DModel:
    """The architecture with fresh weights."""
    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=3,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        text_dim=CAPTION_DIM,
        freq_dim=64,
        ffn_dim=512,
        num_layers=5,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def save_model(model: torch.nn.Module, path: Path) -> None:
    """Write the weights as fp16 safetensors."""
    save_file({name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}, path)


def load_model(path: Path = CHECKPOINT) -> WanTransformer3DModel:
    """The trained model in fp32, ready for inference."""
    model = build_model()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def shifted(time: Tensor) -> Tensor:
    """Move uniform times in [0, 1] towards noise (1)."""
    return NOISE_SHIFT * time / (1 + (NOISE_SHIFT - 1) * time)


def initial_noise(count: int, frames: int, seed: int) -> Tensor:
    """(count, 3, frames, CANVAS, CANVAS) fp32; the same seed gives the same noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, frames, CANVAS, CANVAS, generator=generator)


def parameter_count(model: torch.nn.Module) -> int:
    """All parameters of the model."""
    return sum(math.prod(p.shape) for p in model.parameters())
