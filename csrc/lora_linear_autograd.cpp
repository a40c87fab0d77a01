// lora_linear with its gradients, on any device. PyTorch's dispatcher finds lora_linear_fwd and
// lora_linear_bwd, which compute. This is in C++ so that a layer costs the host little time.

#include <cmath>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "dtypes.h"
#include "ops.h"

namespace deltadiff {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("deltadiff::lora_linear_fwd", "")
                             .typed<decltype(lora_linear_fwd)>();
  return op;
}

const auto& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("deltadiff::lora_linear_bwd", "")
                             .typed<decltype(lora_linear_bwd)>();
  return op;
}

// The backward pass by PyTorch's own operations, in deltadiff/ops/lora_linear.py.
using ReferenceBackward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&, double, const OptionalTensor&, std::array<bool, 4>, double,
    const OptionalTensor&);

const auto& reference_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("deltadiff::lora_linear_bwd_reference", "")
                             .typed<ReferenceBackward>();
  return op;
}

// (tokens, columns) of a tensor of any leading shape
at::Tensor rows(const at::Tensor& t, const c10::SymInt& columns) {
  return t.dim() == 2 ? t : t.reshape_symint({-1, columns});
}

// A matrix that has as many rows as t, viewed in t's leading shape.
at::Tensor in_shape_of(const at::Tensor& t, const at::Tensor& matrix) {
  if (t.dim() == 2) return matrix;
  c10::SymDimVector shape(t.sym_sizes().begin(), t.sym_sizes().end());
  shape.back() = matrix.sym_size(1);
  return matrix.view_symint(shape);
}

std::tuple<at::Tensor, at::Tensor> forward_pass(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto [y, S] = forward_op().call(
      rows(x, weight.sym_size(1)), weight, lora_A, lora_B, scaling, gate, bias, dropout, seed,
      backend);
  return {in_shape_of(x, y), S};
}

bool needs_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

// Whether the backward pass reads x: for dA and, in a backend whose entry in
// deltadiff/ops/dispatch.py says so (`gate_reads_x`), for the gate's gradient. `keeps_x` there is
// the same function.
bool keeps_x(std::string_view backend, bool need_A, bool need_gate) {
  return need_A || (need_gate && backend == "cpp");
}

class LoraLinearFunction : public torch::autograd::Function<LoraLinearFunction> {
 public:
  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
      const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling,
      const OptionalTensor& gate, const OptionalTensor& bias, double dropout,
      const OptionalTensor& seed, std::string_view backend) {
    auto [y, S] =
        forward_pass(x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend);
    const bool keep_x = keeps_x(backend, lora_A.requires_grad(), needs_grad(gate));
    const at::Tensor none;
    ctx->save_for_backward(
        {keep_x ? x : none, weight, lora_A, lora_B, gate.value_or(none), S, seed.value_or(none)});
    ctx->saved_data["scaling"] = scaling;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["backend"] = std::string(backend);
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // This comes first, with autograd on: activation checkpointing may recompute the tensors here.
    const auto saved = ctx->get_saved_variables();
    const bool create_graph = at::GradMode::is_enabled();  // then autograd records what runs here
    std::optional<at::AutoDispatchBelowADInplaceOrView> no_autograd;
    if (!create_graph) no_autograd.emplace();

    const at::Tensor &weight = saved[1], &lora_A = saved[2], &lora_B = saved[3];
    const auto given = [](const at::Tensor& t) {
      return t.defined() ? OptionalTensor(t) : std::nullopt;
    };
    const OptionalTensor gate = given(saved[4]), seed = given(saved[6]);
    OptionalTensor x = given(saved[0]);
    if (x) x = rows(*x, weight.sym_size(1));
    // The index counts only the tensors that were given.
    const bool need_gate = gate && ctx->needs_input_grad(4);
    const bool need_bias =
        ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(gate ? 5 : 4);
    const std::array<bool, 4> needs = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(2), ctx->needs_input_grad(3), need_gate};

    const at::Tensor dy = rows(grads[0], weight.sym_size(0));
    const double scaling = ctx->saved_data["scaling"].toDouble();
    const double dropout = ctx->saved_data["dropout"].toDouble();
    auto [dx, dA, dB, dgate] = create_graph
        ? reference_backward_op().call(
              dy, x, weight, lora_A, lora_B, scaling, gate, needs, dropout, seed)
        : backward_op().call(
              dy, x, weight, lora_A, lora_B, saved[5], scaling, gate, needs, dropout, seed,
              ctx->saved_data["backend"].toStringView());
    if (dx.defined()) dx = in_shape_of(grads[0], dx);
    at::Tensor dbias;
    if (need_bias) dbias = dy.sum(0, /*keepdim=*/false, at::kFloat).to(weight.scalar_type());
    return {dx, {}, dA, dB, {}, dgate, dbias, {}, {}, {}};
  }
};

