"""The package sageattention as a provider of sage_attention.

Its front door chooses granularity and PV by itself, so the adapter calls the function that computes what was asked, and
has a sentence where there is none. K and V are smoothed here, from fp32 means: the package corrects the lse in half
precision, and ignores smooth_v where sums are fp32.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..call import AttentionCall
from ..capability import Capability
from ..layout import like_query
from ..numerics.quantize import mean_scores, without_mean
from ..spec import Kernel, Provider, Support
from . import known_bad
from .stream import on_default_stream

PACKAGE = "sageattention"
_SMS = (80, 86, 89, 90, 120, 121)
_CONSUMER_BLACKWELL = (120, 121)


def function_for(sm: int, granularity: str, pv: str) -> tuple[str, dict[str, str]]:
    """Name the package's function, with the arguments it needs beyond the common ones.

    On sm90 with pv="fp8" it groups 16 rows of q and 128 of k where `quantize_qk` groups 32 and 64.
    """
    if granularity == "per_block":
        return "sageattn_qk_int8_pv_fp16_triton", {}
    if pv == "fp16":
        return "sageattn_qk_int8_pv_fp16_cuda", {"qk_quant_gran": granularity, "pv_accum_dtype": "fp32"}
    name = "sageattn_qk_int8_pv_fp8_cuda_sm90" if sm == 90 else "sageattn_qk_int8_pv_fp8_cuda"
    return name, {"qk_quant_gran": granularity, "pv_accum_dtype": "fp32+fp32"}


def load() -> Kernel:
    """Import the package and return the kernel of sage_attention."""
    package = importlib.import_module(PACKAGE)

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float,
        bits: int = 8,  # noqa: ARG001  (the provider refuses any other than what it has)
        granularity: str,
        pv: str,
        smooth_q: bool = False,  # noqa: ARG001
        smooth_k: bool,
        smooth_v: bool = False,
        asymmetric: bool = False,  # noqa: ARG001
    ) -> tuple[Tensor, Tensor]:
        name, arguments = function_for(Capability.current(q.device).sm or 0, granularity, pv)
        k, k_mean = _smoothed(k) if smooth_k else (k, None)
        v, v_mean = _smoothed(v) if smooth_v else (v, None)
        with on_default_stream(PACKAGE, q):
            out, lse = getattr(package, name)(
                *(q, k, v),
                tensor_layout="HND",
                is_causal=causal,
                sm_scale=scale,
                smooth_k=False,
                return_lse=True,
                **arguments,
            )
        lse = lse.contiguous() if k_mean is None else lse + mean_scores(q, k_mean, scale)
        out = out if v_mean is None else out + v_mean.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return like_query(out, q), lse

    return attention


def _smoothed(x: Tensor) -> tuple[Tensor, Tensor]:
    rest, mean = without_mean(x)
    return rest.to(x.dtype), mean


def _why_not(call: AttentionCall, capability: Capability) -> list[str]:
    reasons = []
    if capability.sm is not None and capability.sm not in _SMS:
        reasons.append(f"has kernels for {', '.join(f'sm{sm}' for sm in _SMS)}, not for sm{capability.sm}")
    elif capability.sm is not None:
        reasons += _missing_functions(capability.sm, call)
    if call.param("bits") == 4:
        reasons.append("bits=4: its release has no INT4 kernel")
    reasons += [f"{name}=True: it has no kernel for it" for name in ("smooth_q", "asymmetric") if call.param(name)]
    return [*reasons, *known_bad.reasons(PACKAGE, call, capability)]


def _missing_functions(sm: int, call: AttentionCall) -> list[str]:
    granularity, pv = call.param("granularity"), call.param("pv")
    if granularity == "per_block" and (pv == "fp8" or sm in _CONSUMER_BLACKWELL):
        return [f'has no kernel for granularity="per_block" with pv="{pv}" on sm{sm}']
    if pv == "fp8" and sm < 89:
        return [f'has no kernel for pv="fp8" on sm{sm}']
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
