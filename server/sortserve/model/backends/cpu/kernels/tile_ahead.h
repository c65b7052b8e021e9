// What a tile brings near while it computes: the panel that comes next.
#pragma once

#include <cstdint>

namespace sortserve {

// The 128 bytes of each step of a panel, or half of them, a line of 64 at a time.
struct Ahead {
  const void* at;     // what is in a cache already costs nothing
  bool whole = true;  // else half a panel

  // Where pass ``pass`` of ``passes`` over the steps begins; it goes on by a line for each step, or
  // by two if there is one pass.
  const char* first(int pass, int passes, int64_t steps) const {
    const char* bytes = static_cast<const char*>(at);
    return bytes + (pass == 1 && passes > 1 && whole ? 64 * steps : 0);
  }
};

}  // namespace sortserve
