"""attach: how a module hands tensors of its own to the attention inside it, through the graph.

`torch.ops.sparseattn.attach(names, tensors)` has no result. A pass that rewrites the graph gives the tensors to the
arguments of these names of the next attention in the same module, and removes the node; every other backend does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import LIBRARY, NAMESPACE


def _nothing(_names: list[str], _tensors: list[Tensor]) -> None:
    return None


LIBRARY.define("attach(str[] names, Tensor[] tensors) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attach", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::attach", _nothing, lib=LIBRARY)

ATTACH = torch.ops.sparseattn.attach.default
