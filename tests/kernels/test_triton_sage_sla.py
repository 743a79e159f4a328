"""SageSLA through the Triton kernel, in the interpreter: the lists it is given, and the linear branch after it."""

from __future__ import annotations

import pytest
import torch
from support.quantize_cases import summable
from support.triton_interpreter import interpret, why_not_interpret

from sparseattn.attn_ops.blocks.sla_method import SlaMethod
from sparseattn.attn_ops.kernels import sla
from sparseattn.attn_ops.kernels.sage_sla import on_lists
from sparseattn.attn_ops.kernels.triton import sparge
from sparseattn.attn_ops.reference.sage_sla import sage_sparse_linear_attention

pytestmark = pytest.mark.skipif(bool(why_not_interpret()), reason=why_not_interpret())


@pytest.mark.parametrize("pv", ["fp16", "fp8"])
@pytest.mark.parametrize("variant", ["all", "complement"])
def test_it_is_the_definition(monkeypatch: pytest.MonkeyPatch, pv: str, variant: str) -> None:
    monkeypatch.setattr(sla, "runs_triton", lambda device: True)
    q, k, v = (summable(torch.randn(1, heads, 150, 32)).half() for heads in (4, 2, 2))
    weight, bias = torch.randn(32, 32) / 6, torch.randn(32)
    how = SlaMethod(0.4, variant, "softmax", 64, 32, False, None)
    modes = {"pv": pv, "smooth_k": True, "scale": 0.2}
    with interpret(arch=90):
        out, lse = on_lists(sparge.attention)(q, k, v, weight, bias, how, **modes)
    want, want_lse = sage_sparse_linear_attention(q, k, v, weight, bias, how, **modes)
    # Weights are rounded to e4m3 against the largest score of a tile there, of the row here.
    limit = 1e-3 if pv == "fp16" else 3e-2
    assert (out.double() - want.double()).norm() < limit * want.double().norm()
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
