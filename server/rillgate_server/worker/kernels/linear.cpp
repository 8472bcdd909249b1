// Linear layers over packed weights: y = x W^T + b. Called through ctypes; see kernels/library.py.

#include "packed_gemm.h"

#include <vector>

namespace rillgate {
namespace {

template <typename T>
void linear_int8(const T* x, int64_t m, int64_t k, const uint8_t* packed, const float* weight_scales, const float* bias,
                 int64_t n, T* y, int threads) {
  const int64_t padded = (k + 3) / 4 * 4;
  static thread_local std::vector<int8_t> quantized;
  static thread_local std::vector<float> row_scales;
  static thread_local std::vector<int32_t> row_sums;
  quantized.resize(std::max<size_t>(quantized.size(), m * padded));
  row_scales.resize(std::max<size_t>(row_scales.size(), m));
  row_sums.resize(std::max<size_t>(row_sums.size(), m));
  int8_t* q = quantized.data();
  float* scales = row_scales.data();
  int32_t* sums = row_sums.data();

#pragma omp parallel num_threads(threads)
  {
    Range rows = own_part(m);
    for (int64_t row = rows.first; row < rows.last; ++row)
      sums[row] = quantize_row(x + row * k, k, padded, q + row * padded, scales + row);
#pragma omp barrier
    Range own = own_part(panels(n));
    for (int64_t panel = own.first; panel < own.last; ++panel) {
      const uint8_t* weights = packed + panel * kPanel * padded;
      for_tiles(m, [&](int64_t row, auto count) {
        constexpr int Rows = decltype(count)::value;
        __m512i found[Rows][kVectors];
        tile_int8<Rows>(weights, q + row * padded, padded, padded / 4, found);
        for (int v = 0; v < kVectors; ++v) {
          int64_t channel = panel * kPanel + v * 16;
          if (channel >= n) break;
          __mmask16 mask = lanes(n - channel);
          __m512 of_weights = _mm512_maskz_loadu_ps(mask, weight_scales + channel);
          __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + channel) : _mm512_setzero_ps();
          for (int r = 0; r < Rows; ++r) {
            // The weights are 128 too large: each sum has 128 times the row's sum too much.
            __m512i exact = _mm512_sub_epi32(found[r][v], _mm512_set1_epi32(128 * sums[row + r]));
            __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(scales[row + r])), of_weights);
            store16(y + (row + r) * n + channel, _mm512_add_ps(value, added), mask);
          }
        }
      });
    }
  }
}

void linear_bf16(const bf16* x, int64_t m, int64_t k, const bf16* packed, const float* bias, int64_t n, bf16* y, int threads) {
  const int64_t padded = (k + 1) / 2 * 2;
  const bf16* rows = x;
  static thread_local std::vector<bf16> copied;
  if (padded != k) {  // rows of an odd length are copied beside a zero
    copied.assign(m * padded, 0);
    for (int64_t row = 0; row < m; ++row) std::copy_n(x + row * k, k, copied.data() + row * padded);
    rows = copied.data();
  }
#pragma omp parallel num_threads(threads)
  {
    Range own = own_part(panels(n));
    for (int64_t panel = own.first; panel < own.last; ++panel) {
      const bf16* weights = packed + panel * kPanel * padded;
      for_tiles(m, [&](int64_t row, auto count) {
        constexpr int Rows = decltype(count)::value;
        __m512 found[Rows][kVectors];
        tile_bf16<Rows>(weights, rows + row * padded, padded, padded / 2, found);
        for (int v = 0; v < kVectors; ++v) {
          int64_t channel = panel * kPanel + v * 16;
          if (channel >= n) break;
          __mmask16 mask = lanes(n - channel);
          __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + channel) : _mm512_setzero_ps();
          for (int r = 0; r < Rows; ++r) store16(y + (row + r) * n + channel, _mm512_add_ps(found[r][v], added), mask);
        }
      });
    }
  }
}

}  // namespace
}  // namespace rillgate

using namespace rillgate;

extern "C" {

// Bytes of a packed int8 weight; bf16: twice that for K filled up to a multiple of 2.
int64_t rg_packed_elements(int64_t n, int64_t k, int64_t group) { return panels(n) * kPanel * ((k + group - 1) / group * group); }

void rg_pack_int8(const int8_t* weight, int64_t n, int64_t k, uint8_t* packed) {
  const int64_t padded = (k + 3) / 4 * 4;
  std::memset(packed, 128, panels(n) * kPanel * padded);
  for (int64_t row = 0; row < n; ++row) {
    uint8_t* panel = packed + row / kPanel * kPanel * padded + row % kPanel * 4;
    for (int64_t i = 0; i < k; ++i) panel[i / 4 * kPanel * 4 + i % 4] = uint8_t(int(weight[row * k + i]) + 128);
  }
}

void rg_pack_bf16(const bf16* weight, int64_t n, int64_t k, bf16* packed) {
  const int64_t padded = (k + 1) / 2 * 2;
  std::memset(packed, 0, panels(n) * kPanel * padded * 2);
  for (int64_t row = 0; row < n; ++row) {
    bf16* panel = packed + row / kPanel * kPanel * padded + row % kPanel * 2;
    for (int64_t i = 0; i < k; ++i) panel[i / 2 * kPanel * 2 + i % 2] = weight[row * k + i];
  }
}

void rg_linear_int8_f32(const float* x, int64_t m, int64_t k, const uint8_t* packed, const float* scales, const float* bias, int64_t n, float* y, int threads) {
  linear_int8(x, m, k, packed, scales, bias, n, y, threads);
}

void rg_linear_int8_bf16(const bf16* x, int64_t m, int64_t k, const uint8_t* packed, const float* scales, const float* bias, int64_t n, bf16* y, int threads) {
  linear_int8(x, m, k, packed, scales, bias, n, y, threads);
}

void rg_linear_bf16(const bf16* x, int64_t m, int64_t k, const bf16* packed, const float* bias, int64_t n, bf16* y, int threads) {
  linear_bf16(x, m, k, packed, bias, n, y, threads);
}
}
