// Checks of the ops' arguments, one sentence per mistake: those of checks.py, and that the tensors are on the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sparseattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream all;
  (all << ... << parts);
  return all.str();
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string all;
  for (const int64_t size : sizes) all += (all.empty() ? "" : ", ") + std::to_string(size);
  return "(" + all + ")";
}

[[noreturn]] inline void refuse(const char* op, const char* argument, const std::string& must, const std::string& got) {
  throw std::invalid_argument(text(op, ": ", argument, " must ", must, ", got ", got, "."));
}

inline void check_at_least_one(const char* op, const char* argument, int64_t value) {
  if (value < 1) refuse(op, argument, "be at least 1", std::to_string(value));
}

inline void check_on_cpu(const char* op, const char* argument, const Tensor& x) {
  if (!x.is_cpu()) refuse(op, argument, "be on the CPU in this library", "another device");
}

inline void check_dtype(const char* op, const char* argument, const Tensor& x, ScalarType dtype, const char* name) {
  check_on_cpu(op, argument, x);
  if (x.scalar_type() != dtype) refuse(op, argument, text("be ", name), "another dtype");
}

inline void check_shape(const char* op, const char* argument, const Tensor& x, std::initializer_list<int64_t> shape,
                        const char* have = "have shape ") {
  bool same = x.dim() == (int64_t)shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(i) == shape.begin()[i];
  if (!same) refuse(op, argument, text(have, shape_text(shape)), shape_text(x.sizes()));
}

// q: (B, Hq, Sq, D) against k and v: (B, Hkv, Sk, D).
inline void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  const struct {
    const char* name;
    const Tensor& tensor;
  } given[] = {{"q", q}, {"k", k}, {"v", v}};
  for (const auto& [name, x] : given) {
    if (x.dim() != 4) refuse(op, name, "be 4-D, (batch, heads, tokens, head_dim)", shape_text(x.sizes()));
    const ScalarType dtype = x.scalar_type();
    const bool known = dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
    if (!known || dtype != q.scalar_type())
      refuse(op, name, "be float32 or float16 or bfloat16, the same for q, k and v", "another dtype");
    check_on_cpu(op, name, x);
    if (x.stride(3) != 1 && x.size(3) != 1) refuse(op, name, "have unit stride on head_dim", shape_text(x.strides()));
  }
  check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), k.size(3)}, "have k's shape ");
  const auto outer = {q.size(0), q.size(3)};
  if (k.size(0) != q.size(0) || k.size(3) != q.size(3))
    refuse(op, "k", text("have q's batch and head_dim ", shape_text(outer)), shape_text(k.sizes()));
  if (k.size(1) == 0 || q.size(1) % k.size(1) != 0)
    refuse(op, "k", text("have a number of heads that divides q's ", q.size(1)), std::to_string(k.size(1)));
}

// An exported graph names the provider that was chosen for it; only `here` is compiled into this library.
inline void check_provider(const char* op, const std::string& provider, const char* here) {
  if (provider != "auto" && provider != here)
    refuse(op, "provider", text("be \"", here, "\" or \"auto\" in the C++ library"), '"' + provider + '"');
}

// `scale`, or head_dim ** -0.5 if there is none.
inline double scale_of(std::optional<double> scale, const Tensor& q) {
  return scale ? *scale : 1 / std::sqrt((double)q.size(3));
}

}  // namespace sparseattn
