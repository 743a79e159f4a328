// A library that registers ops of sparseattn with torch's dispatcher when it is loaded: CPU, inference, no Python.
//
// Through torch's stable interface only, so that one build runs with every torch from TORCH_TARGET_VERSION on. The
// schemas are those of Python, word for word.

#include "block_topk_op.h"
#include "flash_op.h"

#include <torch/csrc/stable/library.h>

namespace sparseattn {
namespace {

constexpr char BLOCK_SPARSE[] =
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_index, Tensor block_count, "
    "Tensor? key_sizes=None, *, int block_q, int block_k, bool causal=False, float? scale=None, str provider='auto') "
    "-> (Tensor out, Tensor lse)";
constexpr char BLOCK_TOPK[] =
    "block_topk_attention(Tensor q, Tensor k, Tensor v, *, float keep_ratio=0.25, int block_q=64, int block_k=64, "
    "Tensor? keep_ratios=None, bool causal=False, float? scale=None, str provider='auto') "
    "-> (Tensor out, Tensor lse)";
constexpr char FLASH[] =
    "flash_attention(Tensor q, Tensor k, Tensor v, *, bool causal=False, int? window=None, float? scale=None, "
    "str provider='auto') -> (Tensor out, Tensor lse)";

typedef void (*Boxed)(StableIValue*, uint64_t, uint64_t);

// The registrations live as long as the process: their handles are never given back.
class Registration {
 public:
  Registration() {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_fragment("sparseattn", __FILE__, __LINE__, &schemas_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("sparseattn", "CPU", __FILE__, __LINE__, &kernels_));
    add("block_sparse_attention", BLOCK_SPARSE, TORCH_BOX(&block_sparse_attention));
    add("block_topk_attention", BLOCK_TOPK, TORCH_BOX(&block_topk_attention));
    add("flash_attention", FLASH, TORCH_BOX(&flash_attention));
  }

 private:
  // Who defines an op first keeps it: where Python's sparseattn did, this library leaves it alone.
  void add(const char* name, const char* schema, Boxed kernel) {
    if (aoti_torch_library_def(schemas_, schema) != TORCH_SUCCESS) return;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_library_impl(kernels_, name, kernel, TORCH_ABI_VERSION));
  }

  TorchLibraryHandle schemas_, kernels_;
};

const Registration registration;

}  // namespace
}  // namespace sparseattn
