// Products of small matrices whose columns lie in vector lanes: C[rows][lanes] from A[rows][depth] and B[depth][lanes].
// A is read in place, one number at a time into all lanes; B and C are scratch. Elements are 4 bytes: a float, or two
// bf16 numbers of two neighbouring depths, whose products are summed in fp32.
#pragma once

#include "simd.h"

#include <algorithm>

namespace sparseattn {

struct Rows {  // the operand A; stride in bytes
  const void* data;
  int64_t stride;
};

enum Update {
  SCALED,    // C = factor[0] * A B
  ADDED,     // C = C + A B
  RESCALED,  // C = C * factor[lane] + A B, with A given as its transpose, [depth][rows]
};

struct Floats {
  typedef Vec Operand;
  static INLINE Operand lanes(const float* from) { return load(from); }
  static INLINE Operand all(const char* from) {
    float x;
    memcpy(&x, from, 4);
    return splat(x);
  }
  static INLINE Vec add_product(Vec sum, Operand x, Operand y) { return sum + x * y; }
};

#ifdef __AVX512BF16__
struct Pairs {
  typedef __m512bh Operand;
  static INLINE Operand lanes(const float* from) { return (__m512bh)_mm512_loadu_ps(from); }
  static INLINE Operand all(const char* from) {
    int32_t x;
    memcpy(&x, from, 4);
    return (__m512bh)_mm512_set1_epi32(x);
  }
  static INLINE Vec add_product(Vec sum, Operand x, Operand y) { return (Vec)_mm512_dpbf16_ps((__m512)sum, x, y); }
};
#endif

// Rows that a later product reads: a few are fetched into the L2 cache with every tile, while the arithmetic is busy.
struct Ahead {
  const char* next;
  int64_t stride;  // bytes
  int rows, bytes;

  INLINE void fetch_some() {
    const int some = std::min(rows, 8);
    for (int i = 0; i < some; ++i, next += stride)
      for (int at = 0; at < bytes; at += 64) __builtin_prefetch(next + at, 0, 2);
    rows -= some;
  }
};

template <class Element, Update UPDATE, int ROWS, int STRIP>
void tile(int depth, const char* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride,
          const float* factor) {
  Vec sum[ROWS][STRIP] = {};
  for (int k = 0; k < depth; ++k) {
    typename Element::Operand lanes[STRIP];
#pragma GCC unroll 4
    for (int j = 0; j < STRIP; ++j) lanes[j] = Element::lanes(b + k * b_stride + W * j);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; ++r) {
      const auto x = Element::all(UPDATE == RESCALED ? a + k * a_stride + 4 * r : a + r * a_stride + 4 * k);
#pragma GCC unroll 4
      for (int j = 0; j < STRIP; ++j) sum[r][j] = Element::add_product(sum[r][j], x, lanes[j]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < STRIP; ++j) {
      float* at = c + r * c_stride + W * j;
      Vec x = sum[r][j];
      if (UPDATE == SCALED) x = x * splat(*factor);
      if (UPDATE == ADDED) x = load(at) + x;
      if (UPDATE == RESCALED) x = load(at) * load(factor + W * j) + x;
      store(at, x);
    }
  }
}

template <class Element, Update UPDATE, int STRIP>
void strip(int rows, int depth, const char* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
           int64_t c_stride, const float* factor, Ahead& ahead) {
  constexpr int MANY = MAX_STRIP == 4 ? (STRIP == 4 ? 6 : 12) : 6, SOME = MANY / 3;
  const int64_t step = UPDATE == RESCALED ? 4 : a_stride;
  int r = 0;
  for (; r + MANY <= rows; r += MANY) {
    ahead.fetch_some();
    tile<Element, UPDATE, MANY, STRIP>(depth, a + r * step, a_stride, b, b_stride, c + r * c_stride, c_stride, factor);
  }
  for (; r + SOME <= rows; r += SOME)
    tile<Element, UPDATE, SOME, STRIP>(depth, a + r * step, a_stride, b, b_stride, c + r * c_stride, c_stride, factor);
  for (; r < rows; ++r)
    tile<Element, UPDATE, 1, STRIP>(depth, a + r * step, a_stride, b, b_stride, c + r * c_stride, c_stride, factor);
}

// C: [rows][lanes], lanes a multiple of LANE_PAD; the strides of B and C are in words.
template <class Element, Update UPDATE>
void gemm(int rows, int lanes, int depth, Rows a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
          const float* factor, Ahead ahead = {}) {
  const char* bytes = (const char*)a.data;
  const int64_t a_stride = a.stride;
  const int per_lane = UPDATE == RESCALED;
  int n = 0;
  if constexpr (MAX_STRIP == 4)
    for (; n + 4 * W <= lanes; n += 4 * W)
      strip<Element, UPDATE, 4>(rows, depth, bytes, a_stride, b + n, b_stride, c + n, c_stride, factor + n * per_lane,
                                ahead);
  for (; n + 2 * W <= lanes; n += 2 * W)
    strip<Element, UPDATE, 2>(rows, depth, bytes, a_stride, b + n, b_stride, c + n, c_stride, factor + n * per_lane,
                              ahead);
  if constexpr (W == LANE_PAD)
    for (; n < lanes; n += W)
      strip<Element, UPDATE, 1>(rows, depth, bytes, a_stride, b + n, b_stride, c + n, c_stride, factor + n * per_lane,
                                ahead);
}

}  // namespace sparseattn
