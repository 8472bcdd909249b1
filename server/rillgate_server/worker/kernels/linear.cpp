// Linear layers over packed weights: y = x W^T + b. Called through ctypes; see kernels/library.py.

#include "packed_gemm.h"

namespace rillgate {
namespace {

template <typename T>
void linear(const RgLinear& layer, const T* x, int64_t m, T* y, int threads) {
  static thread_local Rows of_caller;
  Rows& rows = of_caller;  // the team's, not each thread's
  rows.reserve(layer, m);
#pragma omp parallel num_threads(threads)
  {
    Range own = own_part(m);
    for (int64_t row = own.first; row < own.last; ++row) rows.set(layer, row, x + row * layer.k);
#pragma omp barrier
    product(layer, rows, m, [&](int64_t row, int64_t channel, const Floats* found) {
      for (int v = 0; v < kVectors; ++v)
        store16(y + row * layer.n + channel + v * 16, found[v], lanes(layer.n - channel - v * 16));
    });
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

void rg_linear_f32(const RgLinear* layer, const float* x, int64_t m, float* y, int threads) { linear(*layer, x, m, y, threads); }

void rg_linear_bf16(const RgLinear* layer, const bf16* x, int64_t m, bf16* y, int threads) { linear(*layer, x, m, y, threads); }
}
