// Room for numbers that begins where a line of the caches does: a vector or the row of a tile that
// lies across two of them costs two loads.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace sortserve {

template <typename T>
class Lines {
 public:
  // Room for so many; what is in it means nothing.
  T* reserve(int64_t size) {
    if (size > size_) {
      data_.reset();
      data_.reset(static_cast<T*>(::operator new(size * sizeof(T), kAlignment)));
      size_ = size;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };

  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace sortserve
