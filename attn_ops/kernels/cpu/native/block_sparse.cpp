// Block-sparse attention and its gradients, without torch headers.
//
// Queries lie in vector lanes, in panels of up to 64: scores are S[key][query] = K Qt, the softmax runs down the keys
// without a horizontal step, and O[channel][query] = Vt P. K and V are read in place, whatever their strides, nothing is
// gathered, and a short block is only fewer rows. Products of bf16 tensors go in pairs where the CPU has that, but for
// weights times V, which are fp32; other halves are widened tile by tile.

#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

namespace sparseattn {

namespace {

constexpr int PANEL = 64;  // queries
constexpr int KEYS = 64;   // keys of one step
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr double WORK_PER_THREAD = 4e6;  // floating-point operations that pay for waking one more thread

struct Panel {
  int64_t batch, head, kv_head, row, first;  // row: which block of queries; first: its first query
  int queries;
};

struct Keys {
  int64_t first;
  int count;
  bool crosses;  // some query of the panel does not see all of them
};

INLINE int padded(int n) { return (n + LANE_PAD - 1) / LANE_PAD * LANE_PAD; }
INLINE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

INLINE const char* token(const Call& c, const Tokens& x, int64_t batch, int64_t head, int64_t at) {
  return x.data + (batch * x.batch + head * x.head + at * x.token) * size_of((Dtype)c.dtype);
}

// Hands out the buffers of one thread.
struct Scratch {
  float* next;
  float* take(size_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  }
};

// Calls body(Keys) for the keys that a panel sees, in steps of at most KEYS.
template <class Body>
INLINE void for_keys(const Call& c, const Panel& p, Body body) {
  const int32_t* list = c.index.data + p.batch * c.index.batch + p.head * c.index.head + p.row * c.index.row;
  const int32_t count = c.count.data[p.batch * c.count.batch + p.head * c.count.head + p.row * c.count.row];
  for (int32_t i = 0; i < count; ++i) {
    const int64_t start = list[i] * c.block_k;
    int64_t end = std::min(start + c.block_k, c.seq_k);
    if (c.key_sizes) end = std::min(end, start + c.key_sizes[list[i]]);
    if (c.causal) end = std::min(end, p.first + p.queries);
    for (int64_t first = start; first < end; first += KEYS) {
      const int keys = (int)std::min<int64_t>(KEYS, end - first);
      body(Keys{first, keys, c.causal && first + keys - 1 > p.first});
    }
  }
}

// Where a query does not see a key: s[key][query] = value. Padding lanes see every key.
template <int NQ>
INLINE void hide_future(float* s, const Panel& p, const Keys& keys, float value) {
  for (int k = 0; k < keys.count; ++k) {
    const int ahead = (int)std::min<int64_t>(std::max<int64_t>(keys.first + k - p.first, 0), NQ);
    for (int i = 0; i < ahead; ++i) s[k * NQ + i] = value;
  }
}

// Likewise in the lanes without a query.
template <int NQ>
INLINE void hide_padding(float* s, const Panel& p, const Keys& keys, float value) {
  for (int k = 0; k < keys.count; ++k) std::fill(s + k * NQ + p.queries, s + (k + 1) * NQ, value);
}

// One step of the softmax over s[key][query], scores in base 2: s becomes the weights relative to the new maximum.
template <int NQ>
void softmax_step(float* s, int keys, float* largest, float* total, float* rescale) {
  constexpr int GROUP = std::min(NQ / W, 4);
  for (int lane = 0; lane < NQ; lane += GROUP * W) {
    Vec most[GROUP], sum[GROUP];
    for (int j = 0; j < GROUP; ++j) most[j] = load(largest + lane + W * j);
    for (int k = 0; k < keys; ++k)
      for (int j = 0; j < GROUP; ++j) most[j] = max(most[j], load(s + k * NQ + lane + W * j));
    for (int j = 0; j < GROUP; ++j) {
      float* before = largest + lane + W * j;
      // No key so far: -inf - 0 instead of -inf - -inf.
      const Vec base = select(most[j], splat(-INFINITY), splat(0), most[j]);
      store(rescale + lane + W * j, exp2(load(before) - base));
      store(before, most[j]);
      most[j] = base;
      sum[j] = splat(0);
    }
    for (int k = 0; k < keys; ++k)
      for (int j = 0; j < GROUP; ++j) {
        float* at = s + k * NQ + lane + W * j;
        const Vec weight = exp2(load(at) - most[j]);
        sum[j] += weight;
        store(at, weight);
      }
    for (int j = 0; j < GROUP; ++j) {
      float* at = total + lane + W * j;
      store(at, load(at) * load(rescale + lane + W * j) + sum[j]);
    }
  }
}

// `count` rows as fp32, and rows of zeros up to `rows`.
void load_rows(const Call& c, float* to, const char* from, int64_t stride, int count, int rows) {
  const int pitch = padded(c.channels);
  for (int i = 0; i < count; ++i)
    load_row(to + i * pitch, from + i * stride * size_of((Dtype)c.dtype), c.channels, (Dtype)c.dtype);
  if (count < rows) memset(to + count * pitch, 0, 4 * (size_t)(rows - count) * pitch);
}

// The panel's queries of `to`, from rows of fp32.
void store_rows(const Call& c, const Tokens& to, const Panel& p, const float* from) {
  for (int i = 0; i < p.queries; ++i)
    store_row((char*)token(c, to, p.batch, p.head, p.first + i), from + i * padded(c.channels), c.channels,
              (Dtype)c.dtype);
}

// The two arithmetics: how K, V, Q and the weights become operands of `gemm`.

struct InFloats {
  typedef Floats Element;
  static int depth(int n) { return n; }

