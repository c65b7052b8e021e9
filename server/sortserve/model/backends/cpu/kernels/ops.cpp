// Norms and the gate of the MLP. Arithmetic is fp32; results are rounded once.

#include <cmath>

#include "kernels.h"
#include "silu.h"

namespace sortserve {
namespace {

// Elements that are worth a turn of their own, and worth waking the other threads for.
constexpr int64_t kGrainElements = 4096, kTeamElements = 65536;

int64_t grain_of(const RowsCall& call) {
  return std::max<int64_t>(1, kGrainElements / call.width);
}

int64_t num_threads_of(const RowsCall& call) {
  return call.num_rows * call.width < kTeamElements ? 1 : call.num_threads;
}

template <typename T>
void add_rms_norm_row(const RowsCall& call, int64_t row, bool y_in_tiles) {
  const int64_t width = call.width;
  T* x = static_cast<T*>(call.x) + row * width;
  const T* weight = static_cast<const T*>(call.weight);
  const Rows<T> y = {static_cast<T*>(call.y), width, y_in_tiles};
  if (call.delta != nullptr) {
    const T* delta = static_cast<const T*>(call.delta) + row * width;
    for (int64_t i = 0; i < width; i += 16)
      store(x + i, load(x + i, width - i) + load(delta + i, width - i), width - i);
  }
  f32x16 squares = {};
  for (int64_t i = 0; i < width; i += 16) {
    const f32x16 v = load(x + i, width - i);
    squares += v * v;
  }
  const f32x16 scale = 1.0f / std::sqrt(sum(squares) / width + static_cast<float>(call.eps));
  for (int64_t i = 0; i < width; i += 16)
    store(y.at(row, i), load(x + i, width - i) * scale * load(weight + i, width - i), width - i);
}

}  // namespace

void add_rms_norm(Team& team, const RowsCall& call, bool y_in_tiles) {
  with_dtype(call.dtype, [&](auto type) {
    using T = decltype(type);
    team.parallel_for(call.num_rows, grain_of(call),
                      [&](int64_t row) { add_rms_norm_row<T>(call, row, y_in_tiles); });
  });
}

extern "C" void sortserve_add_rms_norm(const RowsCall* call) {
  Team::run(num_threads_of(*call), [&](Team& team) { add_rms_norm(team, *call, false); });
}

namespace {

// y = silu(x[:width]) * x[width:].
template <typename T>
void silu_and_mul_row(const RowsCall& call, int64_t row) {
  const int64_t width = call.width;
  const T* gate = static_cast<const T*>(call.x) + row * 2 * width;
  const T* up = gate + width;
  T* y = static_cast<T*>(call.y) + row * width;
  for (int64_t i = 0; i < width; i += 16)
    store(y + i, silu<T>(load(gate + i, width - i)) * load(up + i, width - i), width - i);
}

}  // namespace

extern "C" void sortserve_silu_and_mul(const RowsCall* call) {
  Team::run(num_threads_of(*call), [&](Team& team) {
    with_dtype(call->dtype, [&](auto type) {
      using T = decltype(type);
      team.parallel_for(call->num_rows, grain_of(*call),
                        [&](int64_t row) { silu_and_mul_row<T>(*call, row); });
    });
  });
}

}  // namespace sortserve
