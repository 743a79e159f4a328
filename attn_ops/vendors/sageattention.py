"""The package sageattention as a provider of sage_attention.

Its front door chooses granularity and PV by itself, so the adapter calls the function that computes what was asked, and
has a sentence where there is none. K is smoothed here, in fp32, because the package corrects the lse in half precision.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..call import AttentionCall
from ..capability import Capability
from ..layout import like_query
from ..quantize import mean_scores
from ..spec import Kernel, Provider, Support
from .stream import on_default_stream

PACKAGE = "sageattention"
_SMS = (80, 86, 89, 90, 120, 121)
_CONSUMER_BLACKWELL = (120, 121)
_LONGEST_FP8_ON_SM120 = 160_000
_GARBAGE_ON_SM90 = (2, 2, 0)


def function_for(sm: int, qk_quant: str, pv: str) -> tuple[str, dict[str, str]]:
    """Name the package's function, with the arguments it needs beyond the common ones.

    On sm90 with pv="fp8" it groups 16 rows of q and 128 of k where `quantize_qk` groups 32 and 64.
    """
    if qk_quant == "per_block":
        return "sageattn_qk_int8_pv_fp16_triton", {}
    if pv == "fp16":
        return "sageattn_qk_int8_pv_fp16_cuda", {"qk_quant_gran": qk_quant, "pv_accum_dtype": "fp32"}
    name = "sageattn_qk_int8_pv_fp8_cuda_sm90" if sm == 90 else "sageattn_qk_int8_pv_fp8_cuda"
    return name, {"qk_quant_gran": qk_quant, "pv_accum_dtype": "fp32+fp32"}


def load() -> Kernel:
    """Import the package and return the kernel of sage_attention."""
    package = importlib.import_module(PACKAGE)

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float, qk_quant: str, pv: str, smooth_k: bool
    ) -> tuple[Tensor, Tensor]:
        sm = Capability.current(q.device).sm or 0
        name, arguments = function_for(sm, qk_quant, pv)
        k_mean = k.float().mean(dim=-2, keepdim=True) if smooth_k else None
        with on_default_stream(PACKAGE, q):
            out, lse = getattr(package, name)(
                q,
                k if k_mean is None else (k - k_mean).to(k.dtype),
                v,
                tensor_layout="HND",
                is_causal=causal,
                sm_scale=scale,
                smooth_k=False,
                return_lse=True,
                **arguments,
            )
        lse = lse.contiguous() if k_mean is None else lse + mean_scores(q, k_mean, scale)
        return like_query(out, q), lse

    return attention


def _why_not(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = []
    if capability.sm is not None and capability.sm not in _SMS:
        reasons.append(f"has kernels for {', '.join(f'sm{sm}' for sm in _SMS)}, not for sm{capability.sm}")
    elif capability.sm is not None:
        reasons += _missing_functions(capability.sm, call)
    # https://github.com/thu-ml/SageAttention/issues/320
    if capability.sm == 90 and capability.version_of(PACKAGE) == _GARBAGE_ON_SM90:
        reasons.append("sageattention 2.2.0 returns uninitialised memory on sm90")
    return reasons


def _missing_functions(sm: int, call: AttentionCall) -> list[str]:
    qk_quant, pv = call.param("qk_quant"), call.param("pv")
    if qk_quant == "per_block" and (pv == "fp8" or sm in _CONSUMER_BLACKWELL):
        return [f'has no kernel for qk_quant="per_block" with pv="{pv}" on sm{sm}']
    if pv == "fp8" and sm < 89:
        return [f'has no kernel for pv="fp8" on sm{sm}']
    # https://github.com/thu-ml/SageAttention/issues/388
    if pv == "fp8" and sm in _CONSUMER_BLACKWELL and call.seq_k > _LONGEST_FP8_ON_SM120:
        return [f'pv="fp8" with {call.seq_k} keys on sm{sm} gives noise beyond {_LONGEST_FP8_ON_SM120}']
    return []


PROVIDER = Provider(
    PACKAGE,
    "SageAttention 2, the package sageattention",
    load=load,
    # 1.0.x changes K in place, has no lse, and attends to keys past the end when Sk is not a multiple of 64; 2.0 has
    # other functions.
    support=Support(
        dtypes=(torch.float16, torch.bfloat16),
        head_dim=(1, 128),
        causal_cross=False,
        grad=False,
        devices=("cuda",),
        min_sm=80,
        package=PACKAGE,
        min_version="2.1",
    ),
    why_not=_why_not,
    install="pip install sageattention==2.2.0 --no-build-isolation",
)
