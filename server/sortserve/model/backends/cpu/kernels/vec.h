// Sixteen floats at a time, on any CPU: GCC and clang lower these vectors to what the machine has.
// bf16 and fp16 are storage only; all arithmetic is fp32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace sortserve {

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  _Float16 value;
};

inline f32x16 splat(float x) { return x - f32x16{}; }

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- loads and stores of 16 elements, which need not be aligned

inline f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline f32x16 load(const bf16* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof(half));
  return bit_cast<f32x16>(__builtin_convertvector(half, u32x16) << 16);
}

inline f32x16 load(const fp16* p) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  f32x16 v;
  for (int i = 0; i < 16; ++i) v[i] = (float)p[i].value;
  return v;
#endif
}

inline void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(bf16* p, f32x16 v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, sizeof(half));
#else
  const u32x16 bits = bit_cast<u32x16>(v);
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const u32x16 nan = (u32x16)(v != v);
  const u16x16 half = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), u16x16);
  std::memcpy(p, &half, sizeof(half));
#endif
}

inline void store(fp16* p, f32x16 v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < 16; ++i) p[i].value = (_Float16)v[i];
#endif
}

// ---- the first n <= 16 elements; the rest reads as zero and is not written

template <typename T>
inline f32x16 load(const T* p, int64_t n) {
  if (n >= 16) return load(p);
  T padded[16] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <typename T>
inline void store(T* p, f32x16 v, int64_t n) {
  if (n >= 16) return store(p, v);
  T padded[16];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// ---- arithmetic

inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Pairwise, so that the order is the same on every machine.
inline float sum(f32x16 v) {
  float x[16];
  store(x, v);
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}

inline float max(f32x16 v) {
  float result = v[0];
  for (int i = 1; i < 16; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// e^x to about 1 ulp from -87 to 88; 0 below (-inf included), e^88 above.
inline f32x16 exp(f32x16 x) {
  const i32x16 live = x > splat(-87.0f);
  x = x > splat(-87.0f) ? x : splat(-87.0f);
  x = x < splat(88.0f) ? x : splat(88.0f);
  const f32x16 shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 n_shifted = x * 1.44269504f + shifter;
  const f32x16 n = n_shifted - shifter;
  const f32x16 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // x - n ln 2, in two parts
  f32x16 p = r * 1.98412698e-4f + 1.38888889e-3f;                // Taylor, |r| <= ln(2) / 2
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const i32x16 exponent = (bit_cast<i32x16>(n_shifted) - 0x4b400000 + 127) << 23;
  return bit_cast<f32x16>(bit_cast<i32x16>(p * bit_cast<f32x16>(exponent)) & live);
}

inline f32x16 silu(f32x16 x) { return x / (1.0f + exp(-x)); }

}  // namespace sortserve
