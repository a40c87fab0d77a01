// lora_linear on a GPU. For backend "hopper" this launches the sm_90 kernel by plans, which Python
// makes once for each kind of call. Everything without a plan goes to the launchers in Python: the
// other backend, calls for which deltadiff/ops/dispatch.py names another kernel, and calls that are
// captured in a CUDA graph.

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>

#include "gpu_launch.h"
#include "ops.h"

namespace deltadiff {
namespace {

using at::Tensor;

// The tensors that a launch reads and writes. kernels/lora_linear/hopper_plan.py has the same list.
enum Slot { X, WEIGHT, LORA_A, LORA_B, GATE, BIAS, DY, US, VT, Y, DA, DB, MEMORY, SYNC, SLOTS };

struct Plan {
  int64_t kept_width, memory_bytes, sync_entries;
  bool factor_gradients;  // whether the launches make dA and dB
  std::vector<GpuLaunch> launches;  // empty where Python launches
};

std::vector<int64_t> make_plan(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    const OptionalTensor& gate, const OptionalTensor& bias, const OptionalTensor& dy, bool need_A,
    bool need_B) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("deltadiff::lora_linear_plan", "")
                             .typed<decltype(make_plan)>();
  return op.call(x, weight, lora_A, lora_B, gate, bias, dy, need_A, need_B);
}

// ------------------------------------------------------------------------ plans, by key

// All that a plan depends on: the device, which gradients are asked for, and of each input the
// dtype, alignment, sizes and strides.
constexpr size_t kInputs = DY + 1;
using Key = std::array<int64_t, 2 + 5 * kInputs>;

struct Inputs : std::array<const Tensor*, kInputs> {  // null where an input is not given
  bool need_A = false, need_B = false;
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (int64_t number : key) {
      hash = (hash ^ static_cast<uint64_t>(number)) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
      hash ^= hash >> 32;
    }
    return hash;
  }
};

int64_t misalignment(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16;
}

Key key_of(const Inputs& inputs) {
  Key key = {inputs[X]->get_device(), 2 * inputs.need_A + inputs.need_B};
  auto entry = key.begin() + 2;
  for (const Tensor* t : inputs) {
    if (t) {
      entry[0] = 1 + static_cast<int64_t>(t->scalar_type()) * 16 + misalignment(*t);
      const bool matrix = t->dim() == 2;  // vectors are dense
      entry[1] = matrix ? t->size(0) : t->numel();
      entry[2] = matrix ? t->size(1) : 0;
      entry[3] = matrix ? t->stride(0) : 0;
      entry[4] = matrix ? t->stride(1) : 0;
    }
    entry += 5;
  }
  return key;
}

class Plans {
 public:
  std::shared_ptr<const Plan> find(const Inputs& inputs) {
    const Key key = key_of(inputs);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = plans_.find(key);
      if (found != plans_.end()) return found->second;
    }
    auto plan = make(inputs);  // without the lock, which a thread that holds the GIL may wait for
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) plans_.clear();
    return plans_[key] = std::move(plan);
  }

 private:
  static std::shared_ptr<const Plan> make(const Inputs& inputs) {
    const auto optional = [&](Slot slot) {
      return inputs[slot] ? OptionalTensor(*inputs[slot]) : std::nullopt;
    };
    const std::vector<int64_t> numbers = make_plan(
        *inputs[X], *inputs[WEIGHT], *inputs[LORA_A], *inputs[LORA_B], optional(GATE),
        optional(BIAS), optional(DY), inputs.need_A, inputs.need_B);
    if (numbers.empty()) return std::make_shared<Plan>();
    constexpr size_t kHeader = 5;
    TORCH_CHECK(numbers.size() > kHeader, "a plan without launches");
    const auto launches = c10::IntArrayRef(numbers).slice(kHeader);
    return std::make_shared<Plan>(
        Plan{numbers[0], numbers[1], numbers[2], numbers[3] != 0,
             read_launches(numbers[4], launches)});
  }

  static constexpr size_t kMost = 4096;
  std::mutex mutex_;
  std::unordered_map<Key, std::shared_ptr<const Plan>, KeyHash> plans_;
};

// Zeros, which every launch leaves as zeros again, so the launches of one stream share them.
Tensor sync_of(const Tensor& x, void* stream, int64_t entries) {
  static std::mutex mutex;
  // Never freed: at the end of the process, CUDA may be gone already.
  static auto& syncs = *new std::map<std::pair<int, void*>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& sync = syncs[{x.get_device(), stream}];
  if (!sync.defined() || sync.numel() < entries)
    sync = at::zeros({std::max<int64_t>(entries, 1024)}, x.options().dtype(at::kInt));
  return sync;
}

// ------------------------------------------------------------------------------ a call

struct Call {
  std::shared_ptr<const Plan> plan;
  void* stream;
};

// The call with its plan, or nothing where Python must launch.
std::optional<Call> find_call(const Inputs& inputs, std::string_view backend) {
  if (backend != "hopper" || !can_launch()) return std::nullopt;
  const auto device = inputs[X]->get_device();
  ensure_context(device);
  void* stream = current_stream(device);
  if (is_capturing(stream)) return std::nullopt;
  static Plans plans;
  auto plan = plans.find(inputs);
  if (plan->launches.empty()) return std::nullopt;
  return Call{std::move(plan), stream};
}

