// W += scale (dB A' + (B' - dB) dA) on a block of rows, with one read and one write of each
// element. cpu_dispatch.h compiles this file once for each instruction set.

#include "philox.h"

constexpr int kVectors = 2;
constexpr int kTile = kVectors * kLanes;  // columns whose sums are held in registers...
constexpr int kRows = kLanes == 16 ? 8 : 4;  // ...for this many rows
constexpr int kTerms = 64;  // number of terms that are summed up alone
constexpr int kPanel = 512;  // number of columns whose random bits are made at a time

// ---- Storage of an element: `read` and `write` take its float32 value from, and put it into,
// ---- the weight and, where there is one, the remainder.

// A rounding mode derives from this for each dtype that it is not written for, so that there is no
// kernel for the two.
struct Unsupported {};

template <class Storage>
struct Nearest {
  using Weight = typename Storage::Item;
  using Low = char;
  static constexpr bool kRandom = false, kRemainder = false;
  DELTADIFF_INLINE f32v read(const Weight* w, const Low*) { return Storage::read(w); }
  DELTADIFF_INLINE void write(f32v wide, Weight* w, Low*, const uint16_t*) {
    Storage::write(w, wide);
  }
};

template <class Storage>
struct Remainder : Unsupported {};

template <>
struct Remainder<BFloat16> {
  using Weight = uint16_t;
  using Low = int16_t;
  static constexpr bool kRandom = false, kRemainder = true;
  DELTADIFF_INLINE f32v read(const Weight* w, const Low* low) {
    typedef int16_t i16v __attribute__((vector_size(2 * kLanes)));
    const i32v signed_low = __builtin_convertvector(load<i16v>(low), i32v);
    return (f32v)((widen(load<u16v>(w)) << 16) + (u32v)signed_low);
  }
  DELTADIFF_INLINE void write(f32v wide, Weight* w, Low* low, const uint16_t*) {
    const u32v bits = (u32v)wide;
    // A carry must not turn a NaN into a number.
    const u32v high = wide == wide ? (bits + 0x8000) >> 16 : bits >> 16;
    store(w, narrow(high));
    store(low, narrow(wide == wide ? bits - (high << 16) : u32v{}));
  }
};

// The remainder counts units of 2^-15 of a float16's last place: W + remainder * unit is the float32.
template <>
struct Remainder<Float16> {
  using Weight = uint16_t;
  using Low = int16_t;
  static constexpr bool kRandom = false, kRemainder = true;
  // The bits of the unit, a power of two; below 2^-14 float16 has a fixed spacing.
  DELTADIFF_INLINE i32v unit_bits(f32v w) {
    const i32v exponent = (i32v)w & 0x7F800000, least = i32v{} + (113 << 23);
    return (exponent > least ? exponent : least) - (25 << 23);
  }
  DELTADIFF_INLINE f32v read(const Weight* w, const Low* low) {
    typedef int16_t i16v __attribute__((vector_size(2 * kLanes)));
    const i32v count = __builtin_convertvector(load<i16v>(low), i32v);
    const f32v wide = Float16::read(w), unit = (f32v)unit_bits(wide);
    return wide - __builtin_convertvector(-count, f32v) * unit;  // less 0, so that -0 stays -0
  }
  DELTADIFF_INLINE void write(f32v wide, Weight* w, Low* low, const uint16_t*) {
    const i32v size = (i32v)wide & 0x7FFFFFFF, finite = size < 0x7F800000;
    const f32v most = f32v{} + 65504.f;
    const bool some_far = any(size > (i32v)most);  // few elements are: the two branches are rare
    f32v bounded = wide;
    if (some_far) bounded = finite & (size > (i32v)most) ? (wide > 0 ? most : -most) : wide;
    const u16v high = Float16::round(bounded);
    store(w, high);
    const f32v back = Float16::expand(high), per_unit = (f32v)((254 << 23) - unit_bits(back));
    f32v count = (wide - back) * per_unit;
    if (some_far) {
      count = finite ? count : f32v{};
      count = count > 32767.f ? f32v{} + 32767.f : count;
      count = count < -32768.f ? f32v{} - 32768.f : count;
    }
    // The sum with 1.5 * 2^23 rounds to an integer, to nearest even, in the last bits.
    store(low, narrow((u32v)(count + 0x1.8p23f) - 0x4B400000));
  }
};

