"""sparseattn.nn: attention with trained parameters, as modules. State dicts of the published code load as they are."""

from .sparse_linear import SageSparseLinearAttention, SparseLinearAttention

__all__ = ["SageSparseLinearAttention", "SparseLinearAttention"]
