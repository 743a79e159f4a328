"""One step of a video model on many H100s that are not here: predicted, with `sparseattn`'s own models of cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from .source_tree import find_sparseattn

find_sparseattn()

from sparseattn.attn_ops.call import AttentionCall  # noqa: E402
from sparseattn.attn_ops.capability import Capability  # noqa: E402
from sparseattn.attn_ops.sharding import local_tokens  # noqa: E402
from sparseattn.lowering.communication_model import Cluster, ParallelCost, Split, parallel_cost, splits  # noqa: E402
from sparseattn.lowering.cost_model import predicted_seconds  # noqa: E402

GPUS = (1, 2, 4, 8, 16, 32, 64)
_H100 = Capability.of("sm90")


@dataclass(frozen=True)
class VideoModel:
    """A diffusion transformer, as numbers.

    Args:
        name: its name.
        tokens: of the video.
        text: tokens of text in the same sequence.
        heads: query heads, as many as key and value heads, of 128 channels.
        blocks: with one self-attention each.
        weights: of the linear layers of a block that a token goes through.
        passes: forward passes of a step; two with classifier-free guidance.
    """

    name: str
    tokens: int
    text: int
    heads: int
    blocks: int
    weights: float
    passes: int

    @property
    def call(self) -> AttentionCall:
        """Its self-attention."""
        tokens = self.tokens + self.text
        return AttentionCall(1, self.heads, self.heads, tokens, tokens, 128, dtype=torch.bfloat16)

    def linear(self, tokens: int) -> float:
        """FLOP of the linear layers of a forward pass on so many tokens."""
        return 2 * self.weights * self.blocks * tokens


HUNYUAN = VideoModel("HunyuanVideo", 33 * 45 * 80, 256, 24, 60, 12 * 3072**2, 1)
"""129 frames at 720p, guidance distilled; 20 double and 40 single blocks have as many weights for each token."""
WAN = VideoModel("Wan 14B", 21 * 45 * 80, 0, 40, 40, 6 * 5120**2 + 2 * 5120 * 13824, 2)
"""81 frames at 720p, two passes; of cross-attention the projections of queries and output."""
MODELS = {"hunyuan": HUNYUAN, "wan": WAN}

_PUBLISHED = replace(HUNYUAN, tokens=30 * 48 * 80)
"""On one H100 50 steps take 945 s without VAE and text encoder, 800 s of it attention, with FlashAttention-3
(https://arxiv.org/abs/2502.04507)."""
_REST_RATE = _PUBLISHED.linear(_PUBLISHED.tokens + _PUBLISHED.text) / ((945 - 800) / 50)
"""FLOP/s of the linear layers of that, all else that is not attention being counted as if it were none."""
FLASH_3 = predicted_seconds(_PUBLISHED.call, None, 1.0, _H100) / (800 / 50 / _PUBLISHED.blocks)
"""How many times as fast as the cost model says its attention is."""


@dataclass(frozen=True)
class Attention:
    """What computes attention, and how well.

    Args:
        name: as a page calls it.
        backend: the backend, None for dense.
        kept: share of the scores that is computed.
        times: so many times as fast as the cost model says.
        network: so many times the bandwidth between nodes that the communication model says.
    """

    name: str
    backend: str | None = None
    kept: float = 1.0
    times: float = 1.0
    network: float = 1.0

    def seconds(self, call: AttentionCall) -> float:
        """Of a part on one GPU."""
        return predicted_seconds(call, self.backend, self.kept, _H100) / self.times

    @property
    def cluster(self) -> Cluster:
        """The GPUs."""
        cluster = Cluster.of(_H100)
        link = cluster.network
        return replace(cluster, network=replace(link, bandwidth=self.network * link.bandwidth))


DENSE = Attention("dense")
SPARSE = Attention("10 % of the scores", backend="block_topk", kept=0.1)


@dataclass(frozen=True)
class StepTime:
    """One step.

    Args:
        site: one of its attentions.
        attention: seconds of them all, without waiting.
        waiting: seconds of them all for communication.
        rest: seconds of all else.
    """

    site: ParallelCost
    attention: float
    waiting: float
    rest: float

    @property
    def seconds(self) -> float:
        """The step."""
        return self.attention + self.waiting + self.rest


@functools.cache
def step_time(model: VideoModel, split: Split, attention: Attention) -> StepTime:
    """Predict a step."""
    site = parallel_cost(model.call, split, attention.seconds, attention.cluster, text_tokens=model.text)
    sites = model.passes * model.blocks
    tokens = local_tokens(model.tokens, split.ranks) + model.text
    rest = model.passes * model.linear(tokens) / _REST_RATE
    return StepTime(site, sites * site.attention, sites * site.waiting, rest)


def by_method(model: VideoModel, ranks: int, attention: Attention) -> dict[str, StepTime]:
    """The fastest split of each method, by its name."""
    found: dict[str, StepTime] = {}
    for split in splits(ranks, model.heads):
        time = step_time(model, split, attention)
        if split.method not in found or time.seconds < found[split.method].seconds:
            found[split.method] = time
    return found


def fastest(model: VideoModel, ranks: int, attention: Attention) -> StepTime:
    """Of all methods."""
    return min(by_method(model, ranks, attention).values(), key=lambda time: time.seconds)


def tokens_that_hide(attention: Attention, *, network: bool) -> int:
    """Queries of a rank of a ring from which on computing with a shard takes longer than passing on the next."""
    link = attention.cluster.network if network else attention.cluster.nvlink
    many = replace(HUNYUAN.call, seq_q=2**20, seq_k=2**20)
    each = attention.seconds(many) / (many.seq_q * many.seq_k)  # seconds of one query and one key, all heads
    key = 2 * many.heads * many.head_dim * many.dtype.itemsize  # bytes of it, with its value
    return round(key / link.bandwidth / each)
