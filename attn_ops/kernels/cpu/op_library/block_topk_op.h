// block_topk_attention: the selection of blocks/pooled.py and blocks/topk.py, then block-sparse attention.
//
// Means and lists come from the kernels that Python uses too, the scores from the same operator of torch, so that they
// agree to the last bit and the same blocks are chosen.
#pragma once

#include "../native/selection.h"

#include "block_sparse_op.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace sparseattn {

inline void check_memory(int status) {
  if (status != DONE) throw std::runtime_error("block_topk_attention: no memory for the buffers of its threads.");
}

// Mean of every block of tokens, (B, H, S, D) to (B, H, ceil(S / block), D) fp32.
inline Tensor block_mean(const Tensor& given, int64_t block) {
  const Tensor x = unit_stride(given);
  const int64_t blocks = ceil_div(x.size(2), block);
  const Tensor means = torch::stable::new_empty(x, {x.size(0), x.size(1), blocks, x.size(3)}, ScalarType::Float);
  BlockMean call{tokens_of(x), nullptr, (float*)means.data_ptr(), x.size(0), x.size(1), x.size(2), block};
  call.channels = (int32_t)x.size(3), call.dtype = dtype_of(x);
  call.threads = (int32_t)torch::stable::get_num_threads();
  check_memory(sparseattn_block_mean(&call));
  return means;
}

// mean(q block) . mean(k block), (B, Hq, nq, nk) fp32, contiguous.
inline Tensor pooled_scores(const Tensor& q, const Tensor& k, Blocks blocks) {
  const Tensor mean_q = block_mean(q, blocks.q), mean_k = block_mean(k, blocks.k);
  const int64_t batch = k.size(0), kv_heads = k.size(1), nq = mean_q.size(2), nk = mean_k.size(2), dim = k.size(3);
  const Tensor grouped = torch::stable::reshape(mean_q, {batch, kv_heads, q.size(1) / kv_heads, nq, dim});
  const Tensor keys = torch::stable::transpose(torch::stable::unsqueeze(mean_k, 2), -2, -1);
  const Tensor scores = torch::stable::matmul(grouped, keys);
  return torch::stable::contiguous(torch::stable::reshape(scores, {batch, q.size(1), nq, nk}));
}

// Ratios are rounded to six decimals: the fp32 number nearest to 0.9 is below it.
inline double decimal(float ratio) { return std::nearbyint((double)ratio * 1e6) / 1e6; }

// Index (B, Hq, nq, nk) and count (B, Hq, nq), int32. With `causal`, candidates are the blocks not wholly in the future,
// and those that hold a row's own tokens are always kept.
inline std::tuple<Tensor, Tensor> choose_blocks(const Tensor& q, const Tensor& k,
                                                const std::function<double(int64_t)>& ratio_of_head, Blocks blocks,
                                                bool causal) {
  const Tensor scores = pooled_scores(q, k, blocks);
  const int64_t heads = q.size(1), nq = scores.size(2), nk = scores.size(3), rows = q.size(0) * heads * nq;
  const Tensor index = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Int);
  const Tensor count = torch::stable::new_empty(scores, {q.size(0), heads, nq}, ScalarType::Int);
  std::vector<int64_t> keep(rows);
  std::vector<uint8_t> allowed(causal ? rows * nk : 0);
  float* score = (float*)scores.data_ptr();
  for (int64_t row = 0; row < rows; ++row) {
    int64_t visible = nk, own = nk;  // candidates are the blocks below `visible`, its own are those from `own` on
    if (causal) {
      const int64_t first = row % nq * blocks.q, last = std::min(first + blocks.q, q.size(2)) - 1;
      visible = std::min(nk, last / blocks.k + 1), own = first / blocks.k;
      std::fill_n(allowed.begin() + row * nk, visible, 1);
      std::fill(score + row * nk + std::min(own, visible), score + row * nk + visible, INFINITE);
    }
    const double wanted = std::floor(ratio_of_head(row / nq % heads) * (double)visible + 0.5);
    keep[row] = std::max((int64_t)wanted, visible - own);
  }
  const int32_t threads = (int32_t)torch::stable::get_num_threads();
  const TopK call{(const float*)scores.data_ptr(), keep.data(), causal ? allowed.data() : nullptr,
                  (int32_t*)index.data_ptr(), (int32_t*)count.data_ptr(), rows, nk, threads};
  check_memory(sparseattn_top_k(&call));
  return {index, count};
}

inline Result block_topk_attention(Tensor q, Tensor k, Tensor v, double keep_ratio, int64_t block_q, int64_t block_k,
                                   std::optional<Tensor> keep_ratios, bool causal, std::optional<double> scale,
                                   std::string provider) {
  const char* op = "block_topk_attention";
  check_qkv(op, q, k, v);
  if (!(keep_ratio >= 0 && keep_ratio <= 1)) refuse(op, "keep_ratio", "be in 0 ... 1", text(keep_ratio));
  check_at_least_one(op, "block_q", block_q);
  check_at_least_one(op, "block_k", block_k);
  if (keep_ratios) {
    check_dtype(op, "keep_ratios", *keep_ratios, ScalarType::Float, "float32, whatever q is");
    if (keep_ratios->dim() != 0) check_shape(op, "keep_ratios", *keep_ratios, {q.size(1)});
  }
  check_provider(op, provider, "cpu");
  if (q.numel() == 0 || k.numel() == 0) return empty_result(q);
  check_cpu(op);
  const float* ratios = keep_ratios ? (const float*)keep_ratios->data_ptr() : nullptr;
  const int64_t stride = keep_ratios && keep_ratios->dim() ? keep_ratios->stride(0) : 0;
  const auto ratio_of_head = [&](int64_t head) { return ratios ? decimal(ratios[head * stride]) : keep_ratio; };
  const Blocks blocks{block_q, block_k};
  const auto [index, count] = choose_blocks(q, k, ratio_of_head, blocks, causal);
  return attend(op, q, k, v, index, count, std::nullopt, blocks, causal, scale_of(scale, q));
}

}  // namespace sparseattn
