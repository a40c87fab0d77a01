// Launches kernels that Triton compiled, without Python. Python writes down once, as numbers, what
// is launched and with which parameters (kernels/runtime/plan.py); the addresses are new in each
// launch.
//
// Building this needs neither CUDA's headers nor its libraries: the driver is found at run time.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include <c10/util/ArrayRef.h>

namespace deltadiff {

enum class ParameterKind : int64_t { pointer, int32, int64, scaling, descriptor };

// A matrix as a TMA descriptor sees it, inner dimension last.
struct TensorMapShape {
  int type, itemsize, swizzle;
  std::array<uint32_t, 2> block;
  std::array<int64_t, 2> shape, strides;
};

struct Parameter {
  ParameterKind kind;
  int64_t slot = 0, offset = 0;  // pointer, descriptor: number of the tensor, offset in bytes
  int64_t value = 0;
  TensorMapShape map = {};
};

struct GpuLaunch {
  void* function;
  unsigned grid, threads, shared_bytes;
  std::vector<Parameter> parameters;
};

// Reads the `count` launches that are written in `numbers`.
std::vector<GpuLaunch> read_launches(int64_t count, c10::IntArrayRef numbers);

// Whether libcuda and PyTorch's streams can be reached. If not, it warns once with the reason.
bool can_launch();

// Gives this thread the context of `device` if it has none. PyTorch sets one only when it calls the
// driver, which it does not do as long as its caches hold all that it needs.
void ensure_context(int device);

// The CUDA handle of PyTorch's current stream on a device.
void* current_stream(int device);

bool is_capturing(void* stream);

// `slots` holds the addresses of the tensors. Throws the driver's message if the launch fails.
void launch(const GpuLaunch& what, c10::ArrayRef<char*> slots, float scaling, void* stream);

}  // namespace deltadiff
