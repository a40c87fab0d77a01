// One AdamW step on consecutive elements. cpu_dispatch.h compiles this file once for each
// instruction set.

template <class Param, class Moment>
DELTADIFF_INLINE void update_elements(
    typename Param::Item* p, const typename Param::Item* g, typename Moment::Item* m,
    typename Moment::Item* v, float* delta, typename Param::Item* anchor, const Step& step) {
  const f32v old = Param::read(p);
  f32v grad = Param::read(g);
  if (step.grad_scale != 1.f) grad = grad / step.grad_scale;
  f32v mean = Moment::read(m), square = Moment::read(v);
  mean = step.beta1 * mean + step.one_minus_beta1 * grad;
  square = step.beta2 * square + step.one_minus_beta2 * grad * grad;
  const f32v denominator = sqrt(square * step.inverse_correction2) + step.eps;
  Param::write(p, old * step.decay - step.step_size * mean / denominator);
  Moment::write(m, mean);
  Moment::write(v, square);
  if (delta) store(delta, Param::read(p) - old);  // with p' as it was rounded
  if (anchor) Param::write(anchor, old);
}

template <class Param, class Moment>
static void update(const Chunk& chunk, const Step& step) {
  using P = typename Param::Item;
  using M = typename Moment::Item;
  P *p = (P*)chunk.param, *anchor = (P*)chunk.anchor;
  const P* g = (const P*)chunk.grad;
  M *m = (M*)chunk.exp_avg, *v = (M*)chunk.exp_avg_sq;
  float* delta = chunk.delta;
  const int64_t begin = chunk.begin, whole = chunk.begin + chunk.count / kLanes * kLanes;
  for (int64_t i = begin; i < whole; i += kLanes) {
    update_elements<Param, Moment>(
        p + i, g + i, m + i, v + i, delta ? delta + i : nullptr, anchor ? anchor + i : nullptr,
        step);
  }
  const size_t rest = chunk.count % kLanes;
  if (rest == 0) return;
  P tail_p[kLanes] = {}, tail_g[kLanes] = {}, tail_anchor[kLanes];
  M tail_m[kLanes] = {}, tail_v[kLanes] = {};
  float tail_delta[kLanes];
  memcpy(tail_p, p + whole, rest * sizeof(P));
  memcpy(tail_g, g + whole, rest * sizeof(P));
  memcpy(tail_m, m + whole, rest * sizeof(M));
  memcpy(tail_v, v + whole, rest * sizeof(M));
  update_elements<Param, Moment>(tail_p, tail_g, tail_m, tail_v, tail_delta, tail_anchor, step);
  memcpy(p + whole, tail_p, rest * sizeof(P));
  memcpy(m + whole, tail_m, rest * sizeof(M));
  memcpy(v + whole, tail_v, rest * sizeof(M));
  if (delta) memcpy(delta + whole, tail_delta, rest * sizeof(float));
  if (anchor) memcpy(anchor + whole, tail_anchor, rest * sizeof(P));
}

static Kernel kernel(at::ScalarType dtype, KernelOption moments) {
  return choose_by_dtype(dtype, [moments](auto storage) -> Kernel {
    using Param = decltype(storage);
    return moments == KernelOption::wide_moments ? update<Param, Float32> : update<Param, Param>;
  });
}
