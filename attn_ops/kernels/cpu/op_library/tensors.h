// What the ops do with tensors, through torch's stable interface.
#pragma once

#include "arguments.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>
#include <tuple>
#include <vector>

namespace sparseattn {

using Result = std::tuple<Tensor, Tensor>;  // out, lse

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Calls an operator of torch by its name, with the arguments in the order of its schema.
template <size_t RETURNS = 1, class... Arguments>
std::array<Tensor, RETURNS> aten(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, std::max(sizeof...(Arguments), RETURNS)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<Tensor, RETURNS>{torch::stable::detail::to<Tensor>(stack[I])...};
  }(std::make_index_sequence<RETURNS>());
}

// A part of a dimension, as a view.
inline Tensor part(Tensor x, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(x, dim, start, length);
}

// (B, Hq, Sq) fp32 for the logarithms.
inline Tensor empty_lse(const Tensor& q) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
}

// The result of attending to no key.
inline Result empty_result(const Tensor& q) {
  Tensor out = torch::stable::empty_like(q), lse = empty_lse(q);
  torch::stable::zero_(out);
  torch::stable::fill_(lse, -INFINITE);
  return {out, lse};
}

// `out` in the layout of empty_like(q): itself if it has it already, else a copy.
inline Tensor like_query(const Tensor& out, const Tensor& q) {
  Tensor target = torch::stable::empty_like(q);
  bool same = true;
  for (int64_t i = 0; i < q.dim(); ++i) same &= out.stride(i) == target.stride(i);
  return same ? out : torch::stable::copy_(target, out);
}

}  // namespace sparseattn