template <class Storage>
struct Stochastic : Unsupported {};

template <>
struct Stochastic<BFloat16> {
  using Weight = uint16_t;
  using Low = char;
  static constexpr bool kRandom = true, kRemainder = false;
  DELTADIFF_INLINE f32v read(const Weight* w, const Low*) { return BFloat16::read(w); }
  DELTADIFF_INLINE void write(f32v wide, Weight* w, Low*, const uint16_t* random) {
    // Infinity is not changed by the addition. A NaN is left alone; arithmetic sets its top bit, so
    // it is still a NaN when its low half is cut off.
    const u32v added = wide == wide ? widen(load<u16v>(random)) : u32v{};
    store(w, narrow(((u32v)wide + added) >> 16));
  }
};

template <>
struct Stochastic<Float16> {
  using Weight = uint16_t;
  using Low = char;
  static constexpr bool kRandom = true, kRemainder = false;
  DELTADIFF_INLINE f32v read(const Weight* w, const Low*) { return Float16::read(w); }
  DELTADIFF_INLINE void write(f32v wide, Weight* w, Low*, const uint16_t* random) {
    const u32v bits = (u32v)wide, fraction = widen(load<u16v>(random)) >> 3;
    const f32v size = (f32v)(bits & 0x7FFFFFFF);
    f32v rounded = (f32v)((bits + fraction) & 0xFFFFE000);
    const i32v small = size < 0x1p-14f;
    if (any(small)) {  // there float16 has a fixed spacing of 2^-24
      const f32v units = size * 0x1p24f + __builtin_convertvector((i32v)fraction, f32v) * 0x1p-13f;
      const f32v whole = __builtin_convertvector(__builtin_convertvector(units, i32v), f32v);
      rounded = small ? (f32v)((u32v)(whole * 0x1p-24f) | (bits & 0x80000000)) : rounded;
    }
    Float16::write(w, wide == wide ? rounded : wide);
  }
};

// ---- The update

template <class Format>
DELTADIFF_INLINE void update_elements(
    typename Format::Weight* w, typename Format::Low* low, const f32v* sum, float scale,
    const uint16_t* random) {
  for (int v = 0; v < kVectors; ++v) {
    f32v wide = Format::read(w + v * kLanes, low + v * kLanes);
    wide += scale * sum[v];
    Format::write(wide, w + v * kLanes, low + v * kLanes, random + v * kLanes);
  }
}

// Updates a copy of the elements, for a tile that does not consist of whole vectors: the end of a
// row, or strided elements.
template <class Format>
__attribute__((noinline)) static void update_copied(
    typename Format::Weight* w, typename Format::Low* low, int64_t w_stride, int64_t low_stride,
    int count, const f32v* sum, float scale, const uint16_t* random) {
  typename Format::Weight whole_w[kTile] = {};
  typename Format::Low whole_low[kTile] = {};
  for (int j = 0; j < count; ++j) {
    whole_w[j] = w[j * w_stride];
    if (Format::kRemainder) whole_low[j] = low[j * low_stride];
  }
  update_elements<Format>(whole_w, whole_low, sum, scale, random);
  for (int j = 0; j < count; ++j) {
    w[j * w_stride] = whole_w[j];
    if (Format::kRemainder) low[j * low_stride] = whole_low[j];
  }
}

