// Norms and the gate of the MLP. Arithmetic is fp32; results are rounded once.

#include <cmath>

#include "dtype.h"
#include "parallel.h"
#include "vec.h"

namespace sortserve {

struct RowsCall {
  void* x;             // [num_rows, width]; add_rms_norm updates it in place
  const void* delta;   // [num_rows, width], or null
  const void* weight;  // [width]
  void* y;             // [num_rows, width]
  int64_t num_rows, width, dtype, num_threads;
  double eps;
};

// Rows that one thread takes at a time: below this, waking another thread costs more than it saves.
static int64_t grain_of(int64_t width) { return std::max<int64_t>(1, 65536 / width); }

template <typename T>
static void add_rms_norm_row(const RowsCall& call, int64_t row) {
  const int64_t width = call.width;
  T* x = static_cast<T*>(call.x) + row * width;
  const T* weight = static_cast<const T*>(call.weight);
  T* y = static_cast<T*>(call.y) + row * width;
  f32x16 squares = {};
  if (call.delta != nullptr) {
    const T* delta = static_cast<const T*>(call.delta) + row * width;
    for (int64_t i = 0; i < width; i += 16)
      store(x + i, load(x + i, width - i) + load(delta + i, width - i), width - i);
  }
  for (int64_t i = 0; i < width; i += 16) {
    const f32x16 v = load(x + i, width - i);
    squares += v * v;
  }
  const f32x16 scale = splat(1.0f / std::sqrt(sum(squares) / width + static_cast<float>(call.eps)));
  for (int64_t i = 0; i < width; i += 16)
    store(y + i, load(x + i, width - i) * scale * load(weight + i, width - i), width - i);
}

// x += delta (if there is one); y = x / rms(x) * weight.
extern "C" void sortserve_add_rms_norm(const RowsCall* call) {
  with_dtype(call->dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(call->num_rows, grain_of(call->width), call->num_threads,
                 [&](int64_t row) { add_rms_norm_row<T>(*call, row); });
  });
}

// y[width] = silu(x[:width]) * x[width:].
extern "C" void sortserve_silu_and_mul(const RowsCall* call) {
  const int64_t width = call->width;
  with_dtype(call->dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(call->num_rows, grain_of(width), call->num_threads, [&](int64_t row) {
      const T* gate = static_cast<const T*>(call->x) + row * 2 * width;
      const T* up = gate + width;
      T* y = static_cast<T*>(call->y) + row * width;
      for (int64_t i = 0; i < width; i += 16)
        store(y + i, silu(load(gate + i, width - i)) * load(up + i, width - i), width - i);
    });
  });
}

}  // namespace sortserve
