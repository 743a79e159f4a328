// The two arithmetics: how K, V, Q and the weights become operands of `gemm`, as floats or as pairs of bf16 numbers.
#pragma once

#include "gemm.h"
#include "panels.h"

namespace sparseattn {

// `count` rows as fp32, and rows of zeros up to `rows`.
inline void load_rows(const Call& c, float* to, const char* from, int64_t stride, int count, int rows) {
  const int pitch = padded(c.channels);
  for (int i = 0; i < count; ++i)
    load_row(to + i * pitch, from + i * stride * size_of((Dtype)c.dtype), c.channels, (Dtype)c.dtype);
  if (count < rows) memset(to + count * pitch, 0, 4 * (size_t)(rows - count) * pitch);
}

// Rows of K or V, to be fetched.
INLINE Ahead rows_of(const Call& c, const Tokens& x, const Panel& p, const Keys& keys) {
  const int64_t size = size_of((Dtype)c.dtype);
  return {token(c, x, p.batch, p.kv_head, keys.first), x.token * size, keys.count, (int)(c.channels * size)};
}

struct Operands {
  Rows a;
  const float* b;
  int depth;
};

struct ByBoth {
  Rows by_query;        // the operand A, with depth over queries
  const float* by_key;  // the operand B, with depth over keys
};

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
  // V transposed and weights[key][query] >= 0, with depth over keys.
  template <int NQ>
  static Operands weighted_values(const Call& c, const char* v, const float* weights, int keys, float* wide, float*) {
    return {columns(c, v, c.v.token, keys, wide), weights, keys};
  }
  // A weight as the backward keeps it: [key][query] of them are the operand A, with depth over queries.
  typedef float Weight;
  static INLINE void store_weights(Weight* to, Vec weights) { store(to, weights); }
  static INLINE Vec load_weights(const Weight* from) { return load(from); }
  // Where the scores are that become these weights: in place, or in a buffer.
  static float* scores(Weight* weights, float*) { return weights; }
  // value(key, query), of W queries, as the operand A with depth over queries, and as the operand B with depth over keys.
  template <int NQ, class Value>
  static ByBoth by_both(int keys, float* buffer, Value value) {
    for (int k = 0; k < keys; ++k)
      for (int i = 0; i < NQ; i += W) store(buffer + k * NQ + i, value(k, i));
    return {{buffer, 4 * NQ}, buffer};
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
  // Weights rounded to bf16 would add 1.6e-3 to the relative error of 1.4e-3 that the rounding of out is. So 3 of 8
  // keys have weights of twice the digits, in a pair of their own: always the same ones, for which keys weigh most
  // depends on the query, and what is in one lane must not change another.
  template <int NQ>
  static Operands weighted_values(const Call& c, const char* v, float* weights, int keys, float* wide, float* packed) {
    const uint16_t* row = (const uint16_t*)v;
    const int precise = (keys * 3 + 7) / 8, pitch = padded(c.channels);
    int pairs = 0;
    for (; pairs < precise; ++pairs, row += c.v.token) {
      interleave(wide + pairs * pitch, row, row, c.channels);
      split_row(packed + pairs * NQ, weights + pairs * NQ, NQ);
    }
    columns(c, (const char*)row, c.v.token, keys - precise, wide + pairs * pitch);
    over_keys<NQ>(weights + precise * NQ, keys - precise, packed + pairs * NQ);
    return {{wide, 4 * pitch}, packed, pairs + depth(keys - precise)};
  }
  template <int NQ>
  static void over_keys(float* s, int keys, float* to) {
    if (keys % 2) memset(s + keys * NQ, 0, 4 * NQ);
    for (int k = 0; k < keys; k += 2) pack_pairs(to + k / 2 * NQ, s + k * NQ, s + (k + 1) * NQ, NQ);
  }
  typedef uint16_t Weight;
  static INLINE void store_weights(Weight* to, Vec weights) { pack_row(to, weights); }
  static INLINE Vec load_weights(const Weight* from) { return widen(from, BFLOAT16); }
  static float* scores(Weight*, float* buffer) { return buffer; }
  template <int NQ, class Value>
  static ByBoth by_both(int keys, float* buffer, Value value) {
    float* pairs = buffer + KEYS * NQ / 2;
    uint16_t* rows = (uint16_t*)buffer;
    for (int k = 0; k < keys; k += 2)
      for (int i = 0; i < NQ; i += W) {
        const Vec x = value(k, i), y = k + 1 < keys ? value(k + 1, i) : splat(0);
        pack_row(rows + k * NQ + i, x);
        pack_row(rows + (k + 1) * NQ + i, y);
        pack_pairs(pairs + k / 2 * NQ + i, x, y);
      }
    return {{rows, 2 * NQ}, pairs};
  }
};
#endif

// Calls body with the arithmetic that suits the call, as a value of its type. A pair needs an even number of channels.
template <class Body>
void with_arithmetic([[maybe_unused]] const Call& c, Body body) {
#ifdef __AVX512BF16__
  if (c.dtype == BFLOAT16 && c.channels % 2 == 0) return body(InPairs());
#endif
  body(InFloats());
}

}  // namespace sparseattn
