// Attention with INT8 scores to lists of blocks, or to all keys as one block. The frame is that of block_sparse.cpp.
//
// Weights times V: a bf16 V is multiplied in pairs where the CPU has that, with the weights rounded to bf16. Else V is
// FP16, widened, and the weights are fp32.

#include "gemm.h"
#include "integer_gemm.h"
#include "panels.h"
#include "quantized.h"
#include "softmax.h"

#include <memory>

namespace sparseattn {

namespace {

size_t scratch_of(const QuantizedCall& x) {
  return (2 * PANEL + KEYS) * padded(x.call.channels) + PANEL * x.pitch + 2 * KEYS * PANEL + 4 * PANEL;
}

// The panel's queries as words [channels of a word][query], and their scales times `factor`.
template <int NQ>
void load_queries(const QuantizedCall& x, const Panel& p, float factor, int32_t* words, float* scales, int32_t* rows) {
  const int64_t first = (p.batch * x.call.heads + p.head) * x.call.seq_q + p.first;
  const int64_t pitch = x.pitch / IntegerProducts::CHANNELS;
  IntegerProducts::widen_queries(rows, x.q + first * x.pitch, p.queries * x.pitch);
  std::fill(rows + p.queries * pitch, rows + NQ * pitch, 0);
  transpose((float*)words, NQ, (const float*)rows, pitch, NQ, (int)pitch);
  std::fill_n(scales, NQ, 0.f);
  for (int i = 0; i < p.queries; ++i) scales[i] = x.q_scales[first + i] * factor;
}

KeyRows key_rows(const QuantizedCall& x, const Panel& p, const Keys& keys, int32_t* buffer) {
  const int64_t first = (p.batch * x.call.kv_heads + p.kv_head) * x.call.seq_k + keys.first;
  const int32_t* words = IntegerProducts::keys(x.k + first * x.pitch, keys.count * x.pitch, buffer);
  return {words, x.pitch / IntegerProducts::CHANNELS, x.k_scales + first, x.k_sums + first};
}

const uint16_t* values_at(const Call& c, int64_t batch, int64_t head, int64_t at) {
  return (const uint16_t*)c.v.data + batch * c.v.batch + head * c.v.head + at * c.v.token;
}

// The two ways to multiply with V. `prepare` fills `space` floats, which `add` is given.

struct HalfValues {
  static size_t space(const Call&) { return 0; }
  static Status prepare(const Call&, float*) { return DONE; }

  // out[channel][query] = out * rescale + Vt weights
  template <int NQ>
  static void add(const Call& c, const Panel& p, const Keys& keys, float* weights, float*, float* wide, const float*,
                  const float* rescale, float* out) {
    const uint16_t* v = values_at(c, p.batch, p.kv_head, keys.first);
    const int pitch = padded(c.channels);
    for (int i = 0; i < keys.count; ++i) load_row(wide + i * pitch, v + i * c.v.token, c.channels, FLOAT16);
    gemm<Floats, RESCALED>(c.channels, NQ, keys.count, {wide, 4 * pitch}, weights, NQ, out, NQ, rescale);
  }
};

#ifdef __AVX512BF16__
// Pairs of neighbouring keys are put together once, block by block: (batch, kv_heads, blocks, pairs, padded channels).
struct PairedValues {
  static int64_t pairs(const Call& c) { return ceil_div(std::min(c.block_k, c.seq_k), 2); }
  static int64_t blocks(const Call& c) { return ceil_div(c.seq_k, c.block_k); }
  static size_t space(const Call& c) {
    return c.batch * c.kv_heads * blocks(c) * pairs(c) * padded(c.channels);
  }

  static void interleave_rows(const Call& c, const uint16_t* v, int64_t count, float* to) {
    const int pitch = padded(c.channels);
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t* row = v + i * c.v.token;
      interleave(to + i / 2 * pitch, row, i + 1 < count ? row + c.v.token : nullptr, c.channels);
    }
  }

  static Status prepare(const Call& c, float* to) {
    const int64_t steps = ceil_div(pairs(c), KEYS / 2), tasks = c.batch * c.kv_heads * blocks(c) * steps;
    const int threads = useful_threads(c.threads, tasks, 4. * space(c));
    return in_threads(threads, tasks, 0, [&](int64_t task, Scratch) {
      const int64_t block = task / steps % blocks(c), head = task / steps / blocks(c);
      const int64_t first = block * c.block_k + task % steps * KEYS;
      const int64_t end = std::min({first + KEYS, (block + 1) * c.block_k, c.seq_k});
      float* at = to + (task / steps * pairs(c) + task % steps * KEYS / 2) * padded(c.channels);
      interleave_rows(c, values_at(c, head / c.kv_heads, head % c.kv_heads, first), end - first, at);
    });
  }

