"""block_map: which key blocks every block of queries reads, a picture for each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ...attn_ops.blocks.block_index import BlockIndex
from ...attn_ops.errors import ArgumentError
from .figure import SMALL, new_figure, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 12
_PIXELS = 512
_INCHES = 1.9


def block_map(
    index: BlockIndex | Tensor, *, heads: int | Sequence[int] | None = None, batch: int = 0, title: str = ""
) -> Figure:
    """Dark where a block of queries (rows) reads a block of keys (columns), and the density of each head.

    Args:
        index: a BlockIndex, such as `site_blocks` gives; or a mask (..., nq, nk) bool with at most two leading
            dimensions, batch and heads.
        heads: numbers of the heads to show; None shows all, at most the first 12.
        batch: number in the batch.
        title: begins the title, such as the name of the layer.

    Raises:
        ArgumentError: if the mask is not bool or of other dimensions, or there is no such head or batch, or no block.
        MissingPackageError: if matplotlib is not installed.

    Where there are more than 512 blocks, a pixel is darker the more of its blocks are read.
    """
    given = index if isinstance(index, BlockIndex) else BlockIndex.from_mask(index, block_q=1, block_k=1)
    mask = given.to_mask().cpu()
    if mask.numel() == 0:
        raise ArgumentError("block_map", "index", "have blocks", tuple(mask.shape))
    if not 0 <= batch < mask.shape[0]:
        raise ArgumentError("block_map", "batch", f"be in 0 ... {mask.shape[0] - 1}", batch)
    shown = _heads(heads, mask.shape[1])
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    inches = _INCHES if len(shown) > 1 else 3.2
    density = f"density {mask[batch].double().mean().item():.1%}{_of_heads(mask.shape[1], shown)}"
    title = f"{shortened(title)}: {density}" if title else density
    figure = new_figure(columns * inches + 0.6, rows * (inches + 0.25) + 0.6, title)
    all_axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, head in zip(all_axes.flat, shown, strict=False):
        _draw(axes, mask[batch, head])
        alone = mask.shape[1] == 1
        axes.set_title(
            "" if alone else f"head {head}: {mask[batch, head].double().mean().item():.1%}", fontsize=SMALL + 1
        )
    for axes in list(all_axes.flat)[len(shown) :]:
        axes.remove()
    of_tokens = isinstance(index, BlockIndex)
    figure.supxlabel(f"block of {given.block_k} keys" if of_tokens else "block of keys", fontsize=SMALL + 1)
    figure.supylabel(f"block of {given.block_q} queries" if of_tokens else "block of queries", fontsize=SMALL + 1)
    return figure


def _heads(asked: int | Sequence[int] | None, heads: int) -> list[int]:
    if asked is None:
        return list(range(min(heads, _MOST)))
    numbers = [asked] if isinstance(asked, int) else list(asked)
    if not numbers or not all(0 <= number < heads for number in numbers):
        raise ArgumentError("block_map", "heads", f"be numbers in 0 ... {heads - 1}", asked)
    return numbers


def _of_heads(heads: int, shown: list[int]) -> str:
    """What the density is of, and how much of that is seen."""
    if heads == 1:
        return ""
    return f" over {heads} heads" + (f", {len(shown)} shown" if len(shown) < heads else "")


def _draw(axes: Axes, mask: Tensor) -> None:
    """One head, (nq, nk): pooled where a block would be smaller than a pixel; the axes count blocks all the same."""
    nq, nk = mask.shape
    size = (min(nq, _PIXELS), min(nk, _PIXELS))
    cells = mask.float() if size == (nq, nk) else adaptive_avg_pool2d(mask[None].float(), size)[0]
    axes.imshow(
        cells.numpy(),
        cmap="Blues",
        vmin=0.0,
        vmax=1.0,
        extent=(-0.5, nk - 0.5, nq - 0.5, -0.5),
        interpolation="nearest",
        aspect="equal" if 0.25 <= nq / nk <= 4 else "auto",
    )
    axes.locator_params(integer=True, nbins=5, min_n_ticks=1)
    axes.tick_params(labelsize=SMALL, length=2)
