// fingerprint: a hash of all that a launch over a list of tensors depends on; empty for tensors
// that no launch takes.

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "ops.h"

namespace deltadiff {
namespace {

// Two hashes that mix differently, 128 bits together.
class Hash {
 public:
  void add(int64_t value) {
    const auto bits = static_cast<uint64_t>(value);
    first_ = (first_ ^ bits) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
    first_ ^= first_ >> 32;
    second_ = (second_ + bits) * 0xD1342543DE82EF95u;  // a multiplier of a 64-bit generator
    second_ ^= second_ >> 29;
  }

  std::vector<int64_t> numbers() const {
    return {static_cast<int64_t>(first_), static_cast<int64_t>(second_)};
  }

 private:
  uint64_t first_ = 0x243F6A8885A308D3u, second_ = 0x13198A2E03707344u;  // of pi
};

std::vector<int64_t> fingerprint(const OptionalTensorList& tensors) {
  Hash hash;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const OptionalTensor entry = tensors.get(i);
    if (!entry || !entry->defined()) {
      hash.add(-1);
      continue;
    }
    const at::Tensor& t = *entry;
    // What has no plain elements in memory has no address either; the checks refuse it.
    if (t.layout() != at::kStrided || t.is_nested() || t.is_neg() || t.is_conj()) return {};
    hash.add(reinterpret_cast<int64_t>(t.const_data_ptr()));
    hash.add(static_cast<int64_t>(t.scalar_type()) * 256 + t.dim());
    hash.add(t.is_inference() && !c10::InferenceMode::is_enabled());  // such are not written
    hash.add(static_cast<int64_t>(t.device().type()) * 256 + t.get_device());
    for (const int64_t size : t.sizes()) hash.add(size);
    for (const int64_t stride : t.strides()) hash.add(stride);
  }
  return hash.numbers();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deltadiff, m) {
  m.def("fingerprint(Tensor?[] tensors) -> int[]", fingerprint);
}

}  // namespace deltadiff
