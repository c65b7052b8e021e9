// y = x W^T + b with weights and activations in int8: a scale for every 32 inputs of an output, and
// of a row. Activations are quantised here, once for all outputs; integers are summed within a
// block, and blocks in fp32. Python: linear_int8.py; the same in torch: model/quantization.py.
//
// A token's result does not depend on the tokens beside it nor on their number.

#include <memory>
#include <vector>

#include "kernels.h"
#include "outputs.h"
#include "tile_int8.h"
#include "tile_int8_amx.h"

namespace sortserve {
namespace {

struct LinearInt8Call {
  Matrix matrix;  // packed: as sortserve_pack_int8 does it
  const void* x;  // [num_tokens, num_inputs] in fp32 or bf16
  void* y;        // [num_tokens, num_outputs] in the dtype of x, or in fp32 (kFp32)
  int64_t num_tokens, dtype, num_threads;
};

struct PackInt8Call {
  const int8_t* values;  // [rows, num_inputs]; rows: num_outputs, or all gates, then all ups
  const bf16* scales;    // [rows, blocks of 32 inputs]
  uint8_t* packed;       // [packed_bytes], or null: only packed_bytes is found
  int64_t num_inputs, num_outputs, output, num_threads;
  int64_t packed_bytes;  // written
};

#if defined(SORTSERVE_HAS_AMX_INT8)
constexpr int kInt8Rows = kInt8AmxRows;
#else
constexpr int kInt8Rows = Int8Tile::kRows;
#endif

int64_t num_blocks_of(int64_t num_inputs) { return (num_inputs + kBlock - 1) / kBlock; }

int64_t num_panels_of(int64_t num_outputs, int64_t output) {
  const int64_t width = output == kSiluMul ? kPanel / 2 : kPanel;
  return (num_outputs + width - 1) / width;
}

// ---- packing

// The row of the weights that an output of a panel has, or -1: it is there to fill the panel.
int64_t row_of(const PackInt8Call& call, int64_t panel, int64_t i) {
  if (call.output != kSiluMul) {
    const int64_t row = panel * kPanel + i;
    return row < call.num_outputs ? row : -1;
  }
  const int64_t half = kPanel / 2, row = panel * half + i % half;
  if (row >= call.num_outputs) return -1;
  return i < half ? row : call.num_outputs + row;
}

void pack_output(const PackInt8Call& call, int64_t panel, int64_t i, uint8_t* packed) {
  const int64_t row = row_of(call, panel, i), num_blocks = num_blocks_of(call.num_inputs);
  for (int64_t b = 0; b < num_blocks; ++b) {
    uint8_t* block = packed + b * kBlockBytes;
    for (int64_t k = 0; k < kBlock; ++k) {
      const int64_t input = b * kBlock + k;
      const bool is_there = row >= 0 && input < call.num_inputs;
      const int value = is_there ? call.values[row * call.num_inputs + input] : 0;
      block[(k / 4 * kPanel + i) * 4 + k % 4] =
          static_cast<uint8_t>(value + Int8Tile::kWeightOffset);
    }
    const bf16 scale = row >= 0 ? call.scales[row * num_blocks + b] : bf16{0};
    std::memcpy(block + kBlockValueBytes + i * sizeof(bf16), &scale, sizeof(bf16));
  }
}

}  // namespace

extern "C" void sortserve_pack_int8(PackInt8Call* call) {
  const int64_t num_panels = num_panels_of(call->num_outputs, call->output);
  const int64_t panel_bytes = num_blocks_of(call->num_inputs) * kBlockBytes;
  call->packed_bytes = num_panels * panel_bytes;
  if (call->packed == nullptr) return;
  Team::run(call->num_threads, [&](Team& team) {
    team.parallel_for(num_panels, 1, [&](int64_t panel) {
      for (int64_t i = 0; i < kPanel; ++i)
        pack_output(*call, panel, i, call->packed + panel * panel_bytes);
    });
  });
}

namespace {

// ---- activations

// To the nearest integers, ties to even, of the rounded products.
void round_products(const float* x, float factor, int32_t* values) {
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    lanes product = load_lanes(x + i) * splat_lanes(factor);
#if defined(__AVX512F__)
    const i32_lanes nearest = (i32_lanes)_mm512_cvtps_epi32((__m512)product);
#elif defined(__AVX2__)
    const i32_lanes nearest = (i32_lanes)_mm256_cvtps_epi32((__m256)product);
#else
    asm("" : "+m"(product));  // or it were fused with the addition, and rounded once
    const lanes shifted = product + splat_lanes(12582912.0f);  // 1.5 * 2^23
    const i32_lanes nearest = bit_cast<i32_lanes>(shifted) - 0x4b400000;
#endif
    std::memcpy(values + i, &nearest, sizeof(nearest));
  }
}

// The largest size of 32 numbers; NaN if there is one, as its bits are above all others.
float largest_size(const float* x) {
  i32_lanes largest = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const i32_lanes size = load_as<i32_lanes>(x + i) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
#if defined(__AVX512F__)
  return bit_cast<float>(_mm512_reduce_max_epi32((__m512i)largest));
#else
  int32_t result = largest[0];
  for (int i = 1; i < kLanes; ++i) result = std::max(result, (int32_t)largest[i]);
  return bit_cast<float>(result);
#endif
}

// 32 integers as bytes; their sum.
int32_t narrow(const int32_t* integers, int8_t* values) {
#if defined(__AVX512F__)
  const __m512i left = load_as<__m512i>(integers), right = load_as<__m512i>(integers + 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtepi32_epi8(left));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 16), _mm512_cvtepi32_epi8(right));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(left, right));