bool is_matrix(const at::Tensor& t, const c10::SymInt& height, const c10::SymInt& width) {
  return t.dim() == 2 && t.sym_size(0) == height && t.sym_size(1) == width;
}

bool is_vector(const at::Tensor& t, const c10::SymInt& entries) {
  return t.dim() == 1 && t.sym_size(0) == entries;
}

// Where something does not fit, deltadiff/ops/lora_linear.py finds out which argument it is.
bool fits(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed) {
  const auto dtype = x.scalar_type();
  const auto is_ours = [](at::ScalarType t) {
    return has_kernels(t) || t == at::kDouble;  // float64 goes to the reference
  };
  if (x.dim() < 1 || weight.dim() != 2 || lora_A.dim() != 2) return false;
  const auto out = weight.sym_size(0), in = weight.sym_size(1), r = lora_A.sym_size(0);
  if (x.sym_size(-1) != in || !is_matrix(lora_A, r, in) || !is_matrix(lora_B, out, r)) return false;
  if (out == 0 || in == 0 || r == 0) return false;
  if (!is_ours(dtype) || weight.scalar_type() != dtype) return false;
  if (lora_A.scalar_type() != dtype && (lora_A.scalar_type() != at::kFloat || dtype == at::kDouble))
    return false;
  if (lora_B.scalar_type() != lora_A.scalar_type()) return false;
  for (const at::Tensor* t : {&weight, &lora_A, &lora_B})
    if (t->device() != x.device()) return false;
  if (bias && (!is_vector(*bias, out) || bias->scalar_type() != dtype)) return false;
  if (gate && gate->sym_numel() != 1 && !is_vector(*gate, r)) return false;
  if (gate && !is_ours(gate->scalar_type())) return false;
  if (!(dropout >= 0 && dropout < 1) || (dropout > 0) != seed.has_value()) return false;
  if (seed && (seed->dim() != 0 || seed->scalar_type() != at::kLong)) return false;
  for (const OptionalTensor* t : {&gate, &bias, &seed})
    if (*t && (*t)->device() != x.device()) return false;
  return std::isfinite(scaling);
}

}  // namespace

at::Tensor lora_linear(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed,
    std::string_view backend) {
  TORCH_CHECK_VALUE(
      fits(x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed),
      "lora_linear: shapes, dtypes or devices that do not fit");
  const bool differentiable = at::GradMode::is_enabled() &&
      (x.requires_grad() || lora_A.requires_grad() || lora_B.requires_grad() || needs_grad(gate) ||
       needs_grad(bias));
  if (!differentiable)  // saves the host autograd's bookkeeping
    return std::get<0>(
        forward_pass(x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend));
  return LoraLinearFunction::apply(
      x, weight.requires_grad() ? weight.detach() : weight, lora_A, lora_B, scaling, gate, bias,
      dropout, seed, backend);
}

}  // namespace deltadiff
