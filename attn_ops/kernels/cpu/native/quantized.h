// The interface of attention with INT8 scores: plain C, for ctypes as for C++.
#pragma once

#include "block_sparse.h"

namespace sparseattn {

struct Rounding {  // of tokens to INT8; a group of tokens shares a scale, see `Groups` in numerics/quantize.py
  Tokens x;
  const float* mean;   // (batch, heads, channels) to take from every token, or null
  const float* along;  // (batch, along_heads, channels), or null
  int8_t* integers;    // (batch, heads, tokens, pitch), 0 after the channels
  float* scales;       // (batch, heads, tokens), as are the others
  int32_t* sums;       // of a token's integers, or null
  float* products;     // token . along, of the token as it is given; null without `along`
  int64_t batch, heads, along_heads, tokens, pitch, period, lanes, run;
  int32_t channels, dtype, threads;
};

struct QuantizedCall {
  Call call;  // without q and k; its dtype is that of out
  const int8_t *q, *k;
  const float *q_scales, *k_scales;
  const int32_t* k_sums;
  const float* lse_shift;  // (batch, heads, seq_q) to add to lse, or null
  int64_t pitch;
  int32_t v_dtype;  // FLOAT16, or BFLOAT16 where that is multiplied
};

}  // namespace sparseattn

// Fills what is not null. Returns a Status.
EXPORTED int sparseattn_round(const sparseattn::Rounding* rounding);
// Fills out and lse. Returns a Status.
EXPORTED int sparseattn_quantized_forward(const sparseattn::QuantizedCall* call);
// Whether a bf16 V is multiplied as it is; else it must be given in FP16.
EXPORTED int sparseattn_multiplies_bf16();
// Whether integers are multiplied as INT8, not widened first.
EXPORTED int sparseattn_has_vnni();
