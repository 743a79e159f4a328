// The interface of what blocks are chosen with: plain C, for ctypes as for C++. Defined in blocks/topk.py.
#pragma once

#include "block_sparse.h"

namespace sparseattn {

struct BlockMean {
  Tokens x;
  const int32_t* sizes;  // (blocks,) how many tokens a block has, or null
  float* means;          // (batch, heads, blocks, channels)
  int64_t batch, heads, tokens, block;
  int32_t channels, dtype, threads;
};

struct TopK {
  const float* scores;     // (rows, n)
  const int64_t* keep;     // (rows,)
  const uint8_t* allowed;  // (rows, n), or null
  int32_t *index, *count;  // (rows, n), (rows,)
  int64_t rows, n;
  int32_t threads;
};

struct Mass {
  const float* weights;  // (rows, n)
  const int64_t* units;  // (rows,) of which a mass of 1 has UNITS_OF_MASS
  int64_t* count;        // (rows,)
  int64_t rows, n;
  int32_t threads;
};

constexpr float UNITS_OF_MASS = 1099511627776.f;  // 2 ** 40

}  // namespace sparseattn

// Each fills its results and returns a Status.
EXPORTED int sparseattn_block_mean(const sparseattn::BlockMean* call);
EXPORTED int sparseattn_top_k(const sparseattn::TopK* call);
EXPORTED int sparseattn_count_to_mass(const sparseattn::Mass* call);
