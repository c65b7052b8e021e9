// Makes OpenVINO's own kernels choose as on a processor without AVX-512 and AMX; a library to preload.
//
// oneDNN inside OpenVINO heeds ONEDNN_MAX_CPU_ISA, but OpenVINO's other kernels ask these functions of
// libopenvino.so, and heed a variable only in debug builds. A preloaded library answers in their place.

namespace ov {

bool with_cpu_x86_avx512f() { return false; }
bool with_cpu_x86_avx512_core() { return false; }
bool with_cpu_x86_avx512_core_vnni() { return false; }
bool with_cpu_x86_bfloat16() { return false; }
bool with_cpu_x86_avx512_core_fp16() { return false; }
bool with_cpu_x86_avx512_core_amx() { return false; }
bool with_cpu_x86_avx512_core_amx_int8() { return false; }
bool with_cpu_x86_avx512_core_amx_bf16() { return false; }
bool with_cpu_x86_avx512_core_amx_fp16() { return false; }

}  // namespace ov
