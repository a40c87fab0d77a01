// delta_update_: the Delta-LoRA update of a whole list of weights, in place.
//
// The work is one range of units over all weights. A unit is some rows of one strip of columns. A
// thread lays out the strip of [A'; dA] once for all of its units, so that the innermost loop reads
// it in order from cache. The results do not depend on how the range is divided among threads.

#include <algorithm>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "ops.h"

namespace deltadiff {
namespace {

// Some rows of one strip of a weight. Strides count elements.
struct Block {
  void* weight;
  void* low;  // remainder
  int64_t weight_stride[2];
  int64_t low_stride[2];
  bool unit_stride;       // of neighbouring columns, in weight and remainder
  int64_t rows, columns;
  const float* lora_B;    // (rows, rank), A' and B' are the values after the optimizer's step
  const float* delta_B;
  const float* right;     // [A'; dA] as (column tile, 2 rank, kTile)
  float* left;            // workspace of (2 rank, kRows)
  int64_t rank;
  float scale;
  uint64_t seed;
  uint32_t step, index;
  uint64_t first;         // row-major index of the first element in the whole weight
  int64_t first_row;      // of the weight, which may be a part of a larger one
  int64_t pitch;          // elements in a row of the whole weight
};

struct Kernel {
  void (*update)(const Block&);
  int rows, tile;
  bool keeps_remainder;
};

}  // namespace
}  // namespace deltadiff

#define DELTADIFF_KERNEL "delta_update_kernel.h"
#include "cpu_dispatch.h"

