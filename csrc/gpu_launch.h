// Launches of kernels that Triton compiled, without Python. What is launched, and with which
// parameters, Python says once, in numbers (kernels/plan.py); the addresses are new each time.
//
// To build this takes neither CUDA's headers nor its libraries: the driver is found at run time.
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
  int64_t slot = 0, offset = 0;  // of a pointer or descriptor: number of the tensor, bytes in it
  int64_t value = 0;
  TensorMapShape map = {};
};

struct GpuLaunch {
  void* function;
  unsigned grid, threads, shared_bytes;
  std::vector<Parameter> parameters;
};

// The `count` launches written in `numbers`.
std::vector<GpuLaunch> read_launches(int64_t count, c10::IntArrayRef numbers);

// Whether libcuda and PyTorch's streams can be reached; false warns once, with the reason.
bool can_launch();

// Gives this thread the context of `device` if it has none: PyTorch leaves it without one as long
// as it finds all it needs in caches.
void ensure_context(int device);

// CUDA's handle of the current stream of a device.
void* current_stream(int device);

bool is_capturing(void* stream);

// `slots` are the tensors' addresses. Throws what the driver says of an error.
void launch(const GpuLaunch& what, c10::ArrayRef<char*> slots, float scaling, void* stream);

}  // namespace deltadiff
