// Registers torch.ops.deltadiff.*: schemas, kernels, and the shapes of outputs for torch.compile.

#include <Python.h>

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "ops.h"

namespace deltadiff {
namespace {

at::Tensor empty_for(const at::Tensor& like, c10::SymIntArrayRef sizes) {
  return at::empty_symint(sizes, like.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd_meta(
    const at::Tensor& dy, const OptionalTensor&, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const at::Tensor&, double, const OptionalTensor& gate,
    std::array<bool, 4> needs, double, const OptionalTensor&, std::string_view) {
  at::Tensor dx, dA, dB, dgate;
  if (needs[0]) dx = empty_for(dy, {dy.sym_size(0), weight.sym_size(1)});
  if (needs[1]) dA = empty_for(lora_A, lora_A.sym_sizes());
  if (needs[2]) dB = empty_for(lora_A, lora_B.sym_sizes());
  if (needs[3] && gate) dgate = empty_for(*gate, gate->sym_sizes());
  return {dx, dA, dB, dgate};
}

// The in-place operations return nothing, so they have no output shapes.
void delta_update_meta_(
    at::TensorList, at::TensorList, at::TensorList, at::TensorList, at::TensorList,
    at::ArrayRef<double>, std::string_view, at::TensorList, int64_t, const at::Tensor&,
    const OptionalTensor&, at::IntArrayRef, at::IntArrayRef) {}

void adamw_step_meta_(
    at::TensorList, const OptionalTensorList&, at::TensorList, at::TensorList, const at::Tensor&,
    double, double, double, double, double, const OptionalTensorList&, const OptionalTensorList&,
    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensorList&,
    const OptionalTensor&) {}

}  // namespace

TORCH_LIBRARY(deltadiff, m) {
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
      "Tensor? gate, Tensor? bias, float dropout, Tensor? seed, str backend) -> Tensor",
      lora_linear);
  m.def(
      "lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
      "Tensor? gate, Tensor? bias, float dropout, Tensor? seed, str backend) "
      "-> (Tensor y, Tensor S)");
  m.def(
      "lora_linear_bwd(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "Tensor S, float scaling, Tensor? gate, bool[4] needs, float dropout, Tensor? seed, "
      "str backend) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)");
  // csrc/lora_linear_cuda.cpp calls these three, which deltadiff/ops/lora_linear.py implements: the
  // two passes launched from Python, and the launches of a pass written down for C++.
  m.def(
      "lora_linear_fwd_python(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "float scaling, Tensor? gate, Tensor? bias, float dropout, Tensor? seed, str backend) "
      "-> (Tensor y, Tensor S)");
  m.def(
      "lora_linear_bwd_python(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, "
      "Tensor S, float scaling, Tensor? gate, bool[4] needs, float dropout, Tensor? seed, "
      "str backend) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)");
  // Second derivatives come from here, also implemented there.
  m.def(
      "lora_linear_bwd_reference(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, "
      "Tensor lora_B, float scaling, Tensor? gate, bool[4] needs, float dropout, Tensor? seed) "
      "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)");
  m.def(
      "lora_linear_plan(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? gate, "
      "Tensor? bias, Tensor? dy, bool need_A, bool need_B) -> int[]");
  m.def(
      "delta_update_(Tensor(a!)[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor[] delta_As, "
      "Tensor[] delta_Bs, float[] scales, str rounding, Tensor(b!)[] remainders, int seed, "
      "Tensor step, Tensor? apply, int[] positions, int[] first_rows) -> ()");
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor steps, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, Tensor(d!)?[] deltas, Tensor(e!)?[] anchors, Tensor? anchor_now, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor(f!)?[] copies, Tensor(g!)? moved) -> ()");
}

TORCH_LIBRARY_IMPL(deltadiff, CPU, m) {
  m.impl("lora_linear_fwd", lora_linear_fwd);
  m.impl("lora_linear_bwd", lora_linear_bwd);
  m.impl("delta_update_", delta_update_);
  m.impl("adamw_step_", adamw_step_);
}

TORCH_LIBRARY_IMPL(deltadiff, CUDA, m) {
  m.impl("lora_linear_fwd", lora_linear_fwd_cuda);
  m.impl("lora_linear_bwd", lora_linear_bwd_cuda);
}

// These two are the passes of lora_linear, which is differentiable. They themselves are not.
TORCH_LIBRARY_IMPL(deltadiff, Autograd, m) {
  m.impl("lora_linear_fwd", torch::autograd::autogradNotImplementedFallback());
  m.impl("lora_linear_bwd", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(deltadiff, Meta, m) {
  m.impl("lora_linear_bwd", lora_linear_bwd_meta);
  m.impl("delta_update_", delta_update_meta_);
  m.impl("adamw_step_", adamw_step_meta_);
}

}  // namespace deltadiff

// Importing deltadiff._C loads this library, which registers the operations. The Python module
// itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
