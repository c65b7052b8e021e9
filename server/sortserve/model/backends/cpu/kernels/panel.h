// Panels: how packed weights, and keys and values of a prompt, lie in memory.
#pragma once

namespace sortserve {

// Outputs of a panel. Python: linear.py.
constexpr int kPanel = 32;

}  // namespace sortserve
