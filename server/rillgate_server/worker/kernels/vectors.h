// Sixteen floats or integers at a time: one register of AVX-512, or two of AVX2. What a file is compiled for (build.py
// says it) decides; sums run over the same sixteen lanes in both.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace rillgate {

using bf16 = uint16_t;

inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

#ifdef __AVX512F__

using Floats = __m512;  // has GCC's operators
using Mask = __mmask16;

struct Whole {  // int32
  __m512i of;
};

inline Mask lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : Mask((1u << count) - 1); }

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats spread(float value) { return _mm512_set1_ps(value); }
inline Floats load16(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load16(const bf16* from) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Floats load16(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline Floats load16(const bf16* from, Mask mask) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store16(float* to, Floats value, Mask mask) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store16(bf16* to, Floats value, Mask mask) {
  // Round to nearest even in integers: the conversion instruction takes denormals for zero.
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(rounded));
}
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n
inline Floats nan_where(Floats is_nan, Floats x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(is_nan, is_nan, _CMP_UNORD_Q), is_nan);
}
inline float total(Floats x) { return _mm512_reduce_add_ps(x); }

inline Whole no_whole() { return {_mm512_setzero_si512()}; }
inline Whole magnitudes(Floats x) {  // their bits
  return {_mm512_castps_si512(_mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))))};
}
inline Whole larger(Whole a, Whole b) { return {_mm512_max_epu32(a.of, b.of)}; }
inline uint32_t largest(Whole x) { return _mm512_reduce_max_epu32(x.of); }
inline Whole to_whole(Floats x) { return {_mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats to_floats(Whole x) { return _mm512_cvtepi32_ps(x.of); }
inline Whole operator+(Whole a, Whole b) { return {_mm512_add_epi32(a.of, b.of)}; }
inline Whole minus(Whole a, int32_t b) { return {_mm512_sub_epi32(a.of, _mm512_set1_epi32(b))}; }
inline int32_t total(Whole x) { return _mm512_reduce_add_epi32(x.of); }
inline void store_bytes(int8_t* to, Whole x, Mask mask) { _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(x.of)); }

#else  // AVX2, FMA

struct Floats {
  __m256 low, high;
};
struct Whole {  // int32
  __m256i low, high;
};
struct Mask {
  int count;
};

inline Mask lanes(int64_t count) { return {count >= 16 ? 16 : count <= 0 ? 0 : int(count)}; }

inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats spread(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline __m256 widened(__m128i eight) {  // bf16
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
inline Floats load16(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load16(const bf16* from) {
  return {widened(_mm_loadu_si128((const __m128i*)from)), widened(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
template <typename T>
inline Floats load16(const T* from, Mask mask) {
  if (mask.count == 16) return load16(from);
  T some[16] = {};
  std::memcpy(some, from, mask.count * sizeof(T));
  return load16(some);
}
inline void store_whole(float* to, Floats value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
inline __m256i to_bf16(__m256 value) {  // to nearest even, in the low halves
  __m256i bits = _mm256_castps_si256(value);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(nearest, _mm256_set1_epi32(0x7fc0), is_nan);
}
inline void store_whole(bf16* to, Floats value) {
  __m256i mixed = _mm256_packus_epi32(to_bf16(value.low), to_bf16(value.high));
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(mixed, 0xd8));
}
template <typename T>
inline void store16(T* to, Floats value, Mask mask) {
  if (mask.count == 16) return store_whole(to, value);
  T some[16];
  store_whole(some, value);
  std::memcpy(to, some, mask.count * sizeof(T));
}
inline Floats fused(Floats a, Floats b, Floats c) {  // a b + c
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline __m256 rounded(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats rounded(Floats x) { return {rounded(x.low), rounded(x.high)}; }
inline __m256 power(__m256 n) {  // 2^n for whole n from -126 to 127
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Floats times_power(Floats x, Floats n) { return x * Floats{power(n.low), power(n.high)}; }  // x 2^n
inline __m256 nan_where(__m256 is_nan, __m256 x) { return _mm256_blendv_ps(x, is_nan, _mm256_cmp_ps(is_nan, is_nan, _CMP_UNORD_Q)); }
inline Floats nan_where(Floats is_nan, Floats x) { return {nan_where(is_nan.low, x.low), nan_where(is_nan.high, x.high)}; }
inline float total(Floats x) {
  __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline Whole no_whole() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Whole magnitudes(Floats x) {  // their bits
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.low), mask), _mm256_and_si256(_mm256_castps_si256(x.high), mask)};
}
inline Whole larger(Whole a, Whole b) { return {_mm256_max_epu32(a.low, b.low), _mm256_max_epu32(a.high, b.high)}; }
inline uint32_t largest(Whole x) {
  alignas(32) uint32_t eight[8];
  _mm256_store_si256((__m256i*)eight, _mm256_max_epu32(x.low, x.high));
  uint32_t most = 0;
  for (uint32_t one : eight) most = one > most ? one : most;
  return most;
}
inline Whole to_whole(Floats x) { return {_mm256_cvtps_epi32(rounded(x.low)), _mm256_cvtps_epi32(rounded(x.high))}; }
inline Floats to_floats(Whole x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Whole operator+(Whole a, Whole b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Whole minus(Whole a, int32_t b) {
  const __m256i same = _mm256_set1_epi32(b);
  return {_mm256_sub_epi32(a.low, same), _mm256_sub_epi32(a.high, same)};
}
inline int32_t total(Whole x) {
  alignas(32) int32_t eight[8];
  _mm256_store_si256((__m256i*)eight, _mm256_add_epi32(x.low, x.high));
  int32_t sum = 0;
  for (int32_t one : eight) sum += one;
  return sum;
}
inline void store_bytes(int8_t* to, Whole x, Mask mask) {
  __m256i mixed = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);  // 16 int16, in order
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(mixed), _mm256_extracti128_si256(mixed, 1));
  int8_t some[16];
  _mm_storeu_si128((__m128i*)some, bytes);
  std::memcpy(to, some, mask.count);
}

#endif

// exp(x) to about one unit in the last place (Cephes' polynomial), 0 below -87.3, and NaN for NaN.
inline Floats exp16(Floats x) {
  Floats bounded = smaller(spread(88.3f), larger(spread(-87.3f), x));
  Floats n = rounded(bounded * spread(1.44269504f));
  Floats r = fused(n, spread(-0.693359375f), bounded);
  r = fused(n, spread(2.12194440e-4f), r);
  Floats p = spread(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fused(p, r, spread(c));
  p = fused(p, r * r, r + spread(1.0f));
  return nan_where(x, times_power(p, n));
}

}  // namespace rillgate
