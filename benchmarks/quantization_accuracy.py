"""What each rounding costs: relative L1 error and cosine similarity to fp64 attention, one row per setting.

The op's reference provider computes every row, so the numbers are those of the definition and the same on every
machine, up to the last digit. Errors are over all elements of the output: sum |out - exact| / sum |exact|.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from sparseattn import ops

INT8: dict[str, Any] = {"bits": 8, "granularity": "per_thread"}
INT4: dict[str, Any] = {"bits": 4, "granularity": "per_thread"}
FP4: dict[str, Any] = {"op": ops.sage_fp4_attention}
SETTINGS: dict[str, dict[str, Any]] = {
    "INT8 per_block": {**INT8, "granularity": "per_block"},
    "INT8 per_warp": {**INT8, "granularity": "per_warp"},
    "INT8 per_thread (the default)": INT8,
    "INT8 per_thread, smooth_q": {**INT8, "smooth_q": True},
    "INT8 per_thread, smooth_k=False": {**INT8, "smooth_k": False},
    "INT8 per_thread, smooth_k=False, asymmetric": {**INT8, "smooth_k": False, "asymmetric": True},
    "INT4 per_block": {**INT4, "granularity": "per_block"},
    "INT4 per_warp": {**INT4, "granularity": "per_warp"},
    "INT4 per_thread": INT4,
    "INT4 per_block, smooth_q": {**INT4, "granularity": "per_block", "smooth_q": True},
    "INT4 per_warp, smooth_q": {**INT4, "granularity": "per_warp", "smooth_q": True},
    "INT4 per_thread, smooth_q": {**INT4, "smooth_q": True},
    "INT4 per_thread, asymmetric": {**INT4, "asymmetric": True},
    "INT4 per_thread, smooth_q, asymmetric": {**INT4, "smooth_q": True, "asymmetric": True},
    'INT8 per_thread, pv="fp8"': {**INT8, "pv": "fp8"},
    'INT8 per_thread, pv="fp8", smooth_v': {**INT8, "pv": "fp8", "smooth_v": True},
    'INT4 per_thread, smooth_q, pv="fp8", smooth_v': {**INT4, "smooth_q": True, "pv": "fp8", "smooth_v": True},
    "FP4 (NVFP4, emulated)": FP4,
    "FP4, smooth_q=False": {**FP4, "smooth_q": False},
    "FP4, two_level=False": {**FP4, "two_level": False},
}


def noise(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k and v."""
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def structured(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with what trained models have.

    Neighbours are alike: a random walk along the tokens, of variance 1, is the same in q and k, so that a token looks
    at those near it; v has one of its own. To it comes noise of the same size. Tokens differ in size: q and k are
    multiplied by exp(0.3 * normal) per token. Channel outliers, a vector per head that all tokens share: +-6 in 4
    channels of q, +-12 in 4 of k, drawn for each. A channel of v has a mean, normal with variance 1.
    """
    place, content = walk(shape), walk(shape)
    q, k = ((place + torch.randn(shape)) * (0.3 * torch.randn(*shape[:3], 1)).exp() for _ in range(2))
    v = content + torch.randn(shape) + torch.randn_like(content[:, :, :1])
    return q + outliers(shape, 6.0), k + outliers(shape, 12.0), v


def walk(shape: tuple[int, ...]) -> Tensor:
    """(B, H, S, D): a random walk along the tokens in every channel, with mean 0 and variance 1."""
    steps = torch.randn(shape).cumsum(dim=-2)
    return (steps - steps.mean(dim=-2, keepdim=True)) / steps.std(dim=-2, keepdim=True)


def outliers(shape: tuple[int, ...], size: float) -> Tensor:
    """(B, H, 1, D): +-size in 4 channels of every head, 0 elsewhere."""
    channels = torch.rand(*shape[:2], 1, shape[3]).argsort(dim=-1) < 4
    return size * channels * torch.randn(*shape[:2], 1, shape[3]).sign()


def errors(setting: dict[str, Any], qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Relative L1 error and cosine similarity to fp64."""
    options = {name: value for name, value in setting.items() if name != "op"}
    out = setting.get("op", ops.sage_attention)(*qkv, provider="reference", **options)[0].double()
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in qkv))
    cosine = torch.nn.functional.cosine_similarity(out.flatten(), exact.flatten(), dim=0)
    return float((out - exact).abs().sum() / exact.abs().sum()), float(cosine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 4, 1024, 128], metavar=("B", "H", "S", "D"))
    args = parser.parse_args()
    torch.manual_seed(0)
    inputs = noise(tuple(args.shape)), structured(tuple(args.shape))
    width = max(map(len, SETTINGS))
    print(
        f"B, H, S, D = {', '.join(map(str, args.shape))}, fp32 inputs; relative L1 error and cosine to fp64 attention"
    )
    print(f"{'':{width}} | normal            | structured")
    print(f"{'':{width}} |  relL1   cosine   |  relL1   cosine")
    for name, setting in SETTINGS.items():
        cells = [f"{error:.4f}  {cosine:.6f}" for error, cosine in (errors(setting, qkv) for qkv in inputs)]
        print(f"{name:{width}} | {cells[0]}  | {cells[1]}", flush=True)


if __name__ == "__main__":
    main()
