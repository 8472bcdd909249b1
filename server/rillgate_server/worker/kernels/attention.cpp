// Attention of a step's rows over block tables, bf16 queries, keys and values in bf16 or int8: flash attention's method
// (Dao, https://arxiv.org/abs/2307.08691) over tiles of 64 tokens. Stores the step's keys and values first.
//
//     position   | 0 .. 63 | 64 .. 127 |  ...  | 512 .. |         tiles lie at the same positions for every token
//     split      | 0                           | 1                 each sums on its own; then they are added in order
//
// So a token's numbers hang on its own context alone: not on what else is in the batch, on how its prompt was cut, on
// whether it is decoded or verified beside drafts, nor on the number of threads. Scores and sums are float32; weights
// are rounded to bf16, and it is the rounded ones that are divided by their sum. int8 is taken as it is: a key's scale
// goes into the score, a value's into the weight.

#include "attention_tiles.h"

using namespace rillgate;

extern "C" {

// What the step brings: [kv_heads, num_tokens, dim] in bf16, and where each token goes.
struct RgNewTokens {
  const bf16 *keys, *values;
  const int64_t *blocks, *offsets;
  int64_t num_tokens;
};

// The rows of a step: which tokens of it, at which positions, over which blocks, seeing how far back (0: all).
struct RgRows {
  const int64_t *offsets, *starts, *counts;
  const int64_t* const* tables;
  int64_t num_rows, window;
};
}

