// The packed sum's operations as Python sees them, the same for threads and for a CUDA stream.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "border.h"

namespace curvfast {

// Runner is made from the last argument, a number of workers or a stream, and runs one operation.
template <class Runner>
void define_triangle(pybind11::module_& module, const char* last) {
  namespace py = pybind11;
  using Last = decltype(Runner::last);
  using py::arg;

  module.def("pack", [](std::uintptr_t matrix, std::int64_t d, std::uintptr_t tiles,
                        std::int64_t values, std::int64_t width, int bits, Last how) {
    with_type(bits, [&]<class T>(T) {
      const Triangle shape = triangle(d, width, values);
      const auto from = view<const T>(matrix, d * d, "matrix");
      const auto to = view<T>(tiles, values, "tiles");
      const py::gil_scoped_release release;
      Runner{how}.pack(from.data(), shape, to.data());
    });
  }, arg("matrix"), arg("d"), arg("tiles"), arg("values"), arg("width"), arg("bits"), arg(last));

  module.def("unpack", [](std::uintptr_t tiles, std::int64_t values, std::int64_t width,
                          std::uintptr_t matrix, std::int64_t d, int bits, Last how) {
    with_type(bits, [&]<class T>(T) {
      const Triangle shape = triangle(d, width, values);
      const auto from = view<const T>(tiles, values, "tiles");
      const auto to = view<T>(matrix, d * d, "matrix");
      const py::gil_scoped_release release;
      Runner{how}.unpack(from.data(), shape, to.data());
    });
  }, arg("tiles"), arg("values"), arg("width"), arg("matrix"), arg("d"), arg("bits"), arg(last));

  module.def("mirror", [](std::uintptr_t matrix, std::int64_t values, std::int64_t d, int bits,
                          Last how) {
    with_type(bits, [&]<class T>(T) {
      const Triangle shape = triangle(d, d, values);
      const auto entries = view<T>(matrix, values, "matrix");
      const py::gil_scoped_release release;
      Runner{how}.mirror(entries.data(), shape.d);
    });
  }, arg("matrix"), arg("values"), arg("d"), arg("bits"), arg(last));

  module.def("scale", [](std::uintptr_t values, std::int64_t size, double factor, int bits,
                         Last how) {
    with_type(bits, [&]<class T>(T) {
      const auto entries = view<T>(values, size, "values");
      if (!std::isfinite(static_cast<T>(factor)))
        throw std::invalid_argument("the factor must be finite in the values' type");
      const py::gil_scoped_release release;
      Runner{how}.scale(entries, static_cast<T>(factor));
    });
  }, arg("values"), arg("size"), arg("factor"), arg("bits"), arg(last));
}

}  // namespace curvfast
