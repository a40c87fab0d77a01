// adamw_step_: AdamW for a whole list of tensors in place, in one parallel region. It also writes
// p' - p and, where asked, the value of p before the step and a copy of p'. It notices where p was
// not equal to the copy of the step before. The caller raises the step counts.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "ops.h"

namespace deltadiff {
namespace {

enum class KernelOption { wide_moments, moments_like_params };  // wide: float32

// The numbers that one tensor's step needs. The bias corrections are computed in float64, as
// PyTorch does.
struct Step {
  float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_correction2, eps;
  float decay, step_size;
};

// Elements [begin, begin + count) of a tensor. The pointers are those of the tensor's first
// element.
struct Chunk {
  void *param, *exp_avg, *exp_avg_sq;
  const void* grad;
  float* delta;  // null where it is not wanted, like the anchor and the copy
  void *anchor, *copy;
  int32_t* moved;  // null without a copy
  int64_t begin, count;
};

using Kernel = void (*)(const Chunk&, const Step&);

}  // namespace
}  // namespace deltadiff

#define DELTADIFF_KERNEL "adamw_step_kernel.h"
#include "cpu_dispatch.h"

namespace deltadiff {
namespace {

constexpr int64_t kChunk = 8192;

// A tensor as flat memory. Of a tensor that is not contiguous a copy is updated and written back.
class Flat {
 public:
  explicit Flat(const at::Tensor& t) : original_(t), flat_(t.contiguous()) {}
  void* data() const { return flat_.data_ptr(); }
  void write_back() const {
    if (!flat_.is_same(original_)) original_.copy_(flat_);
  }

 private:
  at::Tensor original_, flat_;
};

// Notes it where the bits of elements are not those of the copy. Several threads may store the same
// 1, so the store is atomic.
void compare(const Chunk& chunk, int64_t item) {
  const auto at = [&](void* p) { return static_cast<char*>(p) + chunk.begin * item; };
  if (std::memcmp(at(chunk.param), at(chunk.copy), chunk.count * item) != 0) {
    __atomic_store_n(chunk.moved, 1, __ATOMIC_RELAXED);
  }
}

void copy_param(const Chunk& chunk, int64_t item) {
  const auto at = [&](void* p) { return static_cast<char*>(p) + chunk.begin * item; };
  std::memcpy(at(chunk.copy), at(chunk.param), chunk.count * item);
}

bool is_set(const OptionalTensor& flag) { return flag && flag->item().toDouble() != 0; }

}  // namespace

void adamw_step_(
    at::TensorList params, const OptionalTensorList& grads, at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs, const at::Tensor& steps, double lr, double beta1, double beta2,
    double eps, double weight_decay, const OptionalTensorList& deltas,
    const OptionalTensorList& anchors, const OptionalTensor& anchor_now,
    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
    const OptionalTensorList& copies, const OptionalTensor& moved) {
  const PlainTensors plain;
  const size_t n = params.size();
  TORCH_CHECK(
      grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && deltas.size() == n &&
          anchors.size() == n && copies.size() == n && steps.numel() == static_cast<int64_t>(n) &&
          steps.scalar_type() == at::kFloat,
      "adamw_step_: the lists differ in length");
  TORCH_CHECK(
      !moved || (moved->scalar_type() == at::kInt && moved->is_contiguous() &&
                 moved->numel() == static_cast<int64_t>(n)),
      "adamw_step_: moved is no int32 vector with an entry for each tensor");
  if (n == 0) return;
  if (is_set(found_inf)) {
    for (const OptionalTensor& delta : deltas) {
      if (delta) delta->zero_();
    }
    return;
  }

  const auto dtype = params[0].scalar_type(), moment_dtype = exp_avgs[0].scalar_type();
  const Kernel update = best_kernel(
      dtype, moment_dtype == at::kFloat ? KernelOption::wide_moments
                                        : KernelOption::moments_like_params);
  TORCH_CHECK(
      update && (moment_dtype == dtype || moment_dtype == at::kFloat),
      "adamw_step_: no kernel for ", dtype, " with moments in ", moment_dtype);
  const bool keep_anchors = is_set(anchor_now);
  const float scale = grad_scale ? grad_scale->item<float>() : 1.f;

  std::vector<Flat> written;
  std::vector<at::Tensor> read;
  std::vector<Step> numbers;
  std::vector<std::pair<size_t, Chunk>> chunks;
  written.reserve(6 * n);
  read.reserve(n);
  numbers.reserve(n);
  const auto flat = [&](const at::Tensor& t, const at::Tensor& like, at::ScalarType expected) {
    TORCH_CHECK(
        t.scalar_type() == expected && t.sizes() == like.sizes(), "adamw_step_: a tensor of ",
        t.scalar_type(), " ", t.sizes(), " beside a parameter of ", dtype, " ", like.sizes());
    return written.emplace_back(t).data();
  };
  const at::Tensor step_counts = steps.contiguous();
  const float* done = step_counts.const_data_ptr<float>();
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& p = params[i];
    const OptionalTensor grad = grads[i], delta = deltas[i], anchor = anchors[i], copy = copies[i];
    int32_t* const moved_here = moved && copy ? moved->mutable_data_ptr<int32_t>() + i : nullptr;
    if (!grad) {
      if (moved_here && !p.equal(*copy)) *moved_here = 1;
      if (delta) delta->zero_();
      if (anchor && keep_anchors) anchor->copy_(p);
      continue;
    }
    TORCH_CHECK(
        grad->scalar_type() == dtype && grad->sizes() == p.sizes(),
        "adamw_step_: a gradient does not fit its parameter");
    Chunk chunk{};
    chunk.param = flat(p, p, dtype);
    chunk.exp_avg = flat(exp_avgs[i], p, moment_dtype);
    chunk.exp_avg_sq = flat(exp_avg_sqs[i], p, moment_dtype);
    chunk.grad = read.emplace_back(grad->contiguous()).const_data_ptr();
    if (delta) chunk.delta = static_cast<float*>(flat(*delta, p, at::kFloat));
    if (anchor && keep_anchors) chunk.anchor = flat(*anchor, p, dtype);
    if (copy) chunk.copy = flat(*copy, p, dtype);
    chunk.moved = moved_here;
    for (chunk.begin = 0; chunk.begin < p.numel(); chunk.begin += kChunk) {
      chunk.count = std::min(kChunk, p.numel() - chunk.begin);
      chunks.emplace_back(numbers.size(), chunk);
    }
    const double step = done[i] + 1.;
    const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
    numbers.push_back({
        scale, static_cast<float>(beta1), static_cast<float>(1 - beta1), static_cast<float>(beta2),
        static_cast<float>(1 - beta2), static_cast<float>(1 / correction2),
        static_cast<float>(eps), static_cast<float>(1 - lr * weight_decay),
        static_cast<float>(lr / correction1)});
  }
  const int64_t item = params[0].element_size();
  at::parallel_for(0, chunks.size(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i].second;
      if (chunk.moved) compare(chunk, item);
      update(chunk, numbers[chunks[i].first]);
      if (chunk.copy) copy_param(chunk, item);
    }
  });
  for (const Flat& t : written) t.write_back();
}

}  // namespace deltadiff