namespace rillgate {
namespace {

constexpr int64_t kSplit = 512;     // tokens
constexpr int64_t kQueryRows = 192; // of a query tile, about: what is kept for them stays in the second-level cache

// 2^x to about one unit in the last place (Cephes' polynomial), 0 below -150, and NaN for NaN.
__m512 power16(__m512 x) {
  __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // its second operand where that is NaN
  __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_sub_ps(bounded, n);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  for (float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

float power(float x) { return _mm512_cvtss_f32(power16(_mm512_set1_ps(x))); }

// Memory that grows and stays, at cache lines.
struct Buffer {
  std::vector<char> bytes;

  char* reserve(size_t size) {
    if (bytes.size() < size + 64) bytes.resize(size + 64);
    return (char*)(((uintptr_t)bytes.data() + 63) / 64 * 64);
  }
};

// Rows' sums over a part of their context: largest score (times log2 e), sum of weights, weighted values.
struct Sums {
  float *largest, *total, *values;

  static int64_t size(int64_t rows, int64_t value_dim) { return rows * (value_dim + 2); }
  static Sums at(float* memory, int64_t rows, int64_t value_dim) {
    return {memory + rows * value_dim, memory + rows * (value_dim + 1), memory};
  }
};

// Query rows of some heads of keys: `count` tokens from position `start` on, each with the group's heads.
struct Queries {
  const bf16* rows;  // [heads of keys, count * group, key_dim]
  int64_t start, count, group, window;

  int64_t first_seen(int64_t token) const { return window ? std::max<int64_t>(0, start + token - window + 1) : 0; }
  int64_t num_rows() const { return count * group; }
};

struct Work {
  const RgHeads& heads;
  const RgCache& cache;
  bf16 *keys, *values;  // panels
  const void* zeros;
  float* lanes_of_totals;  // [rows, 16]
};

// One tile: its position and who sees how much of it.
struct Tile {
  int64_t begin;
  int vectors;
  alignas(64) float key_scales[kTile], value_scales[kTile];
};

// Weights of `Rows` rows from `row` on, [Rows, 64] in bf16; sums so far are brought to the new largest score.
template <bool Scaled, int Rows, int Vectors>
void weigh(const Work& work, const Queries& queries, const Tile& tile, int64_t row, const Sums& sums, bf16* weights) {
  const int64_t key_dim = work.heads.key_dim, value_dim = work.heads.value_dim;
  __m512 scores[Rows][Vectors];
  multiply<Rows, Vectors>(work.keys, queries.rows + row * key_dim, key_dim, key_dim / 2, scores);
  const __m512 factor = _mm512_set1_ps(work.heads.scale * 1.44269504f);
  float most[Rows];
  __m512 added[Rows];
  for (int r = 0; r < Rows; ++r) {
    int64_t token = (row + r) / queries.group, last = queries.start + token - tile.begin;
    int64_t first = queries.first_seen(token) - tile.begin;
    __m512 found = _mm512_set1_ps(-INFINITY);
    for (int v = 0; v < Vectors; ++v) {
      __m512& score = scores[r][v];
      if constexpr (Scaled) score = _mm512_mul_ps(score, _mm512_load_ps(tile.key_scales + v * kLanes));
      if (first > 0 || last < kTile - 1) {
        __mmask16 seen = lanes(last + 1 - v * kLanes) & ~lanes(first - v * kLanes);
        score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), score);
      }
      found = _mm512_max_ps(found, score);
    }
    most[r] = std::max(sums.largest[row + r], _mm512_reduce_max_ps(found) * work.heads.scale * 1.44269504f);
  }
  for (int r = 0; r < Rows; ++r) {
    __m512 part[4];
    for (auto& sum : part) sum = _mm512_setzero_ps();
    for (int v = 0; v < Vectors; ++v) {
      __m512 weight = power16(_mm512_fmsub_ps(scores[r][v], factor, _mm512_set1_ps(most[r])));
      __m512 used = weight;
      if constexpr (Scaled) used = _mm512_mul_ps(weight, _mm512_load_ps(tile.value_scales + v * kLanes));
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(used);
      _mm256_storeu_si256((__m256i*)(weights + r * kTile + v * kLanes), rounded);
      part[v] = Scaled ? weight : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    }
    added[r] = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
  }
  for (int r = 0; r < Rows; ++r) {
    float* of_total = work.lanes_of_totals + (row + r) * kLanes;
    __m512 total = _mm512_load_ps(of_total);
    if (most[r] != sums.largest[row + r]) {
      const __m512 shrunk = power16(_mm512_set1_ps(sums.largest[row + r] - most[r]));
      float* values = sums.values + (row + r) * value_dim;
      total = _mm512_mul_ps(total, shrunk);
      for (int64_t dim = 0; dim < value_dim; dim += 16)
        _mm512_storeu_ps(values + dim, _mm512_mul_ps(_mm512_loadu_ps(values + dim), shrunk));
      sums.largest[row + r] = most[r];
    }
    _mm512_store_ps(of_total, _mm512_add_ps(total, added[r]));
  }
}

// Add the tile's weighted values.
template <int Rows>
void add_values(const Work& work, const Tile& tile, const bf16* weights, float* values) {
  const int64_t value_dim = work.heads.value_dim;
  for (int64_t dim = 0; dim < value_dim; dim += kPanel) {
    as_constant<kVectors>((value_dim - dim) / kLanes, [&](auto vectors) {
      constexpr int Vectors = decltype(vectors)::value;
      __m512 found[Rows][Vectors];
      multiply<Rows, Vectors>(work.values + dim * kTile, weights, kTile, tile.vectors * kLanes / 2, found);
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vectors; ++v) {
          float* to = values + r * value_dim + dim + v * kLanes;
          _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), found[r][v]));
        }
    });
  }
}

// A run of positions [first, last) over a block table, taken from the tile at `begin` on.
struct Stretch {
  const int64_t* table;
  int64_t begin, first, last;

  void find(Places& places, int64_t block_size, int64_t at) const {
    places.find(table, block_size, at, std::max(at, first), std::min(at + kTile, last));
  }
};

// What the queries see of the positions [begin, end).
Stretch seen_of(const Queries& queries, const int64_t* table, int64_t begin, int64_t end) {
  const int64_t first = queries.first_seen(0);
  return {table, std::max(begin, first / kTile * kTile), first, std::min(end, queries.start + queries.count)};
}

