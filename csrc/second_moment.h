// Second moments of bfloat16 rows on CPUs that multiply bfloat16 (AVX512_BF16).
#pragma once

#include <cstdint>
#include <span>

namespace curvfast {

// The packed triangle of curvfast/ops/panels.py: panels of width columns, stacked.
struct PackedSum {
  float* tiles;
  std::int64_t d, width;
};

// Whether this processor has the instructions.
bool multiplies_bfloat16();

// Adds scale * sum of x xᵀ over the rows at x + offsets[i] to out: products and sums in float32,
// in one order whatever the workers; subnormal numbers count as zero. Throws std::runtime_error
// where the instructions are missing.
void add_bfloat16_rows(PackedSum out, const std::uint16_t* x, std::span<const std::int64_t> offsets,
                       float scale, int workers);

}  // namespace curvfast
