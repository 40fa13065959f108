// The border to Python: addresses and sizes in, plain numbers out. No tensor type crosses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "border.h"
#include "finite.h"
#include "split.h"
#include "scores.h"
#include "second_moment.h"
#include "staircase.h"
#include "triangle_bindings.h"

namespace py = pybind11;

namespace {

using curvfast::view;
using Result = std::tuple<double, std::int64_t, double>;

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

// (address of g, rows, address of a, columns, address of widths)
using Table = std::vector<
    std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t, std::uintptr_t>>;

std::vector<curvfast::Layer> layers_of(const Table& table, std::size_t masses) {
  std::vector<curvfast::Layer> layers;
  for (const auto& [g, rows, a, columns, widths] : table) {
    const auto values_g = view<const double>(g, rows, "values_g");
    if (rows > (std::int64_t{1} << 31)) throw std::invalid_argument("values_g is too long");
    const auto size = rows * static_cast<std::int64_t>(masses);
    layers.push_back({values_g, view<const double>(a, columns, "values_a"),
                      view<std::int32_t>(widths, size, "widths")});
  }
  return layers;
}

std::vector<Result> search_many(const Table& table, const std::vector<double>& masses,
                                int workers) {
  if (masses.empty()) throw std::invalid_argument("masses is empty");
  const auto layers = layers_of(table, masses.size());
  std::vector<Result> results;
  const py::gil_scoped_release release;
  for (const auto& found : curvfast::staircases_by_mass(layers, masses, workers))
    results.emplace_back(found.threshold, found.pairs, found.kept);
  return results;
}

double search_common(const Table& table, double mass) {
  const auto layers = layers_of(table, 1);
  const py::gil_scoped_release release;
  return curvfast::staircases_by_common_mass(layers, mass);
}

// (address of the scores, rows, columns, address of the mask)
using ScoreTable =
    std::vector<std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t>>;
using Count = std::tuple<std::int64_t, double>;

std::vector<curvfast::Scores> scores_of(const ScoreTable& table) {
  std::vector<curvfast::Scores> layers;
  for (const auto& [scores, rows, columns, mask] : table) {
    if (rows <= 0 || columns <= 0) throw std::invalid_argument("scores is empty");
    if (rows > (std::int64_t{1} << 31) || columns > (std::int64_t{1} << 31))
      throw std::invalid_argument("scores has too many rows or columns");
    layers.push_back({view<const float>(scores, rows * columns, "scores"), columns,
                      view<std::uint8_t>(mask, rows * ((columns + 7) / 8), "mask")});
  }
  return layers;
}

std::vector<Count> select_scores(const ScoreTable& table, double mass, int workers) {
  const auto layers = scores_of(table);
  std::vector<Count> results;
  const py::gil_scoped_release release;
  for (const auto& kept : curvfast::scores_by_mass(layers, mass, workers))
    results.emplace_back(kept.count, kept.mass);
  return results;
}

Count select_largest(std::uintptr_t scores, std::int64_t rows, std::int64_t columns,
                     std::uintptr_t mask, std::int64_t pairs, int workers) {
  const auto layers = scores_of({{scores, rows, columns, mask}});
  const py::gil_scoped_release release;
  const curvfast::Kept kept = curvfast::scores_by_pairs(layers[0], pairs, workers);
  return {kept.count, kept.mass};
}

template <class Value>
bool add_rows(std::uintptr_t tiles, std::int64_t values, std::int64_t d, std::int64_t width,
              std::uintptr_t x, std::uintptr_t offsets, std::int64_t rows, std::uintptr_t roots,
              std::uintptr_t room, std::int64_t words, float scale,
              bool finite_only, const std::string& instructions, int workers) {
  const auto out = view<float>(tiles, values, "tiles");
  curvfast::triangle(d, width, values);
  const Value* first = view<const Value>(x, 1, "x").data();
  const curvfast::Rows given{
      view<const std::int64_t>(offsets, rows, "offsets"),
      roots == 0 ? std::span<const float>{} : view<const float>(roots, rows, "roots"),
      view<std::uint32_t>(room, words, "room"), finite_only};
  const curvfast::InstructionSet& set = curvfast::instruction_set(instructions);
  const py::gil_scoped_release release;
  return curvfast::add_rows({out.data(), d, width}, first, given, scale, set, workers);
}

template <class Word>
bool finite(std::uintptr_t x, std::span<const std::int64_t> offsets, std::int64_t d, Word exponent,
            int workers) {
  const Word* first = view<const Word>(x, 1, "x").data();
  const py::gil_scoped_release release;
  return curvfast::finite_rows(first, offsets, d, exponent, workers);
}

bool finite_rows(std::uintptr_t x, std::uintptr_t offsets, std::int64_t rows, std::int64_t d,
                 const std::string& type, int workers) {
  const auto begin = view<const std::int64_t>(offsets, rows, "offsets");
  if (type == "float16") return finite(x, begin, d, curvfast::kFloat16Exponent, workers);
  if (type == "bfloat16") return finite(x, begin, d, curvfast::kBfloat16Exponent, workers);
  if (type == "float32") return finite(x, begin, d, curvfast::kFloat32Exponent, workers);
  if (type == "float64") return finite(x, begin, d, curvfast::kFloat64Exponent, workers);
  throw std::invalid_argument("no floating-point type " + type);
}

// Every instruction set's name, and whether this processor supports it.
std::vector<std::tuple<std::string, bool>> instruction_sets() {
  std::vector<std::tuple<std::string, bool>> found;
  for (const auto& set : curvfast::instruction_sets())
    found.emplace_back(set.name, set.supported());
  return found;
}

template <class Value>
void define_add_rows(py::module_& module, const char* name) {
  module.def(name, &add_rows<Value>, py::arg("tiles"), py::arg("values"), py::arg("d"),
             py::arg("width"), py::arg("x"), py::arg("offsets"), py::arg("rows"), py::arg("roots"),
             py::arg("room"), py::arg("words"), py::arg("scale"), py::arg("finite_only"),
             py::arg("instructions"), py::arg("workers"));
}

struct Threads {
  int last;
  template <class T>
  void pack(const T* matrix, curvfast::Triangle shape, T* tiles) const {
    curvfast::pack(matrix, shape, tiles, last);
  }
  template <class T>
  void unpack(const T* tiles, curvfast::Triangle shape, T* matrix) const {
    curvfast::unpack(tiles, shape, matrix, last);
  }
  template <class T>
  void mirror(T* matrix, std::int32_t d) const {
    curvfast::mirror(matrix, d, last);
  }
  template <class T>
  void scale(std::span<T> values, T factor) const {
    curvfast::scale(values, factor, last);
  }
};

std::tuple<std::int64_t, std::int64_t, std::int64_t> find_split(std::uintptr_t widths,
                                                                std::int64_t rows,
                                                                std::int64_t columns,
                                                                std::int64_t band) {
  const auto kept = view<const std::int64_t>(widths, rows, "widths");
  if (columns < 0) throw std::invalid_argument("columns must not be negative");
  const py::gil_scoped_release release;
  const curvfast::Split found = curvfast::cheapest_split(kept, columns, band);
  return {found.flops, found.split, found.reach};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of curvfast: addresses and sizes in, plain numbers out.";
  module.def("staircase_by_mass", search<double>(&curvfast::staircase_by_mass), py::arg("g"),
             py::arg("rows"), py::arg("a"), py::arg("columns"), py::arg("mass"), py::arg("widths"));
  module.def("staircase_by_pairs", search<std::int64_t>(&curvfast::staircase_by_pairs),
             py::arg("g"), py::arg("rows"), py::arg("a"), py::arg("columns"), py::arg("pairs"),
             py::arg("widths"));
  module.def("staircases_by_mass", &search_many, py::arg("layers"), py::arg("masses"),
             py::arg("workers"));
  module.def("staircases_by_common_mass", &search_common, py::arg("layers"), py::arg("mass"));
  module.def("scores_by_mass", &select_scores, py::arg("layers"), py::arg("mass"),
             py::arg("workers"));
  module.def("scores_by_pairs", &select_largest, py::arg("scores"), py::arg("rows"),
             py::arg("columns"), py::arg("mask"), py::arg("pairs"), py::arg("workers"));
  module.def("cheapest_split", &find_split, py::arg("widths"), py::arg("rows"), py::arg("columns"),
             py::arg("band"));
  module.def("instruction_sets", &instruction_sets);
  module.def("packed_words", &curvfast::packed_words, py::arg("d"), py::arg("rows"),
             py::arg("bits"));
  module.def("packed_products", &curvfast::packed_products, py::arg("d"));
  module.def("finite_rows", &finite_rows, py::arg("x"), py::arg("offsets"), py::arg("rows"),
             py::arg("d"), py::arg("type"), py::arg("workers"));
  define_add_rows<float>(module, "add_float32_rows");
  define_add_rows<std::uint16_t>(module, "add_bfloat16_rows");
  curvfast::define_triangle<Threads>(module, "workers");
}
