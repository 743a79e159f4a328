"""Device functions that the Hopper kernels share: tiles in shared memory, copies, asynchronous products.

A product runs on while the code goes on: its result is a token until `warpgroup_mma_wait` returns it, and what it reads
from shared memory must stay as it is until then.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma


@gluon.constexpr_function
def product_layout(columns, operand, warps):
    """Layout of the result of a wgmma: 16 rows a warp, all columns. `operand` is the type of what is multiplied."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 256 // operand.primitive_bitwidth])


@gluon.constexpr_function
def left_layout(product, operand):
    """Layout of the left operand of a wgmma that is in registers."""
    return gl.DotOperandLayout(0, product, 32 // operand.primitive_bitwidth)


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """Barriers, each for one copy at a time, that the copy engine can see."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=1)
    fence_async_shared()
    return made


@gluon.jit
def tiles(tensor, COUNT: gl.constexpr):
    """Room for so many tiles of a tensor, (COUNT, 1, 1, M, N)."""
    SHAPE: gl.constexpr = [COUNT] + tensor.block_type.shape  # noqa: RUF005  (Triton has no starred expression)
    return gl.allocate_shared_memory(tensor.dtype, SHAPE, tensor.layout)


@gluon.jit
def matrix(tile):
    """A tile (1, 1, M, N) as (M, N)."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def fetch(tensor, plane, token, tile, ready, wanted):
    """If wanted, start to copy the tokens from `token` on of a plane (batch, head) into a tile; `ready` will tell."""
    mbarrier.expect(ready, tensor.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(tensor, [plane[0], plane[1], token, 0], ready, tile, pred=wanted)


@gluon.jit
def fetch_values(V, plane, token, tile, ready, wanted):
    """Likewise values, which in FP8 are stored as (channels, tokens)."""
    if V.dtype == gl.float8e4nv:
        mbarrier.expect(ready, V.block_type.nbytes, pred=wanted)
        tma.async_copy_global_to_shared(V, [plane[0], plane[1], 0, token], ready, tile, pred=wanted)
    else:
        fetch(V, plane, token, tile, ready, wanted)


@gluon.jit
def multiply_keys(q, k_tile, SCORES: gl.constexpr):
    """Start q @ k.T."""
    k = matrix(k_tile)
    ROWS: gl.constexpr = q.shape[0]
    KEYS: gl.constexpr = k.shape[0]
    zero = gl.zeros([ROWS, KEYS], gl.int32 if q.dtype == gl.int8 else gl.float32, SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(weights, v_tile, acc, decay, OUT: gl.constexpr):
    """Start acc * decay + weights @ v."""
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUT))[:, None]
    left = gl.convert_layout(weights.to(v_tile.dtype), left_layout(OUT, v_tile.dtype))
    v = matrix(v_tile)
    if v_tile.dtype == gl.float8e4nv:
        v = v.permute((1, 0))
    return warpgroup_mma(left, v, acc, is_async=True)


@gluon.jit
def store_rows(Out, out, plane, row, tile):
    """Write the rows from `row` on of a plane, those that exist, through a tile that nothing reads any more."""
    matrix(tile).store(out.to(Out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(Out, [plane[0], plane[1], row, 0], tile)
    tma.store_wait(0)
