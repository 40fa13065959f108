// The cheapest split of a staircase: rows before it are projected rows first, the rest columns
// first (curvfast/ops/projection.py says what that costs; its twin is in reference.py).
#pragma once

#include <cstdint>
#include <span>

namespace curvfast {

struct Split {
  std::int64_t flops;
  std::int64_t split;
  std::int64_t reach;
};

// widths: columns kept in each row, never increasing, from 0 to columns. band: rows or columns
// evaluated together.
Split cheapest_split(std::span<const std::int64_t> widths, std::int64_t columns, std::int64_t band);

}  // namespace curvfast
