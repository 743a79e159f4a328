"""sparseattn.nn: attention with trained parameters as modules, and what `sparseattn.convert` adds to others.

State dicts of the published code load as they are.
"""

from .attached import SlaProjection, VsaGate
from .sparse_linear import SageSparseLinearAttention, SparseLinearAttention

__all__ = ["SageSparseLinearAttention", "SlaProjection", "SparseLinearAttention", "VsaGate"]