#else
  // Into an array of our own: bytes elsewhere might be those of ``integers``, for all GCC knows.
  alignas(64) int8_t bytes[kBlock];
  int32_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    bytes[i] = static_cast<int8_t>(integers[i]);
    sum += integers[i];
  }
  std::memcpy(values, bytes, kBlock);
  return sum;
#endif
}

// Blocks that are all below this are zero: their factor would not be finite.
constexpr float kTiny = 0x1p-100f;

template <typename T>
void quantize_block(const T* x, int64_t n, int8_t* values, BlockScale* scale) {
  alignas(64) float numbers[kBlock];
  store(numbers, load(x, n));
  store(numbers + 16, n > 16 ? load(x + 16, n - 16) : f32x16(0));
  const float largest = largest_size(numbers);
  if (largest < kTiny) {
    std::memset(values, 0, kBlock);
    *scale = {0, 0};
    return;
  }
  alignas(64) int32_t integers[kBlock];
  round_products(numbers, 127.0f / largest, integers);
  const int32_t sum = narrow(integers, values);
  *scale = {largest / 127.0f, -Int8Tile::kWeightOffset * sum};
}

// Room for the quantised rows of a call; kept, as the next call needs as much.
class RowBuffer {
 public:
  char* reserve(int64_t num_bytes) {
    if (num_bytes > size_) {
      bytes_.reset(new char[num_bytes + 64]);
      size_ = num_bytes;
    }
    const auto address = reinterpret_cast<uintptr_t>(bytes_.get());
    return bytes_.get() + (64 - address % 64) % 64;
  }

 private:
  std::unique_ptr<char[]> bytes_;
  int64_t size_ = 0;
};

// How the rows of a call are shared out among tiles: as evenly as can be.
struct Tiles {
  int64_t num_rows, count;

  explicit Tiles(int64_t num_tokens)
      : num_rows(num_tokens), count((num_tokens + kInt8Rows - 1) / kInt8Rows) {}

  int64_t first_row(int64_t tile) const { return tile * num_rows / count; }
  int64_t size(int64_t tile) const { return first_row(tile + 1) - first_row(tile); }
  int64_t tile_of(int64_t row) const { return ((row + 1) * count - 1) / num_rows; }
};

// Rows of x, quantised: of each tile in turn what TileRows has.
struct QuantizedRows {
  const int8_t* values;
  const BlockScale* scales;
  int64_t num_blocks;
  Tiles tiles;
};

template <typename T>
QuantizedRows quantize_rows(Team& team, const T* x, int64_t num_tokens, int64_t num_inputs) {
  thread_local RowBuffer buffer;
  const int64_t num_blocks = num_blocks_of(num_inputs), count = num_tokens * num_blocks;
  constexpr int64_t kBytes = kBlock + sizeof(BlockScale);  // what lies behind the last is read, too
  int8_t* values = reinterpret_cast<int8_t*>(buffer.reserve((count + kInt8Rows) * kBytes));
  BlockScale* scales = reinterpret_cast<BlockScale*>(values + count * kBlock);
  const Tiles tiles(num_tokens);
  constexpr int64_t kGrain = 512;
  team.parallel_for(count, kGrain, [&](int64_t index) {
    const int64_t token = index / num_blocks, b = index % num_blocks, first = b * kBlock;
    const int64_t tile = tiles.tile_of(token), tile_row = tiles.first_row(tile);
    const int64_t to = tile_row * num_blocks + b * tiles.size(tile) + token - tile_row;
    quantize_block(x + token * num_inputs + first, num_inputs - first, values + to * kBlock,
                   scales + to);
  });
  return {values, scales, num_blocks, tiles};
}

// ---- products

// What a tile brings near: the same panel a little further on where that is all there is to wait
// for, else the next panel, while the second tile runs.
const uint8_t* ahead_of(int64_t tile, int64_t num_tiles, int64_t num_rows, const uint8_t* panel,
                        int64_t panel_bytes) {
  constexpr int64_t kStreamAhead = 4096;
  if (num_tiles == 1 && num_rows <= Int8Tile::kRows) return panel + kStreamAhead;
  return tile == std::min<int64_t>(1, num_tiles - 1) ? panel + panel_bytes : panel;
}

