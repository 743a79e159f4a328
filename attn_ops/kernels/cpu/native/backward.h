// The gradients through one panel of queries.
//
// Where the softmax is sharp, grad_out . v - grad_out . out nearly cancels, and the rounding of out to a half would be
// 0.7% of grad_q. So halves take two passes over the keys: the first computes the weights and grad_out . v, and from
// them the exact mean grad_out . out; the second takes both up again, or repeats them where there are too many to keep.
// Pairs keep the weights rounded to bf16, as grad_v takes them: a quarter less to keep makes long sequences 10% faster,
// and errors of grad_q and grad_k are 2.9e-3 instead of 2.4e-3 (those of torch's dense backward 3.1e-3 and 3.9e-3).
#pragma once

#include "arithmetic.h"
#include "softmax.h"

namespace sparseattn {

constexpr int64_t MOST_KEPT = 128;  // steps of a panel: at most 4 MiB

// How many steps the first pass keeps for the second. Floats take one pass.
inline int64_t kept_steps(const Call& c) {
  const int64_t steps = c.width * ceil_div(std::min(c.block_k, c.seq_k), KEYS);
  return c.dtype == FLOAT32 ? 0 : std::min(steps, MOST_KEPT);
}

inline size_t backward_scratch(const Call& c) {
  return (5 * PANEL + 2 * KEYS) * padded(c.channels) + (3 + 2 * kept_steps(c)) * KEYS * PANEL + 5 * PANEL;
}

// In the lanes without a query: s[key][query] = value.
template <int NQ>
INLINE void hide_padding(float* s, const Panel& p, const Keys& keys, float value) {
  for (int k = 0; k < keys.count; ++k) std::fill(s + k * NQ + p.queries, s + (k + 1) * NQ, value);
}

// sum(grad_out * out) of a query, both fp32.
inline float product_with_out(const Call& c, const Panel& p, int64_t at, float* buffer) {
  const int pitch = padded(c.channels);
  load_row(buffer, token(c, c.out, p.batch, p.head, at), c.channels, FLOAT32);
  load_row(buffer + pitch, token(c, c.grad_out, p.batch, p.head, at), c.channels, FLOAT32);
  Vec sum = splat(0);
  for (int d = 0; d < pitch; d += W) sum += load(buffer + d) * load(buffer + pitch + d);
  float dot = 0;
  for (int j = 0; j < W; ++j) dot += sum[j];
  return dot;
}

// The weights of s[key][query], scores in base 2. They are added to `total`, and their products with t to `product`.
// The sums of these keys are taken apart, so that a long list does not round as often as it has keys.
template <int NQ, class Arithmetic>
void weigh(const float* s, const float* t, int keys, const float* base, typename Arithmetic::Weight* weights,
           float* total, float* product) {
  for (int lane = 0; lane < NQ; lane += W) {
    const Vec low = load(base + lane);
    Vec sum = splat(0), dot = splat(0);
    for (int k = 0; k < keys; ++k) {
      const Vec weight = exp2(load(s + k * NQ + lane) - low);
      Arithmetic::store_weights(weights + k * NQ + lane, weight);
      sum += weight;
      dot += weight * load(t + k * NQ + lane);
    }
    store(total + lane, load(total + lane) + sum);
    store(product + lane, load(product + lane) + dot);
  }
}

template <int NQ, class Arithmetic>
class Backward {
 public:
  Backward(const Call& call, const Panel& panel, float* grad_k, float* grad_v, Scratch scratch)
      : c(call), p(panel), grad_k(grad_k), grad_v(grad_v), pitch(padded(c.channels)) {
    for (float** rows : {&q, &q_rows, &g, &g_rows, &grad_q}) *rows = scratch.take(NQ * pitch);
    for (float** rows : {&wide_k, &wide_v}) *rows = scratch.take(KEYS * pitch);
    for (float** lanes : {&base, &delta, &ones, &total, &product}) *lanes = scratch.take(NQ);
    packed = scratch.take(KEYS * NQ);
    tiles = scratch.take(0);
  }

  void run() {
    start();
    c.dtype == FLOAT32 ? one_pass() : two_passes();
    transpose(q_rows, pitch, grad_q, NQ, pitch, NQ);
    store_rows(c, c.grad_q, p, q_rows);
  }

 private:
  typedef typename Arithmetic::Element Element;
  typedef typename Arithmetic::Weight Weight;
  struct Tile {  // of one step: the weights, and scale * grad_out . v, [key][query]
    Weight* weights;
    float* t;
  };

  // base: the lse in base 2, infinite where there is no query or it sees no key, so that every weight is 0 there.
  // delta: scale * (sum(grad_out * out) - grad_lse), in halves yet without the sum.
  void start() {
    const int64_t first = (p.batch * c.heads + p.head) * c.seq_q + p.first;
    std::fill_n(base, NQ, INFINITY);
    for (float* lanes : {delta, total, product}) std::fill_n(lanes, NQ, 0.f);
    std::fill_n(ones, NQ, 1.f);
    for (int i = 0; i < p.queries; ++i) {
      float dot = c.dtype == FLOAT32 ? product_with_out(c, p, p.first + i, q_rows) : 0;
      if (c.grad_lse) dot -= c.grad_lse[first + i];
      delta[i] = dot * c.scale;
      if (c.lse[first + i] != -INFINITY) base[i] = c.lse[first + i] * LOG2_E;
    }
    const char* grad_out = token(c, c.grad_out, p.batch, p.head, p.first);
    Arithmetic::template queries<NQ>(c, token(c, c.q, p.batch, p.head, p.first), c.q.token, p.queries, q, q_rows);
    Arithmetic::template queries<NQ>(c, grad_out, c.grad_out.token, p.queries, g, g_rows);
    std::fill_n(grad_q, NQ * pitch, 0.f);
  }

