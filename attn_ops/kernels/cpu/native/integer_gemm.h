// Scores of INT8 keys and queries: s[key][query] = key_scale * lane_scale * (integers of K times those of Q).
// Exact, by the widest products that the CPU has. Queries lie in vector lanes; an operand's word holds the integers of
// some neighbouring channels.
#pragma once

#include "simd.h"

namespace sparseattn {

typedef int32_t Ints __attribute__((vector_size(4 * W)));

#ifdef __AVX512F__
INLINE Vec to_floats(Ints x) { return (Vec)_mm512_cvtepi32_ps((__m512i)x); }
#else
INLINE Vec to_floats(Ints x) { return (Vec)_mm256_cvtepi32_ps((__m256i)x); }
#endif

#ifdef __AVX512VNNI__
// Four channels in a word, q + 128 unsigned: the product is 128 * sum(k) too large.
struct IntegerProducts {
  static constexpr int CHANNELS = 4, EXCESS = 128;
  // As an instruction, not as an intrinsic: around that, GCC 12 copies every sum there and back.
  static INLINE void add(Ints& sum, Ints q, Ints k) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(q), "v"(k)); }
  static void widen_queries(int32_t* to, const int8_t* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) ((uint8_t*)to)[i] = (uint8_t)from[i] ^ 0x80;
  }
  // Rows of words: in place.
  static const int32_t* keys(const int8_t* from, int64_t, int32_t*) { return (const int32_t*)from; }
};
#else
// Two channels in a word, as 16-bit numbers: a pair's product with another has 32 bits.
struct IntegerProducts {
  static constexpr int CHANNELS = 2, EXCESS = 0;
  static INLINE void add(Ints& sum, Ints q, Ints k) {
#ifdef __AVX512F__
    sum += (Ints)_mm512_madd_epi16((__m512i)q, (__m512i)k);
#else
    sum += (Ints)_mm256_madd_epi16((__m256i)q, (__m256i)k);
#endif
  }
  static void widen_queries(int32_t* to, const int8_t* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) ((int16_t*)to)[i] = from[i];
  }
  static const int32_t* keys(const int8_t* from, int64_t n, int32_t* buffer) {
    widen_queries(buffer, from, n);
    return buffer;
  }
};
#endif

struct KeyRows {
  const int32_t* words;
  int64_t stride;  // in words, and as many are multiplied
  const float* scales;
  const int32_t* sums;
};

template <int ROWS, int STRIP>
void score_tile(KeyRows k, const int32_t* q, int lanes, const float* lane_scales, float* s) {
  Ints sum[ROWS][STRIP];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < STRIP; ++j) sum[r][j] = Ints{} - IntegerProducts::EXCESS * k.sums[r];
  }
  for (int64_t d = 0; d < k.stride; ++d) {
    Ints x[STRIP];
#pragma GCC unroll 4
    for (int j = 0; j < STRIP; ++j) memcpy(&x[j], q + d * lanes + W * j, sizeof(Ints));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Ints y = Ints{} + k.words[r * k.stride + d];
#pragma GCC unroll 4
      for (int j = 0; j < STRIP; ++j) IntegerProducts::add(sum[r][j], x[j], y);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < STRIP; ++j)
      store(s + r * lanes + W * j, to_floats(sum[r][j]) * splat(k.scales[r]) * load(lane_scales + W * j));
  }
}

// s: [keys][NQ], q: [words][NQ].
template <int NQ>
void integer_scores(int keys, KeyRows k, const int32_t* q, const float* lane_scales, float* s) {
  constexpr int STRIP = NQ / W < MAX_STRIP ? NQ / W : MAX_STRIP, ROWS = 4 * MAX_STRIP / STRIP;
  for (int n = 0; n < NQ; n += STRIP * W) {
    const auto rows = [&](int at) {
      return KeyRows{k.words + at * k.stride, k.stride, k.scales + at, k.sums + at};
    };
    int r = 0;
    for (; r + ROWS <= keys; r += ROWS)
      score_tile<ROWS, STRIP>(rows(r), q + n, NQ, lane_scales + n, s + r * NQ + n);
    for (; r < keys; ++r) score_tile<1, STRIP>(rows(r), q + n, NQ, lane_scales + n, s + r * NQ + n);
  }
}

}  // namespace sparseattn
