// The cheapest hook of a staircase: rows before a split are projected rows first, the rest columns
// first (curvfast/ops/plan.py says what that costs, and is its twin).
#pragma once

#include <cstdint>
#include <span>

namespace curvfast {

struct Hook {
  std::int64_t flops;
  std::int64_t split;
  std::int64_t reach;
};

// widths: columns kept in each row, never increasing, from 0 to columns. band: rows or columns
// evaluated together.
Hook cheapest_hook(std::span<const std::int64_t> widths, std::int64_t columns, std::int64_t band);

}  // namespace curvfast
