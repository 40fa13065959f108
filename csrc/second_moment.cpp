#include "second_moment.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "parallel.h"
#include "triangle.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CURVFAST_X86 1
#include <immintrin.h>
#endif

namespace curvfast {

#ifndef CURVFAST_X86

bool multiplies_bfloat16() { return false; }

void add_bfloat16_rows(PackedSum, const std::uint16_t*, std::span<const std::int64_t>, float, int) {
  throw std::runtime_error("this processor does not multiply bfloat16");
}

#else

namespace {

// Both operands of xᵀx are the same numbers, so rows are packed once: strips of kStrip features,
// and in each, pair by pair of rows, both rows' values of a feature in one word.
constexpr std::int64_t kStrip = 32, kRegisterRows = 8, kPairs = 128, kBlockRows = 4 * 2 * kPairs;

struct Packed {
  std::unique_ptr<std::uint32_t[]> words;
  std::int64_t strips, pairs;
  const std::uint32_t* strip(std::int64_t s) const { return words.get() + s * pairs * kStrip; }
};

void pack_strip(const Packed& packed, std::int64_t s, const std::uint16_t* x,
                std::span<const std::int64_t> offsets, std::int64_t d) {
  const std::int64_t first = s * kStrip, columns = std::min(kStrip, d - first);
  std::uint32_t* out = packed.words.get() + s * packed.pairs * kStrip;
  const auto rows = static_cast<std::int64_t>(offsets.size());
  for (std::int64_t pair = 0; pair < packed.pairs; ++pair, out += kStrip) {
    const std::uint16_t* even = x + offsets[2 * pair] + first;
    const bool whole = 2 * pair + 1 < rows;
    const std::uint16_t* odd = whole ? x + offsets[2 * pair + 1] + first : even;
    const std::uint32_t keep = whole ? 0xFFFFFFFFu : 0x0000FFFFu;
    for (std::int64_t c = 0; c < columns; ++c)
      out[c] = (even[c] | static_cast<std::uint32_t>(odd[c]) << 16) & keep;
    for (std::int64_t c = columns; c < kStrip; ++c) out[c] = 0;
  }
}

// Products of kRegisterRows features of one strip with all of another, over a block of pairs.
__attribute__((target("avx512f,avx512bf16"))) void multiply(const std::uint32_t* a,
                                                            const std::uint32_t* b,
                                                            std::int64_t pairs, float* out) {
  __m512 acc[kRegisterRows][2];
  for (auto& row : acc) row[0] = row[1] = _mm512_setzero_ps();
  for (std::int64_t k = 0; k < pairs; ++k, a += kStrip, b += kStrip) {
    const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
    const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 16));
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r) {
      const auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[r])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], value, left);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], value, right);
    }
  }
  for (int r = 0; r < kRegisterRows; ++r) {
    _mm512_storeu_ps(out + r * kStrip, acc[r][0]);
    _mm512_storeu_ps(out + r * kStrip + 16, acc[r][1]);
  }
}

float* place(const PackedSum& out, std::int64_t row, std::int64_t column) {
  const Triangle shape{static_cast<std::int32_t>(out.d), static_cast<std::int32_t>(out.width)};
  return out.tiles + shape.entry(static_cast<std::int32_t>(row), static_cast<std::int32_t>(column));
}

// Adds a block of products to the sum; a strip may reach over two panels and past the last feature.
void add(const PackedSum& out, std::int64_t row, std::int64_t column, const float* block,
         float scale) {
  const std::int64_t rows = std::min(kRegisterRows, out.d - row);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < kStrip;) {
      if (column + c >= out.d) break;
      const std::int64_t panel_stop = ((column + c) / out.width + 1) * out.width;
      const std::int64_t run = std::min({kStrip - c, panel_stop - column - c, out.d - column - c});
      // Rows below a panel's diagonal tile are no part of it.
      if (row + r < panel_stop) {
        float* target = place(out, row + r, column + c);
        for (std::int64_t j = 0; j < run; ++j) target[j] += scale * block[r * kStrip + c + j];
      }
      c += run;
    }
  }
}

void add_strip(const PackedSum& out, const Packed& packed, std::int64_t column, float scale) {
  float block[kRegisterRows * kStrip];
  for (std::int64_t start = 0; start < packed.pairs; start += kPairs) {
    const std::int64_t pairs = std::min(kPairs, packed.pairs - start);
    const std::uint32_t* b = packed.strip(column) + start * kStrip;
    for (std::int64_t strip = 0; strip <= column; ++strip) {
      const std::uint32_t* a = packed.strip(strip) + start * kStrip;
      for (std::int64_t r = 0; r < kStrip && strip * kStrip + r < out.d; r += kRegisterRows) {
        multiply(a + r, b, pairs, block);
        add(out, strip * kStrip + r, column * kStrip, block, scale);
      }
    }
  }
}

}  // namespace

bool multiplies_bfloat16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
}

void add_bfloat16_rows(PackedSum out, const std::uint16_t* x, std::span<const std::int64_t> offsets,
                       float scale, int workers) {
  if (!multiplies_bfloat16())
    throw std::runtime_error("this processor does not multiply bfloat16");
  const std::int64_t strips = (out.d + kStrip - 1) / kStrip;
  const auto rows = static_cast<std::int64_t>(offsets.size());
  const std::int64_t most = (std::min(rows, kBlockRows) + 1) / 2;
  Packed packed{std::make_unique_for_overwrite<std::uint32_t[]>(
                    static_cast<std::size_t>(strips * most * kStrip)),
                strips, most};
  for (std::int64_t start = 0; start < rows; start += kBlockRows) {
    const std::int64_t count = std::min(kBlockRows, rows - start);
    packed.pairs = (count + 1) / 2;
    const auto block = offsets.subspan(static_cast<std::size_t>(start),
                                       static_cast<std::size_t>(count));
    parallel_for(static_cast<std::size_t>(strips), workers, [&](std::size_t s) {
      pack_strip(packed, static_cast<std::int64_t>(s), x, block, out.d);
    });
    // The longest columns first: the last to finish are then the shortest.
    parallel_for(static_cast<std::size_t>(strips), workers, [&](std::size_t s) {
      add_strip(out, packed, strips - 1 - static_cast<std::int64_t>(s), scale);
    });
  }
}

#endif

}  // namespace curvfast
