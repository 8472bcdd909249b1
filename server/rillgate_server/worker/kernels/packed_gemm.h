// Products of few or many rows with a packed weight.
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
//
// What a file is compiled for decides the instructions:
//
//     int8   VNNI; or pairs in 16 bits by |w| (x sign(w)), at most 2 * 128 * 127, which 16 bits hold, then in 32
//     bf16   AVX512-BF16's dot products; or widened to float, with fused multiplication and addition
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace rillgate {

constexpr int kPanel = 64;    // output channels of a panel
constexpr int kVectors = 4;   // of 16 lanes in it

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// --- tiles ------------------------------------------------------------------------------------------------------

// x: `Rows` rows of `stride` elements. sums[row][channels]: what the panel's channels give.

// What a tile fetches of the next panel while it computes: two runs of memory, a line per step; or null.
struct Ahead {
  const char* first;
  const char* second;
};

#ifdef __AVX512F__
constexpr int kTileRows = 6;  // 24 accumulators of the 32 registers

// Few rows are alone with their panel, and fetch what lies a page ahead in it.
template <int Rows, typename T>
inline void prefetch(Ahead ahead, const T* at, int64_t k) {
  if (Rows < kTileRows && !ahead.first) {
    for (int v = 0; v < kVectors; ++v) _mm_prefetch((const char*)at + 4096 + v * 64, _MM_HINT_T0);
  } else {
    _mm_prefetch(ahead.first + k * 64, _MM_HINT_T1);
    _mm_prefetch(ahead.second + k * 64, _MM_HINT_T1);
  }
}

constexpr int32_t kWeightOffset = 128;  // left in tile_int8's sums, times the sum of a row

template <int Rows>
inline void tile_int8(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t steps, Ahead ahead, Whole (&sums)[Rows][kVectors]) {
  // Not the caller's, nor of __m512i, which may alias: GCC 12 would keep either in memory, and go through it.
  typedef int Sixteen __attribute__((vector_size(64)));
  Sixteen own[Rows][kVectors];
  for (auto& row : own)
    for (auto& sum : row) sum = Sixteen{};
  for (int64_t k = 0; k < steps; ++k, panel += kPanel * 4) {
    __m512i weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = _mm512_loadu_si512(panel + v * 64);
    prefetch<Rows>(ahead, panel, k);
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * stride + 4 * k, 4);
      __m512i spread = _mm512_set1_epi32(four);
      for (int v = 0; v < kVectors; ++v)
        own[r][v] = (Sixteen)_mm512_dpbusd_epi32((__m512i)own[r][v], weights[v], spread);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = {(__m512i)own[r][v]};
}

#ifdef __AVX512BF16__
using Half = bf16;  // how activations of a bf16 product are kept

template <int Rows>
inline void tile_bf16(const bf16* panel, const bf16* x, int64_t stride, int64_t steps, Ahead ahead, Floats (&sums)[Rows][kVectors]) {
  __m512 own[Rows][kVectors];  // not the caller's, which GCC would keep in memory
  for (auto& row : own)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k, panel += kPanel * 2) {
    __m512bh weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(panel + v * 32);
    prefetch<Rows>(ahead, panel, k);
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
#else
using Half = float;

template <int Rows>
inline void tile_bf16(const bf16* panel, const float* x, int64_t stride, int64_t steps, Ahead ahead, Floats (&sums)[Rows][kVectors]) {
  __m512 own[Rows][kVectors];
  for (auto& row : own)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k, panel += kPanel * 2) {
    prefetch<Rows>(ahead, panel, k);
    for (int v = 0; v < kVectors; ++v) {
      __m512i pair = _mm512_loadu_si512(panel + v * 32);
      __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
      __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000)));
      for (int r = 0; r < Rows; ++r) {
        own[r][v] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[r * stride + 2 * k]), own[r][v]);
        own[r][v] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[r * stride + 2 * k + 1]), own[r][v]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = own[r][v];
}
#endif

#else  // AVX2
constexpr int kTileRows = 4;
constexpr int32_t kWeightOffset = 0;

