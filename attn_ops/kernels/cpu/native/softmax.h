// The softmax of scores in base 2, s[key][query]: step by step down the keys, queries in vector lanes.
#pragma once

#include "simd.h"

#include <algorithm>

namespace sparseattn {

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

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

// out[channel][query] divided by the weights' total; 0 where that is 0.
template <int NQ>
void divide_by_total(float* out, int channels, const float* total) {
  for (int lane = 0; lane < NQ; lane += W) {
    const Vec sum = load(total + lane), inverse = splat(1) / sum;
    for (int d = 0; d < channels; ++d) {
      float* at = out + d * NQ + lane;
      store(at, select(sum, splat(0), splat(0), load(at) * inverse));
    }
  }
}

INLINE float natural_lse(float largest, float total) {
  return total == 0 ? -INFINITY : largest * LN_2 + logf(total);
}

}  // namespace sparseattn
