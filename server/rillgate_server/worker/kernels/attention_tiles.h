// Tiles of 64 tokens of the cache, as dot products of pairs read them.
//
//     keys     [dim/2][64 tokens][2]           scores of up to 6 queries with 64 tokens: one pass over it
//     values   [dim/64][64 tokens/2][64][2]    sums of up to 6 rows of weights over the tokens: one pass each
//
// Keys and values lie in blocks, in bf16 or in int8 with a scale per token and head. int8 is exact in bf16; its scales
// are for whoever uses the tile. Does not know queries, softmax or threads.
#pragma once

#include "packed_gemm.h"

extern "C" {

struct RgHeads {
  int64_t heads, kv_heads, key_dim, value_dim;  // dims of a head: multiples of 32 and of 16
  float scale;
};

// One layer's keys, or its values: blocks of [block_size, kv_heads, dim], `stride` elements apart.
struct RgVectors {
  void* elements;     // bf16, or int8 where there are scales
  uint16_t* scales;   // blocks of [block_size, kv_heads], `scale_stride` elements apart; or null
  int64_t stride, scale_stride, dim;
};

struct RgCache {
  RgVectors keys, values;
  int64_t block_size, kv_heads;
};
}

namespace rillgate {

constexpr int kLanes = 16;
constexpr int kTile = 64;  // tokens

// From 16 rows of 16 to 16 columns of 16.
inline void transpose16(__m512i (&r)[kLanes]) {
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

// 32 elements as bf16, or 16 and zeros.
inline __m512i load32(const bf16* from, bool whole) {
  return _mm512_maskz_loadu_epi16(whole ? 0xffffffffu : 0xffffu, from);
}
inline __m512 load16(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
inline __m512i load32(const int8_t* from, bool whole) {
  return (__m512i)_mm512_cvtne2ps_pbh(whole ? load16(from + 16) : _mm512_setzero_ps(), load16(from));
}

// Where tokens of a tile lie: block and offset in it; -1: not seen by anybody, zeros stand there.
struct Places {
  int64_t blocks[kTile], offsets[kTile];

  // The tile that begins at position `begin`, of which [first, last) is seen.
  void find(const int64_t* table, int64_t block_size, int64_t begin, int64_t first, int64_t last) {
    int64_t index = begin / block_size, offset = begin % block_size;
    for (int i = 0; i < kTile; ++i) {
      bool is_seen = begin + i >= first && begin + i < last;
      blocks[i] = is_seen ? table[index] : -1;
      offsets[i] = offset;
      if (++offset == block_size) offset = 0, ++index;
    }
  }
};

template <typename T>
inline const T* vector_at(const RgVectors& of, const Places& places, int token, int64_t kv_heads, int64_t head, const void* zeros) {
  if (places.blocks[token] < 0) return (const T*)zeros;
  return (const T*)of.elements + places.blocks[token] * of.stride + (places.offsets[token] * kv_heads + head) * of.dim;
}

// The first `vectors` times 16 tokens of a tile's keys.
template <typename T>
inline void pack_keys(const RgVectors& keys, const Places& places, int64_t kv_heads, int64_t head, int vectors, const void* zeros, bf16* panel) {
  for (int v = 0; v < vectors; ++v) {
    const T* from[kLanes];
    for (int i = 0; i < kLanes; ++i) from[i] = vector_at<T>(keys, places, v * kLanes + i, kv_heads, head, zeros);
    for (int64_t dim = 0; dim < keys.dim; dim += 32) {
      __m512i pairs[kLanes];
      for (int i = 0; i < kLanes; ++i) pairs[i] = load32(from[i] + dim, true);
      transpose16(pairs);
      for (int i = 0; i < kLanes; ++i) _mm512_store_si512(panel + ((dim / 2 + i) * kTile + v * kLanes) * 2, pairs[i]);
    }
  }
}

template <typename T>
inline void pack_values(const RgVectors& values, const Places& places, int64_t kv_heads, int64_t head, int vectors, const void* zeros, bf16* panel) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) order[0][i] = i / 2 + i % 2 * 32, order[1][i] = order[0][i] + 16;
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int token = 0; token < vectors * kLanes; token += 2) {
    const T* one = vector_at<T>(values, places, token, kv_heads, head, zeros);
    const T* other = vector_at<T>(values, places, token + 1, kv_heads, head, zeros);
    for (int64_t dim = 0; dim < values.dim; dim += 32) {
      bool whole = dim + 32 <= values.dim;
      __m512i a = load32(one + dim, whole), b = load32(other + dim, whole);
      bf16* to = panel + (dim / kPanel * kTile * kPanel) + (token * kPanel) + dim % kPanel * 2;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Scales of a tile's tokens, float; 0 where nobody sees.
inline void load_scales(const RgVectors& of, const Places& places, int64_t kv_heads, int64_t head, float* to) {
  for (int i = 0; i < kTile; ++i)
    to[i] = places.blocks[i] < 0 ? 0.0f : to_float(of.scales[places.blocks[i] * of.scale_stride + places.offsets[i] * kv_heads + head]);
}

// A tile that comes into the cache bit by bit while another one is computed: all at once would wait for memory, and
// nothing would be computed meanwhile.
struct Upcoming {
  const RgCache& cache;
  int64_t head, heads;  // of keys
  Places places;
  int next = kTile, step = 0;  // tokens

  void begin(int64_t num_parts) { next = 0, step = int((kTile + num_parts - 1) / num_parts); }

  // Always inline: GCC takes a call that only prefetches for one without effect, and drops it.
  [[gnu::always_inline]] inline void advance() {
    for (int last = std::min(kTile, next + step); next < last; ++next) {
      if (places.blocks[next] < 0) continue;
      fetch(cache.keys);
      fetch(cache.values);
    }
  }

 private:
  [[gnu::always_inline]] inline void fetch(const RgVectors& of) {
    const int64_t size = of.scales ? 1 : 2;
    const char* from = (const char*)of.elements + (places.blocks[next] * of.stride + (places.offsets[next] * cache.kv_heads + head) * of.dim) * size;
    for (int64_t at = 0; at < heads * of.dim * size; at += 64) _mm_prefetch(from + at, _MM_HINT_T1);
    if (of.scales) _mm_prefetch((const char*)(of.scales + places.blocks[next] * of.scale_stride + places.offsets[next] * cache.kv_heads), _MM_HINT_T1);
  }
};

// Sums over `steps` pairs of panel columns and rows x, `stride` elements apart.
template <int Rows, int Vectors>
inline void multiply(const bf16* panel, const bf16* x, int64_t stride, int64_t steps, __m512 (&sums)[Rows][Vectors]) {
  __m512 own[Rows][Vectors];  // not the caller's, which GCC would keep in memory
  for (auto& row : own)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < steps; ++k, panel += kPanel * 2) {
    __m512bh columns[Vectors];
    for (int v = 0; v < Vectors; ++v) columns[v] = (__m512bh)_mm512_load_si512(panel + v * 32);
    for (int r = 0; r < Rows; ++r) {
      int32_t two;
      std::memcpy(&two, x + r * stride + 2 * k, 4);
      __m512bh spread = (__m512bh)_mm512_set1_epi32(two);
      for (int v = 0; v < Vectors; ++v) own[r][v] = _mm512_dpbf16_ps(own[r][v], columns[v], spread);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) sums[r][v] = own[r][v];
}

// Call `take` with `count` as a compile-time constant in [1, Most].
template <int Most, typename Take>
inline void as_constant(int64_t count, Take take) {
  if constexpr (Most > 1) {
    if (count < Most) return as_constant<Most - 1>(count, take);
  }
  take(std::integral_constant<int, Most>());
}

}  // namespace rillgate
