// Exact selection of eigenpair products over two sorted lists, without forming their outer product.
#pragma once

#include <cstdint>
#include <span>

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

}  // namespace curvfast
