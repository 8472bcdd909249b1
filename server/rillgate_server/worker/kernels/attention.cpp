// Attention of decode rows (one token each) over block tables, keys and values in bf16.
//
// Each row and head of keys is worked on alone, in an order that only its context decides: what else is in the batch
// changes no bit. Scores and sums are float32, products exact (Q K^T by dot products of pairs, as in packed_gemm.h).

#include "packed_gemm.h"

using namespace rillgate;

extern "C" {

struct RgHeads {
  int64_t heads, kv_heads, key_dim, value_dim;  // dims of a head: multiples of 32 and of 16
  float scale;
};

// One layer's cache: blocks of [block_size, kv_heads, dim], `stride` elements apart.
struct RgCache {
  const bf16* keys;
  const bf16* values;
  int64_t key_stride, value_stride, block_size;
};

// The rows of a step: which token of it, at which position, over which blocks, seeing how far back (0: all).
struct RgDecodeRows {
  const int64_t* offsets;
  const int64_t* positions;
  const int64_t* const* tables;
  int64_t num_rows, window;
};
}

namespace rillgate {
namespace {

constexpr int kLanes = 16;

// From 16 rows of 16 to 16 columns of 16.
void transpose16(__m512i (&r)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

struct Context {
  const int64_t* table;
  int64_t first, count, block_size;

  // Where a token's vectors lie, in elements from the cache's begin.
  int64_t place(int64_t token, int64_t stride, int64_t size) const {
    int64_t at = first + token;
    return table[at / block_size] * stride + at % block_size * size;
  }
};

// scores[group][token] = q . k, for the `group` queries of a head of keys.
void score(const RgHeads& shape, const RgCache& cache, const Context& context, int64_t kv_head, const bf16* queries,
           int64_t query_stride, int64_t group, float* scores, int64_t padded) {
  const int64_t size = shape.kv_heads * shape.key_dim;
  std::memset(scores, 0, group * padded * sizeof(float));
  for (int64_t token = 0; token < padded; token += kLanes) {
    const bf16* keys[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      int64_t known = std::min(token + i, context.count - 1);  // past the end: the last one, which is masked later
      keys[i] = cache.keys + context.place(known, cache.key_stride, size) + kv_head * shape.key_dim;
    }
    for (int64_t dim = 0; dim < shape.key_dim; dim += 32) {
      __m512i pairs[kLanes];
      for (int i = 0; i < kLanes; ++i) pairs[i] = _mm512_loadu_si512(keys[i] + dim);
      transpose16(pairs);
      for (int64_t g = 0; g < group; ++g) {
        float* to = scores + g * padded + token;
        __m512 sum = _mm512_loadu_ps(to);
        const bf16* query = queries + g * query_stride + dim;
        for (int i = 0; i < kLanes; ++i) {
          int32_t two;
          std::memcpy(&two, query + 2 * i, 4);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)pairs[i], (__m512bh)_mm512_set1_epi32(two));
        }
        _mm512_storeu_ps(to, sum);
      }
    }
  }
}

// Scores to weights that add up to the returned sum.
float soften(float* scores, int64_t count, int64_t padded, float scale) {
  __m512 largest = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < padded; i += kLanes) {
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(scale));
    value = _mm512_mask_blend_ps(lanes(count - i), _mm512_set1_ps(-INFINITY), value);
    _mm512_storeu_ps(scores + i, value);
    largest = _mm512_max_ps(largest, value);
  }
  float most = _mm512_reduce_max_ps(largest);
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded; i += kLanes) {
    __m512 weight = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(most)));
    weight = _mm512_maskz_mov_ps(lanes(count - i), weight);
    _mm512_storeu_ps(scores + i, weight);
    total = _mm512_add_ps(total, weight);
  }
  return _mm512_reduce_add_ps(total);
}

