// Second moments of rows on CPUs with AVX-512: float32 ones, and bfloat16 ones where there is
// AVX512_BF16.
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
bool multiplies_float32();
bool multiplies_bfloat16();

// How many words of room add_rows needs to pack so many rows of so many bits a value.
std::int64_t packed_words(std::int64_t d, std::int64_t rows, int bits);

// How many of the d * d products of a row add_rows computes.
std::int64_t packed_products(std::int64_t d);

// Adds scale * sum of x xᵀ over the rows at x + offsets[i] to out: products and sums in float32,
// in one order whatever the workers. roots is empty, or one factor for each row, by which its
// values are multiplied first; bfloat16 rows take none, and their subnormal numbers count as zero.
// Throws std::runtime_error where the instructions are missing, and std::invalid_argument if room
// is too small.
struct Rows {
  std::span<const std::int64_t> offsets;
  std::span<const float> roots;
  std::span<std::uint32_t> room;
};
void add_rows(PackedSum out, const float* x, const Rows& rows, float scale, int workers);
void add_rows(PackedSum out, const std::uint16_t* x, const Rows& rows, float scale, int workers);

}  // namespace curvfast
