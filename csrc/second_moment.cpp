#include "second_moment.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <stdexcept>

#include "finite.h"
#include "parallel.h"
#include "triangle.h"

namespace curvfast {

namespace {

// Both operands of xᵀx are the same numbers, so rows are packed once, a step being one row of
// float32 or two of bfloat16. kDepth steps are summed in registers: longer sums would round more,
// and two strips of them fill a first-level cache.
constexpr std::int64_t kDepth = 128;

constexpr std::int64_t upwards(std::int64_t n, std::int64_t step) { return (n + step - 1) / step; }

// How many steps of d features are packed at a time: threads meet twice for each such block, so
// few features are packed far ahead.
constexpr std::int64_t block_steps(std::int64_t d) {
  return std::max<std::int64_t>(512, (1 << 19) / (upwards(d, kStrip) * kStrip));
}

}  // namespace

std::int64_t packed_words(std::int64_t d, std::int64_t rows, int bits) {
  const std::int64_t steps = std::min(upwards(rows, 32 / bits), block_steps(d));
  return upwards(d, kStrip) * kStrip * steps;
}

std::int64_t packed_products(std::int64_t d) {
  std::int64_t products = 0;
  for (std::int64_t first = 0; first < d; first += kStrip) {
    const std::int64_t rows = std::min(upwards(d - first, kRegisterRows) * kRegisterRows, kStrip);
    products += rows * upwards(d - first, kStrip) * kStrip;
  }
  return products;
}

namespace {

struct Packed {
  std::uint32_t* words;
  std::int64_t strips, steps;
  std::uint32_t* strip(std::int64_t s) const { return words + s * steps * kStrip; }
};

// Packs rows; returns whether all values were finite.
bool pack(const float* x, std::span<const std::int64_t> offsets, std::span<const float> roots,
          std::int64_t first, std::int64_t columns, std::uint32_t* out) {
  std::uint32_t bad = 0;
  for (std::size_t row = 0; row < offsets.size(); ++row, out += kStrip) {
    const float* from = x + offsets[row] + first;
    const float root = roots.empty() ? 1.0f : roots[row];
    for (std::int64_t c = 0; c < columns; ++c) {
      bad |= not_finite(std::bit_cast<std::uint32_t>(from[c]), kFloat32Exponent);
      out[c] = std::bit_cast<std::uint32_t>(root * from[c]);
    }
    for (std::int64_t c = columns; c < kStrip; ++c) out[c] = 0;
  }
  return !bad;
}

bool pack(const std::uint16_t* x, std::span<const std::int64_t> offsets, std::span<const float>,
          std::int64_t first, std::int64_t columns, std::uint32_t* out) {
  std::uint32_t bad = 0;
  for (std::size_t row = 0; row < offsets.size(); row += 2, out += kStrip) {
    const std::uint16_t* even = x + offsets[row] + first;
    const bool whole = row + 1 < offsets.size();
    const std::uint16_t* odd = whole ? x + offsets[row + 1] + first : even;
    const std::uint32_t keep = whole ? 0xFFFFFFFFu : 0x0000FFFFu;
    for (std::int64_t c = 0; c < columns; ++c) {
      bad |= not_finite<std::uint32_t>(even[c], kBfloat16Exponent) |
             not_finite<std::uint32_t>(odd[c], kBfloat16Exponent);
      out[c] = (even[c] | static_cast<std::uint32_t>(odd[c]) << 16) & keep;
    }
    for (std::int64_t c = columns; c < kStrip; ++c) out[c] = 0;
  }
  return !bad;
}

float* place(const PackedSum& out, std::int64_t row, std::int64_t column) {
  const Triangle shape{static_cast<std::int32_t>(out.d), static_cast<std::int32_t>(out.width)};
  return out.tiles + shape.entry(static_cast<std::int32_t>(row), static_cast<std::int32_t>(column));
}

// Adds a block of products to the sum; a strip may reach over two panels and past the last feature.
void spread(const PackedSum& out, std::int64_t row, std::int64_t column, const float* block) {
  const std::int64_t rows = std::min(kRegisterRows, out.d - row);
  for (std::int64_t c = 0; c < kStrip && column + c < out.d;) {
    const std::int64_t panel_stop = ((column + c) / out.width + 1) * out.width;
    const std::int64_t run = std::min({kStrip - c, panel_stop - column - c, out.d - column - c});
    // Rows below a panel's diagonal tile are no part of it.
    for (std::int64_t r = 0; r < rows && row + r < panel_stop; ++r) {
      float* target = place(out, row + r, column + c);
      for (std::int64_t j = 0; j < run; ++j) target[j] += block[r * kStrip + c + j];
    }
    c += run;
  }
}

// Adds the products of kRegisterRows features from row on with the strip from column on.
void add_block(const PackedSum& out, std::int64_t row, std::int64_t column, const std::uint32_t* a,
               const std::uint32_t* b, std::int64_t steps, float scale, Kernel multiply) {
  const std::int64_t panel_stop = std::min((column / out.width + 1) * out.width, out.d);
  if (column + kStrip <= panel_stop && row + kRegisterRows <= panel_stop)
    return multiply(a, b, steps, scale, place(out, row, column), out.width);
  alignas(64) float block[kRegisterRows * kStrip] = {};
  multiply(a, b, steps, scale, block, kStrip);
  spread(out, row, column, block);
}

// Adds the products of the strips from row_strip on with those from column_strip on, a tile.
void add_tile(const PackedSum& out, const Packed& packed, std::int64_t row_strip,
              std::int64_t column_strip, std::int64_t side, float scale, Kernel multiply) {
  const std::int64_t last_row = std::min(row_strip + side, packed.strips);
  const std::int64_t last_column = std::min(column_strip + side, packed.strips);
  for (std::int64_t start = 0; start < packed.steps; start += kDepth) {
    const std::int64_t steps = std::min(kDepth, packed.steps - start);
    for (std::int64_t column = column_strip; column < last_column; ++column) {
      const std::uint32_t* b = packed.strip(column) + start * kStrip;
      for (std::int64_t strip = row_strip; strip < std::min(last_row, column + 1); ++strip) {
        const std::uint32_t* a = packed.strip(strip) + start * kStrip;
        for (std::int64_t r = 0; r < kStrip && strip * kStrip + r < out.d; r += kRegisterRows)
          add_block(out, strip * kStrip + r, column * kStrip, a + r, b, steps, scale, multiply);
      }
    }
  }
}

std::uint32_t exponent_of(const float*) { return kFloat32Exponent; }
std::uint16_t exponent_of(const std::uint16_t*) { return kBfloat16Exponent; }

template <class Value>
bool add_blocks(const PackedSum& out, const Value* x, const Rows& rows, float scale,
                Kernel multiply, int workers) {
  constexpr std::int64_t kRows = sizeof(std::uint32_t) / sizeof(Value);
  const auto total = static_cast<std::int64_t>(rows.offsets.size());
  if (static_cast<std::int64_t>(rows.room.size()) < packed_words(out.d, total, 32 / kRows))
    throw std::invalid_argument("room is too small for the packed rows");
  const std::int64_t strips = upwards(out.d, kStrip), most = block_steps(out.d) * kRows;
  // Small tiles keep few features from idling a thread, large ones reuse what the cache holds.
  const std::int64_t side = std::clamp<std::int64_t>(strips / 4, 1, 8);
  const auto tiles = static_cast<std::uint32_t>(upwards(strips, side));
  // The first block is checked while it is packed, later ones before anything is added.
  const auto later = rows.offsets.subspan(static_cast<std::size_t>(std::min(most, total)));
  if (rows.finite_only && !finite_rows(x, later, out.d, exponent_of(x), workers)) return false;
  for (std::int64_t start = 0; start < total; start += most) {
    std::atomic<bool> finite{true};
    const auto from = static_cast<std::size_t>(start);
    const auto count = static_cast<std::size_t>(std::min(most, total - start));
    const Packed packed{rows.room.data(), strips,
                        upwards(static_cast<std::int64_t>(count), kRows)};
    const auto offsets = rows.offsets.subspan(from, count);
    const auto roots = rows.roots.empty() ? rows.roots : rows.roots.subspan(from, count);
    parallel_for(static_cast<std::size_t>(strips), workers, [&](std::size_t s) {
      const std::int64_t first = static_cast<std::int64_t>(s) * kStrip;
      if (!pack(x, offsets, roots, first, std::min(kStrip, out.d - first),
                packed.strip(static_cast<std::int64_t>(s))))
        finite = false;
    });
    if (rows.finite_only && !finite) return false;
    parallel_for(tiles_of(tiles), workers, [&](std::size_t t) {
      const Tile tile = tile_at(static_cast<std::uint32_t>(t), tiles);
      add_tile(out, packed, tile.row * side, tile.column * side, side, scale, multiply);
    });
  }
  return true;
}

}  // namespace

bool add_rows(PackedSum out, const float* x, const Rows& rows, float scale,
              const InstructionSet& set, int workers) {
  return add_blocks(out, x, rows, scale, set.float32, workers);
}

bool add_rows(PackedSum out, const std::uint16_t* x, const Rows& rows, float scale,
              const InstructionSet& set, int workers) {
  if (!rows.roots.empty()) throw std::invalid_argument("bfloat16 rows take no factors");
  return add_blocks(out, x, rows, scale, set.bfloat16, workers);
}

}  // namespace curvfast