// out[g] = sum over tokens of weight * value, for `Group` queries and 64 columns at a time.
template <int Group>
void weigh(const RgHeads& shape, const RgCache& cache, const Context& context, int64_t kv_head, const float* weights,
           const float* totals, int64_t padded, bf16* out) {
  const int64_t size = shape.kv_heads * shape.value_dim;
  for (int64_t dim = 0; dim < shape.value_dim; dim += 64) {
    const int parts = int(std::min<int64_t>(4, (shape.value_dim - dim) / 16));
    __m512 sums[Group][4];
    for (auto& row : sums)
      for (auto& sum : row) sum = _mm512_setzero_ps();
    for (int64_t token = 0; token < context.count; ++token) {
      const bf16* value = cache.values + context.place(token, cache.value_stride, size) + kv_head * shape.value_dim + dim;
      __m512 wide[4];
      for (int p = 0; p < 4; ++p) wide[p] = p < parts ? load16(value + p * 16) : _mm512_setzero_ps();
      for (int g = 0; g < Group; ++g) {
        __m512 weight = _mm512_set1_ps(weights[g * padded + token]);
        for (int p = 0; p < 4; ++p) sums[g][p] = _mm512_fmadd_ps(weight, wide[p], sums[g][p]);
      }
    }
    for (int g = 0; g < Group; ++g)
      for (int p = 0; p < parts; ++p)
        store16(out + g * shape.value_dim + dim + p * 16, _mm512_div_ps(sums[g][p], _mm512_set1_ps(totals[g])), 0xffff);
  }
}

void weigh_some(int64_t group, const RgHeads& shape, const RgCache& cache, const Context& context, int64_t kv_head,
                const float* weights, const float* totals, int64_t padded, bf16* out) {
  for (int64_t g = 0; g < group;) {
    const float* of = weights + g * padded;
    bf16* to = out + g * shape.value_dim;
    switch (std::min<int64_t>(group - g, 6)) {
      case 6: weigh<6>(shape, cache, context, kv_head, of, totals + g, padded, to), g += 6; break;
      case 5: weigh<5>(shape, cache, context, kv_head, of, totals + g, padded, to), g += 5; break;
      case 4: weigh<4>(shape, cache, context, kv_head, of, totals + g, padded, to), g += 4; break;
      case 3: weigh<3>(shape, cache, context, kv_head, of, totals + g, padded, to), g += 3; break;
      case 2: weigh<2>(shape, cache, context, kv_head, of, totals + g, padded, to), g += 2; break;
      default: weigh<1>(shape, cache, context, kv_head, of, totals + g, padded, to), g += 1;
    }
  }
}

}  // namespace
}  // namespace rillgate

// queries: [heads, num_tokens, key_dim]; out: [num_tokens, heads, value_dim].
extern "C" void rg_attend_decode(const RgHeads* heads, const RgCache* cache, const RgDecodeRows* rows, const bf16* queries,
                                 int64_t num_tokens, bf16* out, int threads) {
  const RgHeads& shape = *heads;
  const int64_t group = shape.heads / shape.kv_heads;
#pragma omp parallel num_threads(threads)
  {
    static thread_local std::vector<float> scores;
    std::vector<float> totals(group);
    // Rows differ in length: whoever is free takes the next.
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < rows->num_rows * shape.kv_heads; ++part) {
      int64_t row = part / shape.kv_heads, kv_head = part % shape.kv_heads;
      int64_t end = rows->positions[row] + 1;
      int64_t first = rows->window ? std::max<int64_t>(0, end - rows->window) : 0;
      Context context{rows->tables[row], first, end - first, cache->block_size};
      int64_t padded = (context.count + kLanes - 1) / kLanes * kLanes;
      scores.resize(std::max<size_t>(scores.size(), group * padded));
      int64_t token = rows->offsets[row];
      const bf16* of = queries + (kv_head * group * num_tokens + token) * shape.key_dim;
      score(shape, *cache, context, kv_head, of, num_tokens * shape.key_dim, group, scores.data(), padded);
      for (int64_t g = 0; g < group; ++g) totals[g] = soften(scores.data() + g * padded, context.count, padded, shape.scale);
      bf16* to = out + (token * shape.heads + kv_head * group) * shape.value_dim;
      weigh_some(group, shape, *cache, context, kv_head, scores.data(), totals.data(), padded, to);
    }
  }
}
