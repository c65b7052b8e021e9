// y = x W^T + b in fp32, for any CPU. A token's result does not depend on the tokens beside it nor on
// their number: each output is one chain of fused multiply-adds over k, in order. Libraries choose
// another kernel, and so another order, for one row than for many.

#include "kernels.h"

namespace sortserve {

struct LinearFp32Call {
  Matrix matrix;
  const float* x;  // [num_tokens, num_inputs]
  float* y;        // [num_tokens, num_outputs]
  int64_t num_tokens, num_threads;
};

// As wide as the registers: a panel is two vectors of outputs, a tile kMaxRows tokens, and together
// they have 24 accumulators of 32 registers, or 12 of 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kMaxRows = 12;
#else
constexpr int kLanes = 8, kMaxRows = 6;
#endif
typedef float lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Written out, so that no compiler fuses it for one number of rows and not for another.
static inline lanes fma(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;  // nothing to fuse with
#endif
}

static inline lanes load_lanes(const float* p) {
  lanes v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The first n lanes; a vector of 16 may have more of them than ``lanes``.
static void store_lanes(float* p, lanes v, int64_t n) {
  std::memcpy(p, &v, std::min<int64_t>(n, kLanes) * sizeof(float));
}

static f32x16 widened(lanes v) {
  f32x16 wide = {};
  std::memcpy(&wide, &v, sizeof(v));
  return wide;
}

// One row of one panel: bias, activation. Not inlined: the same instructions for all tiles.
__attribute__((noinline)) static void write_outputs(const LinearFp32Call& call, int64_t token,
                                                    int64_t panel, lanes a, lanes b) {
  const Matrix& matrix = call.matrix;
  if (matrix.bias != nullptr) {
    a += load_lanes(matrix.bias + panel * 2 * kLanes);
    b += load_lanes(matrix.bias + panel * 2 * kLanes + kLanes);
  }
  float* y = call.y + token * matrix.num_outputs;
  if (matrix.output == kSiluMul) {
    const int64_t first = panel * kLanes, left = matrix.num_outputs - first;
    return store(y + first, silu(widened(a)) * widened(b), std::min<int64_t>(left, kLanes));
  }
  const int64_t first = panel * 2 * kLanes, left = matrix.num_outputs - first;
  store_lanes(y + first, a, left);
  if (left > kLanes) store_lanes(y + first + kLanes, b, left - kLanes);
}

template <int M>
static void multiply_tile(const LinearFp32Call& call, int64_t first, int64_t panel) {
  const int64_t num_inputs = call.matrix.num_inputs;
  const float* x = call.x + first * num_inputs;
  const float* weights =
      static_cast<const float*>(call.matrix.packed) + panel * num_inputs * 2 * kLanes;
  lanes sums[M][2] = {};
  for (int64_t k = 0; k < num_inputs; ++k) {
    const lanes w0 = load_lanes(weights + k * 2 * kLanes);
    const lanes w1 = load_lanes(weights + k * 2 * kLanes + kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const lanes both = x[m * num_inputs + k] - lanes{};
      sums[m][0] = fma(both, w0, sums[m][0]);
      sums[m][1] = fma(both, w1, sums[m][1]);
    }
  }
  for (int m = 0; m < M; ++m) write_outputs(call, first + m, panel, sums[m][0], sums[m][1]);
}

template <int M = kMaxRows>
static void multiply_rows(const LinearFp32Call& call, int64_t first, int64_t num_rows,
                          int64_t panel) {
  if constexpr (M > 0) {
    if (num_rows == M) return multiply_tile<M>(call, first, panel);
    multiply_rows<M - 1>(call, first, num_rows, panel);
  }
}

extern "C" int64_t sortserve_fp32_panel() { return 2 * kLanes; }

extern "C" void sortserve_linear_fp32(const LinearFp32Call* call) {
  const Matrix& matrix = call->matrix;
  const int64_t width = matrix.output == kSiluMul ? kLanes : 2 * kLanes;
  const int64_t num_panels = (matrix.num_outputs + width - 1) / width;
  const int64_t num_tiles = (call->num_tokens + kMaxRows - 1) / kMaxRows;
  Team::run(call->num_threads, [&](Team& team) {
    const int64_t grain = std::max<int64_t>(1, num_panels / (team.num_threads() * 4));
    team.parallel_for(num_panels, grain, [&](int64_t panel) {
      for (int64_t i = 0; i < num_tiles; ++i) {
        const int64_t first = i * call->num_tokens / num_tiles;
        const int64_t num_rows = (i + 1) * call->num_tokens / num_tiles - first;
        multiply_rows(*call, first, num_rows, panel);
      }
    });
  });
}

}  // namespace sortserve