void run(
    const Call& call, const Inputs& inputs, std::initializer_list<std::pair<Slot, Tensor>> others,
    double scaling) {
  const Tensor& x = *inputs[X];
  std::array<char*, SLOTS> slots = {};
  const auto put = [&](Slot slot, const Tensor& t) {
    slots[slot] = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  };
  for (size_t i = 0; i < kInputs; ++i)
    if (inputs[i]) put(static_cast<Slot>(i), *inputs[i]);
  for (const auto& [slot, t] : others) put(slot, t);
  const Tensor memory = at::empty({call.plan->memory_bytes}, x.options().dtype(at::kByte));
  const Tensor sync = sync_of(x, call.stream, call.plan->sync_entries);
  put(MEMORY, memory);
  put(SYNC, sync);
  for (const GpuLaunch& what : call.plan->launches)
    launch(what, slots, static_cast<float>(scaling), call.stream);
}

// The kernel reads a gate of several entries, and a bias, as dense vectors.
OptionalTensor dense(const OptionalTensor& vector) {
  return vector ? OptionalTensor(vector->contiguous()) : std::nullopt;
}

const Tensor* given(const OptionalTensor& t) { return t ? &*t : nullptr; }

// The matrix, copied if TMA cannot read it: rows must not overlap, and each must begin at a
// multiple of 16 bytes.
Tensor for_tma(const Tensor& t) {
  const bool dense = t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) % 8 == 0;
  return dense && misalignment(t) == 0 ? t : t.clone(at::MemoryFormat::Contiguous);
}

// U of the forward pass, or V of the backward pass, in what a pass keeps; with a gate, S or T lies
// after it. `kept_shape` in kernels/lora_linear/hopper_launch.py describes the layout.
Tensor product_part(const Tensor& kept, int64_t m, int64_t r, at::ScalarType dtype) {
  const int64_t pitch = (r + 7) / 8 * 8;
  return kept.view({-1}).slice(0, 0, m * pitch / 2).view(dtype).view({m, pitch}).slice(1, 0, r);
}

Tensor rank_part(const Tensor& kept, int64_t m, int64_t r) {
  return kept.view({-1}).slice(0, kept.numel() - m * r).view({m, r});
}

Tensor product(const Tensor& p, const Tensor& q, at::ScalarType dtype) {
  return at::mm(p, q, at::kFloat).to(dtype);
}

// s sum_m T S, for each rank or summed over ranks: `gate_gradient` in
// kernels/lora_linear/portable.py
Tensor gate_gradient(const Tensor& T, const Tensor& S, double scaling, const Tensor& gate) {
  const Tensor products = T.to(at::kDouble) * S.to(at::kDouble);
  const Tensor sum = gate.numel() > 1 ? products.sum(0) : products.sum();
  return (scaling * sum).to(gate.scalar_type()).reshape(gate.sizes());
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear_fwd_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
    double scaling, const OptionalTensor& gate, const OptionalTensor& bias, double dropout,
    const OptionalTensor& seed, std::string_view backend) {
  static const auto python = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("deltadiff::lora_linear_fwd_python", "")
                                 .typed<decltype(lora_linear_fwd_cuda)>();
  const PlainTensors plain;
  const c10::DeviceGuard guard(x.device());
  const OptionalTensor g = dense(gate), b = dense(bias);
  const Inputs inputs = {{&x, &weight, &lora_A, &lora_B, given(g), given(b), nullptr}};
  const auto call = find_call(inputs, backend);
  if (!call)
    return python.call(
        x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend);

  Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  Tensor kept = at::empty({x.size(0), call->plan->kept_width}, x.options().dtype(at::kFloat));
  run(*call, inputs, {{US, kept}, {Y, y}}, scaling);
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_bwd_cuda(
    const Tensor& dy, const OptionalTensor& x, const Tensor& weight, const Tensor& lora_A,
    const Tensor& lora_B, const Tensor& S, double scaling, const OptionalTensor& gate,
    std::array<bool, 4> needs, double dropout, const OptionalTensor& seed,
    std::string_view backend) {
  static const auto python = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("deltadiff::lora_linear_bwd_python", "")
                                 .typed<decltype(lora_linear_bwd_cuda)>();
  const PlainTensors plain;
  const c10::DeviceGuard guard(dy.device());
  const OptionalTensor g = dense(gate);
  // Stored tensors usually fit TMA, but a gradient is often one row, or one number, expanded.
  const Tensor rows = backend == "hopper" ? for_tma(dy) : dy;
  // Where x was not kept, no launch reads it, and dx takes its place.
  Tensor dx = x ? Tensor() : at::empty({dy.size(0), weight.size(1)}, dy.options());
  const Inputs inputs = {
      {x ? &*x : &dx, &weight, &lora_A, &lora_B, given(g), nullptr, &rows}, needs[1], needs[2]};
  const bool kept_as_made = S.is_contiguous() && misalignment(S) == 0;
  const auto call = kept_as_made ? find_call(inputs, backend) : std::nullopt;
  if (!call) {
    dx.reset();
    return python.call(
        rows, x, weight, lora_A, lora_B, S, scaling, gate, needs, dropout, seed, backend);
  }

  const auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  if (x) dx = like(*x);
  Tensor dA = like(lora_A), dB = like(lora_B), dgate;
  const Tensor vt = like(S);
  run(*call, inputs, {{US, S}, {VT, vt}, {Y, dx}, {DA, dA}, {DB, dB}}, scaling);
  const int64_t m = dy.size(0), r = lora_A.size(0);
  if (!call->plan->factor_gradients) {
    const at::ScalarType half = dy.scalar_type(), own = lora_A.scalar_type();
    if (needs[1]) dA = product(product_part(vt, m, r, half).t(), *x, own);
    if (needs[2]) dB = product(rows.t(), product_part(S, m, r, half), own);
  }
  if (needs[3] && gate) {
    dgate = gate_gradient(rank_part(vt, m, r), rank_part(S, m, r), scaling, *gate);
  }
  return {
      needs[0] ? dx : Tensor(), needs[1] ? dA : Tensor(), needs[2] ? dB : Tensor(), dgate};
}

}  // namespace deltadiff
