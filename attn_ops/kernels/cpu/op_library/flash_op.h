// flash_attention as in kernels/cpu/flash.py: torch's own CPU kernel, and a causal sliding window in chunks of queries.
#pragma once

#include "tensors.h"

#include <algorithm>

namespace sparseattn {

inline Result torch_flash(const Tensor& q, const Tensor& k, const Tensor& v, bool causal,
                          const std::optional<Tensor>& mask, double scale) {
  const auto [out, lse] = aten<2>("aten::_scaled_dot_product_flash_attention_for_cpu", "", q, k, v, 0.0, causal, mask,
                                  std::optional(scale));
  return {out, lse};
}

// Additive, 0 where query start + i sees key first + j and -inf elsewhere, in q's dtype.
inline Tensor window_mask(const Tensor& q, int64_t start, int64_t rows, int64_t first, int64_t keys, int64_t window) {
  const Tensor mask = torch::stable::new_empty(q, {rows, keys}, ScalarType::Float);
  float* at = (float*)mask.data_ptr();
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t distance = start + i - (first + j);
      *at++ = distance >= 0 && distance < window ? 0 : -INFINITE;
    }
  return torch::stable::to(mask, q.scalar_type());
}

inline Result windowed(const Tensor& q, const Tensor& k, const Tensor& v, int64_t window, double scale) {
  const int64_t seq_q = q.size(2), seq_k = k.size(2);
  window = std::min(window, seq_q + seq_k);
  const int64_t size = std::min<int64_t>(std::max<int64_t>(window, 64), 512);
  auto [out, lse] = empty_result(q);
  for (int64_t start = 0; start < seq_q; start += size) {
    const int64_t stop = std::min(start + size, seq_q);
    const int64_t first = std::max<int64_t>(0, start - window + 1), last = std::min(stop, seq_k);
    if (first >= last) break;
    const Tensor mask = window_mask(q, start, stop - start, first, last - first, window);
    const auto [rows, rows_lse] = torch_flash(part(q, 2, start, stop - start), part(k, 2, first, last - first),
                                              part(v, 2, first, last - first), false, mask, scale);
    Tensor to = part(out, 2, start, stop - start), lse_to = part(lse, 2, start, stop - start);
    torch::stable::copy_(to, rows);
    torch::stable::copy_(lse_to, rows_lse);
  }
  const int64_t blind = seq_k + window - 1;  // the first query whose window lies behind the last key
  if (blind < seq_q) {
    Tensor rest = part(lse, 2, blind, seq_q - blind);
    torch::stable::fill_(rest, -INFINITE);
  }
  return {out, lse};
}

inline Result flash_attention(Tensor q, Tensor k, Tensor v, bool causal, std::optional<int64_t> window,
                              std::optional<double> scale, std::string provider) {
  const char* op = "flash_attention";
  check_qkv(op, q, k, v);
  if (window && *window < 1) refuse(op, "window", "be at least 1, or None", std::to_string(*window));
  if (window && !causal) refuse(op, "window", "come with causal=True", std::to_string(*window));
  check_provider(op, provider, "torch");
  if (q.numel() == 0 || k.numel() == 0) return empty_result(q);
  if (window) return windowed(q, k, v, *window, scale_of(scale, q));
  const auto [out, lse] = torch_flash(q, k, v, causal, std::nullopt, scale_of(scale, q));
  return {like_query(out, q), torch::stable::contiguous(lse)};
}

}  // namespace sparseattn