  // Rows as the operand A, [row][channel] or, transposed, [row = depth][channel].
  static Rows rows(const Call& c, const char* from, int64_t stride, int count, float* buffer) {
    if (c.dtype == FLOAT32) return {from, 4 * stride};
    load_rows(c, buffer, from, stride, count, count);
    return {buffer, 4 * padded(c.channels)};
  }
  static Rows columns(const Call& c, const char* from, int64_t stride, int count, float* buffer) {
    return rows(c, from, stride, count, buffer);
  }
  // Queries as the operands B: [channel][query] and, with `by_query`, [query][channel].
  template <int NQ>
  static void queries(const Call& c, const char* from, int64_t stride, int count, float* by_channel, float* by_query) {
    load_rows(c, by_query, from, stride, count, NQ);
    transpose(by_channel, NQ, by_query, padded(c.channels), NQ, c.channels);
  }
  // s[key][query] as the operand B with depth over keys, and as the operand A.
  template <int NQ>
  static const float* over_keys(float* s, int, float*) {
    return s;
  }
  template <int NQ>
  static Rows over_queries(const float* s, int, float*) {
    return {s, 4 * NQ};
  }
};

#ifdef __AVX512BF16__
struct InPairs {
  typedef Pairs Element;
  static int depth(int n) { return (n + 1) / 2; }

