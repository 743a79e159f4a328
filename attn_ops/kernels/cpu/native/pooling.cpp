// The mean of every block of tokens, in fp32, from tensors of any strides.

#include "panels.h"
#include "selection.h"

namespace sparseattn {

namespace {

// Adds four rows to each other first: sums of sums round less.
void add_rows(float* sum, const float* rows, int pitch) {
  for (int d = 0; d < pitch; d += W) {
    const Vec low = load(rows + d) + load(rows + pitch + d), high = load(rows + 2 * pitch + d) + load(rows + 3 * pitch + d);
    store(sum + d, load(sum + d) + (low + high));
  }
}

}  // namespace
}  // namespace sparseattn

using namespace sparseattn;

int sparseattn_block_mean(const BlockMean* call) {
  const BlockMean& c = *call;
  const int64_t blocks = ceil_div(c.tokens, c.block), tasks = c.batch * c.heads * blocks;
  const int pitch = padded(c.channels);
  const int threads = useful_threads(c.threads, tasks, 2. * c.batch * c.heads * c.tokens * c.channels);
  return in_threads(threads, tasks, 5 * pitch, [&](int64_t task, Scratch scratch) {
    const int64_t block = task % blocks, head = task / blocks % c.heads, batch = task / blocks / c.heads;
    const int64_t first = block * c.block, end = std::min(first + c.block, c.tokens);
    const int64_t count = c.sizes ? std::min<int64_t>(c.sizes[block], end - first) : end - first;
    const int64_t size = size_of((Dtype)c.dtype);
    const char* x = c.x.data + (batch * c.x.batch + head * c.x.head + first * c.x.token) * size;
    float *sum = scratch.take(pitch), *rows = scratch.take(4 * pitch);
    std::fill_n(sum, pitch, 0.f);
    for (int64_t at = 0; at < count; at += 4) {
      for (int64_t i = 0; i < 4; ++i) {
        if (at + i < count) load_row(rows + i * pitch, x + (at + i) * c.x.token * size, c.channels, (Dtype)c.dtype);
        else std::fill_n(rows + i * pitch, pitch, 0.f);
      }
      add_rows(sum, rows, pitch);
    }
    for (int d = 0; d < pitch; d += W) store(sum + d, load(sum + d) / splat((float)count));
    memcpy(c.means + task * c.channels, sum, 4 * (size_t)c.channels);
  });
}
