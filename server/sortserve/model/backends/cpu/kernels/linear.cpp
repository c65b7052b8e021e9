// y = x W^T + b, in bf16 with fp32 accumulation and in fp32. Weights are packed in panels (tile.h),
// so that a step over few tokens streams them once, in order. A token's result does not depend on
// the tokens beside it nor on their number.

#include <vector>

#include "kernels.h"
#include "outputs.h"
#include "tile.h"

namespace sortserve {
namespace {

template <typename T>
struct LinearCall {
  Matrix matrix;
  const T* x;  // [num_tokens, num_inputs]
  void* y;     // [num_tokens, num_outputs]
  int64_t num_tokens, num_threads;
};

// Words (4 bytes: 2 inputs in bf16, 1 in fp32) of some outputs, out of their panels.
struct PackedRowsCall {
  const uint32_t* packed;  // [panels, num_words, 32]
  const int64_t* outputs;  // [num_rows]
  uint32_t* rows;          // [num_rows, num_words]
  int64_t num_rows, num_words, num_threads;
};

// Rows as products take them: in the element type of RowOf, and filled up to a whole pack.
template <typename T>
Rows<const RowOf<T>> prepare_rows(Team& team, const Rows<const T>& x, int64_t num_tokens,
                                  int64_t num_inputs) {
  using Row = RowOf<T>;
  const int64_t stride = round_up(num_inputs, kPack<T>);
  if constexpr (std::is_same<Row, T>::value)
    if (stride == num_inputs) return x;
  thread_local std::vector<Row> buffer;
  if (static_cast<int64_t>(buffer.size()) < num_tokens * stride) buffer.resize(num_tokens * stride);
  Row* rows = buffer.data();
  team.parallel_for(num_tokens, std::max<int64_t>(1, (1 << 15) / stride), [&](int64_t token) {
    Row* row = rows + token * stride;
    for (int64_t i = 0; i < num_inputs; i += 16)
      store(row + i, load(x.at(token, i), num_inputs - i), stride - i);
  });
  return {rows, stride};
}

// Tokens that go through all panels together, so that they stay in the second cache.
template <typename T>
struct Blocks {
  int64_t num_tokens, count;

  Blocks(int64_t stride, int64_t num_tokens) : num_tokens(num_tokens) {
    constexpr int64_t kMinTokens = 48;
    const int64_t row_bytes = stride * sizeof(RowOf<T>);
    const int64_t size = std::max<int64_t>(kMinTokens, kBlockBytes<T> / row_bytes);
    count = std::max<int64_t>(1, (num_tokens + size / 2) / size);
  }

  // Blocks end where tiles do.
  int64_t begin(int64_t block) const {
    return std::min(num_tokens, round_up(block * num_tokens / count, kRowsOfBlocks<T>));
  }
};

// The order in which threads take their work: some neighbouring panels with a block of rows at a
// time. Blocks go together, one for each thread, so that a thread finds its own in its second cache.
class Pieces {
 public:
  struct Piece {
    int64_t block, first_panel, end_panel;
  };

  Pieces(int64_t num_blocks, int64_t num_panels, int64_t num_threads)
      : num_blocks_(num_blocks),
        num_panels_(num_panels),
        num_threads_(num_threads),
        panels_at_once_(std::max<int64_t>(1, num_panels / (4 * num_threads))) {}

  int64_t count() const { return num_blocks_ * pieces_of_block(); }
  Piece at(int64_t index) const {
    const int64_t pieces_of_group = num_threads_ * pieces_of_block();
    const int64_t first_block = index / pieces_of_group * num_threads_;
    const int64_t num_together = std::min(num_threads_, num_blocks_ - first_block);
    const int64_t in_group = index % pieces_of_group;
    const int64_t first_panel = in_group / num_together * panels_at_once_;
    return {first_block + in_group % num_together, first_panel,
            std::min(first_panel + panels_at_once_, num_panels_)};
  }
  // The panel that the thread will probably take after a piece: threads take pieces in turn.
  int64_t panel_after(int64_t index) const {
    return at(std::min(index + num_threads_, count() - 1)).first_panel;
  }

 private:
  int64_t pieces_of_block() const { return (num_panels_ + panels_at_once_ - 1) / panels_at_once_; }

  const int64_t num_blocks_, num_panels_, num_threads_, panels_at_once_;
};

template <typename T>
void multiply(Team& team, const Matrix& matrix, const Rows<const T>& x, const Results& y,
              int64_t num_tokens) {
  if (num_tokens == 0) return;
  const int64_t width = matrix.output == kSiluMul ? kPanel / 2 : kPanel;
  const int64_t num_panels = (matrix.num_outputs + width - 1) / width;
  const int64_t panel_size = round_up(matrix.num_inputs, kPack<T>) * kPanel;
  const auto rows = prepare_rows<T>(team, x, num_tokens, matrix.num_inputs);
  const Blocks<T> blocks(rows.stride, num_tokens);
  const Pieces pieces(blocks.count, num_panels, team.num_threads());
  const T* weights = static_cast<const T*>(matrix.packed);
  team.parallel_for_grains(pieces.count(), 1, [&](int64_t begin, int64_t end) {
    Turn turn;
    for (int64_t index = begin; index < end; ++index) {
      const Pieces::Piece piece = pieces.at(index);
      const int64_t first = blocks.begin(piece.block), last = blocks.begin(piece.block + 1);
      for (int64_t panel = piece.first_panel; panel < piece.end_panel; ++panel) {
        const int64_t next = panel + 1 < piece.end_panel ? panel + 1 : pieces.panel_after(index);
        multiply_rows<T>(turn, last - first, rows.from(first), weights + panel * panel_size,
                         matrix.num_inputs, weights + next * panel_size,
                         [&](int64_t m, const float* sums, int64_t num_rows) {
                           write_outputs<T>(matrix, y, first + m, panel, sums, num_rows);
                         });
      }
    }
  });
}

}  // namespace

bool takes_tiles(const Matrix& matrix) {
  return kReadsTiles && matrix.format == kPlain && matrix.num_inputs % Rows<bf16>::kTileWidth == 0;
}

void linear(Team& team, const Matrix& matrix, const Rows<const bf16>& x, const Results& y,
            int64_t num_tokens) {
  multiply<bf16>(team, matrix, x, y, num_tokens);
}

extern "C" void sortserve_packed_rows(const PackedRowsCall* call) {
  const int64_t num_words = call->num_words;
  Team::run(call->num_threads, [&](Team& team) {
    team.parallel_for(call->num_rows, 32, [&](int64_t row) {
      const int64_t output = call->outputs[row];
      const uint32_t* at = call->packed + output / kPanel * num_words * kPanel + output % kPanel;
      uint32_t* to = call->rows + row * num_words;
      for (int64_t i = 0; i < num_words; ++i) to[i] = at[i * kPanel];
    });
  });
}

namespace {

template <typename T>
void run(const LinearCall<T>& call) {
  Team::run(call.num_threads, [&](Team& team) {
    multiply<T>(team, call.matrix, {call.x, call.matrix.num_inputs}, {call.y}, call.num_tokens);
  });
}

}  // namespace

extern "C" void sortserve_linear(const LinearCall<bf16>* call) { run(*call); }

extern "C" void sortserve_linear_fp32(const LinearCall<float>* call) { run(*call); }

}  // namespace sortserve
