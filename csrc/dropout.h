// Dropout's keep mask, made where it is needed from a counter; deltadiff/reference.py says which.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace deltadiff {

// Of one matrix x on the CPU.
class Dropout {
 public:
  // `share` of the elements is left out, a multiple of 1/65536; none where there is no seed.
  Dropout(double share, const std::optional<at::Tensor>& seed, int64_t width);

  explicit operator bool() const { return seed_.has_value(); }

  // Zeros where elements are left out of `part`: of the matrix from (row, column) on, the column a
  // multiple of 8; neighbouring elements of its rows lie side by side.
  void drop_(const at::Tensor& part, int64_t row = 0, int64_t column = 0) const;

  // Rows (dim 0) or columns (dim 1) of x after dropout: a copy, or a view if nothing is left out.
  at::Tensor narrow(const at::Tensor& x, int64_t dim, int64_t start, int64_t length) const;

 private:
  std::optional<int64_t> seed_;
  uint32_t least_;  // random bits of an element that stays
  int64_t pitch_;
};

}  // namespace deltadiff
