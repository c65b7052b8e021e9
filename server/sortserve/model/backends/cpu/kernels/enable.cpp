// What a process must ask of the operating system before the kernels run.

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sortserve {

// Whether the kernels may run. The state of AMX is large, so Linux saves it only for processes that
// have asked (Documentation/arch/x86/xstate.rst); the answer is for all their threads.
extern "C" int64_t sortserve_enable() {
#if defined(__AMX_TILE__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 1;
#endif
}

}  // namespace sortserve
