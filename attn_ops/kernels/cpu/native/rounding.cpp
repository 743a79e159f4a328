// Tokens rounded to INT8, with the integers and scales of numerics/quantize.py, bit for bit.
//
// Largest magnitudes are compared as the integers that their bits are: a NaN is the largest then, and reaches the scale.

#include "panels.h"
#include "quantized.h"

namespace sparseattn {

namespace {

constexpr int64_t TOKENS = 128;  // of a task, or one period if that is longer
constexpr float LEAST_AMAX = 1e-30f, LARGEST = 127;

typedef int32_t Bits __attribute__((vector_size(4 * W)));

INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

INLINE float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE void store_int8(int8_t* to, Vec x) {
  x = select(x, x, x, splat(0));  // a NaN is in the scale
#ifdef __AVX512F__
  _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)x)));
#else
  const __m256i words = _mm256_cvtps_epi32((__m256)x);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(halves, halves));
#endif
}

float sum_of(Vec x) {
  float sum = 0;
  for (int j = 0; j < W; ++j) sum += x[j];
  return sum;
}

// A head's share of the tensors.
struct Head {
  const Rounding& r;
  const char* x;
  int64_t token;  // its first one, in scales, sums and products
  const float *mean, *along;  // padded rows, or null

  // The token minus the mean, padded with zeros.
  void load(float* to, int64_t at) const {
    load_row(to, x + at * r.x.token * size_of((Dtype)r.dtype), r.channels, (Dtype)r.dtype);
    if (along) r.products[token + at] = product(to);
    if (mean)
      for (int d = 0; d < r.pitch; d += W) store(to + d, sparseattn::load(to + d) - sparseattn::load(mean + d));
  }
  float product(const float* row) const {
    Vec sum = splat(0);
    for (int d = 0; d < r.pitch; d += W) sum += sparseattn::load(row + d) * sparseattn::load(along + d);
    return sum_of(sum);
  }
};

int32_t amax_bits(const float* row, int64_t n) {
  Bits most = {};
  for (int64_t d = 0; d < n; d += W) {
    Bits x;
    memcpy(&x, row + d, sizeof x);
    x &= 0x7fffffff;
    most = x > most ? x : most;
  }
  return *std::max_element((int32_t*)&most, (int32_t*)&most + W);
}

void round_token(const Head& head, int64_t at, float scale, const float* row) {
  const int64_t number = head.token + at, pitch = head.r.pitch;
  Vec sum = splat(0);
  for (int64_t d = 0; d < pitch; d += W) {
    const Vec rounded = round_nearest(load(row + d) / splat(scale));
    store_int8(head.r.integers + number * pitch + d, rounded);
    sum += rounded;
  }
  head.r.scales[number] = scale;
  if (head.r.sums) head.r.sums[number] = scale - scale == 0 ? (int32_t)sum_of(sum) : 0;
}

// The tokens first ... end of one period.
void round_period(const Head& head, int64_t first, int64_t end, float* row, int32_t* amax) {
  const Rounding& r = head.r;
  const auto group = [&](int64_t at) { return (at - first) % (r.lanes * r.run) / r.run; };
  std::fill_n(amax, r.lanes, bits_of(LEAST_AMAX));
  for (int64_t at = first; at < end; ++at) {
    head.load(row, at);
    amax[group(at)] = std::max(amax[group(at)], amax_bits(row, r.pitch));
  }
  for (int64_t at = first; at < end; ++at) {
    head.load(row, at);
    round_token(head, at, float_of(amax[group(at)]) / LARGEST, row);
  }
}

}  // namespace
}  // namespace sparseattn

using namespace sparseattn;

int sparseattn_round(const Rounding* rounding) {
  const Rounding& r = *rounding;
  const int64_t span = ceil_div(std::max(TOKENS, r.period), r.period) * r.period, spans = ceil_div(r.tokens, span);
  const int64_t tasks = r.batch * r.heads * spans;
  const double work = 10. * r.batch * r.heads * r.tokens * r.channels;
  const size_t scratch = 3 * r.pitch + r.lanes;
  return in_threads(useful_threads(r.threads, tasks, work), tasks, scratch, [&](int64_t task, Scratch scratch) {
    const int64_t number = task / spans, batch = number / r.heads, head = number % r.heads;
    float *row = scratch.take(r.pitch), *mean = scratch.take(r.pitch), *along = scratch.take(r.pitch);
    if (r.mean) load_row(mean, r.mean + number * r.channels, r.channels, FLOAT32);
    const int64_t along_number = batch * r.along_heads + head / (r.heads / std::max<int64_t>(r.along_heads, 1));
    if (r.along) load_row(along, r.along + along_number * r.channels, r.channels, FLOAT32);
    const char* x = r.x.data + (batch * r.x.batch + head * r.x.head) * size_of((Dtype)r.dtype);
    const Head here{r, x, number * r.tokens, r.mean ? mean : nullptr, r.along ? along : nullptr};
    const int64_t end = std::min((task % spans + 1) * span, r.tokens);
    for (int64_t first = task % spans * span; first < end; first += r.period)
      round_period(here, first, std::min(first + r.period, end), row, (int32_t*)scratch.take(0));
  });
}
