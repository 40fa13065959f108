// Selection of the largest of arbitrary scores, by mass or by number, without sorting them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace curvfast {

// The scores of one layer, row after row, and where to write what is kept of them: each row of the
// mask begins a byte; bit b of byte k is column 8k + b, and bits past the last column are 0.
struct Scores {
  std::span<const float> values;  // finite and non-negative
  std::int64_t columns;
  std::span<std::uint8_t> mask;
};

struct Kept {
  std::int64_t count;  // scores kept
  double mass;         // their share of the layer's sum; 0 if that is 0
};

// Keeps the largest scores of all layers whose sum first reaches mass of the total: one threshold,
// ties with it included. Sums are exact within one exponent and mantissa prefix, then added from
// the largest down: the answer depends neither on the order of the scores nor on the workers.
std::vector<Kept> scores_by_mass(std::span<const Scores> layers, double mass, int workers);

// Keeps exactly so many scores, the largest; ties at the end are taken in row order.
Kept scores_by_pairs(const Scores& layer, std::int64_t pairs, int workers);

}  // namespace curvfast
