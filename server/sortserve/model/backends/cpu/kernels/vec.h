// The vector layer: vectors as wide as the registers of the instruction set that this is compiled
// for ("lanes"), and sixteen floats as a whole number of them. GCC and clang lower their arithmetic
// to what the machine has; only what they do badly is written with intrinsics. bf16 and fp16 are
// storage only; all arithmetic is fp32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sortserve {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32_lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32_lanes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16_lanes __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline lanes splat_lanes(float x) { return x - lanes{}; }

// a * b + c. Written out, so that no compiler fuses it in one place and not in another.
inline lanes fma(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;  // nothing to fuse with
#endif
}

// sum += a * b, in the register that it has. With the intrinsic GCC moves the sums of a loop from
// register to register, and those of AVX2 into memory.
inline void accumulate(lanes& sum, lanes a, lanes b) {
#if defined(__FMA__) && !defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#else
  sum = fma(a, b, sum);
#endif
}

// ---- loads and stores of one vector, which need not be aligned

template <typename V, typename T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline lanes load_lanes(const float* p) { return load_as<lanes>(p); }

inline lanes load_lanes(const bf16* p) {
#if defined(__AVX512F__)
  return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
  return bit_cast<lanes>(__builtin_convertvector(load_as<u16_lanes>(p), u32_lanes) << 16);
#endif
}

inline lanes load_lanes(const fp16* p) {
#if defined(__AVX512F__)
  return (lanes)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return (lanes)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  const u32_lanes half = __builtin_convertvector(load_as<u16_lanes>(p), u32_lanes);
  const u32_lanes magnitude = half & 0x7fff;
  const lanes value = bit_cast<lanes>(magnitude << 13) * 0x1p112f;  // the other exponent's bias
  const u32_lanes special = (u32_lanes)(magnitude >= 0x7c00) & 0x7f800000;  // infinite, NaN
  return bit_cast<lanes>(bit_cast<u32_lanes>(value) | special | (half & 0x8000) << 16);
#endif
}

// The first n elements, if they are fewer than a vector has; the rest reads as zero.
template <typename T>
inline lanes load_lanes(const T* p, int64_t n) {
  if (n >= kLanes) return load_lanes(p);
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load_lanes(padded);
}

inline void store_lanes(float* p, lanes v) { std::memcpy(p, &v, sizeof(v)); }

inline void store_lanes(bf16* p, lanes v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
  const u32_lanes bits = bit_cast<u32_lanes>(v);
  const u32_lanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const u32_lanes nan = (u32_lanes)(v != v);
  const u32_lanes result = (nan & 0x7fc0) | (~nan & rounded);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i both = _mm256_packus_epi32((__m256i)result, (__m256i)result);
  const __m128i half = _mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0xd8));
#else
  const u16_lanes half = __builtin_convertvector(result, u16_lanes);
#endif
#endif
  std::memcpy(p, &half, sizeof(half));
}

