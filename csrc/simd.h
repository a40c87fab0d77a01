// One vector register of float32, and what the kernels do with it. cpu_dispatch.h includes this
// file inside a namespace, once for each instruction set, so it has no include guard and no
// includes.

#if defined(DELTADIFF_AVX512)
constexpr int kLanes = 16;
#elif defined(DELTADIFF_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float f32v __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef uint64_t u64v __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16v __attribute__((vector_size(2 * kLanes)));

#define DELTADIFF_INLINE static inline __attribute__((always_inline))

template <class V>
DELTADIFF_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
DELTADIFF_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

DELTADIFF_INLINE u32v widen(u16v v) {
#if defined(DELTADIFF_AVX512)
  return (u32v)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(DELTADIFF_AVX2)
  return (u32v)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, u32v);
#endif
}

DELTADIFF_INLINE u16v narrow(u32v v) {  // keeps the low 16 bits
#if defined(DELTADIFF_AVX512)
  return (u16v)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(DELTADIFF_AVX2)
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xFFFF));
  const __m256i packed = _mm256_packus_epi32(low, low);
  return (u16v)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, u16v);
#endif
}

// Whether any lane of a comparison holds.
DELTADIFF_INLINE bool any(i32v holds) {
#if defined(DELTADIFF_AVX512)
  return _mm512_movepi32_mask((__m512i)holds) != 0;
#elif defined(DELTADIFF_AVX2)
  return _mm256_movemask_ps((__m256)holds) != 0;
#else
  return (holds[0] | holds[1] | holds[2] | holds[3]) != 0;
#endif
}

DELTADIFF_INLINE f32v sqrt(f32v v) {
#if defined(DELTADIFF_AVX512)
  return (f32v)_mm512_sqrt_ps((__m512)v);
#elif defined(DELTADIFF_AVX2)
  return (f32v)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The 64-bit products of the low halves of a and b.
DELTADIFF_INLINE u64v multiply_low(u64v a, u64v b) {
#if defined(DELTADIFF_AVX512)
  return (u64v)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(DELTADIFF_AVX2)
  return (u64v)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

// Moves the high halves to the low ones. What is then in the high halves does not matter.
DELTADIFF_INLINE u64v high_halves(u64v v) {
#if defined(DELTADIFF_AVX512)
  return (u64v)_mm512_shuffle_epi32((__m512i)v, _MM_PERM_CDAB);
#elif defined(DELTADIFF_AVX2)
  return (u64v)_mm256_shuffle_epi32((__m256i)v, 0xB1);
#else
  return v >> 32;
#endif
}

// Writes a[i] and b[i] side by side, for lanes i in the order 0, 2, 4, ... 1, 3, 5, ...
DELTADIFF_INLINE void store_pairs(uint64_t* out, u64v a, u64v b) {
#if defined(DELTADIFF_AVX512)
  store(out, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
  store(out + 8, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
#elif defined(DELTADIFF_AVX2)
  store(out, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
  store(out + 4, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#else
  store(out, u64v{a[0], b[0]});
  store(out + 2, u64v{a[1], b[1]});
#endif
}

// How each dtype of dtypes.h lies in memory. 16-bit floats are handled as their bits.

struct Float32 {
  using Item = float;
  DELTADIFF_INLINE f32v read(const float* p) { return load<f32v>(p); }
  DELTADIFF_INLINE void write(float* p, f32v v) { store(p, v); }
};

struct BFloat16 {
  using Item = uint16_t;
  DELTADIFF_INLINE f32v read(const uint16_t* p) { return (f32v)(widen(load<u16v>(p)) << 16); }
  DELTADIFF_INLINE u16v round(f32v v) {  // to nearest even
    const u32v bits = (u32v)v;
    const u32v rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return narrow(v == v ? rounded : u32v{} + 0x7FC0);
  }
  DELTADIFF_INLINE void write(uint16_t* p, f32v v) { store(p, round(v)); }
};

struct Float16 {
  using Item = uint16_t;
  DELTADIFF_INLINE f32v expand(u16v v) {
#if defined(DELTADIFF_AVX512)
    return (f32v)_mm512_cvtph_ps((__m256i)v);
#elif defined(DELTADIFF_AVX2)
    return (f32v)_mm256_cvtph_ps((__m128i)v);
#else
    f32v wide;
    for (int i = 0; i < kLanes; ++i) wide[i] = c10::Half(v[i], c10::Half::from_bits());
    return wide;
#endif
  }
  DELTADIFF_INLINE u16v round(f32v v) {  // to nearest even
#if defined(DELTADIFF_AVX512)
    return (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(DELTADIFF_AVX2)
    return (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    u16v bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = c10::Half(v[i]).x;
    return bits;
#endif
  }
  DELTADIFF_INLINE f32v read(const uint16_t* p) { return expand(load<u16v>(p)); }
  DELTADIFF_INLINE void write(uint16_t* p, f32v v) { store(p, round(v)); }
};

// The kernel that `choose` returns when it is called with the struct of `dtype`, one of those
// above. For a dtype that is not in dtypes.h, there is none: the kernel is null.
template <class Choose>
static Kernel choose_by_dtype(at::ScalarType dtype, Choose choose) {
  switch (dtype) {
#define DELTADIFF_CASE(type, Storage) \
  case type:                          \
    return choose(Storage{});
    DELTADIFF_DTYPES(DELTADIFF_CASE)
#undef DELTADIFF_CASE
    default:
      return {};
  }
}
