// The dtypes that the kernels of the CPU take: the one list of the C++ side. The Python side has
// its table in kernels/runtime/dtypes.py, which also says what else a new dtype needs.
#pragma once

#include <c10/core/ScalarType.h>

// Each dtype, with the struct in simd.h that says how it is stored.
#define DELTADIFF_DTYPES(DTYPE)  \
  DTYPE(at::kFloat, Float32)     \
  DTYPE(at::kBFloat16, BFloat16) \
  DTYPE(at::kHalf, Float16)

namespace deltadiff {

inline bool has_kernels(at::ScalarType dtype) {
  switch (dtype) {
#define DELTADIFF_CASE(type, Storage) case type:
    DELTADIFF_DTYPES(DELTADIFF_CASE)
#undef DELTADIFF_CASE
      return true;
    default:
      return false;
  }
}

}  // namespace deltadiff