struct HeadRange {
  int64_t first, count;
};

// Add a tile, which is packed, to one head's sums.
template <bool Scaled>
void add_tile(const Work& work, const Queries& queries, const Tile& tile, const Sums& sums, Upcoming& upcoming) {
  // Tokens before the tile do not see it, nor do those whose window has left it behind.
  int64_t first = std::max<int64_t>(0, tile.begin - queries.start);
  int64_t last = queries.window ? std::min(queries.count, tile.begin + kTile - 1 + queries.window - queries.start) : queries.count;
  int64_t row = first * queries.group, left = std::max<int64_t>(0, last - first) * queries.group;
  for (int64_t tiles = (left + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    int64_t count = (left + tiles - 1) / tiles;  // alike, since a tile of one row waits for its own sums
    as_constant<kTileRows>(count, [&](auto number) {
      constexpr int Rows = decltype(number)::value;
      alignas(64) bf16 weights[Rows * kTile];
      as_constant<kVectors>(tile.vectors, [&](auto vectors) {
        weigh<Scaled, Rows, decltype(vectors)::value>(work, queries, tile, row, sums, weights);
      });
      upcoming.advance();
      add_values<Rows>(work, tile, weights, sums.values + row * work.heads.value_dim);
    });
    upcoming.advance();
    row += count, left -= count;
  }
}

// Sum over what is seen of one split, a tile at a time, for some heads. sums: the first head's, the others behind it.
// `after` is what comes next.
template <typename T>
void attend_split(const Work& work, const Queries& queries, const Stretch& seen, const HeadRange& heads, float* sums, const Stretch* after) {
  constexpr bool Scaled = std::is_same_v<T, int8_t>;
  const RgCache& cache = work.cache;
  const int64_t rows = queries.num_rows(), kv_heads = cache.kv_heads, size = Sums::size(rows, work.heads.value_dim);
  std::memset(sums, 0, heads.count * size * sizeof(float));
  std::memset(work.lanes_of_totals, 0, heads.count * rows * kLanes * sizeof(float));
  for (int64_t head = 0; head < heads.count; ++head)
    std::fill_n(Sums::at(sums + head * size, rows, work.heads.value_dim).largest, rows, -INFINITY);
  Places now;
  Upcoming upcoming{cache, heads.first, heads.count, {}};
  Tile tile;
  tile.begin = seen.begin;
  if (tile.begin < seen.last) seen.find(now, cache.block_size, tile.begin);
  for (; tile.begin < seen.last; tile.begin += kTile, now = upcoming.places) {
    tile.vectors = int((std::min<int64_t>(seen.last - tile.begin, kTile) + kLanes - 1) / kLanes);
    const bool is_last = tile.begin + kTile >= seen.last;
    if (!is_last || after) {
      is_last ? after->find(upcoming.places, cache.block_size, after->begin) : seen.find(upcoming.places, cache.block_size, tile.begin + kTile);
      upcoming.begin(heads.count * (2 + 2 * ((rows + kTileRows - 1) / kTileRows)));
    }
    for (int64_t head = 0; head < heads.count; ++head) {
      const int64_t kv_head = heads.first + head;
      upcoming.advance();
      pack_keys<T>(cache.keys, now, kv_heads, kv_head, tile.vectors, work.zeros, work.keys);
      upcoming.advance();
      pack_values<T>(cache.values, now, kv_heads, kv_head, tile.vectors, work.zeros, work.values);
      if constexpr (Scaled) {
        load_scales(cache.keys, now, kv_heads, kv_head, tile.key_scales);
        load_scales(cache.values, now, kv_heads, kv_head, tile.value_scales);
      }
      Work own = work;
      own.lanes_of_totals += head * rows * kLanes;
      Queries of = queries;
      of.rows += head * rows * work.heads.key_dim;
      add_tile<Scaled>(own, of, tile, Sums::at(sums + head * size, rows, work.heads.value_dim), upcoming);
    }
  }
  for (int64_t head = 0; head < heads.count; ++head)
    for (int64_t row = 0; row < rows; ++row)
      Sums::at(sums + head * size, rows, work.heads.value_dim).total[row] =
          _mm512_reduce_add_ps(_mm512_load_ps(work.lanes_of_totals + (head * rows + row) * kLanes));
}

// Add what a later split gave.
void add_split(const Sums& sums, const Sums& other, int64_t rows, int64_t value_dim) {
  for (int64_t row = 0; row < rows; ++row) {
    if (other.largest[row] == -INFINITY && other.total[row] == 0.0f) continue;  // sees nothing of it
    float largest = std::max(sums.largest[row], other.largest[row]);
    float own = power(sums.largest[row] - largest), theirs = power(other.largest[row] - largest);
    sums.largest[row] = largest;
    sums.total[row] = sums.total[row] * own + other.total[row] * theirs;
    float *to = sums.values + row * value_dim, *from = other.values + row * value_dim;
    for (int64_t dim = 0; dim < value_dim; dim += 16) {
      __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(to + dim), _mm512_set1_ps(own));
      _mm512_storeu_ps(to + dim, _mm512_fmadd_ps(_mm512_loadu_ps(from + dim), _mm512_set1_ps(theirs), kept));
    }
  }
}

