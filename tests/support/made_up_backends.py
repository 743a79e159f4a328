"""Backends that exist only in tests: one of each kind, with every sort of requirement, and no kernel."""

from __future__ import annotations

from sparseattn.attn_ops.call import AttentionCall
from sparseattn.attn_ops.capability import Capability
from sparseattn.attn_ops.spec import BackendSpec, Param, Provider, Support

GPU_ONLY = Support(devices=("cuda",), min_sm=80, package="triton")


def no_kernel() -> None:
    raise AssertionError("a decision must not load a kernel")


def _slow_on_cpu(call: AttentionCall, capability: Capability) -> str | None:
    return "slower than dense on a CPU" if capability.device == "cpu" else None


def _short(call: AttentionCall, capability: Capability) -> str | None:
    return None if call.seq_q >= 4096 else f"{call.seq_q} tokens, break-even is 4096"


def _no_grouped_heads(call: AttentionCall, capability: Capability) -> list[str]:
    return ["grouped heads"] if call.heads != call.kv_heads else []


PLAIN = BackendSpec(
    name="plain",
    op="plain_attention",
    kind="exact",
    summary="exact",
    support=Support(window=True),
    providers=(
        Provider("fused", "fused", load=no_kernel, load_backward=no_kernel, support=Support(head_dim=(1, 128))),
        Provider("reference", "definition", load=no_kernel, load_backward=no_kernel),
    ),
)
QUANT = BackendSpec(
    name="quant",
    op="quant_attention",
    kind="quantized",
    summary="quantized",
    params=(Param("bits", 8, "4 or 8.", choices=(4, 8)), Param("smooth", True, "smooth K.")),
    support=Support(grad=False),
    break_even=_slow_on_cpu,
    providers=(
        Provider(
            "vendor",
            "vendor",
            load=no_kernel,
            support=Support(devices=("cuda",), min_sm=80, package="sageattention", grad=False),
            install="pip install sageattention",
        ),
        Provider("triton", "triton", load=no_kernel, support=GPU_ONLY),
        Provider("cpu", "cpu", load=no_kernel, support=Support(devices=("cpu",), grad=False)),
        Provider("reference", "definition", load=no_kernel),
    ),
)
BLOCKS = BackendSpec(
    name="blocks",
    op="blocks_attention",
    kind="sparse",
    summary="sparse",
    params=(
        Param("keep_ratio", 0.5, "Fraction of key blocks.", low=0.0, high=1.0, tensor="keep_ratios"),
        Param("bits", 8, "4 or 8.", choices=(8,)),
    ),
    support=Support(cross=False, head_dim=(16, 128)),
    why_not=_no_grouped_heads,
    break_even=_short,
    providers=(
        Provider("cpu", "cpu", load=no_kernel, load_backward=no_kernel, support=Support(cross=False, devices=("cpu",))),
        Provider("triton", "triton", load=no_kernel, support=GPU_ONLY),
        Provider("reference", "definition", load=no_kernel, load_backward=no_kernel),
    ),
)
HIDDEN = BackendSpec(
    name="hidden",
    op="hidden_attention",
    kind="sparse",
    summary="needs a block map",
    selectable=False,
    providers=(Provider("reference", "definition", load=no_kernel),),
)

MADE_UP = {spec.name: spec for spec in (PLAIN, QUANT, BLOCKS, HIDDEN)}
