// block_sparse_attention on the kernel that Python uses too: backends/block_sparse.py says what everything means.
#pragma once

#include "../native/block_sparse.h"

#include "tensors.h"

namespace sparseattn {

// What the kernel in this library was compiled for; calling it on another CPU would end the process.
inline void check_cpu(const char* op) {
  const std::string built = INSTRUCTION_SET;
  bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (built != "avx2")
    runs = runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (built == "avx512_vnni" || built == "avx512_bf16") runs = runs && __builtin_cpu_supports("avx512vnni");
  if (built == "avx512_bf16") runs = runs && __builtin_cpu_supports("avx512bf16");
  if (!runs)
    throw std::runtime_error(text(op, ": this library was built for ", built,
                                  ", which this CPU does not have. Build it with instruction_set=\"avx2\"."));
}

inline Tokens tokens_of(const Tensor& x) {
  return {(char*)x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// (B or 1, Hq or 1, rows, ...): what has one batch or head is shared by all.
inline Lists lists_of(const Tensor& x) {
  return {(const int32_t*)x.data_ptr(), x.size(0) > 1 ? x.stride(0) : 0, x.size(1) > 1 ? x.stride(1) : 0, x.stride(2)};
}

inline Dtype dtype_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return FLOAT32;
  return x.scalar_type() == ScalarType::BFloat16 ? BFLOAT16 : FLOAT16;
}

inline Tensor unit_stride(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

struct Blocks {
  int64_t q, k;  // tokens of a block of queries and of keys
  int64_t queries(const Tensor& x) const { return ceil_div(x.size(2), q); }
  int64_t keys(const Tensor& x) const { return ceil_div(x.size(2), k); }
};

// Attention to the listed blocks, all arguments checked.
inline Result attend(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& block_index,
                     const Tensor& block_count, const std::optional<Tensor>& key_sizes, Blocks blocks, bool causal,
                     double scale) {
  if (q.numel() == 0 || k.numel() == 0 || block_index.numel() == 0) return empty_result(q);
  check_cpu(op);
  const Tensor index = unit_stride(block_index);
  const auto sizes = key_sizes ? std::optional(torch::stable::contiguous(*key_sizes)) : std::nullopt;
  Tensor out = torch::stable::empty_like(q), lse = empty_lse(q);
  if (out.stride(3) != 1) out = torch::stable::new_empty(q, q.sizes());
  Call call{};
  call.q = tokens_of(q), call.k = tokens_of(k), call.v = tokens_of(v), call.out = tokens_of(out);
  call.lse = (float*)lse.data_ptr();
  call.index = lists_of(index), call.count = lists_of(block_count);
  call.key_sizes = sizes ? (const int32_t*)sizes->data_ptr() : nullptr;
  call.batch = q.size(0), call.heads = q.size(1), call.kv_heads = k.size(1);
  call.seq_q = q.size(2), call.seq_k = k.size(2);
  call.block_q = blocks.q, call.block_k = blocks.k, call.width = index.size(3);
  call.channels = (int32_t)q.size(3), call.dtype = dtype_of(q), call.causal = causal;
  call.threads = (int32_t)torch::stable::get_num_threads(), call.scale = (float)scale;
  const int status = sparseattn_forward(&call);
  if (status == BAD_LISTS)
    refuse(op, "block_index",
           text("number the ", blocks.keys(k), " key blocks from 0, and block_count be at most ", call.width),
           "other values");
  if (status != DONE) throw std::runtime_error(text(op, ": no memory for the buffers of its threads."));
  return {like_query(out, q), lse};
}

inline Result block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_index, Tensor block_count,
                                     std::optional<Tensor> key_sizes, int64_t block_q, int64_t block_k, bool causal,
                                     std::optional<double> scale, std::string provider) {
  const char* op = "block_sparse_attention";
  check_qkv(op, q, k, v);
  check_at_least_one(op, "block_q", block_q);
  check_at_least_one(op, "block_k", block_k);
  const Blocks blocks{block_q, block_k};
  check_dtype(op, "block_index", block_index, ScalarType::Int, "int32");
  check_dtype(op, "block_count", block_count, ScalarType::Int, "int32");
  const int64_t rows = blocks.queries(q);
  if (block_index.dim() != 4 || block_index.size(2) != rows)
    refuse(op, "block_index", text("be 4-D, (batch or 1, heads or 1, ", rows, " query blocks, width)"),
           shape_text(block_index.sizes()));
  for (const int dim : {0, 1})
    if (block_index.size(dim) != 1 && block_index.size(dim) != q.size(dim))
      refuse(op, "block_index", text("have ", dim ? "heads" : "batch", " 1 or q's ", q.size(dim)),
             shape_text(block_index.sizes()));
  check_shape(op, "block_count", block_count, {block_index.size(0), block_index.size(1), rows});
  if (key_sizes) {
    check_dtype(op, "key_sizes", *key_sizes, ScalarType::Int, "int32");
    check_shape(op, "key_sizes", *key_sizes, {blocks.keys(k)});
  }
  check_provider(op, provider, "cpu");
  return attend(op, q, k, v, block_index, block_count, key_sizes, blocks, causal, scale_of(scale, q));
}

}  // namespace sparseattn
