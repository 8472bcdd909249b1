// The layers of a dense decoder (Llama, Mistral, Qwen2, Qwen3), each in three calls, with attention behind the first.
//
//     into_attention  norm, query/key/value product, head norms, rotary embedding
//     add_attention   output product, added to the residual stream
//     add_mlp         norm, gate and up product, SiLU, down product, added to the residual stream
//
// Where a layer is split over ranks, what the last two add is summed over ranks after each. The residual stream is float32; products take rows in INT8 or bf16. One team of threads goes through a call, and
// divides rows where a row is worked on whole, and panels of output channels in products.

#include "packed_gemm.h"

namespace rillgate {

extern "C" {

struct RgLayer {
  const float* attention_norm;  // [hidden]
  RgLinear qkv;                 // queries, keys, values of all heads
  const float* query_norm;      // [head_dim], or null
  const float* key_norm;
  RgLinear output;
  const float* mlp_norm;
  RgLinear gate_up;  // 32 gates and 32 ups in each panel
  RgLinear down;
};

struct RgShape {
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  float epsilon;
};
}

namespace {

// The most rows that are between two products: what they need there stays small, and in the cache.
// No barrier ends such a run of rows: the next one's norms write what no thread reads any more.
constexpr int64_t kRowsAtOnce = 256;

struct Scratch {
  Rows rows;
  std::vector<float> wide;    // what a product gave, [m, n]
  std::vector<float> normed;  // a row per thread
};

Scratch& scratch() {
  static thread_local Scratch found;
  return found;
}

// Root mean square norm: y = x / sqrt(mean(x^2) + epsilon) * weight.
void norm_row(const float* x, const float* weight, int64_t size, float epsilon, float* y) {
  Floats squares = zeros();
  for (int64_t i = 0; i < size; i += 16) {
    Floats part = load16(x + i, lanes(size - i));
    squares = fused(part, part, squares);
  }
  Floats factor = spread(1.0f / std::sqrt(total(squares) / size + epsilon));
  for (int64_t i = 0; i < size; i += 16) {
    Mask mask = lanes(size - i);
    store16(y + i, load16(x + i, mask) * factor * load16(weight + i, mask), mask);
  }
}

Floats silu16(Floats x) { return x / (spread(1.0f) + exp16(zeros() - x)); }

// Rotate the halves of a head: x cos + (-x2, x1) sin. cosines, sines: [head_dim] of the position.
template <typename T>
void rotate_head(const float* x, const float* cosines, const float* sines, int64_t dim, T* y) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += 16) {
    Mask mask = lanes(half - i);
    Floats first = load16(x + i, mask), second = load16(x + half + i, mask);
    Floats one = first * load16(cosines + i, mask) - second * load16(sines + i, mask);
    Floats other = second * load16(cosines + half + i, mask) + first * load16(sines + half + i, mask);
    store16(y + i, one, mask);
    store16(y + half + i, other, mask);
  }
}

// queries: [heads, m, dim]; keys, values: [kv_heads, m, dim].
template <typename T>
void into_attention(const RgShape& shape, const RgLayer& layer, const float* x, int64_t m, const float* cosines,
                    const float* sines, T* queries, T* keys, T* values, int threads) {
  Scratch& own = scratch();
  const int64_t dim = shape.head_dim, n = panels(layer.qkv.n) * kPanel;
  const int64_t heads = shape.heads + 2 * shape.kv_heads;
  own.rows.reserve(layer.qkv, std::min(m, kRowsAtOnce));
  own.wide.resize(std::max<size_t>(own.wide.size(), std::min(m, kRowsAtOnce) * n));
  own.normed.resize(std::max<size_t>(own.normed.size(), threads * std::max(shape.hidden, dim)));
  float* wide = own.wide.data();
#pragma omp parallel num_threads(threads)
  {
    float* normed = own.normed.data() + omp_get_thread_num() * std::max(shape.hidden, dim);
    for (int64_t begin = 0; begin < m; begin += kRowsAtOnce) {
      const int64_t count = std::min(m - begin, kRowsAtOnce);
      Range rows = own_part(count);
      for (int64_t row = rows.first; row < rows.last; ++row) {
        norm_row(x + (begin + row) * shape.hidden, layer.attention_norm, shape.hidden, shape.epsilon, normed);
        own.rows.set(layer.qkv, row, normed);
      }
#pragma omp barrier
      product(layer.qkv, own.rows, count, [&](int64_t row, int64_t channel, const Floats* found) {
        for (int v = 0; v < kVectors; ++v) store16(wide + row * n + channel + v * 16, found[v], lanes(16));
      });
#pragma omp barrier
      Range parts = own_part(count * heads);  // a head of a row each
      for (int64_t part = parts.first; part < parts.last; ++part) {
        int64_t row = begin + part / heads, head = part % heads;
        const float* from = wide + part / heads * n + head * dim;
        bool is_query = head < shape.heads, is_value = head >= shape.heads + shape.kv_heads;
        const float* weight = is_value ? nullptr : is_query ? layer.query_norm : layer.key_norm;
        if (weight) {
          norm_row(from, weight, dim, shape.epsilon, normed);
          from = normed;
        }
        if (is_value) {
          T* to = values + ((head - shape.heads - shape.kv_heads) * m + row) * dim;
          for (int64_t i = 0; i < dim; i += 16) store16(to + i, load16(from + i, lanes(dim - i)), lanes(dim - i));
        } else {
          T* to = is_query ? queries + (head * m + row) * dim : keys + ((head - shape.heads) * m + row) * dim;
          rotate_head(from, cosines + row * dim, sines + row * dim, dim, to);
        }
      }
    }
  }
}