// One vector to int8 with a scale, as worker/layer_cache.py defines it.
void quantize_vector(const bf16* from, int64_t dim, int8_t* to, bf16* scale) {
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  __m512i largest = _mm512_setzero_si512();  // as integers, in which NaN is above infinity
  for (int64_t i = 0; i < dim; i += 16)
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_and_ps(load16(from + i), magnitude)));
  uint32_t bits = _mm512_reduce_max_epu32(largest);
  float most;
  std::memcpy(&most, &bits, 4);
  store16(scale, _mm512_set1_ps(most / 127.0f), 1);
  const __m512 rounded = _mm512_set1_ps(to_float(*scale));
  for (int64_t i = 0; i < dim; i += 16) {
    __m512 ratio = _mm512_div_ps(load16(from + i), rounded);
    ratio = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(ratio, ratio, _CMP_ORD_Q), ratio);
    ratio = _mm512_min_ps(_mm512_set1_ps(127.0f), _mm512_max_ps(_mm512_set1_ps(-127.0f), ratio));
    __m512i whole = _mm512_cvt_roundps_epi32(ratio, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i*)(to + i), _mm512_cvtepi32_epi8(whole));
  }
}

void store_vector(const RgVectors& to, const bf16* from, int64_t block, int64_t place) {
  if (to.scales) {
    quantize_vector(from, to.dim, (int8_t*)to.elements + block * to.stride + place * to.dim, to.scales + block * to.scale_stride + place);
  } else {
    std::memcpy((bf16*)to.elements + block * to.stride + place * to.dim, from, to.dim * sizeof(bf16));
  }
}

// What one thread does at a time: a query tile of a row, for some heads of keys, over some splits.
struct Unit {
  int64_t row, token, count;
  HeadRange heads;
  int64_t first_split, last_split, memory;  // memory: of its sums, -1: its result goes out
};

struct Plan {
  std::vector<Unit> units;
  int64_t memory = 0;  // floats, of sums that are added up by and by
};

