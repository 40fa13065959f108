// The border to Python on CUDA: addresses of device memory, sizes, and a stream as a number.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>

#include "triangle_bindings.h"
#include "triangle_cuda.h"

namespace {

struct Stream {
  std::uintptr_t last;
  template <class T>
  void pack(const T* matrix, curvfast::Triangle shape, T* tiles) const {
    curvfast::cuda::pack(matrix, shape, tiles, last);
  }
  template <class T>
  void unpack(const T* tiles, curvfast::Triangle shape, T* matrix) const {
    curvfast::cuda::unpack(tiles, shape, matrix, last);
  }
  template <class T>
  void mirror(T* matrix, std::int32_t d) const {
    curvfast::cuda::mirror(matrix, d, last);
  }
  template <class T>
  void scale(std::span<T> values, T factor) const {
    curvfast::cuda::scale(values, factor, last);
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA core of curvfast: device addresses, sizes and a stream in.";
  curvfast::define_triangle<Stream>(module, "stream");
}
