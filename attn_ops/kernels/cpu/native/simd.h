// Vectors of the machine's width: arithmetic, exp2, and rows of numbers between dtypes and layouts.
// Nothing reads or writes past the end of a caller's row; scratch rows are padded to LANE_PAD floats.
#pragma once

#include "block_sparse.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace sparseattn {

#ifdef __AVX512F__
constexpr int W = 16;         // floats per vector
constexpr int MAX_STRIP = 4;  // vectors per strip of the matrix product: 6 x 4 accumulators of 32 registers
#else
constexpr int W = 8;
constexpr int MAX_STRIP = 2;  // 6 x 2 of 16 registers
#endif
constexpr int LANE_PAD = 16;

typedef float Vec __attribute__((vector_size(4 * W)));
#define INLINE inline __attribute__((always_inline))

INLINE int64_t size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE Vec load(const float* from) {
  Vec x;
  memcpy(&x, from, sizeof x);
  return x;
}
INLINE void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }
INLINE Vec splat(float x) { return Vec{} + x; }

#ifdef __AVX512F__
// The second operand where either is NaN.
INLINE Vec max(Vec x, Vec y) { return (Vec)_mm512_max_ps((__m512)x, (__m512)y); }
INLINE Vec select(Vec x, Vec equals, Vec then, Vec otherwise) {
  return (Vec)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)equals, _CMP_EQ_OQ), (__m512)otherwise,
                                   (__m512)then);
}
INLINE Vec lane_numbers() {
  return (Vec)_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE Vec round_nearest(Vec x) { return (Vec)_mm512_roundscale_ps((__m512)x, 8); }
INLINE Vec times_power_of_two(Vec x, Vec n) { return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n); }
INLINE Vec widen(const uint16_t* from, Dtype dtype) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)from);
  if (dtype == FLOAT16) return (Vec)_mm512_cvtph_ps(x);
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE void narrow_to_half(uint16_t* to, Vec x) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
// x[i][j] and x[j][i] change places, squares of `step` at a time.
INLINE void transpose_square(Vec* x) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
    // Lanes of the second operand have numbers from W.
    const __m512i evens = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(W - step));
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(step));
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & step) continue;
      const __m512 above = (__m512)x[i], below = (__m512)x[i + step];
      x[i] = (Vec)_mm512_permutex2var_ps(above, evens, below);
      x[i + step] = (Vec)_mm512_permutex2var_ps(above, odds, below);
    }
  }
}
#else
INLINE Vec max(Vec x, Vec y) { return (Vec)_mm256_max_ps((__m256)x, (__m256)y); }
INLINE Vec select(Vec x, Vec equals, Vec then, Vec otherwise) {
  return (Vec)_mm256_blendv_ps((__m256)otherwise, (__m256)then, _mm256_cmp_ps((__m256)x, (__m256)equals, _CMP_EQ_OQ));
}
INLINE Vec lane_numbers() { return (Vec)_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }
INLINE Vec round_nearest(Vec x) { return (Vec)_mm256_round_ps((__m256)x, 8); }
// n >= -126, else the result is 0.
INLINE Vec times_power_of_two(Vec x, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32((__m256)n), 23);
  const __m256 product = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256((__m256)x), exponent));
  return (Vec)_mm256_andnot_ps(_mm256_cmp_ps((__m256)n, _mm256_set1_ps(-126), _CMP_LT_OQ), product);
}
INLINE Vec widen(const uint16_t* from, Dtype dtype) {
  const __m128i x = _mm_loadu_si128((const __m128i*)from);
  if (dtype == FLOAT16) return (Vec)_mm256_cvtph_ps(x);
  return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
INLINE void narrow_to_half(uint16_t* to, Vec x) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE void transpose_square(Vec* x) {
#pragma GCC unroll 3
  for (int step = 1; step < W; step *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < W; ++i) {
      if (i & step) continue;
      const __m256 above = (__m256)x[i], below = (__m256)x[i + step];
      if (step == 1) {
        x[i] = (Vec)_mm256_blend_ps(above, _mm256_moveldup_ps(below), 0xaa);
        x[i + step] = (Vec)_mm256_blend_ps(_mm256_movehdup_ps(above), below, 0xaa);
      } else if (step == 2) {
        x[i] = (Vec)_mm256_shuffle_ps(above, below, 0x44);
        x[i + step] = (Vec)_mm256_shuffle_ps(above, below, 0xee);
      } else {
        x[i] = (Vec)_mm256_permute2f128_ps(above, below, 0x20);
        x[i + step] = (Vec)_mm256_permute2f128_ps(above, below, 0x31);
      }
    }
}
#endif

// 2 ** x for x < 127; exactly 0 for -inf, NaN for NaN. The polynomial on [-0.5, 0.5] is that of Cephes' exp2f.
INLINE Vec exp2(Vec x) {
  x = max(splat(-200), x);
  const Vec whole = round_nearest(x), part = x - whole;
  Vec sum = splat(1.535336188e-4f);
  sum = sum * part + splat(1.339887440e-3f);
  sum = sum * part + splat(9.618437357e-3f);
  sum = sum * part + splat(5.550332471e-2f);
  sum = sum * part + splat(2.402264791e-1f);
  sum = sum * part + splat(6.931472029e-1f);
  sum = sum * part + splat(1);
  return times_power_of_two(sum, whole);
}

INLINE void narrow_to_bfloat16(uint16_t* to, Vec x) {
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
  const Bits bits = (Bits)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector(x == x ? rounded : Bits{} + 0x7fc0, Halves);
  memcpy(to, &halves, sizeof halves);
}

INLINE void narrow(uint16_t* to, Vec x, Dtype dtype) {
  dtype == FLOAT16 ? narrow_to_half(to, x) : narrow_to_bfloat16(to, x);
}

// n numbers as fp32, and zeros up to the next multiple of LANE_PAD.
inline void load_row(float* to, const void* from, int n, Dtype dtype) {
  int i = 0;
  if (dtype == FLOAT32) {
    memcpy(to, from, 4 * (size_t)n);
    i = n;
  } else {
    const uint16_t* half = (const uint16_t*)from;
    for (; i + W <= n; i += W) store(to + i, widen(half + i, dtype));
    if (i < n) {
      uint16_t rest[W] = {};
      memcpy(rest, half + i, 2 * (size_t)(n - i));
      store(to + i, widen(rest, dtype));
      i = n;
    }
  }
  for (; i % LANE_PAD; ++i) to[i] = 0;
}

// The inverse, without the padding.
inline void store_row(void* to, const float* from, int n, Dtype dtype) {
  if (dtype == FLOAT32) {
    memcpy(to, from, 4 * (size_t)n);
    return;
  }
  uint16_t* half = (uint16_t*)to;
  int i = 0;
  for (; i + W <= n; i += W) narrow(half + i, load(from + i), dtype);
  if (i < n) {
    uint16_t rest[W];
    narrow(rest, load(from + i), dtype);  // scratch rows are padded
    memcpy(half + i, rest, 2 * (size_t)(n - i));
  }
}

// to[column][row] = from[row][column], in 4-byte words; rows a multiple of 16. Up to W - 1 words behind a row are read.
inline void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride, int rows, int columns) {
  for (int row = 0; row < rows; row += W)
    for (int column = 0; column < columns; column += W) {
      Vec square[W];
      for (int i = 0; i < W; ++i) square[i] = load(from + (row + i) * from_stride + column);
      transpose_square(square);
      for (int i = 0; i < std::min(W, columns - column); ++i) store(to + (column + i) * to_stride + row, square[i]);
    }
}