Plan plan(const RgHeads& heads, const RgRows& rows, int threads) {
  const int64_t group = heads.heads / heads.kv_heads, most = std::max<int64_t>(1, kQueryRows / group);
  Plan found;
  int64_t tiles = 0, splits = 0;
  for (int64_t row = 0; row < rows.num_rows; ++row) {
    tiles += (rows.counts[row] + most - 1) / most;
    splits += (rows.starts[row] + rows.counts[row] - 1) / kSplit + 1;
  }
  // Few tiles of long contexts: a split each, so that all threads have work. All heads of few queries together: they
  // lie side by side, and reading is what takes the time.
  const bool are_many = tiles >= 4 * threads;
  for (int64_t row = 0; row < rows.num_rows; ++row)
    for (int64_t end = rows.counts[row]; end > 0; end -= most) {  // the longest context first
      int64_t token = std::max<int64_t>(0, end - most), position = rows.starts[row] + token;
      int64_t first = rows.window ? std::max<int64_t>(0, position - rows.window + 1) / kSplit : 0;
      int64_t last = (rows.starts[row] + end - 1) / kSplit + 1;
      const bool is_short = (end - token) * heads.heads <= kQueryRows && splits >= 2 * threads;
      const int64_t step = is_short ? heads.kv_heads : 1;
      for (int64_t head = 0; head < heads.kv_heads; head += step) {
        HeadRange of{head, step};
        if (are_many || last - first == 1) {
          found.units.push_back({row, token, end - token, of, first, last, -1});
          continue;
        }
        for (int64_t split = first; split < last; ++split) {
          found.units.push_back({row, token, end - token, of, split, split + 1, found.memory});
          found.memory += step * Sums::size((end - token) * group, heads.value_dim);
        }
      }
    }
  return found;
}

struct Step {
  const RgHeads& heads;
  const RgCache& cache;
  const RgRows& rows;
  const bf16* queries;  // [heads, num_tokens, key_dim]
  int64_t num_tokens;
  bf16* out;  // [num_tokens, heads, value_dim]
  const std::vector<Unit>& units;
  float* memory;

  int64_t group() const { return heads.heads / heads.kv_heads; }
  int64_t num_rows(const Unit& unit) const { return unit.count * group(); }
  int64_t size(const Unit& unit) const { return Sums::size(num_rows(unit), heads.value_dim); }

  void put(const Unit& unit, float* of_heads) const {
    for (int64_t head = 0; head < unit.heads.count; ++head) {
      const Sums sums = Sums::at(of_heads + head * size(unit), num_rows(unit), heads.value_dim);
      for (int64_t row = 0; row < num_rows(unit); ++row) {
        int64_t token = rows.offsets[unit.row] + unit.token + row / group();
        bf16* to = out + (token * heads.heads + (unit.heads.first + head) * group() + row % group()) * heads.value_dim;
        const __m512 total = _mm512_set1_ps(sums.total[row]);
        for (int64_t dim = 0; dim < heads.value_dim; dim += 16)
          store16(to + dim, _mm512_div_ps(_mm512_loadu_ps(sums.values + row * heads.value_dim + dim), total), 0xffff);
      }
    }
  }

  void add(const Unit& unit, float* to, float* from) const {
    for (int64_t head = 0; head < unit.heads.count; ++head)
      add_split(Sums::at(to + head * size(unit), num_rows(unit), heads.value_dim), Sums::at(from + head * size(unit), num_rows(unit), heads.value_dim), num_rows(unit), heads.value_dim);
  }

  Queries queries_of(const Unit& unit, const bf16* packed) const {
    return {packed, rows.starts[unit.row] + unit.token, unit.count, group(), rows.window};
  }

  Stretch stretch(const Unit& unit, int64_t split) const {
    return seen_of(queries_of(unit, nullptr), rows.tables[unit.row], split * kSplit, (split + 1) * kSplit);
  }

