// State shared by the kernels.

#include "parallel.h"

namespace sortserve {

ParallelFn run_on_threads = nullptr;

extern "C" void sortserve_set_parallel(ParallelFn fn) { run_on_threads = fn; }

}  // namespace sortserve