  static Rows rows(const Call&, const char* from, int64_t stride, int, float*) { return {from, 2 * stride}; }
  static Rows columns(const Call& c, const char* from, int64_t stride, int count, float* buffer) {
    const uint16_t* row = (const uint16_t*)from;
    const int pitch = padded(c.channels);
    for (int i = 0; i < count; i += 2) {
      const uint16_t* next = i + 1 < count ? row + (i + 1) * stride : nullptr;
      interleave(buffer + i / 2 * pitch, row + i * stride, next, c.channels);
    }
    return {buffer, 4 * pitch};
  }
  template <int NQ>
  static void queries(const Call& c, const char* from, int64_t stride, int count, float* by_channel, float* by_query) {
    const int words = c.channels / 2;
    for (int i = 0; i < count; ++i) memcpy(by_query + i * words, from + 2 * i * stride, 4 * (size_t)words);
    memset(by_query + count * words, 0, 4 * (size_t)(NQ - count) * words);
    transpose(by_channel, NQ, by_query, words, NQ, words);
    columns(c, from, stride, count, by_query);
  }
  template <int NQ>
  static const float* over_keys(float* s, int keys, float* buffer) {
    if (keys % 2) memset(s + keys * NQ, 0, 4 * NQ);
    for (int k = 0; k < keys; k += 2) pack_pairs(buffer + k / 2 * NQ, s + k * NQ, s + (k + 1) * NQ, NQ);
    return buffer;
  }
  template <int NQ>
  static Rows over_queries(const float* s, int keys, float* buffer) {
    for (int k = 0; k < keys; ++k) pack_row(buffer + k * NQ / 2, s + k * NQ, NQ);
    return {buffer, 2 * NQ};
  }
};
#endif

size_t forward_scratch(const Call& c) { return (3 * PANEL + KEYS) * padded(c.channels) + (KEYS + 3) * PANEL; }

template <int NQ, class Arithmetic>
void forward_panel(const Call& c, const Panel& p, Scratch scratch) {
  typedef typename Arithmetic::Element Element;
  const int channels = c.channels, pitch = padded(channels);
  float *q = scratch.take(NQ * pitch), *rows = scratch.take(NQ * pitch), *out = scratch.take(NQ * pitch);
  float *wide = scratch.take(KEYS * pitch), *s = scratch.take(KEYS * NQ);
  float *largest = scratch.take(NQ), *total = scratch.take(NQ), *rescale = scratch.take(NQ);
  Arithmetic::template queries<NQ>(c, token(c, c.q, p.batch, p.head, p.first), c.q.token, p.queries, q, rows);
  std::fill_n(out, NQ * pitch, 0.f);
  std::fill_n(largest, NQ, -INFINITY);
  std::fill_n(total, NQ, 0.f);
  const float factor = c.scale * LOG2_E;
  for_keys(c, p, [&](const Keys& keys) {
    const char* k_at = token(c, c.k, p.batch, p.kv_head, keys.first);
    const char* v_at = token(c, c.v, p.batch, p.kv_head, keys.first);
    const Rows k = Arithmetic::rows(c, k_at, c.k.token, keys.count, wide);
    gemm<Element, SCALED>(keys.count, NQ, Arithmetic::depth(channels), k, q, NQ, s, NQ, &factor);
    if (keys.crosses) hide_future<NQ>(s, p, keys, -INFINITY);
    softmax_step<NQ>(s, keys.count, largest, total, rescale);
    // Weights rounded to pairs of bf16 would add more error than the output has: this product is fp32 always.
    const Rows v = InFloats::columns(c, v_at, c.v.token, keys.count, wide);
    gemm<Floats, RESCALED>(channels, NQ, keys.count, v, s, NQ, out, NQ, rescale);
  });
  for (int lane = 0; lane < NQ; lane += W) {
    const Vec sum = load(total + lane), inverse = splat(1) / sum;
    for (int d = 0; d < channels; ++d) {
      float* at = out + d * NQ + lane;
      store(at, select(sum, splat(0), splat(0), load(at) * inverse));
    }
  }
  transpose(rows, pitch, out, NQ, pitch, NQ);
  store_rows(c, c.out, p, rows);
  float* lse = c.lse + (p.batch * c.heads + p.head) * c.seq_q + p.first;
  for (int i = 0; i < p.queries; ++i) lse[i] = total[i] == 0 ? -INFINITY : largest[i] * LN_2 + logf(total[i]);
}

size_t backward_scratch(const Call& c) { return (5 * PANEL + 2 * KEYS) * padded(c.channels) + (4 * KEYS + 5) * PANEL; }

// sum(grad_out * out) of a query, both fp32.
float product_with_out(const Call& c, const Panel& p, int64_t at, float* buffer) {
  const int pitch = padded(c.channels);
  load_row(buffer, token(c, c.out, p.batch, p.head, at), c.channels, FLOAT32);
  load_row(buffer + pitch, token(c, c.grad_out, p.batch, p.head, at), c.channels, FLOAT32);
  Vec sum = splat(0);
  for (int d = 0; d < pitch; d += W) sum += load(buffer + d) * load(buffer + pitch + d);
  float dot = 0;
  for (int j = 0; j < W; ++j) dot += sum[j];
  return dot;
}

// base: the lse in base 2, infinite where there is no query or it sees no key, so that every weight is 0 there.
// delta: scale * (sum(grad_out * out) - grad_lse), without the sum for halves: out is rounded there.
void softmax_terms(const Call& c, const Panel& p, int lanes, float* base, float* delta, float* buffer) {
  const int64_t first = (p.batch * c.heads + p.head) * c.seq_q + p.first;
  std::fill_n(base, lanes, INFINITY);
  std::fill_n(delta, lanes, 0.f);
  for (int i = 0; i < p.queries; ++i) {
    float dot = c.dtype == FLOAT32 ? product_with_out(c, p, p.first + i, buffer) : 0;
    if (c.grad_lse) dot -= c.grad_lse[first + i];
    delta[i] = dot * c.scale;
    if (c.lse[first + i] != -INFINITY) base[i] = c.lse[first + i] * LOG2_E;
  }
}

// Adds the weights of s[key][query] to `total`, and their products with t to `product`.
template <int NQ>
void add_weighted(const float* s, const float* t, int keys, const float* base, float* total, float* product) {
  for (int lane = 0; lane < NQ; lane += W) {
    const Vec low = load(base + lane);
    Vec sum = load(total + lane), dot = load(product + lane);
    for (int k = 0; k < keys; ++k) {
      const Vec weight = exp2(load(s + k * NQ + lane) - low);
      sum += weight;
      dot += weight * load(t + k * NQ + lane);
    }
    store(total + lane, sum);
    store(product + lane, dot);
  }
}

// Adds scale * sum(grad_out * out) to delta, as the mean of scale * grad_out . v under the weights.
template <int NQ>
void add_mean(const float* total, const float* product, float* delta) {
  for (int lane = 0; lane < NQ; lane += W) {
    const Vec sum = load(total + lane), mean = load(product + lane) / sum;
    store(delta + lane, load(delta + lane) + select(sum, splat(0), splat(0), mean));
  }
}

// s[key][query], scores in base 2, becomes the weights; t, scale * grad_out . v, becomes scale * the scores' gradient.
template <int NQ>
void softmax_gradient(float* s, float* t, int keys, const float* base, const float* delta) {
  for (int lane = 0; lane < NQ; lane += W) {
    const Vec low = load(base + lane), less = load(delta + lane);
    for (int k = 0; k < keys; ++k) {
      const Vec weight = exp2(load(s + k * NQ + lane) - low);
      store(s + k * NQ + lane, weight);
      store(t + k * NQ + lane, weight * (load(t + k * NQ + lane) - less));
    }
  }
}

// grad_k, grad_v: [key][padded channel] of the panel's key head.
template <int NQ, class Arithmetic>
void backward_panel(const Call& c, const Panel& p, float* grad_k, float* grad_v, Scratch scratch) {
  typedef typename Arithmetic::Element Element;
  const int channels = c.channels, pitch = padded(channels);
  float *q = scratch.take(NQ * pitch), *q_rows = scratch.take(NQ * pitch);
  float *g = scratch.take(NQ * pitch), *g_rows = scratch.take(NQ * pitch), *grad_q = scratch.take(NQ * pitch);
  float *wide_k = scratch.take(KEYS * pitch), *wide_v = scratch.take(KEYS * pitch);
  float *s = scratch.take(KEYS * NQ), *t = scratch.take(KEYS * NQ), *packed = scratch.take(KEYS * NQ);
  float *base = scratch.take(NQ), *delta = scratch.take(NQ), *ones = scratch.take(NQ);
  float *total = scratch.take(NQ), *product = scratch.take(NQ);
  softmax_terms(c, p, NQ, base, delta, q_rows);
  const char* grad_out = token(c, c.grad_out, p.batch, p.head, p.first);
  Arithmetic::template queries<NQ>(c, token(c, c.q, p.batch, p.head, p.first), c.q.token, p.queries, q, q_rows);
  Arithmetic::template queries<NQ>(c, grad_out, c.grad_out.token, p.queries, g, g_rows);
  std::fill_n(grad_q, NQ * pitch, 0.f);
  std::fill_n(ones, NQ, 1.f);
  const float factor = c.scale * LOG2_E;
  const int depth = Arithmetic::depth(channels), query_depth = Arithmetic::depth(p.queries);
  // s = the scores in base 2, t = scale * grad_out . v
  const auto products = [&](const Keys& keys) {
    const char* k_at = token(c, c.k, p.batch, p.kv_head, keys.first);
    const char* v_at = token(c, c.v, p.batch, p.kv_head, keys.first);
    const Rows k = Arithmetic::rows(c, k_at, c.k.token, keys.count, wide_k);
    const Rows v = Arithmetic::rows(c, v_at, c.v.token, keys.count, wide_v);
    gemm<Element, SCALED>(keys.count, NQ, depth, k, q, NQ, s, NQ, &factor);
    gemm<Element, SCALED>(keys.count, NQ, depth, v, g, NQ, t, NQ, &c.scale);
    if (keys.crosses) hide_future<NQ>(s, p, keys, -INFINITY), hide_future<NQ>(t, p, keys, 0);
    if (p.queries < NQ) hide_padding<NQ>(s, p, keys, -INFINITY), hide_padding<NQ>(t, p, keys, 0);
  };
  if (c.dtype != FLOAT32) {
    // Where the softmax is sharp, t - delta nearly cancels: the rounding of out to a half would be 0.7% of grad_q.
    std::fill_n(total, NQ, 0.f);
    std::fill_n(product, NQ, 0.f);
    for_keys(c, p, [&](const Keys& keys) {
      products(keys);
      add_weighted<NQ>(s, t, keys.count, base, total, product);
    });
    add_mean<NQ>(total, product, delta);
  }
  for_keys(c, p, [&](const Keys& keys) {
    products(keys);
    softmax_gradient<NQ>(s, t, keys.count, base, delta);
    const Rows weights = Arithmetic::template over_queries<NQ>(s, keys.count, packed);
    float *grad_v_at = grad_v + keys.first * pitch, *grad_k_at = grad_k + keys.first * pitch;
    gemm<Element, ADDED>(keys.count, pitch, query_depth, weights, g_rows, pitch, grad_v_at, pitch, nullptr);
    const Rows grads = Arithmetic::template over_queries<NQ>(t, keys.count, packed);
    gemm<Element, ADDED>(keys.count, pitch, query_depth, grads, q_rows, pitch, grad_k_at, pitch, nullptr);
    const float* grad_scores = Arithmetic::template over_keys<NQ>(t, keys.count, packed);
    const char* k_at = token(c, c.k, p.batch, p.kv_head, keys.first);
    const Rows k_columns = Arithmetic::columns(c, k_at, c.k.token, keys.count, wide_k);
    const int key_depth = Arithmetic::depth(keys.count);
    gemm<Element, RESCALED>(channels, NQ, key_depth, k_columns, grad_scores, NQ, grad_q, NQ, ones);
  });
  transpose(q_rows, pitch, grad_q, NQ, pitch, NQ);
  store_rows(c, c.grad_q, p, q_rows);
}

int64_t panels_per_head(const Call& c) {
  return ceil_div(c.seq_q, c.block_q) * ceil_div(std::min(c.block_q, c.seq_q), PANEL);
}

// Panel `number` of a head; no queries if the last block of queries ends before it.
Panel panel_at(const Call& c, int64_t batch, int64_t head, int64_t number) {
  const int64_t per_row = ceil_div(std::min(c.block_q, c.seq_q), PANEL), row = number / per_row;
  const int64_t first = row * c.block_q + number % per_row * PANEL;
  const int64_t end = std::min({first + PANEL, (row + 1) * c.block_q, c.seq_q});
  return {batch, head, head / (c.heads / c.kv_heads), row, first, (int)std::max<int64_t>(end - first, 0)};
}

// Calls body with the narrowest width that holds the queries, as a type.
template <class Body>
void with_width(int queries, Body body) {
  if (queries <= 0) return;
  if (queries <= 16) return body(std::integral_constant<int, 16>());
  if (queries <= 32) return body(std::integral_constant<int, 32>());
  body(std::integral_constant<int, PANEL>());
}

// Calls body with the arithmetic that suits the call, as a value of its type. A pair needs an even number of channels.
template <class Body>
void with_arithmetic([[maybe_unused]] const Call& c, Body body) {
#ifdef __AVX512BF16__
  if (c.dtype == BFLOAT16 && c.channels % 2 == 0) return body(InPairs());
#endif
  body(InFloats());
}

// Listed blocks over all heads, or -1 if a count or a number is out of range.
int64_t listed_blocks(const Call& c) {
  const int64_t blocks = ceil_div(c.seq_k, c.block_k);
  int64_t listed = 0;
  for (int64_t batch = 0; batch < c.batch; ++batch)
    for (int64_t head = 0; head < c.heads; ++head)
      for (int64_t row = 0; row < ceil_div(c.seq_q, c.block_q); ++row) {
        const int32_t count = c.count.data[batch * c.count.batch + head * c.count.head + row * c.count.row];
        const int32_t* list = c.index.data + batch * c.index.batch + head * c.index.head + row * c.index.row;
        if (count < 0 || count > c.width) return -1;
        for (int32_t i = 0; i < count; ++i)
          if (list[i] < 0 || list[i] >= blocks) return -1;
        listed += count;
      }
  return listed;
}

// Runs body(task, Scratch) for every task. `products` is how many matrix products a listed block costs.
template <class Body>
Status parallel(const Call& c, int64_t tasks, size_t scratch, int products, Body body) {
  const int64_t listed = listed_blocks(c);
  if (listed < 0) return BAD_LISTS;
  const double work = 2. * products * listed * c.channels * std::min(c.block_q, c.seq_q) * std::min(c.block_k, c.seq_k);
  const int threads = (int)std::min({(double)c.threads, (double)tasks, 1 + work / WORK_PER_THREAD});
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    float* buffers = (float*)aligned_alloc(64, (4 * scratch + 63) / 64 * 64);
    failed = buffers == nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      if (buffers) body(task, Scratch{buffers});
    free(buffers);
  }
  return failed ? NO_MEMORY : DONE;
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
          backward_panel<width.value, decltype(arithmetic)>(c, p, c.grad_k + task * size, c.grad_v + task * size,
                                                            scratch);
        });
      });
    }
  });
}