// What the sums of a panel lack, if they lack anything: [blocks, 32].
const int16_t* lacks_of(const uint8_t* panel, int64_t num_blocks, int64_t num_rows) {
  thread_local std::vector<int16_t> lacks;
  if (!Int8Tile::has_lacks(num_rows)) return nullptr;
  const size_t size = num_blocks * kPanel;
  if (lacks.size() < size) lacks.resize(size);
  for (int64_t b = 0; b < num_blocks; ++b)
    Int8Tile::find_lacks(panel + b * kBlockBytes, lacks.data() + b * kPanel);
  return lacks.data();
}

// 1 <= num_rows <= M: sums of as many rows; lacks may be null.
template <int M = kInt8Rows>
void multiply_int8_rows(int64_t num_rows, const int8_t* values, const BlockScale* scales,
                        int64_t num_blocks, const uint8_t* panel, const int16_t* lacks,
                        const uint8_t* ahead, float (*sums)[kPanel]) {
  if constexpr (M > 1)
    if (num_rows != M)
      return multiply_int8_rows<M - 1>(num_rows, values, scales, num_blocks, panel, lacks, ahead,
                                       sums);
  const TileRows<M> x = {reinterpret_cast<const int8_t (*)[M][kBlock]>(values),
                         reinterpret_cast<const BlockScale (*)[M]>(scales)};
#if defined(SORTSERVE_HAS_AMX_INT8)
  if constexpr (M > Int8Tile::kRows)
    return multiply_int8_by_amx<M>(x, num_blocks, panel, ahead, sums);
#endif
  lacks == nullptr ? multiply_int8_tile<M, false>(x, num_blocks, panel, lacks, ahead, sums)
                   : multiply_int8_tile<M, true>(x, num_blocks, panel, lacks, ahead, sums);
}

// Tiles that go through all panels together, so that their rows stay in the second cache.
int64_t num_groups_of(const QuantizedRows& rows) {
  constexpr int64_t kBytes = 128 << 10, kMinTiles = 6;
  const int64_t tile_bytes = kInt8Rows * rows.num_blocks * kBlock;
  const int64_t group = std::max<int64_t>(kMinTiles, kBytes / tile_bytes);
  return std::max<int64_t>(1, (rows.tiles.count + group / 2) / group);
}

// Tiles ``begin`` to ``end`` and one panel; write(row, sums of its 32 outputs) for each row.
template <typename Write>
void multiply_panel(const QuantizedRows& rows, int64_t begin, int64_t end, const uint8_t* panel,
                    const Write& write) {
  const Tiles& tiles = rows.tiles;
  const int64_t num_blocks = rows.num_blocks, panel_bytes = num_blocks * kBlockBytes;
  const int64_t num_rows = tiles.first_row(end) - tiles.first_row(begin);
  const int16_t* lacks = lacks_of(panel, num_blocks, num_rows);
#if defined(SORTSERVE_HAS_AMX_INT8)
  const Int8Registers registers(num_rows > Int8Tile::kRows);
#endif
  alignas(64) float sums[kInt8Rows][kPanel];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tiles.first_row(tile), at = first * num_blocks;
    multiply_int8_rows(tiles.size(tile), rows.values + at * kBlock, rows.scales + at, num_blocks,
                       panel, lacks,
                       ahead_of(tile - begin, end - begin, num_rows, panel, panel_bytes), sums);
    for (int64_t m = 0; m < tiles.size(tile); ++m) write(first + m, sums[m]);
  }
}

template <typename T>
void multiply_int8(Team& team, const Matrix& matrix, const T* x, void* y, int64_t num_tokens) {
  if (num_tokens == 0) return;
  const int64_t num_panels = num_panels_of(matrix.num_outputs, matrix.output);
  const QuantizedRows rows = quantize_rows(team, x, num_tokens, matrix.num_inputs);
  const int64_t panel_bytes = rows.num_blocks * kBlockBytes, num_tiles = rows.tiles.count;
  const int64_t num_groups = num_groups_of(rows);
  const int64_t grain = std::max<int64_t>(1, num_panels / (team.num_threads() * 4));
  team.parallel_for(num_groups * num_panels, grain, [&](int64_t index) {
    const int64_t panel = index % num_panels, group = index / num_panels;
    const uint8_t* weights = static_cast<const uint8_t*>(matrix.packed) + panel * panel_bytes;
    multiply_panel(rows, group * num_tiles / num_groups, (group + 1) * num_tiles / num_groups,
                   weights, [&](int64_t row, const float* sums) {
                     write_outputs<T>(matrix, {y}, row, panel, sums, 1);
                   });
  });
}

}  // namespace

void linear_int8(Team& team, const Matrix& matrix, const bf16* x, void* y, int64_t num_tokens) {
  multiply_int8(team, matrix, x, y, num_tokens);
}

extern "C" void sortserve_linear_int8(const LinearInt8Call* call) {
  Team::run(call->num_threads, [&](Team& team) {
    if (call->dtype == kBfloat16)
      multiply_int8(team, call->matrix, static_cast<const bf16*>(call->x), call->y,
                    call->num_tokens);
    else
      multiply_int8(team, call->matrix, static_cast<const float*>(call->x), call->y,
                    call->num_tokens);
  });
}

}  // namespace sortserve
