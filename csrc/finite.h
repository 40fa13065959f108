// Whether floating-point rows are finite, by the bits of their exponents alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <span>

#include "parallel.h"

namespace curvfast {

// The bits of the exponent: all are set in infinities and NaNs, and in nothing else.
constexpr std::uint16_t kFloat16Exponent = 0x7C00, kBfloat16Exponent = 0x7F80;
constexpr std::uint32_t kFloat32Exponent = 0x7F800000;
constexpr std::uint64_t kFloat64Exponent = 0x7FF0000000000000;

// 1 for an infinity or NaN, else 0: without a branch, so that loops over it become vectors.
template <class Word>
constexpr Word not_finite(Word word, Word exponent) {
  return (word & exponent) == exponent;
}

// Whether every value of the rows at x + offsets[i], each of d values, is finite.
template <class Value, class Word>
bool finite_rows(const Value* x, std::span<const std::int64_t> offsets, std::int64_t d,
                 Word exponent, int workers) {
  // So many values are read in less time than a thread takes to begin.
  constexpr std::int64_t kShare = 1 << 17;
  const std::int64_t step = std::max<std::int64_t>(1, kShare / std::max<std::int64_t>(1, d));
  const auto total = static_cast<std::int64_t>(offsets.size());
  std::atomic<bool> finite{true};
  parallel_for(static_cast<std::size_t>((total + step - 1) / step), workers, [&](std::size_t part) {
    const std::int64_t first = static_cast<std::int64_t>(part) * step;
    for (std::int64_t row = first; row < std::min(first + step, total) && finite; ++row) {
      const Value* values = x + offsets[static_cast<std::size_t>(row)];
      Word bad = 0;
      for (std::int64_t c = 0; c < d; ++c) bad |= not_finite(std::bit_cast<Word>(values[c]), exponent);
      if (bad) finite = false;
    }
  });
  return finite;
}

}  // namespace curvfast
