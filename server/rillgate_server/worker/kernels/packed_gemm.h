// Products of few or many rows with a packed weight, on AVX-512 with VNNI and BF16.
//
// A weight [N, K] lies in panels of 64 output channels, and within a panel as the instructions read it:
//
//     int8   [N/64][K/4][64][4]   unsigned, the signed value + 128
//     bf16   [N/64][K/2][64][2]
//
// so that a product streams it once, front to back, whatever the number of rows. N and K are filled up with zeros.
//
// The sum over K of one output runs in one accumulator, from the first to the last, whatever the rows beside it and
// the tile it is in: a request's numbers cannot depend on its neighbours. (In int8 the sum is exact anyway.)
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,fma")

namespace rillgate {

constexpr int kPanel = 64;     // output channels of a panel
constexpr int kVectors = 4;    // vectors of 16 lanes in it
constexpr int kTileRows = 6;   // rows of a tile: 24 accumulators of the 32 registers

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

using bf16 = uint16_t;

inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load16(const bf16* from) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 load16(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load16(const bf16* from, __mmask16 mask) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store16(float* to, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store16(bf16* to, __m512 value, __mmask16 mask) {
  // Round to nearest even in integers: the conversion instruction takes denormals for zero.
  __m512i bits = _mm512_castps_si512(value);
  __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(rounded));
}
inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

// exp(x) to about one unit in the last place (Cephes' polynomial), 0 below -87.3, and NaN for NaN.
inline __m512 exp16(__m512 x) {
  __m512 bounded = _mm512_min_ps(_mm512_set1_ps(88.3f), _mm512_max_ps(_mm512_set1_ps(-87.3f), x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), bounded);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  p = _mm512_scalef_ps(p, n);
  return _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

// --- tiles ------------------------------------------------------------------------------------------------------

// x: `Rows` rows of `stride` bytes. sums[row][channel]: what the panel's channels give, as int32 or float.

template <int Rows>
inline void tile_int8(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t steps, __m512i (&sums)[Rows][kVectors]) {
  __m512i own[Rows][kVectors];  // not the caller's, which GCC would keep in memory
  for (auto& row : own)
    for (auto& sum : row) sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < steps; ++k, panel += kPanel * 4) {
    __m512i weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = _mm512_loadu_si512(panel + v * 64);
    if (Rows < kTileRows)
      for (int v = 0; v < kVectors; ++v) _mm_prefetch((const char*)panel + 4096 + v * 64, _MM_HINT_T0);
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * stride + 4 * k, 4);
      __m512i spread = _mm512_set1_epi32(four);
      // Written down: around the intrinsic GCC 12 moves every accumulator through memory.
      for (int v = 0; v < kVectors; ++v) asm("vpdpbusd %2, %1, %0" : "+v"(own[r][v]) : "v"(weights[v]), "v"(spread));
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = own[r][v];
}

template <int Rows>
inline void tile_bf16(const bf16* panel, const bf16* x, int64_t stride, int64_t steps, __m512 (&sums)[Rows][kVectors]) {
  __m512 own[Rows][kVectors];  // not the caller's, which GCC would keep in memory
  for (auto& row : own)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k, panel += kPanel * 2) {
    __m512bh weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(panel + v * 32);
    if (Rows < kTileRows)
      for (int v = 0; v < kVectors; ++v) _mm_prefetch((const char*)panel + 4096 + v * 64, _MM_HINT_T0);
    for (int r = 0; r < Rows; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * stride + 2 * k, 4);
      __m512bh spread = (__m512bh)_mm512_set1_epi32(two);
      for (int v = 0; v < kVectors; ++v) own[r][v] = _mm512_dpbf16_ps(own[r][v], weights[v], spread);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = own[r][v];
}

struct Range {
  int64_t first, last;
};

// The part of `count` that falls to this thread of the team.
inline Range own_part(int64_t count) {
  int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Call `tile(row, rows)` for tiles of at most kTileRows rows, `rows` as a compile-time constant.
template <typename Tile>
inline void for_tiles(int64_t num_rows, Tile tile) {
  int64_t row = 0;
  for (; row + kTileRows <= num_rows; row += kTileRows) tile(row, std::integral_constant<int, kTileRows>());
  switch (num_rows - row) {
    case 5: tile(row, std::integral_constant<int, 5>()); break;
    case 4: tile(row, std::integral_constant<int, 4>()); break;
    case 3: tile(row, std::integral_constant<int, 3>()); break;
    case 2: tile(row, std::integral_constant<int, 2>()); break;
    case 1: tile(row, std::integral_constant<int, 1>()); break;
  }
}

// One row to int8 with one scale: q = round(x * (127 / max|x|)), scale = max|x| / 127. What is not finite makes the
// scale NaN, and with it every output of the row. Returns the sum of q.
template <typename T>
inline int32_t quantize_row(const T* x, int64_t k, int64_t padded, int8_t* q, float* scale) {
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  __m512i largest = _mm512_setzero_si512();  // as integers, in which NaN is above infinity
  for (int64_t i = 0; i < k; i += 16)
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_and_ps(load16(x + i, lanes(k - i)), magnitude)));
  uint32_t bits = _mm512_reduce_max_epu32(largest);
  float most;
  std::memcpy(&most, &bits, 4);
  if (bits >= 0x7f800000u) {
    *scale = NAN;
    std::memset(q, 0, padded);
    return 0;
  }
  *scale = most / 127.0f;
  // The smallest floats have no inverse: they count as zeros, whose scale makes zeros of the whole row.
  float inverse = 127.0f / most;
  if (!std::isfinite(inverse)) inverse = 0.0f;
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded; i += 16) {
    __m512 scaled = _mm512_mul_ps(load16(x + i, lanes(k - i)), _mm512_set1_ps(inverse));
    __m512i whole = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    total = _mm512_add_epi32(total, whole);
    _mm_mask_storeu_epi8(q + i, lanes(padded - i), _mm512_cvtepi32_epi8(whole));
  }
  return _mm512_reduce_add_epi32(total);
}

