// Compiles the file named by DELTADIFF_KERNEL once for each instruction set, in namespaces
// deltadiff::avx512, deltadiff::avx2 and deltadiff::baseline, so that one build runs on every CPU
// and uses the best instructions that it finds. There is no include guard: each .cpp that has a
// kernel includes this file once.

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "dtypes.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#define DELTADIFF_BEGIN(features) \
  _Pragma(DELTADIFF_TEXT(          \
      clang attribute push(__attribute__((target(features))), apply_to = function)))
#define DELTADIFF_END _Pragma("clang attribute pop")
#else
#define DELTADIFF_BEGIN(features) \
  _Pragma("GCC push_options") _Pragma(DELTADIFF_TEXT(GCC target(features)))
#define DELTADIFF_END _Pragma("GCC pop_options")
#endif
#define DELTADIFF_TEXT(...) #__VA_ARGS__

#define DELTADIFF_AVX512
DELTADIFF_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace deltadiff::avx512 {
#include "simd.h"
#include DELTADIFF_KERNEL
}  // namespace deltadiff::avx512
DELTADIFF_END
#undef DELTADIFF_AVX512

#define DELTADIFF_AVX2
DELTADIFF_BEGIN("avx2,fma,f16c")
namespace deltadiff::avx2 {
#include "simd.h"
#include DELTADIFF_KERNEL
}  // namespace deltadiff::avx2
DELTADIFF_END
#undef DELTADIFF_AVX2
#endif

namespace deltadiff::baseline {
#include "simd.h"
#include DELTADIFF_KERNEL
}  // namespace deltadiff::baseline

namespace deltadiff {

// PyTorch's own choice for this CPU, so that its switch (ATEN_CPU_CAPABILITY) holds here too.
template <class... Choice>
static Kernel best_kernel(Choice... choice) {
#if defined(__x86_64__)
  static const std::string found = at::get_cpu_capability();
  if (found.rfind("AVX512", 0) == 0) return avx512::kernel(choice...);
  if (found.rfind("AVX2", 0) == 0) return avx2::kernel(choice...);
#endif
  return baseline::kernel(choice...);
}

}  // namespace deltadiff
