// Selection of the largest of arbitrary scores by mass, without sorting them.
#pragma once

#include <cstdint>
#include <span>

namespace curvfast {

struct Kept {
  float threshold;     // smallest score kept
  std::int64_t count;  // scores kept
  double mass;         // their share of the sum
};

// Keeps the largest scores whose sum first reaches mass of the total, ties included. Scores are
// finite and non-negative; bit i of the mask, lowest bit of a byte first, says whether score i is
// kept. Sums are exact within one exponent and mantissa prefix, then added from the largest down:
// the answer depends neither on the order of the scores nor on the workers.
Kept scores_by_mass(std::span<const float> scores, double mass, std::span<std::uint8_t> mask,
                    int workers);

}  // namespace curvfast