  template <int NQ>
  static void add(const Call& c, const Panel& p, const Keys& keys, float* weights, float* packed, float* wide,
                  const float* prepared, const float* rescale, float* out) {
    const int pitch = padded(c.channels), count = keys.count;
    const int64_t block = keys.first / c.block_k, pair = (keys.first - block * c.block_k) / 2;
    const float* v = prepared + (((p.batch * c.kv_heads + p.kv_head) * blocks(c) + block) * pairs(c) + pair) * pitch;
    if (count % 2) {  // the last key's neighbour may be one that no query of the panel sees
      std::fill_n(weights + count * NQ, NQ, 0.f);
      interleave_rows(c, values_at(c, p.batch, p.kv_head, keys.first), count, wide);
      v = wide;
    }
    for (int i = 0; i < count; i += 2) pack_pairs(packed + i / 2 * NQ, weights + i * NQ, weights + (i + 1) * NQ, NQ);
    gemm<Pairs, RESCALED>(c.channels, NQ, (count + 1) / 2, {v, 4 * pitch}, packed, NQ, out, NQ, rescale);
  }
};
#endif

template <int NQ, class Values>
void forward_panel(const QuantizedCall& x, const Panel& p, const float* prepared, Scratch scratch) {
  const Call& c = x.call;
  const int channels = c.channels, pitch = padded(channels);
  int32_t* q = (int32_t*)scratch.take(NQ * x.pitch);
  float *rows = scratch.take(NQ * pitch), *out = scratch.take(NQ * pitch), *wide = scratch.take(KEYS * pitch);
  float *s = scratch.take(KEYS * NQ), *packed = scratch.take(KEYS * NQ), *scales = scratch.take(NQ);
  float *largest = scratch.take(NQ), *total = scratch.take(NQ), *rescale = scratch.take(NQ);
  load_queries<NQ>(x, p, c.scale * LOG2_E, q, scales, (int32_t*)rows);
  std::fill_n(out, NQ * pitch, 0.f);
  std::fill_n(largest, NQ, -INFINITY);
  std::fill_n(total, NQ, 0.f);
  for_keys(c, p, [&](const Keys& keys) {
    integer_scores<NQ>(keys.count, key_rows(x, p, keys, (int32_t*)wide), q, scales, s);
    if (keys.crosses) hide_future<NQ>(s, p, keys, -INFINITY);
    softmax_step<NQ>(s, keys.count, largest, total, rescale);
    Values::template add<NQ>(c, p, keys, s, packed, wide, prepared, rescale, out);
  });
  divide_by_total<NQ>(out, channels, total);
  transpose(rows, pitch, out, NQ, pitch, NQ);
  store_rows(c, c.out, p, rows);
  const int64_t first = (p.batch * c.heads + p.head) * c.seq_q + p.first;
  for (int i = 0; i < p.queries; ++i)
    c.lse[first + i] = natural_lse(largest[i], total[i]) + (x.lse_shift ? x.lse_shift[first + i] : 0);
}

template <class Values>
Status forward(const QuantizedCall& x) {
  const Call& c = x.call;
  const std::unique_ptr<float, decltype(&free)> prepared(take_floats(Values::space(c)), free);
  if (!prepared) return NO_MEMORY;
  if (const Status status = Values::prepare(c, prepared.get())) return status;
  const int64_t panels = panels_per_head(c);
  return parallel(c, c.batch * c.heads * panels, scratch_of(x), 2, [&](int64_t task, Scratch scratch) {
    const Panel p = panel_at(c, task / panels / c.heads, task / panels % c.heads, task % panels);
    with_width(p.queries, [&](auto width) { forward_panel<width.value, Values>(x, p, prepared.get(), scratch); });
  });
}

}  // namespace
}  // namespace sparseattn

using namespace sparseattn;

int sparseattn_quantized_forward(const QuantizedCall* call) {
#ifdef __AVX512BF16__
  if (call->v_dtype == BFLOAT16) return forward<PairedValues>(*call);
#endif
  return forward<HalfValues>(*call);
}

int sparseattn_multiplies_bf16() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

int sparseattn_has_vnni() { return IntegerProducts::CHANNELS == 4; }
