// Block-sparse attention and its gradients, without torch headers.
//
// Queries lie in vector lanes, in panels of up to 64: scores are S[key][query] = K Qt, the softmax runs down the keys
// without a horizontal step, and O[channel][query] = Vt P. K and V are read in place, whatever their strides, nothing is
// gathered, and a short block is only fewer rows. Products of bf16 tensors go in pairs where the CPU has that; other
// halves are widened tile by tile.

#include "arithmetic.h"
#include "backward.h"
#include "gemm.h"
#include "panels.h"
#include "softmax.h"

namespace sparseattn {

namespace {

size_t forward_scratch(const Call& c) { return (3 * PANEL + KEYS) * padded(c.channels) + (2 * KEYS + 3) * PANEL; }

template <int NQ, class Arithmetic>
void forward_panel(const Call& c, const Panel& p, Scratch scratch) {
  typedef typename Arithmetic::Element Element;
  const int channels = c.channels, pitch = padded(channels);
  float *q = scratch.take(NQ * pitch), *rows = scratch.take(NQ * pitch), *out = scratch.take(NQ * pitch);
  float *wide = scratch.take(KEYS * pitch), *s = scratch.take(KEYS * NQ), *packed = scratch.take(KEYS * NQ);
  float *largest = scratch.take(NQ), *total = scratch.take(NQ), *rescale = scratch.take(NQ);
  Arithmetic::template queries<NQ>(c, token(c, c.q, p.batch, p.head, p.first), c.q.token, p.queries, q, rows);
  std::fill_n(out, NQ * pitch, 0.f);
  std::fill_n(largest, NQ, -INFINITY);
  std::fill_n(total, NQ, 0.f);
  const float factor = c.scale * LOG2_E;
  for_keys_ahead(c, p, [&](const Keys& keys, const Keys& next) {
    const char* k_at = token(c, c.k, p.batch, p.kv_head, keys.first);
    const char* v_at = token(c, c.v, p.batch, p.kv_head, keys.first);
    const Rows k = Arithmetic::rows(c, k_at, c.k.token, keys.count, wide);
    gemm<Element, SCALED>(keys.count, NQ, Arithmetic::depth(channels), k, q, NQ, s, NQ, &factor,
                          rows_of(c, c.v, p, keys));
    if (keys.crosses) hide_future<NQ>(s, p, keys, -INFINITY);
    softmax_step<NQ>(s, keys.count, largest, total, rescale);
    const auto [v, weights, depth] = Arithmetic::template weighted_values<NQ>(c, v_at, s, keys.count, wide, packed);
    gemm<Element, RESCALED>(channels, NQ, depth, v, weights, NQ, out, NQ, rescale, rows_of(c, c.k, p, next));
  });
  divide_by_total<NQ>(out, channels, total);
  transpose(rows, pitch, out, NQ, pitch, NQ);
  store_rows(c, c.out, p, rows);
  float* lse = c.lse + (p.batch * c.heads + p.head) * c.seq_q + p.first;
  for (int i = 0; i < p.queries; ++i) lse[i] = natural_lse(largest[i], total[i]);
}

}  // namespace
}  // namespace sparseattn

using namespace sparseattn;

int sparseattn_forward(const Call* call) {
  const Call& c = *call;
  const int64_t panels = panels_per_head(c);
  return parallel(c, c.batch * c.heads * panels, forward_scratch(c), 2, [&](int64_t task, Scratch scratch) {
    const int64_t head = task / panels % c.heads, batch = task / panels / c.heads;
    const Panel p = panel_at(c, batch, head, task % panels);
    with_arithmetic(c, [&](auto arithmetic) {
      with_width(p.queries, [&](auto width) { forward_panel<width.value, decltype(arithmetic)>(c, p, scratch); });
    });
  });
}

// Every split of a key head has buffers of its own and takes its panels in order, so the sums do not depend on which
// thread computes what.
int sparseattn_backward(const Call* call) {
  const Call& c = *call;
  const int64_t per_head = panels_per_head(c), group = c.heads / c.kv_heads, panels = group * per_head;
  const int64_t heads = c.batch * c.kv_heads, size = c.seq_k * padded(c.channels);
  return parallel(c, heads * c.splits, backward_scratch(c), 5, [&](int64_t task, Scratch scratch) {
    const int64_t split = task / heads, batch = task % heads / c.kv_heads, kv_head = task % c.kv_heads;
    for (int64_t i = panels * split / c.splits; i < panels * (split + 1) / c.splits; ++i) {
      const Panel p = panel_at(c, batch, kv_head * group + i / per_head, i % per_head);
      with_arithmetic(c, [&](auto arithmetic) {
        with_width(p.queries, [&](auto width) {
          float *grad_k = c.grad_k + task * size, *grad_v = c.grad_v + task * size;
          Backward<width.value, decltype(arithmetic)>(c, p, grad_k, grad_v, scratch).run();
        });
      });
    }
  });
}
