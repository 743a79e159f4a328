// Exact top-k, and how many of the largest weights hold a mass.
//
// Numbers are compared as integers in the same order. The k-th largest is found bit by bit, from the highest: a number
// so large that k are not below it.

#include "panels.h"
#include "selection.h"

#include <functional>

namespace sparseattn {

namespace {

typedef int32_t Ranks __attribute__((vector_size(4 * W)));

constexpr int32_t LOWEST = INT32_MIN;  // below that of -inf
constexpr double OPERATIONS = 100;     // for a number

int32_t rank(float x) {
  x = std::isnan(x) ? INFINITY : x + 0.f;  // 0 and -0 are equal
  int32_t bits;
  memcpy(&bits, &x, 4);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

// n a multiple of W.
int64_t count_from(const int32_t* ranks, int64_t n, int32_t low) {
  Ranks count = {};
  for (int64_t i = 0; i < n; i += W) {
    Ranks x;
    memcpy(&x, ranks + i, sizeof x);
    count -= x >= low;
  }
  int64_t sum = 0;
  for (int j = 0; j < W; ++j) sum += count[j];
  return sum;
}

int32_t kth_largest(const int32_t* ranks, int64_t n, int64_t k) {
  uint32_t found = (uint32_t)LOWEST;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1)
    if (count_from(ranks, n, (int32_t)(found + bit)) >= k) found += bit;
  return (int32_t)found;
}

int32_t keep_best(const TopK& c, int64_t row, int32_t* ranks) {
  const float* scores = c.scores + row * c.n;
  const uint8_t* allowed = c.allowed ? c.allowed + row * c.n : nullptr;
  const int64_t width = ceil_div(c.n, W) * W, k = std::min(std::max<int64_t>(c.keep[row], 1), c.n);
  const int32_t nothing = rank(-INFINITY);
  for (int64_t i = 0; i < c.n; ++i) ranks[i] = allowed && !allowed[i] ? nothing : rank(scores[i]);
  std::fill(ranks + c.n, ranks + width, LOWEST);
  const int32_t last = kth_largest(ranks, width, k);
  int64_t ties = k - (last == INT32_MAX ? 0 : count_from(ranks, width, last + 1));
  int32_t count = 0, *index = c.index + row * c.n;
  for (int64_t i = 0; i < c.n; ++i) {
    const bool tie = ranks[i] == last && (!allowed || allowed[i]);
    if (ranks[i] > last || (tie && ties-- > 0)) index[count++] = (int32_t)i;
  }
  std::fill(index + count, index + c.n, 0);
  return count;
}

int64_t holding(const Mass& c, int64_t row, float* sorted) {
  const float* weights = c.weights + row * c.n;
  for (int64_t i = 0; i < c.n; ++i) sorted[i] = std::isnan(weights[i]) ? 0 : weights[i];
  std::sort(sorted, sorted + c.n, std::greater<float>());
  int64_t held = 0, count = 0;
  for (; count < c.n && held < c.units[row]; ++count) {
    const int64_t units = (int64_t)(sorted[count] * UNITS_OF_MASS);
    if (units <= 0) break;
    held += units;
  }
  return count;
}

template <class Body>
Status for_rows(int64_t rows, int64_t n, int threads, Body body) {
  constexpr int64_t AT_ONCE = 16;
  const int64_t tasks = ceil_div(rows, AT_ONCE);
  threads = useful_threads(threads, tasks, OPERATIONS * rows * n);
  return in_threads(threads, tasks, ceil_div(n, W) * W, [&](int64_t task, Scratch scratch) {
    float* buffer = scratch.take(0);
    for (int64_t row = task * AT_ONCE; row < std::min((task + 1) * AT_ONCE, rows); ++row) body(row, buffer);
  });
}

}  // namespace
}  // namespace sparseattn

using namespace sparseattn;

int sparseattn_top_k(const TopK* call) {
  return for_rows(call->rows, call->n, call->threads, [&](int64_t row, float* buffer) {
    call->count[row] = keep_best(*call, row, (int32_t*)buffer);
  });
}

int sparseattn_count_to_mass(const Mass* call) {
  return for_rows(call->rows, call->n, call->threads,
                  [&](int64_t row, float* buffer) { call->count[row] = holding(*call, row, buffer); });
}