namespace deltadiff {
namespace {

constexpr int64_t kStripBytes = 256 << 10;  // a strip of [A'; dA] stays in the second-level cache
constexpr int64_t kUnitElements = 64 << 10;

// One weight: what its blocks have in common, and how the weight is divided into blocks.
struct Job {
  Block block;
  at::Tensor lora_A, delta_A, lora_B, delta_B;  // float32, contiguous
  int64_t rows, columns, item_bytes;
  int64_t strip, strips, unit_rows, units_a_strip;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Job plan(
    const at::Tensor& weight, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const at::Tensor& delta_A, const at::Tensor& delta_B, const at::Tensor* remainder,
    const Kernel& kernel) {
  Job job{};
  job.rows = weight.size(0), job.columns = weight.size(1);
  const int64_t rank = lora_A.size(0);
  TORCH_CHECK(
      lora_A.sizes() == at::IntArrayRef({rank, job.columns}) && delta_A.sizes() == lora_A.sizes() &&
          lora_B.sizes() == at::IntArrayRef({job.rows, rank}) && delta_B.sizes() == lora_B.sizes(),
      "delta_update_: the factors do not fit a weight of shape ", weight.sizes());
  const auto wide = [](const at::Tensor& t) { return t.to(at::kFloat).contiguous(); };
  job.lora_A = wide(lora_A), job.delta_A = wide(delta_A);
  job.lora_B = wide(lora_B), job.delta_B = wide(delta_B);
  job.item_bytes = weight.element_size();

  Block& block = job.block;
  block.weight = weight.data_ptr();
  block.weight_stride[0] = weight.stride(0), block.weight_stride[1] = weight.stride(1);
  block.unit_stride = weight.stride(1) == 1;
  if (remainder) {
    TORCH_CHECK(
        remainder->sizes() == weight.sizes() && remainder->scalar_type() == at::kShort,
        "delta_update_: a remainder does not fit its weight of shape ", weight.sizes());
    block.low = remainder->data_ptr();
    block.low_stride[0] = remainder->stride(0), block.low_stride[1] = remainder->stride(1);
    block.unit_stride = block.unit_stride && remainder->stride(1) == 1;
  }
  block.rank = rank;
  block.pitch = job.columns;

  const int64_t fits = kStripBytes / (2 * rank * sizeof(float)) / kernel.tile * kernel.tile;
  job.strip = std::max<int64_t>(kernel.tile, std::min(job.columns, fits));
  job.strips = divide_up(job.columns, job.strip);
  job.unit_rows = divide_up(divide_up(kUnitElements, job.strip), kernel.rows) * kernel.rows;
  job.units_a_strip = divide_up(job.rows, job.unit_rows);
  return job;
}

// [A'; dA] from column `start`, as (column tile, 2 rank, tile), with zeros beyond the last column.
void lay_out(float* out, const Job& job, int64_t start, int64_t columns, int64_t tile) {
  const int64_t rank = job.block.rank;
  const at::Tensor* sources[] = {&job.lora_A, &job.delta_A};
  for (int64_t column = 0; column < columns; column += tile) {
    const int64_t count = std::min(tile, columns - column);
    for (const at::Tensor* source : sources) {
      const float* from = source->const_data_ptr<float>();
      for (int64_t k = 0; k < rank; ++k, out += tile) {
        std::copy_n(from + k * job.columns + start + column, count, out);
        std::fill(out + count, out + tile, 0.f);
      }
    }
  }
}

void run_units(const std::vector<Job>& jobs, const Kernel& kernel, int64_t begin, int64_t end) {
  std::vector<float> right, left;
  int64_t job_begin = 0;
  for (const Job& job : jobs) {
    const int64_t job_end = job_begin + job.strips * job.units_a_strip;
    int64_t laid_out = -1;
    for (int64_t unit = std::max(begin, job_begin); unit < std::min(end, job_end); ++unit) {
      const int64_t strip = (unit - job_begin) / job.units_a_strip;
      const int64_t row = (unit - job_begin) % job.units_a_strip * job.unit_rows;
      const int64_t column = strip * job.strip;
      Block block = job.block;
      block.rows = std::min(job.unit_rows, job.rows - row);
      block.columns = std::min(job.strip, job.columns - column);
      if (strip != laid_out) {
        const int64_t terms = 2 * block.rank, tiles = divide_up(block.columns, kernel.tile);
        right.resize(terms * tiles * kernel.tile);
        left.resize(terms * kernel.rows);
        lay_out(right.data(), job, column, block.columns, kernel.tile);
        laid_out = strip;
      }
      const auto moved = [&](void* start, const int64_t (&stride)[2]) {
        const int64_t elements = row * stride[0] + column * stride[1];
        return start ? static_cast<char*>(start) + elements * job.item_bytes : nullptr;
      };
      block.weight = moved(block.weight, block.weight_stride);
      block.low = moved(block.low, block.low_stride);
      block.lora_B = job.lora_B.const_data_ptr<float>() + row * block.rank;
      block.delta_B = job.delta_B.const_data_ptr<float>() + row * block.rank;
      block.right = right.data();
      block.left = left.data();
      block.first = (block.first_row + row) * job.columns + column;
      kernel.update(block);
    }
    job_begin = job_end;
  }
}

}  // namespace

void delta_update_(
    at::TensorList weights, at::TensorList lora_As, at::TensorList lora_Bs,
    at::TensorList delta_As, at::TensorList delta_Bs, at::ArrayRef<double> scales,
    std::string_view rounding, at::TensorList remainders, int64_t seed, const at::Tensor& step,
    const OptionalTensor& apply, at::IntArrayRef positions, at::IntArrayRef first_rows) {
  const PlainTensors plain;
  const size_t n = weights.size();
  TORCH_CHECK(
      lora_As.size() == n && lora_Bs.size() == n && delta_As.size() == n && delta_Bs.size() == n &&
          scales.size() == n && (positions.empty() || positions.size() == n) &&
          (first_rows.empty() || first_rows.size() == n),
      "delta_update_: the lists differ in length");
  if (n == 0 || (apply && apply->item().toDouble() == 0)) return;

  const auto dtype = weights[0].scalar_type();
  const Kernel kernel = best_kernel(dtype, rounding);
  TORCH_CHECK(kernel.update, "delta_update_: no kernel for ", dtype, " with rounding ", rounding);
  TORCH_CHECK(
      !kernel.keeps_remainder || remainders.size() == n,
      "delta_update_: the lists differ in length");
  const auto step_now = static_cast<uint32_t>(step.item<int64_t>());
  std::vector<Job> jobs;
  jobs.reserve(n);
  int64_t units = 0, elements = 0;
  for (size_t i = 0; i < n; ++i) {
    TORCH_CHECK(weights[i].scalar_type() == dtype, "delta_update_: weights of several dtypes");
    if (weights[i].numel() == 0) continue;
    const at::Tensor* low = kernel.keeps_remainder ? &remainders[i] : nullptr;
    Job job = plan(weights[i], lora_As[i], lora_Bs[i], delta_As[i], delta_Bs[i], low, kernel);
    job.block.scale = static_cast<float>(scales[i]);
    job.block.seed = static_cast<uint64_t>(seed);
    job.block.step = step_now;
    job.block.index = static_cast<uint32_t>(positions.empty() ? i : positions[i]);
    job.block.first_row = first_rows.empty() ? 0 : first_rows[i];
    units += job.strips * job.units_a_strip;
    elements += weights[i].numel();
    jobs.push_back(std::move(job));
  }
  const int64_t grain = elements > kUnitElements ? 1 : units;
  at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    run_units(jobs, kernel, begin, end);
  });
}

}  // namespace deltadiff
