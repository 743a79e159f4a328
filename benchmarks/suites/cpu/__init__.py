"""What a CPU takes: this package's kernels beside torch's dense attention, and the errors of every rounding."""

from . import (
    block_sparse,
    explain_full_size,
    fused_prologue,
    linear_branch,
    methods,
    onnx_models,
    overhead,
    prologue_layer,
    quantization,
    sage,
    sharded,
    sparge_tuning,
    training,
)

CASES = (
    *(
        module.CASE
        for module in (
            block_sparse,
            training,
            methods,
            sage,
            sparge_tuning,
            onnx_models,
            overhead,
            quantization,
            fused_prologue,
            prologue_layer,
            linear_branch,
            explain_full_size,
        )
    ),
    *sharded.CASES,
)
