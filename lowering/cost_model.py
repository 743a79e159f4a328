"""Cost model: how long attention should take on a GPU that is not here. A prediction, from published throughputs.

The time is that of the scores that are computed, at the throughput that published kernels reach on the machine, plus
what choosing blocks and quantizing read and write, plus launches. It ranks settings and predicts ratios; it does not
replace a measurement.

Throughputs are of non-causal forward kernels with head_dim 128 and 32K tokens: FlashAttention-2 and SageAttention2
(INT8 scores, 8-bit values; on the A100, fp16 values) as published with SageAttention 2. Sparse kernels reach 0.9 of the
dense ones in half precision and 0.83 in INT8: SpargeAttn's published times on an RTX 4090, by the work that they do.
"""

from __future__ import annotations

from typing import NamedTuple

from ..attn_ops.call import AttentionCall
from ..attn_ops.capability import Capability
from ..attn_ops.errors import PolicyError


class _Rates(NamedTuple):
    """TFLOP/s of attention in half precision and in INT8, and GB/s of memory."""

    half: float
    int8: float
    memory: float


_RATES = {
    80: _Rates(204, 278, 2039),
    89: _Rates(164, 423, 1008),
    90: _Rates(339, 870, 3350),
    120: _Rates(214, 551, 1792),
}
"""By compute capability: A100 80 GB SXM, RTX 4090, H100 SXM, RTX 5090."""

_SPARSE_HALF, _SPARSE_INT8 = 0.9, 0.83
_INT8 = frozenset({"sage", "sparge", "sage_sla"})
_UNKNOWN = frozenset({"sage_fp4"})
_LAUNCH = 5e-6
"""Seconds that a kernel takes however little it does."""


def predicted_seconds(call: AttentionCall, backend: str | None, kept: float, machine: Capability) -> float:
    """Seconds of one forward of a site on a GPU.

    Args:
        call: the site; fp32 is taken for half precision, which such a GPU would be given.
        backend: what serves it there; None is dense attention.
        kept: share of the scores that is computed, 0 ... 1.
        machine: the GPU.

    Raises:
        PolicyError: if nothing is known of the machine or of the speed of the backend.
    """
    rates = _rates(machine)
    if backend in _UNKNOWN:
        raise PolicyError(f"the time of {backend} cannot be predicted: nobody published it. Measure it on the machine.")
    dense, int8 = backend in (None, "flash"), backend in _INT8
    sparse = not dense and backend != "sage"
    rate = rates.int8 * (_SPARSE_INT8 if sparse else 1.0) if int8 else rates.half * (_SPARSE_HALF if sparse else 1.0)
    scores = call.batch * call.heads * call.seq_q * call.seq_k * (0.5 if call.causal else 1.0) * kept
    entries = call.batch * call.head_dim * (call.heads * call.seq_q + 2 * call.kv_heads * call.seq_k)
    moved = entries * (2 * sparse + 3 * int8)  # halves are read to pool them, and to write them in INT8
    kernels = 1 + 5 * sparse + 3 * int8
    return 4 * scores * call.head_dim / (rate * 1e12) + moved / (rates.memory * 1e9) + kernels * _LAUNCH


def memory_rate(machine: Capability) -> float:
    """Bytes per second of a GPU's memory.

    Raises:
        PolicyError: if nothing is known of the machine.
    """
    return _rates(machine).memory * 1e9


def _rates(machine: Capability) -> _Rates:
    if machine.sm not in _RATES:
        known = ", ".join(f"sm{sm}" for sm in _RATES)
        raise PolicyError(f"times are predicted for {known}, of which throughputs are published, not for {machine}.")
    return _RATES[machine.sm]