constexpr int64_t kSteps = 64;  // of 256 bytes of a panel, which then lie in the first cache

using Half = float;

// The part of a panel that is read first fetches all of a step, kSteps ahead.
template <typename T>
inline void prefetch_steps(const T* at) {
  for (int line = 0; line < 4; ++line) _mm_prefetch((const char*)at + kSteps * 256 + line * 64, _MM_HINT_T0);
}

// Sixteen registers hold 8 accumulators and what is summed: of few rows a whole panel at a time, of more a part of it,
// kSteps at a time.
template <int Rows, typename Sum, typename Step>
inline void tile_in_parts(int64_t steps, Sum (&sums)[Rows][kVectors], Step step) {
  constexpr int Width = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  std::memset(sums, 0, sizeof(sums));
  for (int64_t begin = 0; begin < steps; begin += kSteps) {
    const int64_t end = std::min(begin + kSteps, steps);
    for (int first = 0; first < kVectors; first += Width) {
      Sum own[Rows][Width];
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Width; ++v) own[r][v] = sums[r][first + v];
      for (int64_t k = begin; k < end; ++k) step(k, first, own);
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Width; ++v) sums[r][first + v] = own[r][v];
    }
  }
}

template <int Rows>
inline void tile_int8(const uint8_t* panel, const int8_t* x, int64_t stride, int64_t steps, Ahead, Whole (&sums)[Rows][kVectors]) {
  const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(-128);
  tile_in_parts<Rows>(steps, sums, [&](int64_t k, int first, auto& own) {
    const uint8_t* at = panel + k * kPanel * 4 + first * 64;
    if (first == 0) prefetch_steps(at);
    for (int v = 0; v < int(std::size(own[0])); ++v) {
      __m256i low = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(at + v * 64)), offset);
      __m256i high = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(at + v * 64 + 32)), offset);
      __m256i low_size = _mm256_abs_epi8(low), high_size = _mm256_abs_epi8(high);
      for (int r = 0; r < Rows; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * stride + 4 * k, 4);
        __m256i spread = _mm256_set1_epi32(four);
        __m256i pairs = _mm256_maddubs_epi16(low_size, _mm256_sign_epi8(spread, low));
        own[r][v].low = _mm256_add_epi32(own[r][v].low, _mm256_madd_epi16(pairs, ones));
        pairs = _mm256_maddubs_epi16(high_size, _mm256_sign_epi8(spread, high));
        own[r][v].high = _mm256_add_epi32(own[r][v].high, _mm256_madd_epi16(pairs, ones));
      }
    }
  });
}

template <int Rows>
inline void tile_bf16(const bf16* panel, const float* x, int64_t stride, int64_t steps, Ahead, Floats (&sums)[Rows][kVectors]) {
  const __m256i upper = _mm256_set1_epi32(0xffff0000);
  tile_in_parts<Rows>(steps, sums, [&](int64_t k, int first, auto& own) {
    const bf16* at = panel + k * kPanel * 2 + first * 32;
    if (first == 0) prefetch_steps(at);
    for (int v = 0; v < int(std::size(own[0])); ++v) {
      __m256i low = _mm256_loadu_si256((const __m256i*)(at + v * 32));
      __m256i high = _mm256_loadu_si256((const __m256i*)(at + v * 32 + 16));
      Floats even = {_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(high, 16))};
      Floats odd = {_mm256_castsi256_ps(_mm256_and_si256(low, upper)), _mm256_castsi256_ps(_mm256_and_si256(high, upper))};
      for (int r = 0; r < Rows; ++r) {
        own[r][v] = fused(even, spread(x[r * stride + 2 * k]), own[r][v]);
        own[r][v] = fused(odd, spread(x[r * stride + 2 * k + 1]), own[r][v]);
      }
    }
  });
}
#endif

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
#ifdef __AVX512F__
    case 5: tile(row, std::integral_constant<int, 5>()); break;
    case 4: tile(row, std::integral_constant<int, 4>()); break;
