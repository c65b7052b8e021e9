// The tile registers of AMX: eight of up to 16 rows of 64 bytes.
//
// Their number is part of the instruction, hence templates over it. SORTSERVE_EMULATE_AMX puts plain
// loops in their place: the tests then run what is built on them on any CPU.
#pragma once

#include <cstdint>
#include <cstring>

namespace sortserve {
namespace amx {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

// Palette 1 of Intel's manual, volume 1, chapter 18.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int num_rows, int num_bytes = kTileBytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    bytes_of_row[tile] = static_cast<uint16_t>(num_bytes);
  }
};
static_assert(sizeof(Config) == 64);

#if defined(SORTSERVE_EMULATE_AMX)

struct Registers {
  Config config;
  alignas(64) uint8_t tiles[kTiles][kTileRows][kTileBytes];
};
inline Registers& registers() {
  thread_local Registers registers;
  return registers;
}

inline void configure(const Config& config) {
  registers().config = config;
  std::memset(registers().tiles, 0, sizeof(Registers::tiles));
}
inline void release() { configure(Config()); }

template <int tile>
inline void zero() {
  std::memset(registers().tiles[tile], 0, sizeof(Registers::tiles[tile]));
}

template <int tile>
inline void load(const void* from, int64_t stride_bytes) {
  Registers& r = registers();
  for (int row = 0; row < r.config.rows[tile]; ++row)
    std::memcpy(r.tiles[tile][row], static_cast<const char*>(from) + row * stride_bytes,
                r.config.bytes_of_row[tile]);
}

template <int tile>
inline void load_once(const void* from, int64_t stride_bytes) {
  load<tile>(from, stride_bytes);
}

template <int tile>
inline void store(void* to, int64_t stride_bytes) {
  Registers& r = registers();
  for (int row = 0; row < r.config.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride_bytes, r.tiles[tile][row],
                r.config.bytes_of_row[tile]);
}

// sums += a times b; b has a pair of inputs a row. Even and odd inputs are summed apart, as there.
template <int sums, int a, int b>
inline void multiply_bf16() {
  const auto widened = [](uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  };
  Registers& r = registers();
  for (int m = 0; m < r.config.rows[sums]; ++m) {
    float row[16];
    uint16_t left[32], right[32];
    std::memcpy(row, r.tiles[sums][m], sizeof(row));
    std::memcpy(left, r.tiles[a][m], sizeof(left));
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < r.config.rows[b]; ++k) {
      std::memcpy(right, r.tiles[b][k], sizeof(right));
      for (int n = 0; n < 16; ++n) {
        even[n] += widened(left[2 * k]) * widened(right[2 * n]);
        odd[n] += widened(left[2 * k + 1]) * widened(right[2 * n + 1]);
      }
    }
    for (int n = 0; n < 16; ++n) row[n] += even[n] + odd[n];
    std::memcpy(r.tiles[sums][m], row, sizeof(row));
  }
}

// sums += a times b in integers; a has bytes with a sign, b has four inputs a row, with or without.
template <int sums, int a, int b, bool b_is_unsigned>
inline void multiply_int8() {
  Registers& r = registers();
  for (int m = 0; m < r.config.rows[sums]; ++m) {
    int32_t row[16];
    std::memcpy(row, r.tiles[sums][m], sizeof(row));
    for (int k = 0; k < r.config.bytes_of_row[a]; ++k)
      for (int n = 0; n < 16; ++n) {
        const uint8_t right = r.tiles[b][k / 4][4 * n + k % 4];
        row[n] += static_cast<int8_t>(r.tiles[a][m][k]) *
                  (b_is_unsigned ? static_cast<int>(right) : static_cast<int8_t>(right));
      }
    std::memcpy(r.tiles[sums][m], row, sizeof(row));
  }
}

#else

// In assembler: the compilers' macros take no template arguments, and GCC's for the configuration
// tells the compiler of its first eight bytes alone.
inline void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
inline void release() { __asm__ volatile("tilerelease"); }

template <int tile>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int tile>
inline void load(const void* from, int64_t stride_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(tile)
                   : "memory");
}

// Leaves the first cache to what is read more often.
template <int tile>
inline void load_once(const void* from, int64_t stride_bytes) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(tile)
                   : "memory");
}

template <int tile>
inline void store(void* to, int64_t stride_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(tile)
                   : "memory");
}

template <int sums, int a, int b>
inline void multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

template <int sums, int a, int b, bool b_is_unsigned>
inline void multiply_int8() {
  if constexpr (b_is_unsigned)
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
  else
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

#endif

}  // namespace amx
}  // namespace sortserve
