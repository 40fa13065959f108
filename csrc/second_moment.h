// Second moments of rows on CPUs, of float32 and of bfloat16, by any instruction set.
#pragma once

#include <cstdint>
#include <span>

#include "gram_kernels.h"

namespace curvfast {

// The packed triangle of curvfast/ops/packed_layout.py: panels of width columns, stacked.
struct PackedSum {
  float* tiles;
  std::int64_t d, width;
};

// How many words of room add_rows needs to pack so many rows of so many bits a value.
std::int64_t packed_words(std::int64_t d, std::int64_t rows, int bits);

// How many of the d * d products of a row add_rows computes.
std::int64_t packed_products(std::int64_t d);

// Adds scale * sum of x xᵀ over the rows at x + offsets[i] to out: products and sums in float32,
// in one order whatever the workers. roots is empty, or one factor for each row, by which its
// values are multiplied first; bfloat16 rows take none. Throws std::invalid_argument if room is
// too small. The set must be one that this processor supports. With finite_only, rows that are not
// all finite leave out as it was, and the answer is false.
struct Rows {
  std::span<const std::int64_t> offsets;
  std::span<const float> roots;
  std::span<std::uint32_t> room;
  bool finite_only = false;
};
bool add_rows(PackedSum out, const float* x, const Rows& rows, float scale,
              const InstructionSet& set, int workers);
bool add_rows(PackedSum out, const std::uint16_t* x, const Rows& rows, float scale,
              const InstructionSet& set, int workers);

}  // namespace curvfast