template <class Format>
static void update(const Block& job) {
  using Weight = typename Format::Weight;
  using Low = typename Format::Low;
  const int64_t rank = job.rank, terms = 2 * rank;
  const int64_t w_pitch = job.weight_stride[0], w_stride = job.weight_stride[1];
  const int64_t low_pitch = job.low_stride[0], low_stride = job.low_stride[1];
  const float scale = job.scale;
  uint16_t random[kRows][kPanel + 8 * kLanes];
  for (int64_t row = 0; row < job.rows; row += kRows) {
    const int rows = (int)(job.rows - row < kRows ? job.rows - row : kRows);
    float* left = job.left;  // (terms, kRows): dB, then B' - dB = B
    for (int i = 0; i < kRows; ++i) {
      for (int64_t k = 0; k < rank; ++k) {
        const int64_t at = (row + i) * rank + k;
        const float delta = i < rows ? job.delta_B[at] : 0;
        left[k * kRows + i] = delta;
        left[(rank + k) * kRows + i] = i < rows ? job.lora_B[at] - delta : 0;
      }
    }
    for (int64_t panel = 0; panel < job.columns; panel += kPanel) {
      const int64_t end = panel + kPanel < job.columns ? panel + kPanel : job.columns;
      const uint16_t* bits[kRows] = {};
      for (int i = 0; Format::kRandom && i < rows; ++i) {
        const uint64_t first = job.first + (row + i) * job.pitch + panel;
        uint16_t* const out = random[i];
        bits[i] = out + random_bits(out, job.seed, job.step, job.index, first, end - panel);
      }
      for (int64_t column = panel; column < end; column += kTile) {
        f32v sum[kRows][kVectors] = {};
        const float* right = job.right + column * terms;
        // Some terms have a sum of their own, so that a small one is not lost beside many.
        for (int64_t start = 0; start < terms; start += kTerms) {
          const int64_t stop = start + kTerms < terms ? start + kTerms : terms;
          f32v part[kRows][kVectors] = {};
          for (int64_t k = start; k < stop; ++k, right += kTile) {
            for (int v = 0; v < kVectors; ++v) {
              const f32v factor = load<f32v>(right + v * kLanes);
              for (int i = 0; i < kRows; ++i) part[i][v] += left[k * kRows + i] * factor;
            }
          }
          for (int i = 0; i < kRows; ++i) {
            for (int v = 0; v < kVectors; ++v) sum[i][v] += part[i][v];
          }
          asm volatile("" : : "r"(sum) : "memory");  // in memory: registers are for the parts
        }
        Weight* const w = (Weight*)job.weight + row * w_pitch + column * w_stride;
        Low* const low = (Low*)job.low + row * low_pitch + column * low_stride;
        if (rows == kRows && end - column >= kTile && job.unit_stride) {
          for (int i = 0; i < kRows; ++i) {
            update_elements<Format>(
                w + i * w_pitch, low + i * low_pitch, sum[i], scale, bits[i] + (column - panel));
          }
          continue;
        }
        const int count = (int)(end - column < kTile ? end - column : kTile);
        f32v kept[kRows][kVectors];  // a copy, so that the sums themselves can stay in registers
        memcpy(kept, sum, sizeof(sum));
        for (int i = 0; i < rows; ++i) {
          update_copied<Format>(
              w + i * w_pitch, low + i * low_pitch, w_stride, low_stride, count, kept[i], scale,
              bits[i] + (column - panel));
        }
      }
    }
  }
}

template <class Format>
static Kernel kernel_of() {
  if constexpr (std::is_base_of_v<Unsupported, Format>) {
    return {};
  } else {
    return {update<Format>, kRows, kTile, Format::kRemainder};
  }
}

static Kernel kernel(at::ScalarType dtype, std::string_view rounding) {
  return choose_by_dtype(dtype, [rounding](auto storage) -> Kernel {
    using Storage = decltype(storage);
    if (rounding == "remainder") return kernel_of<Remainder<Storage>>();
    if (rounding == "stochastic") return kernel_of<Stochastic<Storage>>();
    return kernel_of<Nearest<Storage>>();
  });
}