  void one_pass() {
    for_keys_ahead(c, p, [&](const Keys& keys, const Keys& next) {
      const Tile tile = tile_of(0);
      weights(keys, tile);
      add_to_grad_v(keys, next, tile);
      add_to_grad_k_and_q(keys, next, tile);
    });
  }

  void two_passes() {
    const int64_t kept = kept_steps(c);
    int64_t step = 0;
    for_keys_ahead(c, p, [&](const Keys& keys, const Keys& next) {
      const Tile tile = tile_of(std::min(step++, kept));
      weights(keys, tile);
      add_to_grad_v(keys, next, tile);
    });
    add_mean();
    step = 0;
    for_keys_ahead(c, p, [&](const Keys& keys, const Keys& next) {
      const Tile tile = tile_of(std::min(step, kept));
      if (step++ >= kept) weights(keys, tile);
      add_to_grad_k_and_q(keys, next, tile);
    });
  }

  Tile tile_of(int64_t step) const {
    char* tile = (char*)tiles + step * KEYS * NQ * (sizeof(float) + sizeof(Weight));
    return {(Weight*)(tile + KEYS * NQ * sizeof(float)), (float*)tile};
  }

  Ahead sums_of(float* sums, const Keys& keys) const {
    return {(const char*)(sums + keys.first * pitch), 4 * pitch, keys.count, 4 * pitch};
  }

  void weights(const Keys& keys, const Tile& tile) {
    const float factor = c.scale * LOG2_E;
    float *s = Arithmetic::scores(tile.weights, packed), *t = tile.t;
    const int depth = Arithmetic::depth(c.channels);
    const char* k_at = token(c, c.k, p.batch, p.kv_head, keys.first);
    const char* v_at = token(c, c.v, p.batch, p.kv_head, keys.first);
    const Rows k = Arithmetic::rows(c, k_at, c.k.token, keys.count, wide_k);
    gemm<Element, SCALED>(keys.count, NQ, depth, k, q, NQ, s, NQ, &factor, rows_of(c, c.v, p, keys));
    const Rows v = Arithmetic::rows(c, v_at, c.v.token, keys.count, wide_v);
    gemm<Element, SCALED>(keys.count, NQ, depth, v, g, NQ, t, NQ, &c.scale, sums_of(grad_v, keys));
    if (keys.crosses) hide_future<NQ>(s, p, keys, -INFINITY), hide_future<NQ>(t, p, keys, 0);
    if (p.queries < NQ) hide_padding<NQ>(s, p, keys, -INFINITY), hide_padding<NQ>(t, p, keys, 0);
    weigh<NQ, Arithmetic>(s, t, keys.count, base, tile.weights, total, product);
  }

  void add_to_grad_v(const Keys& keys, const Keys& next, const Tile& tile) {
    const Rows weights = {tile.weights, NQ * sizeof(Weight)};
    gemm<Element, ADDED>(keys.count, pitch, Arithmetic::depth(p.queries), weights, g_rows, pitch,
                         grad_v + keys.first * pitch, pitch, nullptr, rows_of(c, c.k, p, next));
  }

  // Adds scale * sum(grad_out * out) to delta, as the mean of scale * grad_out . v under the weights.
  void add_mean() {
    for (int lane = 0; lane < NQ; lane += W) {
      const Vec sum = load(total + lane), mean = load(product + lane) / sum;
      store(delta + lane, load(delta + lane) + select(sum, splat(0), splat(0), mean));
    }
  }

  void add_to_grad_k_and_q(const Keys& keys, const Keys& next, const Tile& tile) {
    const ByBoth grads = Arithmetic::template by_both<NQ>(keys.count, packed, [&](int k, int i) {
      return Arithmetic::load_weights(tile.weights + k * NQ + i) * (load(tile.t + k * NQ + i) - load(delta + i));
    });
    gemm<Element, ADDED>(keys.count, pitch, Arithmetic::depth(p.queries), grads.by_query, q_rows, pitch,
                         grad_k + keys.first * pitch, pitch, nullptr, rows_of(c, c.k, p, keys));
    const char* k_at = token(c, c.k, p.batch, p.kv_head, keys.first);
    const Rows k = Arithmetic::columns(c, k_at, c.k.token, keys.count, wide_k);
    gemm<Element, RESCALED>(c.channels, NQ, Arithmetic::depth(keys.count), k, grads.by_key, NQ, grad_q, NQ, ones,
                            sums_of(grad_k, next));
  }

  const Call& c;
  const Panel& p;
  float *grad_k, *grad_v;  // [key][padded channel] of the panel's key head
  const int pitch;
  float *q, *q_rows, *g, *g_rows, *grad_q, *wide_k, *wide_v, *packed, *tiles;
  float *base, *delta, *ones, *total, *product;  // of each query
};

}  // namespace sparseattn
