#include "dropout.h"

#include <cmath>

#include <ATen/Parallel.h>

namespace deltadiff {
namespace {

// Some rows of a part of a matrix. Strides count elements.
struct Rows {
  void* data;
  int64_t stride, begin, end, columns;
  int64_t pitch;   // columns of the whole matrix, rounded up to a multiple of 8
  uint64_t first;  // row-major index of the part's first element in a matrix of `pitch` columns
  uint64_t seed;
  uint32_t least;  // an element stays where its random bits are at least this
};

using Kernel = void (*)(const Rows&);

}  // namespace
}  // namespace deltadiff

#define DELTADIFF_KERNEL "dropout_kernel.h"
#include "cpu_dispatch.h"

namespace deltadiff {

Dropout::Dropout(double share, const std::optional<at::Tensor>& seed, int64_t width)
    : least_(static_cast<uint32_t>(std::lround(share * 65536))), pitch_((width + 7) / 8 * 8) {
  if (seed) seed_ = seed->item<int64_t>();
}

void Dropout::drop_(const at::Tensor& part, int64_t row, int64_t column) const {
  if (part.numel() == 0) return;
  Rows rows{};
  rows.data = part.data_ptr();
  rows.stride = part.stride(0), rows.columns = part.size(1);
  rows.first = row * pitch_ + column, rows.pitch = pitch_;
  rows.seed = static_cast<uint64_t>(*seed_), rows.least = least_;
  const Kernel kernel = best_kernel(part.element_size());
  constexpr int64_t kGrainElements = 16 << 10;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / rows.columns);
  at::parallel_for(0, part.size(0), grain, [&](int64_t begin, int64_t end) {
    Rows mine = rows;
    mine.begin = begin, mine.end = end;
    kernel(mine);
  });
}

at::Tensor Dropout::narrow(
    const at::Tensor& x, int64_t dim, int64_t start, int64_t length) const {
  const at::Tensor part = x.narrow(dim, start, length);
  if (!seed_) return part;
  at::Tensor copy = part.clone(at::MemoryFormat::Contiguous);
  drop_(copy, dim == 0 ? start : 0, dim == 1 ? start : 0);
  return copy;
}

}  // namespace deltadiff
