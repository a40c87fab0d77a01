// The keep mask of dropout. It is a function of a seed and of an element's place, so it is made
// where it is needed and never stored; `dropout_mask_ref` in deltadiff/ops/reference.py defines it.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace deltadiff {

// Dropout of one matrix x on the CPU.
class Dropout {
 public:
  // `share`, a multiple of 1/65536, of the elements is dropped; without a seed none is.
  Dropout(double share, const std::optional<at::Tensor>& seed, int64_t width);

  explicit operator bool() const { return seed_.has_value(); }

  // Sets the dropped elements of `part` to zero. `part` begins at (row, column) of the matrix; the
  // column is a multiple of 8, and the part has unit stride along its rows.
  void drop_(const at::Tensor& part, int64_t row = 0, int64_t column = 0) const;

  // Rows (dim 0) or columns (dim 1) of x after dropout: a copy, or a view if nothing is dropped.
  at::Tensor narrow(const at::Tensor& x, int64_t dim, int64_t start, int64_t length) const;

 private:
  std::optional<int64_t> seed_;
  uint32_t least_;  // an element stays where its random bits are at least this
  int64_t pitch_;  // width of x, rounded up to a multiple of 8
};

}  // namespace deltadiff
