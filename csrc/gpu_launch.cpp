#include "gpu_launch.h"

#include <cstring>
#include <string>

#include <c10/util/Exception.h>
#include <dlfcn.h>

namespace deltadiff {
namespace {

// The part of the CUDA driver API that is used here (CUDA Driver API reference, "Execution Control"
// and "Tensor Map Object Management"). These names and numbers are part of its stable ABI.
using CUresult = int;

struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

constexpr int kInterleaveNone = 0;
constexpr int kL2Promotion128B = 2;
constexpr int kFillZeros = 0;

struct Driver {
  CUresult (*launch_kernel)(const CUlaunchConfig*, void* function, void** parameters, void** extra);
  CUresult (*encode_tiled)(
      CUtensorMap*, int type, uint32_t rank, void* address, const uint64_t* shape,
      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
      int swizzle, int l2_promotion, int fill);
  CUresult (*is_capturing)(void* stream, int* status);
  CUresult (*error_string)(CUresult, const char**);
  CUresult (*get_context)(void**);
  CUresult (*set_context)(void*);
  CUresult (*get_device)(int* device, int ordinal);
  CUresult (*retain_primary)(void** context, int device);
  int32_t (*torch_stream)(int32_t device, void** stream);  // PyTorch's C shim
  std::string missing;
};

Driver find_driver() {
  Driver driver = {};
  // PyTorch loads its libraries without making their symbols global, and never unloads them.
  void* cuda = dlopen("libcuda.so.1", RTLD_LAZY);
  void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  const auto find = [&](void* library, const char* name, auto& function) {
    void* found = library ? dlsym(library, name) : nullptr;
    if (!found) driver.missing += (driver.missing.empty() ? "" : ", ") + std::string(name);
    function = reinterpret_cast<std::decay_t<decltype(function)>>(found);
  };
  find(cuda, "cuLaunchKernelEx", driver.launch_kernel);
  find(cuda, "cuTensorMapEncodeTiled", driver.encode_tiled);
  find(cuda, "cuStreamIsCapturing", driver.is_capturing);
  find(cuda, "cuGetErrorString", driver.error_string);
  find(cuda, "cuCtxGetCurrent", driver.get_context);
  find(cuda, "cuCtxSetCurrent", driver.set_context);
  find(cuda, "cuDeviceGet", driver.get_device);
  find(cuda, "cuDevicePrimaryCtxRetain", driver.retain_primary);
  find(torch, "aoti_torch_get_current_cuda_stream", driver.torch_stream);
  return driver;
}

const Driver& driver() {
  static const Driver found = find_driver();
  return found;
}

void check(CUresult result, const char* call) {
  if (result == 0) return;
  const char* text = nullptr;
  driver().error_string(result, &text);
  TORCH_CHECK(false, call, ": ", text ? text : "unknown error", " (", result, ")");
}

void encode(CUtensorMap& map, const TensorMapShape& matrix, char* address) {
  // The inner dimension comes first. Its stride is 1 and is not passed.
  const uint64_t shape[] = {uint64_t(matrix.shape[1]), uint64_t(matrix.shape[0])};
  const uint64_t stride = matrix.strides[0] * matrix.itemsize;
  const uint32_t box[] = {matrix.block[1], matrix.block[0]};
  const uint32_t element_strides[] = {1, 1};
  check(
      driver().encode_tiled(
          &map, matrix.type, 2, address, shape, &stride, box, element_strides, kInterleaveNone,
          matrix.swizzle, kL2Promotion128B, kFillZeros),
      "cuTensorMapEncodeTiled");
}

constexpr size_t kDescriptors = 16, kValues = 128;  // the most that a launch can have

// The values of a kernel's parameters, and the array of their addresses that CUDA wants.
class Arguments {
 public:
  template <typename T>
  void add(T value) {
    std::memcpy(&values_[count_], &value, sizeof(T));
    addresses_[count_] = &values_[count_];
    ++count_;
  }

  // A kernel takes a descriptor, followed by the shape and strides of its tensor.
  void add(const TensorMapShape& matrix, char* address) {
    CUtensorMap& map = maps_[map_count_++];
    encode(map, matrix, address);
    addresses_[count_++] = &map;
    for (int64_t size : matrix.shape) add(static_cast<int32_t>(size));
    for (int64_t stride : matrix.strides) add(stride);
  }

  void** addresses() { return addresses_; }

