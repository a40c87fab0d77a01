// lora_linear: y = x W^T + bias + s g (x A^T) B^T, forward and backward.
//
// ATen computes every product (with oneDNN or MKL). The low-rank products are added into the large
// one as they are computed, which saves the passes over y and dx that eager PyTorch makes.
//
// Dropout acts on the low-rank branch alone. x after dropout is made a block at a time, and made
// again in the backward pass. The factor 1 / (1 - p) is in `scaling`.

#include <algorithm>

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include "dropout.h"
#include "ops.h"

namespace deltadiff {
namespace {

// The matrix, copied if a GEMM cannot read it where it lies: otherwise every product would copy it.
at::Tensor readable(const at::Tensor& t) {
  const bool by_rows = t.stride(1) == 1 && t.stride(0) >= t.size(1);
  const bool by_columns = t.stride(0) == 1 && t.stride(1) >= t.size(0);
  // With AMX, oneDNN takes the gaps between rows of bfloat16 for elements, unless the rows are whole
  // tiles of 32 (PyTorch 2.13: `x[:, :-1] @ w` is wrong).
  const bool gaps = t.stride(0) != t.size(1) && t.size(1) % 32 != 0;
  const bool misread = t.scalar_type() == at::kBFloat16 && gaps;
  return (by_rows && !misread) || by_columns ? t : t.contiguous();
}

// t g, with one entry of g for each column of t, or one for all columns
at::Tensor gated(const at::Tensor& t, const OptionalTensor& gate) {
  return gate ? t.mul(gate->to(t.scalar_type())) : t;
}

// a @ b. A product of one row is computed transposed, as autograd does: MKL sums a single row less
// exactly.
at::Tensor times(const at::Tensor& a, const at::Tensor& b) {
  return a.size(0) == 1 ? at::mm(readable(b.t()), a.t()).t() : at::mm(a, b);
}

// scale * (a @ b). A BLAS does not read the factors of a product whose scale is 0, and returns 0
// where they are inf or NaN; 0 times that is NaN.
at::Tensor scaled_mm(const at::Tensor& a, const at::Tensor& b, double scale) {
  if (scale == 0) return at::mm(a, b).mul_(scale);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  return at::addmm_out(out, out, a, b, /*beta=*/0, /*alpha=*/scale);
}

// out += scale * (a @ b). Where out has few rows or columns, MKL may add one term after the other to
// it, each rounded as out is, which is eight times less exact than the sum of the product. For a
// large out it does not, and one pass over out is saved.
void add_scaled_mm_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double scale) {
  const bool few = std::min(out.size(0), out.size(1)) < 16 && out.scalar_type() == at::kFloat;
  if (few || scale == 0) {
    out.add_(scaled_mm(a, b, scale));
  } else {
    out.addmm_(a, b, /*beta=*/1, /*alpha=*/scale);
  }
}

constexpr int64_t kBlock = 1 << 20;  // elements of x after dropout that exist at the same time

// S = d(x) A^T, computed some rows at a time.
at::Tensor down(const at::Tensor& x, const at::Tensor& A, const Dropout& dropout) {
  if (!dropout) return at::mm(x, A.t());
  at::Tensor S = at::empty({x.size(0), A.size(0)}, x.options());
  const int64_t block = std::max<int64_t>(1, kBlock / x.size(1));
  for (int64_t row = 0; row < x.size(0); row += block) {
    const int64_t rows = std::min(block, x.size(0) - row);
    S.narrow(0, row, rows).copy_(at::mm(dropout.narrow(x, 0, row, rows), A.t()));
  }
  return S;
}

// scale * (G^T d(x)), computed some columns at a time.
at::Tensor down_gradient(
    const at::Tensor& G, const at::Tensor& x, double scale, const Dropout& dropout) {
  if (!dropout) return scaled_mm(G.t(), readable(x), scale);
  at::Tensor dA = at::empty({G.size(1), x.size(1)}, x.options());
  const int64_t block = std::max<int64_t>(8, kBlock / std::max<int64_t>(1, x.size(0)) / 8 * 8);
  for (int64_t column = 0; column < x.size(1); column += block) {
    const int64_t columns = std::min(block, x.size(1) - column);
    dA.narrow(1, column, columns)
        .copy_(scaled_mm(G.t(), dropout.narrow(x, 1, column, columns), scale));
  }
  return dA;
}

// s * sum over tokens of T * S, one entry for each of the r columns. Terms of both signs cancel in
// these few numbers, so T and S are computed again from x in the next wider dtype, some rows at a
// time.
at::Tensor column_sums(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& lora_A, const at::Tensor& lora_B,
    double scaling, const Dropout& dropout) {
  const auto wide = x.scalar_type() == at::kFloat ? at::kDouble : at::kFloat;
  const at::Tensor A = lora_A.to(wide).t(), B = lora_B.to(wide);
  at::Tensor sums = at::zeros({lora_A.size(0)}, x.options().dtype(at::kDouble));
  constexpr int64_t kRows = 256;
  for (int64_t row = 0; row < x.size(0); row += kRows) {
    const int64_t rows = std::min(kRows, x.size(0) - row);
    const at::Tensor T = at::mm(dy.narrow(0, row, rows).to(wide), B);
    const at::Tensor S = at::mm(dropout.narrow(x, 0, row, rows).to(wide), A);
    sums.add_(T.mul(S).sum(0, /*keepdim=*/false, at::kDouble));
  }
  return sums.mul_(scaling);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_fwd(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, double scaling, const OptionalTensor& gate,
    const OptionalTensor& bias, double dropout, const OptionalTensor& seed, std::string_view) {
  const PlainTensors plain;
  const auto dtype = x.scalar_type();
  const at::Tensor rows = readable(x), W = readable(weight);
  const at::Tensor A = readable(lora_A.to(dtype)), B = readable(lora_B.to(dtype));
  at::Tensor y = bias ? at::addmm(*bias, rows, W.t()) : at::mm(rows, W.t());
  at::Tensor S = down(rows, A, Dropout(dropout, seed, x.size(1)));
  add_scaled_mm_(y, gated(S, gate), B.t(), scaling);
  return {y, S};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> lora_linear_bwd(
    const at::Tensor& dy, const OptionalTensor& x, const at::Tensor& weight,
    const at::Tensor& lora_A, const at::Tensor& lora_B, const at::Tensor& S, double scaling,
    const OptionalTensor& gate, std::array<bool, 4> needs, double dropout,
    const OptionalTensor& seed, std::string_view) {
  const PlainTensors plain;
  TORCH_CHECK(x || !(needs[1] || (needs[3] && gate)), "lora_linear_bwd: x was not kept");
  const Dropout drops(dropout, seed, weight.size(1));
  const auto dtype = weight.scalar_type();
  const auto [need_x, need_A, need_B, need_gate] = needs;
  const at::Tensor dy_rows = readable(dy), W = readable(weight);
  const at::Tensor A = readable(lora_A.to(dtype)), B = readable(lora_B.to(dtype));
  at::Tensor dx, dA, dB, dgate, T;
  if (need_x || need_A) T = times(dy_rows, B);
  if (need_x && drops) {  // the mask applies to the low-rank term alone, so that comes first
    dx = scaled_mm(gated(T, gate), A, scaling);
    drops.drop_(dx);
    add_scaled_mm_(dx, dy_rows, W, 1);
  } else if (need_x) {
    dx = at::mm(dy_rows, W);
    add_scaled_mm_(dx, gated(T, gate), A, scaling);
  }
  if (need_A) dA = down_gradient(gated(T, gate), *x, scaling, drops).to(lora_A.scalar_type());
  if (need_B) {  // computed transposed, which is faster; then laid out and cast in one pass
    const at::Tensor dBt = scaled_mm(gated(S, gate).t(), dy_rows, scaling);
    dB = at::empty(lora_B.sizes(), lora_B.options()).copy_(dBt.t());
  }
  if (need_gate && gate) {
    const at::Tensor sums = column_sums(dy, *x, lora_A, lora_B, scaling, drops);
    dgate = (gate->numel() == 1 ? sums.sum() : sums).to(gate->scalar_type()).view(gate->sizes());
  }
  return {dx, dA, dB, dgate};
}

}  // namespace deltadiff
