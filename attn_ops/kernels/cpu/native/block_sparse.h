// The interface of the block-sparse kernel: plain C, for ctypes as for C++.
#pragma once

#include <cstdint>

namespace sparseattn {

struct Tokens {  // (batch, heads, tokens, channels), unit stride on channels, the others in elements
  char* data;
  int64_t batch, head, token;
};

struct Lists {  // strides in elements, 0 along what is shared
  const int32_t* data;
  int64_t batch, head, row;
};

struct Call {
  Tokens q, k, v, out, grad_out, grad_q;
  float* lse;              // (batch, heads, seq_q)
  const float* grad_lse;   // likewise, or null
  float *grad_k, *grad_v;  // (splits, batch, kv_heads, seq_k, padded channels), zero
  Lists index, count;
  const int32_t* key_sizes;  // or null
  int64_t batch, heads, kv_heads, seq_q, seq_k, block_q, block_k, width, splits;
  int32_t channels, dtype, causal, threads;
  float scale;
};

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

enum Status { DONE = 0, BAD_LISTS = 1, NO_MEMORY = 2 };

}  // namespace sparseattn

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Fills out and lse. Returns a Status.
EXPORTED int sparseattn_forward(const sparseattn::Call* call);
// Fills grad_q and adds to grad_k and grad_v. Returns a Status.
EXPORTED int sparseattn_backward(const sparseattn::Call* call);