// Adds a product's panels to sums [m, hidden].
auto adder(float* sums, int64_t hidden) {
  return [=](int64_t row, int64_t channel, const Floats* found) {
    for (int v = 0; v < kVectors; ++v) {
      Mask mask = lanes(hidden - channel - v * 16);
      float* to = sums + row * hidden + channel + v * 16;
      store16(to, load16(to, mask) + found[v], mask);
    }
  };
}

// attended: [m, heads * dim]; sums: [m, hidden].
template <typename T>
void add_attention(const RgShape& shape, const RgLayer& layer, const T* attended, float* sums, int64_t m, int threads) {
  Scratch& own = scratch();
  own.rows.reserve(layer.output, m);
#pragma omp parallel num_threads(threads)
  {
    Range rows = own_part(m);
    for (int64_t row = rows.first; row < rows.last; ++row) own.rows.set(layer.output, row, attended + row * layer.output.k);
#pragma omp barrier
    product(layer.output, own.rows, m, adder(sums, shape.hidden));
  }
}

// x, sums: [m, hidden], which may be the same.
void add_mlp(const RgShape& shape, const RgLayer& layer, const float* x, float* sums, int64_t m, int threads) {
  Scratch& own = scratch();
  static thread_local Rows of_inner;
  Rows &first = own.rows, &second = of_inner;  // the team's, not each thread's
  const int64_t inner = shape.intermediate, hidden = shape.hidden;
  first.reserve(layer.gate_up, std::min(m, kRowsAtOnce));
  second.reserve(layer.down, std::min(m, kRowsAtOnce));
  own.wide.resize(std::max<size_t>(own.wide.size(), std::min(m, kRowsAtOnce) * inner));
  own.normed.resize(std::max<size_t>(own.normed.size(), threads * hidden));
  float* wide = own.wide.data();
#pragma omp parallel num_threads(threads)
  {
    float* normed = own.normed.data() + omp_get_thread_num() * hidden;
    for (int64_t begin = 0; begin < m; begin += kRowsAtOnce) {
      const int64_t count = std::min(m - begin, kRowsAtOnce);
      Range rows = own_part(count);
      for (int64_t row = rows.first; row < rows.last; ++row) {
        norm_row(x + (begin + row) * hidden, layer.mlp_norm, hidden, shape.epsilon, normed);
        first.set(layer.gate_up, row, normed);
      }
#pragma omp barrier
      product(layer.gate_up, first, count, [&](int64_t row, int64_t channel, const Floats* found) {
        for (int v = 0; v < 2; ++v) {
          int64_t at = channel / 2 + v * 16;
          store16(wide + row * inner + at, silu16(found[v]) * found[v + 2], lanes(inner - at));
        }
      });
#pragma omp barrier
      for (int64_t row = rows.first; row < rows.last; ++row) second.set(layer.down, row, wide + row * inner);
#pragma omp barrier
      product(layer.down, second, count, adder(sums + begin * hidden, hidden));
    }
  }
}

}  // namespace
}  // namespace rillgate

using namespace rillgate;

extern "C" {

void rg_into_attention_f32(const RgShape* shape, const RgLayer* layer, const float* x, int64_t m, const float* cosines, const float* sines, float* queries, float* keys, float* values, int threads) {
  into_attention(*shape, *layer, x, m, cosines, sines, queries, keys, values, threads);
}

void rg_into_attention_bf16(const RgShape* shape, const RgLayer* layer, const float* x, int64_t m, const float* cosines, const float* sines, bf16* queries, bf16* keys, bf16* values, int threads) {
  into_attention(*shape, *layer, x, m, cosines, sines, queries, keys, values, threads);
}

void rg_add_attention_f32(const RgShape* shape, const RgLayer* layer, const float* attended, float* sums, int64_t m, int threads) {
  add_attention(*shape, *layer, attended, sums, m, threads);
}

void rg_add_attention_bf16(const RgShape* shape, const RgLayer* layer, const bf16* attended, float* sums, int64_t m, int threads) {
  add_attention(*shape, *layer, attended, sums, m, threads);
}

void rg_add_mlp(const RgShape* shape, const RgLayer* layer, const float* x, float* sums, int64_t m, int threads) {
  add_mlp(*shape, *layer, x, sums, m, threads);
}
}
