// The dtypes that tensors come in.
#pragma once

#include "vec.h"

namespace sortserve {

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// fn(T{}) with the element type of a dtype.
template <typename Fn>
void with_dtype(int64_t dtype, const Fn& fn) {
  switch (dtype) {
    case kFloat32: return fn(float{});
    case kBfloat16: return fn(bf16{});
    case kFloat16: return fn(fp16{});
  }
}

}  // namespace sortserve