#endif
    case 3: tile(row, std::integral_constant<int, 3>()); break;
    case 2: tile(row, std::integral_constant<int, 2>()); break;
    case 1: tile(row, std::integral_constant<int, 1>()); break;
  }
}

// One row to int8 with one scale: q = round(x * (127 / max|x|)), scale = max|x| / 127. What is not finite makes the
// scale NaN, and with it every output of the row. Returns the sum of q.
template <typename T>
inline int32_t quantize_row(const T* x, int64_t k, int64_t padded, int8_t* q, float* scale) {
  Whole most_bits = no_whole();  // as integers, in which NaN is above infinity
  for (int64_t i = 0; i < k; i += 16) most_bits = larger(most_bits, magnitudes(load16(x + i, lanes(k - i))));
  uint32_t bits = largest(most_bits);
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
  Whole sum = no_whole();
  for (int64_t i = 0; i < padded; i += 16) {
    Whole whole = to_whole(load16(x + i, lanes(k - i)) * spread(inverse));
    sum = sum + whole;
    store_bytes(q + i, whole, lanes(padded - i));
  }
  return total(sum);
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
  std::vector<Half> halves;
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
    Half* to = halves.data() + row * padded;
    for (int64_t i = 0; i < linear.k; i += 16) store16(to + i, load16(x + i, lanes(linear.k - i)), lanes(linear.k - i));
    if (padded != linear.k) to[linear.k] = 0;
  }
};

// Call `take(row, channel, values)` with a panel of a row's products, for every row and each of this thread's panels.
template <typename Take>
inline void product(const RgLinear& linear, const Rows& rows, int64_t m, Take take) {
  Range own = own_part(panels(linear.n));
  const int64_t panel_bytes = kPanel * rows.padded * (linear.scales ? 1 : 2);
  for (int64_t panel = own.first; panel < own.last; ++panel) {
    int64_t first = panel * kPanel;
    Floats added[kVectors], of_weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      Mask mask = lanes(linear.n - first - v * 16);
      added[v] = linear.bias ? load16(linear.bias + first + v * 16, mask) : zeros();
      of_weights[v] = linear.scales ? load16(linear.scales + first + v * 16, mask) : zeros();
    }
    // Of four tiles or more each of the first four fetches a quarter of the next panel, of fewer each two.
    const char* next = (const char*)linear.weight + std::min(panel + 1, own.last - 1) * panel_bytes;
    auto fetch = [&](int64_t tile) -> Ahead {
      if (m < kTileRows) return {nullptr, nullptr};
      int64_t quarter = m > 3 * kTileRows ? std::min<int64_t>(tile, 3) : std::min<int64_t>(2 * tile, 2);
      int64_t other = m > 3 * kTileRows ? quarter : quarter + 1;
      return {next + quarter * panel_bytes / 4, next + other * panel_bytes / 4};
    };
    for_tiles(m, [&](int64_t row, auto count) {
      constexpr int Count = decltype(count)::value;
      Floats values[Count][kVectors];
      const Ahead ahead = fetch(row / kTileRows);
      if (linear.scales) {
        Whole found[Count][kVectors];
        const uint8_t* weights = (const uint8_t*)linear.weight + first * rows.padded;
        tile_int8<Count>(weights, rows.bytes.data() + row * rows.padded, rows.padded, rows.padded / 4, ahead, found);
        for (int r = 0; r < Count; ++r)
          for (int v = 0; v < kVectors; ++v) {
            Whole exact = minus(found[r][v], kWeightOffset * rows.sums[row + r]);
            values[r][v] = to_floats(exact) * spread(rows.scales[row + r]) * of_weights[v] + added[v];
          }
      } else {
        const bf16* weights = (const bf16*)linear.weight + first * rows.padded;
        tile_bf16<Count>(weights, rows.halves.data() + row * rows.padded, rows.padded, rows.padded / 2, ahead, values);
        for (int r = 0; r < Count; ++r)
          for (int v = 0; v < kVectors; ++v) values[r][v] = values[r][v] + added[v];
      }
      for (int r = 0; r < Count; ++r) take(row + r, first, values[r]);
    });
  }
}

}  // namespace rillgate
