"""Context parallelism: a model on shards of its sequence, one on each rank, with attention over all of it.

    model = torch.compile(model, backend="sparseattn", options={"parallel": ContextParallel(mesh)})

`tensors` (shard and gather) and `model` (hooks that do it inside a model, by its plan in `plans`) mark what is a shard;
`tokens` follows it through the graph; `exchange` knows what every site needs, `ulysses_exchange` and `ring_exchange`
put it around the site.
"""

from ...attn_ops.dtensor import register_dtensor
from ...lowering.context_parallel import ContextParallel
from .attention import DistributedAttention, LocalAttention
from .communication import Communication
from .model import Sharded, shard_model
from .plans import Gather, Mask, Plan, Split, plan_of
from .tensors import gather, shard, whole_mask

__all__ = [
    "Communication",
    "ContextParallel",
    "DistributedAttention",
    "Gather",
    "LocalAttention",
    "Mask",
    "Plan",
    "Sharded",
    "Split",
    "gather",
    "plan_of",
    "register_dtensor",
    "shard",
    "shard_model",
    "whole_mask",
]
