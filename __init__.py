"""sparseattn: a torch.compile backend that makes attention faster in models nobody has to edit.

    model = torch.compile(model, backend="sparseattn")

Importing this package registers `torch.ops.sparseattn.*` and changes nothing else.
"""

from sparseattn.attn_ops import backends as _backends  # noqa: F401  (registers the ops)
