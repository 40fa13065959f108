// Exact selection of eigenpair products over two sorted lists, without forming their outer product.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace curvfast {

struct Staircase {
  double threshold;    // smallest product kept, in the caller's units
  std::int64_t pairs;  // products kept
  double kept;         // their sum as a share of all products' sum
};

// Both lists descending, finite, non-negative and not empty; widths has one entry a row of g.
// Throws std::invalid_argument otherwise.
Staircase staircase_by_mass(std::span<const double> g, std::span<const double> a, double mass,
                            std::span<std::int32_t> widths);
Staircase staircase_by_pairs(std::span<const double> g, std::span<const double> a,
                             std::int64_t pairs, std::span<std::int32_t> widths);

// Two lists and where the widths go: one entry a value of g, for each mass after the other.
struct Layer {
  std::span<const double> g, a;
  std::span<std::int32_t> widths;
};

// Every layer at every mass, layer by layer; the answer does not depend on the workers.
std::vector<Staircase> staircases_by_mass(std::span<const Layer> layers,
                                          std::span<const double> masses, int workers);

// One threshold for all layers: the largest at which together they keep the mass. Returns it.
double staircases_by_common_mass(std::span<const Layer> layers, double mass);

}  // namespace curvfast