 private:
  CUtensorMap maps_[kDescriptors];
  uint64_t values_[kValues];
  void* addresses_[kValues];
  size_t map_count_ = 0, count_ = 0;
};

class Reader {
 public:
  explicit Reader(c10::IntArrayRef numbers) : numbers_(numbers) {}
  int64_t next() {
    TORCH_CHECK(at_ < numbers_.size(), "a plan ends early");
    return numbers_[at_++];
  }
  bool at_end() const { return at_ == numbers_.size(); }

 private:
  c10::IntArrayRef numbers_;
  size_t at_ = 0;
};

Parameter read_parameter(Reader& reader) {
  Parameter parameter = {static_cast<ParameterKind>(reader.next())};
  switch (parameter.kind) {
    case ParameterKind::int32:
    case ParameterKind::int64:
      parameter.value = reader.next();
      return parameter;
    case ParameterKind::scaling:
      return parameter;
    case ParameterKind::pointer:
    case ParameterKind::descriptor:
      parameter.slot = reader.next();
      parameter.offset = reader.next();
      break;
    default:
      TORCH_CHECK(false, "a plan has a parameter of kind ", static_cast<int64_t>(parameter.kind));
  }
  if (parameter.kind == ParameterKind::descriptor) {
    TensorMapShape& map = parameter.map;
    for (int* number : {&map.type, &map.itemsize, &map.swizzle}) *number = reader.next();
    for (uint32_t& size : map.block) size = reader.next();
    for (int64_t& size : map.shape) size = reader.next();
    for (int64_t& stride : map.strides) stride = reader.next();
  }
  return parameter;
}

}  // namespace

std::vector<GpuLaunch> read_launches(int64_t count, c10::IntArrayRef numbers) {
  Reader reader(numbers);
  std::vector<GpuLaunch> launches(count);
  for (GpuLaunch& launch : launches) {
    launch.function = reinterpret_cast<void*>(reader.next());
    for (unsigned* number : {&launch.grid, &launch.threads, &launch.shared_bytes})
      *number = reader.next();
    size_t descriptors = 0, values = 2;  // two belong to Triton
    for (int64_t left = reader.next(); left > 0; --left) {
      launch.parameters.push_back(read_parameter(reader));
      const bool is_descriptor = launch.parameters.back().kind == ParameterKind::descriptor;
      descriptors += is_descriptor;
      values += is_descriptor ? 5 : 1;
    }
    TORCH_CHECK(descriptors <= kDescriptors && values <= kValues, "a kernel of many parameters");
  }
  TORCH_CHECK(reader.at_end(), "a plan goes on after its last launch");
  return launches;
}

bool can_launch() {
  const std::string& missing = driver().missing;
  if (missing.empty()) return true;
  TORCH_WARN_ONCE("deltadiff launches from Python, which costs the host more: no ", missing);
  return false;
}

void ensure_context(int device) {
  void* context = nullptr;
  check(driver().get_context(&context), "cuCtxGetCurrent");
  if (context) return;
  int handle = 0;
  check(driver().get_device(&handle, device), "cuDeviceGet");
  check(driver().retain_primary(&context, handle), "cuDevicePrimaryCtxRetain");
  check(driver().set_context(context), "cuCtxSetCurrent");
}

void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_CHECK(driver().torch_stream(device, &stream) == 0, "no current stream on device ", device);
  return stream;
}

bool is_capturing(void* stream) {
  int status = 0;
  check(driver().is_capturing(stream, &status), "cuStreamIsCapturing");
  return status != 0;
}

void launch(const GpuLaunch& what, c10::ArrayRef<char*> slots, float scaling, void* stream) {
  Arguments arguments;
  for (const Parameter& parameter : what.parameters) {
    switch (parameter.kind) {
      case ParameterKind::pointer:
        arguments.add(slots[parameter.slot] + parameter.offset);
        break;
      case ParameterKind::int32:
        arguments.add(static_cast<int32_t>(parameter.value));
        break;
      case ParameterKind::int64:
        arguments.add(parameter.value);
        break;
      case ParameterKind::scaling:
        arguments.add(scaling);
        break;
      case ParameterKind::descriptor:
        arguments.add(parameter.map, slots[parameter.slot] + parameter.offset);
        break;
    }
  }
  // Triton's own scratch memory. A kernel with a plan uses none.
  arguments.add<void*>(nullptr);
  arguments.add<void*>(nullptr);
  const CUlaunchConfig config = {
      what.grid, 1, 1, what.threads, 1, 1, what.shared_bytes, stream, nullptr, 0};
  check(
      driver().launch_kernel(&config, what.function, arguments.addresses(), nullptr),
      "cuLaunchKernelEx");
}

}  // namespace deltadiff