#ifdef __AVX512BF16__
// 0 and 16, 1 and 17, ..., as 16-bit numbers.
INLINE __m512i alternating() {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
}

// to[i] = (row0[i], row1[i]) as bf16 pairs, for i < n, and (0, 0) up to the next multiple of LANE_PAD.
INLINE void interleave(float* to, const uint16_t* row0, const uint16_t* row1, int n) {
  // The second operand has numbers from 32.
  const __m512i lower = _mm512_add_epi16(alternating(), _mm512_set1_epi32(16 << 16));
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int i = 0; i < n; i += 32) {
    const __mmask32 used = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(used, row0 + i);
    const __m512i y = row1 ? _mm512_maskz_loadu_epi16(used, row1 + i) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(x, lower, y));
    if (n - i > 16) _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(x, upper, y));
  }
}

// to[i] = (x[i], y[i]) rounded to bf16.
INLINE void pack_pairs(float* to, Vec x, Vec y) {
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(alternating(), (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x)));
}

// Likewise of rows of n numbers, a multiple of 16.
INLINE void pack_pairs(float* to, const float* row0, const float* row1, int n) {
  for (int i = 0; i < n; i += 16) pack_pairs(to + i, load(row0 + i), load(row1 + i));
}

// to[i] = x[i] rounded to bf16.
INLINE void pack_row(uint16_t* to, Vec x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// to[i] = row[i] >= 0 as two bf16 numbers that sum to it to 16 bits, neither of them 0 unless row[i] is, for what they
// multiply may be infinite; n a multiple of 16.
INLINE void split_row(float* to, const float* row, int n) {
  const __m512i one = _mm512_set1_epi32(1), high_half = _mm512_set1_epi32((int)0xffff0000);
  for (int i = 0; i < n; i += 16) {
    const __m512 x = _mm512_loadu_ps(row + i);
    const __m512i below = _mm512_sub_epi32(_mm512_max_epi32((__m512i)x, one), one);
    const __m512i high = _mm512_and_si512(below, high_half);
    const __m512i low = (__m512i)_mm512_sub_ps(x, (__m512)high);
    _mm512_storeu_si512(to + i, _mm512_or_si512(high, _mm512_srli_epi32(low, 16)));
  }
}
#endif

}  // namespace sparseattn