  // after: what this thread probably takes next.
  void run(const Unit& unit, const Unit* after) const {
    static thread_local Buffer of_work;
    const int64_t all_rows = unit.heads.count * num_rows(unit), all_sums = unit.heads.count * size(unit);
    const int64_t padded = (heads.value_dim + kPanel - 1) / kPanel * kPanel, widest = std::max(heads.key_dim, padded);
    // In floats; all but the last two are whole cache lines.
    const int64_t keys = heads.key_dim * kTile / 2, values = padded * kTile / 2, totals = all_rows * kLanes;
    float* of_keys = (float*)of_work.reserve((keys + values + totals + widest + all_rows * heads.key_dim / 2 + 2 * all_sums) * sizeof(float));
    float *of_values = of_keys + keys, *of_totals = of_values + values, *zeros = of_totals + totals;
    bf16* packed = (bf16*)(zeros + widest);
    float* own = zeros + widest + all_rows * heads.key_dim / 2;
    std::memset(zeros, 0, widest * sizeof(float));
    for (int64_t row = 0; row < all_rows; ++row) {
      int64_t in_head = row % num_rows(unit), token = rows.offsets[unit.row] + unit.token + in_head / group();
      int64_t head = (unit.heads.first + row / num_rows(unit)) * group() + in_head % group();
      std::memcpy(packed + row * heads.key_dim, queries + (head * num_tokens + token) * heads.key_dim, heads.key_dim * sizeof(bf16));
    }
    Work work{heads, cache, (bf16*)of_keys, (bf16*)of_values, zeros, of_totals};
    float* sums = unit.memory < 0 ? own : memory + unit.memory;
    for (int64_t split = unit.first_split; split < unit.last_split; ++split) {
      Stretch next;
      const bool is_last = split + 1 == unit.last_split;
      if (!is_last || after) next = is_last ? stretch(*after, after->first_split) : stretch(unit, split + 1);
      auto attend = cache.keys.scales ? attend_split<int8_t> : attend_split<bf16>;
      float* into = split == unit.first_split ? sums : own + all_sums;
      attend(work, queries_of(unit, packed), stretch(unit, split), unit.heads, into, !is_last || after ? &next : nullptr);
      if (split != unit.first_split) add(unit, sums, into);
    }
    if (unit.memory < 0) put(unit, sums);
  }

  bool continues(size_t index) const {
    if (index == 0) return false;
    const Unit &unit = units[index], &before = units[index - 1];
    return before.row == unit.row && before.token == unit.token && before.heads.first == unit.heads.first;
  }

  // Add up the splits of the query tile that begins with unit `index`, if one does.
  void join(size_t index) const {
    const Unit& unit = units[index];
    if (unit.memory < 0 || continues(index)) return;
    for (size_t next = index + 1; next < units.size() && continues(next); ++next) add(unit, memory + unit.memory, memory + units[next].memory);
    put(unit, memory + unit.memory);
  }
};

}  // namespace
}  // namespace rillgate

extern "C" void rg_attend(const RgHeads* heads, const RgCache* cache, const RgNewTokens* added, const RgRows* rows, const bf16* queries, bf16* out, int threads) {
  static thread_local Buffer of_sums;
  const int64_t num_tokens = added->num_tokens, kv_heads = heads->kv_heads;
  const Plan work = plan(*heads, *rows, threads);
  float* memory = (float*)of_sums.reserve(work.memory * sizeof(float));
  const Step step{*heads, *cache, *rows, queries, num_tokens, out, work.units, memory};
  const int64_t num_units = work.units.size();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t part = 0; part < num_tokens * kv_heads; ++part) {
      int64_t token = part / kv_heads, head = part % kv_heads, place = added->offsets[token] * kv_heads + head;
      store_vector(cache->keys, added->keys + (head * num_tokens + token) * heads->key_dim, added->blocks[token], place);
      store_vector(cache->values, added->values + (head * num_tokens + token) * heads->value_dim, added->blocks[token], place);
    }
    // Contexts differ in length: whoever is free takes the next.
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < num_units; ++index) step.run(work.units[index], index + threads < num_units ? &work.units[index + threads] : nullptr);
    if (work.memory) {
#pragma omp for
      for (int64_t index = 0; index < num_units; ++index) step.join(index);
    }
  }
}
