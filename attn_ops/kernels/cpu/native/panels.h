// How a call is cut up: panels of queries, which are the tasks of threads, and the keys that each of them sees in steps.
#pragma once

#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

namespace sparseattn {

constexpr int PANEL = 64;  // queries
constexpr int KEYS = 64;   // keys of one step
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

// Likewise calls body(Keys, Keys) with the next step's keys too, none of them behind the last.
template <class Body>
INLINE void for_keys_ahead(const Call& c, const Panel& p, Body body) {
  Keys keys{0, 0, false};
  for_keys(c, p, [&](const Keys& next) {
    if (keys.count) body(keys, next);
    keys = next;
  });
  if (keys.count) body(keys, Keys{0, 0, false});
}

// Where a query does not see a key: s[key][query] = value. Padding lanes see every key.
template <int NQ>
INLINE void hide_future(float* s, const Panel& p, const Keys& keys, float value) {
  for (int k = 0; k < keys.count; ++k) {
    const int ahead = (int)std::min<int64_t>(std::max<int64_t>(keys.first + k - p.first, 0), NQ);
    for (int i = 0; i < ahead; ++i) s[k * NQ + i] = value;
  }
}

// The panel's queries of `to`, from rows of fp32.
inline void store_rows(const Call& c, const Tokens& to, const Panel& p, const float* from) {
  for (int i = 0; i < p.queries; ++i)
    store_row((char*)token(c, to, p.batch, p.head, p.first + i), from + i * padded(c.channels), c.channels,
              (Dtype)c.dtype);
}

inline int64_t panels_per_head(const Call& c) {
  return ceil_div(c.seq_q, c.block_q) * ceil_div(std::min(c.block_q, c.seq_q), PANEL);
}

// Panel `number` of a head; no queries if the last block of queries ends before it.
inline Panel panel_at(const Call& c, int64_t batch, int64_t head, int64_t number) {
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

// Listed blocks over all heads, or -1 if a count or a number is out of range.
inline int64_t listed_blocks(const Call& c) {
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

// As many floats on a cache line of their own, for `free`; null if there is no memory, but not if there are none.
inline float* take_floats(size_t floats) { return (float*)aligned_alloc(64, (4 * floats + 64) / 64 * 64); }

// Runs body(task, Scratch) for every task; a thread has `scratch` floats.
template <class Body>
Status in_threads(int threads, int64_t tasks, size_t scratch, Body body) {
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    float* buffers = take_floats(scratch);
    failed = buffers == nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task)
      if (buffers) body(task, Scratch{buffers});
    free(buffers);
  }
  return failed ? NO_MEMORY : DONE;
}

// As many of the threads as there are tasks and work for; `work` in floating-point operations.
inline int useful_threads(int threads, int64_t tasks, double work) {
  return (int)std::max(1., std::min({(double)threads, (double)tasks, 1 + work / WORK_PER_THREAD}));
}

// `in_threads` for tasks on the listed blocks. `products` is how many matrix products a listed block costs.
template <class Body>
Status parallel(const Call& c, int64_t tasks, size_t scratch, int products, Body body) {
  const int64_t listed = listed_blocks(c);
  if (listed < 0) return BAD_LISTS;
  const double work = 2. * products * listed * c.channels * std::min(c.block_q, c.seq_q) * std::min(c.block_k, c.seq_k);
  return in_threads(useful_threads(c.threads, tasks, work), tasks, scratch, body);
}

}  // namespace sparseattn
