// The operations in C++. deltadiff/ops/reference.py defines what each of them computes.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace deltadiff {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensorList = c10::List<OptionalTensor>;

// lora_linear runs on any device and is differentiable. `backend` is what deltadiff/ops/dispatch.py
// chose for the layer. `dropout` is the share of x that the low-rank branch does not see, a
// multiple of 1/65536; where it is not 0 there is a 0-dim int64 `seed`, and `scaling` holds the
// factor 1 / (1 - p).
at::Tensor lora_linear(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend);

// The passes on GPUs.
std::tuple<at::Tensor, at::Tensor> lora_linear_fwd_cuda(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd_cuda(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& S, double scaling,
    const OptionalTensor& gate, std::array<bool, 4> needs, double dropout,
    const OptionalTensor& seed, std::string_view backend);

// What follows runs on the CPU.
std::tuple<at::Tensor, at::Tensor> lora_linear_fwd(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend);

// Gradients that `needs` (x, A, B, gate) does not ask for come back undefined, which Python sees as
// None. dA and, unlike on GPUs, the gate's gradient need `x`; without them it may be left out.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& S, double scaling,
    const OptionalTensor& gate, std::array<bool, 4> needs, double dropout,
    const OptionalTensor& seed, std::string_view backend);

void delta_update_(
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
    at::TensorList delta_As, at::TensorList delta_Bs, at::ArrayRef<double> scales,
    std::string_view rounding, at::TensorList remainders, int64_t seed, const at::Tensor& step,
    const OptionalTensor& apply, at::IntArrayRef positions,
    at::IntArrayRef first_rows);

void adamw_step_(
    at::TensorList params, const OptionalTensorList& grads, at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs, const at::Tensor& steps, double lr, double beta1, double beta2,
    double eps, double weight_decay, const OptionalTensorList& deltas,
    const OptionalTensorList& anchors, const OptionalTensor& anchor_now,
    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
    const OptionalTensorList& copies, const OptionalTensor& moved);

// Turns autocast and autograd off inside an operation: its caller has chosen the dtypes and
// computes the gradients.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(
      {c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})};
};

}  // namespace deltadiff
