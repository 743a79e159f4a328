// block_topk_attention: the selection of blocks/pooled.py and blocks/topk.py, then block-sparse attention.
//
// The scores come from the same operators of torch in the same order as in Python, so that they agree to the last bit
// and the same blocks are chosen.
#pragma once

#include "block_sparse_op.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace sparseattn {

// Mean of every block of tokens, (B, H, S, D) to (B, H, ceil(S / block), D) fp32.
inline Tensor block_mean(const Tensor& x, int64_t block) {
  const int64_t whole = x.size(2) / block, rest = x.size(2) % block;
  const auto mean = [](const Tensor& of, int64_t dim, bool keep) {
    return aten("aten::mean", "dim", of, std::optional(std::vector{dim}), keep, std::optional(ScalarType::Float))[0];
  };
  const Tensor blocks = torch::stable::reshape(part(x, 2, 0, whole * block),
                                               {x.size(0), x.size(1), whole, block, x.size(3)});
  const Tensor means = mean(blocks, 3, false);
  if (!rest) return means;
  Tensor all = torch::stable::new_empty(means, {x.size(0), x.size(1), whole + 1, x.size(3)});
  Tensor first = part(all, 2, 0, whole), last = part(all, 2, whole, 1);
  torch::stable::copy_(first, means);
  torch::stable::copy_(last, mean(part(x, 2, whole * block, rest), 2, true));
  return all;
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

// One row of scores: candidates are the blocks below `visible`; of them those from `own` on are always kept.
struct Row {
  const float* scores;
  int64_t blocks, visible, own;

  float rank(int64_t i) const {
    if (i >= visible) return -INFINITE;
    return i >= own || std::isnan(scores[i]) ? INFINITE : scores[i];
  }
};

// The blocks of the highest rank, of equals the lower ones, in ascending order; returns how many.
inline int32_t keep_best(const Row& row, double keep_ratio, float* ranked, int32_t* list) {
  const double rounded = std::floor(keep_ratio * (double)row.visible + 0.5);
  int64_t wanted = rounded >= 1 ? (int64_t)std::min(rounded, (double)row.blocks) : 1;
  wanted = std::max(wanted, std::max<int64_t>(row.visible - row.own, 0));
  for (int64_t i = 0; i < row.blocks; ++i) ranked[i] = row.rank(i);
  std::nth_element(ranked, ranked + wanted - 1, ranked + row.blocks, std::greater<float>());
  const float last = ranked[wanted - 1];
  const int64_t above = std::count_if(ranked, ranked + wanted, [&](float rank) { return rank > last; });
  int64_t ties = wanted - above;
  int32_t count = 0;
  for (int64_t i = 0; i < row.visible; ++i) {
    const float rank = row.rank(i);
    if (rank > last || (rank == last && ties-- > 0)) list[count++] = (int32_t)i;
  }
  std::fill(list + count, list + row.blocks, 0);
  return count;
}

// Ratios are rounded to six decimals: the fp32 number nearest to 0.9 is below it.
inline double decimal(float ratio) { return std::nearbyint((double)ratio * 1e6) / 1e6; }

// Index (B, Hq, nq, nk) and count (B, Hq, nq), int32.
inline std::tuple<Tensor, Tensor> choose_blocks(const Tensor& q, const Tensor& k,
                                                const std::function<double(int64_t)>& ratio_of_head, Blocks blocks,
                                                bool causal) {
  const Tensor scores = pooled_scores(q, k, blocks);
  const int64_t heads = q.size(1), nq = scores.size(2), nk = scores.size(3), seq_q = q.size(2);
  const Tensor index = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Int);
  const Tensor count = torch::stable::new_empty(scores, {q.size(0), heads, nq}, ScalarType::Int);
  const float* from = (const float*)scores.data_ptr();
  int32_t *lists = (int32_t*)index.data_ptr(), *counts = (int32_t*)count.data_ptr();
  torch::stable::parallel_for(0, q.size(0) * heads * nq, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> ranked(nk);
    for (int64_t at = begin; at < end; ++at) {
      Row row{from + at * nk, nk, nk, nk};
      if (causal) {
        const int64_t first = at % nq * blocks.q, last = std::min(first + blocks.q, seq_q) - 1;
        row.visible = std::min(nk, last / blocks.k + 1), row.own = first / blocks.k;
      }
      counts[at] = keep_best(row, ratio_of_head(at / nq % heads), ranked.data(), lists + at * nk);
    }
  });
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
  const float* ratios = keep_ratios ? (const float*)keep_ratios->data_ptr() : nullptr;
  const int64_t stride = keep_ratios && keep_ratios->dim() ? keep_ratios->stride(0) : 0;
  const auto ratio_of_head = [&](int64_t head) { return ratios ? decimal(ratios[head * stride]) : keep_ratio; };
  const Blocks blocks{block_q, block_k};
  const auto [index, count] = choose_blocks(q, k, ratio_of_head, blocks, causal);
  return attend(op, q, k, v, index, count, std::nullopt, blocks, causal, scale_of(scale, q));
}

}  // namespace sparseattn