// --- products ---------------------------------------------------------------------------------------------------

extern "C" struct RgLinear {
  const void* weight;   // packed
  const float* scales;  // of int8's output channels; null: bf16
  const float* bias;    // or null
  int64_t n, k;         // output and input channels
};

// Rows as products take them. Buffers grow and stay; one engine thread calls, its team shares them.
struct Rows {
  std::vector<int8_t> bytes;
  std::vector<bf16> halves;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  int64_t padded = 0;

  void reserve(const RgLinear& linear, int64_t m) {
    padded = linear.scales ? (linear.k + 3) / 4 * 4 : (linear.k + 1) / 2 * 2;
    if (linear.scales) {
      bytes.resize(std::max<size_t>(bytes.size(), m * padded));
      scales.resize(std::max<size_t>(scales.size(), m));
      sums.resize(std::max<size_t>(sums.size(), m));
    } else {
      halves.resize(std::max<size_t>(halves.size(), m * padded));
    }
  }

  template <typename T>
  void set(const RgLinear& linear, int64_t row, const T* x) {
    if (linear.scales) {
      sums[row] = quantize_row(x, linear.k, padded, bytes.data() + row * padded, scales.data() + row);
      return;
    }
    bf16* to = halves.data() + row * padded;
    for (int64_t i = 0; i < linear.k; i += 16) store16(to + i, load16(x + i, lanes(linear.k - i)), lanes(linear.k - i));
    if (padded != linear.k) to[linear.k] = 0;
  }
};

// Call `take(row, channel, values)` with a panel of a row's products, for every row and each of this thread's panels.
template <typename Take>
inline void product(const RgLinear& linear, const Rows& rows, int64_t m, Take take) {
  Range own = own_part(panels(linear.n));
  for (int64_t panel = own.first; panel < own.last; ++panel) {
    int64_t first = panel * kPanel;
    __m512 added[kVectors], of_weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      __mmask16 mask = lanes(linear.n - first - v * 16);
      added[v] = linear.bias ? load16(linear.bias + first + v * 16, mask) : _mm512_setzero_ps();
      of_weights[v] = linear.scales ? load16(linear.scales + first + v * 16, mask) : _mm512_setzero_ps();
    }
    for_tiles(m, [&](int64_t row, auto count) {
      constexpr int Count = decltype(count)::value;
      __m512 values[Count][kVectors];
      if (linear.scales) {
        __m512i found[Count][kVectors];
        const uint8_t* weights = (const uint8_t*)linear.weight + first * rows.padded;
        tile_int8<Count>(weights, rows.bytes.data() + row * rows.padded, rows.padded, rows.padded / 4, found);
        for (int r = 0; r < Count; ++r)
          for (int v = 0; v < kVectors; ++v) {
            __m512i exact = _mm512_sub_epi32(found[r][v], _mm512_set1_epi32(128 * rows.sums[row + r]));
            __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(rows.scales[row + r]));
            values[r][v] = _mm512_add_ps(_mm512_mul_ps(scaled, of_weights[v]), added[v]);
          }
      } else {
        const bf16* weights = (const bf16*)linear.weight + first * rows.padded;
        tile_bf16<Count>(weights, rows.halves.data() + row * rows.padded, rows.padded, rows.padded / 2, values);
        for (int r = 0; r < Count; ++r)
          for (int v = 0; v < kVectors; ++v) values[r][v] = _mm512_add_ps(values[r][v], added[v]);
      }
      for (int r = 0; r < Count; ++r) take(row + r, first, values[r]);
    });
  }
}

}  // namespace rillgate
