// The border to Python: addresses and sizes in, plain numbers out. No tensor type crosses it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>

#include "staircase.h"

namespace py = pybind11;

namespace {

using Result = std::tuple<double, std::int64_t, double>;

template <class T>
std::span<T> view(std::uintptr_t address, std::int64_t size, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is a null address");
  if (size <= 0) throw std::invalid_argument(std::string(name) + " is empty");
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(name) + " is misaligned");
  return {reinterpret_cast<T*>(address), static_cast<std::size_t>(size)};
}

template <class Rule>
auto search(curvfast::Staircase (*select)(std::span<const double>, std::span<const double>, Rule,
                                          std::span<std::int32_t>)) {
  return [select](std::uintptr_t g, std::int64_t rows, std::uintptr_t a, std::int64_t columns,
                  Rule rule, std::uintptr_t widths) -> Result {
    const auto values_g = view<const double>(g, rows, "values_g");
    const auto values_a = view<const double>(a, columns, "values_a");
    const auto out = view<std::int32_t>(widths, rows, "widths");
    const curvfast::Staircase found = [&] {
      py::gil_scoped_release release;
      return select(values_g, values_a, rule, out);
    }();
    return {found.threshold, found.pairs, found.kept};
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of curvfast: addresses and sizes in, plain numbers out.";
  module.def("staircase_by_mass", search<double>(&curvfast::staircase_by_mass), py::arg("g"),
             py::arg("rows"), py::arg("a"), py::arg("columns"), py::arg("mass"), py::arg("widths"));
  module.def("staircase_by_pairs", search<std::int64_t>(&curvfast::staircase_by_pairs),
             py::arg("g"), py::arg("rows"), py::arg("a"), py::arg("columns"), py::arg("pairs"),
             py::arg("widths"));
}
