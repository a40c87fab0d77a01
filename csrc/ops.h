// The operations in C++. What each computes is written down in deltadiff/reference.py.
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

// On any device, differentiable; `backend` names the kernels of lora_linear_fwd and lora_linear_bwd
// where a device has more than one. `dropout`: the share of x that the low-rank branch does not
// see, a multiple of 1/65536, with a 0-dim int64 `seed` where it is not 0; `scaling` makes up for
// what is left out.
at::Tensor lora_linear(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend);

// On GPUs.
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

// The rest runs on the CPU.
std::tuple<at::Tensor, at::Tensor> lora_linear_fwd(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend);

// What `needs` (x, A, B, gate) leaves out comes back undefined, which Python sees as None. `x` is
// for dA and, unlike on GPUs, the gate's gradient; without them it may be left out.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& S, double scaling,
    const OptionalTensor& gate, std::array<bool, 4> needs, double dropout,
    const OptionalTensor& seed, std::string_view backend);

void delta_update_(
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
    at::TensorList delta_As, at::TensorList delta_Bs, at::ArrayRef<double> scales,
    std::string_view rounding, at::TensorList remainders, int64_t seed, const at::Tensor& step,
    const OptionalTensor& apply);

void adamw_step_(
    at::TensorList params, const OptionalTensorList& grads, at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs, const at::Tensor& steps, double lr, double beta1, double beta2,
    double eps, double weight_decay, const OptionalTensorList& deltas,
    const OptionalTensorList& anchors, const OptionalTensor& anchor_now,
    const OptionalTensor& grad_scale, const OptionalTensor& found_inf);

// The caller decided on dtypes and computes gradients: inside an operation neither autocast nor
// autograd has a say.
struct PlainTensors {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKeySet(
      {c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})};
};

}  // namespace deltadiff