inline void store_lanes(fp16* p, lanes v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const u32_lanes bits = bit_cast<u32_lanes>(v), magnitude = bits & 0x7fffffff;
  const u32_lanes normal =  // the other bias; to nearest, ties to even
      (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding a half rounds at the last bit of a subnormal result.
  const u32_lanes subnormal =
      bit_cast<u32_lanes>(bit_cast<lanes>(magnitude) + 0.5f) - (126u << 23);
  u32_lanes result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? u32_lanes{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? u32_lanes{} + 0x7e00 : result;
  const u16_lanes half = __builtin_convertvector(result | (bits >> 16 & 0x8000), u16_lanes);
#endif
  std::memcpy(p, &half, sizeof(half));
}

// Two bf16 that lie side by side, in each lane: the even ones, and the odd ones.
inline lanes even_of(u32_lanes pairs) { return bit_cast<lanes>(pairs << 16); }
inline lanes odd_of(u32_lanes pairs) { return bit_cast<lanes>(pairs & 0xffff0000u); }

// ---- sixteen floats

constexpr int kParts = 16 / kLanes;

struct f32x16 {
  lanes part[kParts];

  f32x16() = default;
  f32x16(float x) { for (lanes& p : part) p = splat_lanes(x); }

  template <typename Fn>  // fn(index of a part)
  static f32x16 of_parts(const Fn& fn) {
    f32x16 v;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) v.part[i] = fn(i);
    return v;
  }

  f32x16 operator-() const {
    return of_parts([&](int i) { return -part[i]; });
  }
  f32x16& operator+=(const f32x16& other);
};

inline f32x16 operator+(const f32x16& a, const f32x16& b) {
  return f32x16::of_parts([&](int i) { return a.part[i] + b.part[i]; });
}
inline f32x16 operator-(const f32x16& a, const f32x16& b) {
  return f32x16::of_parts([&](int i) { return a.part[i] - b.part[i]; });
}
inline f32x16 operator*(const f32x16& a, const f32x16& b) {
  return f32x16::of_parts([&](int i) { return a.part[i] * b.part[i]; });
}
inline f32x16 operator/(const f32x16& a, const f32x16& b) {
  return f32x16::of_parts([&](int i) { return a.part[i] / b.part[i]; });
}
inline f32x16& f32x16::operator+=(const f32x16& other) { return *this = *this + other; }

inline f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
  return f32x16::of_parts([&](int i) { return fma(a.part[i], b.part[i], c.part[i]); });
}

template <typename T>
inline f32x16 load(const T* p) {
  return f32x16::of_parts([&](int i) { return load_lanes(p + i * kLanes); });
}

template <typename T>
inline void store(T* p, const f32x16& v) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) store_lanes(p + i * kLanes, v.part[i]);
}

// Thirty-two elements.
template <typename T>
inline void store_two(T* p, const f32x16& a, const f32x16& b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same<T, bf16>::value) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)b.part[0], (__m512)a.part[0]);
    std::memcpy(p, &both, sizeof(both));
    return;
  }
#endif
  store(p, a);
  store(p + 16, b);
}

// The first n <= 16 elements; the rest reads as zero and is not written.
template <typename T>
inline f32x16 load(const T* p, int64_t n) {
  if (n >= 16) return load(p);
  T padded[16] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* p, const f32x16& v, int64_t n) {
  if (n >= 16) return store(p, v);
  T padded[16];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

inline f32x16 max(const f32x16& a, const f32x16& b) {
  return f32x16::of_parts([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}

// Pairwise, so that the order is the same on every machine.
inline float sum(const f32x16& v) {
  float x[16];
  store(x, v);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}

inline float max(const f32x16& v) {
  float x[16];
  store(x, v);
  float result = x[0];
  for (int i = 1; i < 16; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// e^x to about 1 ulp from -87 to 88; 0 below (-inf included), e^88 above.
inline lanes exp(lanes x) {
  const lanes low = splat_lanes(-87.0f), high = splat_lanes(88.0f);
  const i32_lanes live = x > low;
  x = x > low ? x : low;
  x = x < high ? x : high;
  const lanes shifter = splat_lanes(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const lanes n_shifted = fma(x, splat_lanes(1.44269504f), shifter);
  const lanes n = n_shifted - shifter;
  lanes r = fma(n, splat_lanes(-0.693145752f), x);  // x - n ln 2, in two parts
  r = fma(n, splat_lanes(-1.42860677e-6f), r);
  lanes p = splat_lanes(1.98412698e-4f);  // Taylor, |r| <= ln(2) / 2
  for (const float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f,
                        1.0f})
    p = fma(p, r, splat_lanes(c));
  const i32_lanes exponent = (bit_cast<i32_lanes>(n_shifted) - 0x4b400000 + 127) << 23;
  return bit_cast<lanes>(bit_cast<i32_lanes>(p * bit_cast<lanes>(exponent)) & live);
}

inline f32x16 exp(const f32x16& x) {
  return f32x16::of_parts([&](int i) { return exp(x.part[i]); });
}

}  // namespace sortserve
