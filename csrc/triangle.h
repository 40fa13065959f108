// A packed symmetric sum: where its entries lie, and copies in and out of it.
#pragma once

#include <cstdint>
#include <span>

// One arithmetic for both: what the CPU's tests cover is what a GPU computes.
#ifdef __CUDACC__
#define CURVFAST_BOTH __host__ __device__
#else
#define CURVFAST_BOTH
#endif

namespace curvfast {

// The packed form of a symmetric [d, d] matrix (curvfast/ops/packed_layout.py): the tiles [width, width]
// on and above the diagonal, one panel of columns after the other, zero past d.
struct Triangle {
  std::int32_t d, width;

  CURVFAST_BOTH constexpr std::int32_t panels() const { return (d - 1) / width + 1; }

  // Where the tiles of a panel begin.
  CURVFAST_BOTH constexpr std::int64_t panel(std::int32_t p) const {
    return std::int64_t{p} * (p + 1) / 2 * width * width;
  }

  // Where an entry lies whose row is not below its column's diagonal tile.
  CURVFAST_BOTH constexpr std::int64_t entry(std::int32_t row, std::int32_t column) const {
    const std::int32_t p = column / width;
    return panel(p) + std::int64_t{row} * width + (column - p * width);
  }
};

struct Tile {
  std::uint32_t row, column;
};

// How many tiles are on and above the diagonal of n by n.
CURVFAST_BOTH constexpr std::uint64_t tiles_of(std::uint32_t n) {
  return std::uint64_t{n} * (n + 1u) / 2;
}

// One of those tiles, each once, in integers alone: the longest column and the shortest, or none
// where n is odd, make one row of a rectangle, and so on inwards.
CURVFAST_BOTH constexpr Tile tile_at(std::uint32_t index, std::uint32_t n) {
  const std::uint32_t length = n | 1u, pair = index / length, place = index % length;
  if (place < n - pair) return {place, n - 1 - pair};
  return {place - (n - pair), pair - (n & 1u)};
}

// T is float or double. The answers do not depend on the workers.

// Writes all of tiles: the matrix's entries on, above and in the diagonal tiles, zero past d.
template <class T>
void pack(const T* matrix, Triangle shape, T* tiles, int workers);

// Writes all of the matrix: its lower triangle is a copy of the upper.
template <class T>
void unpack(const T* tiles, Triangle shape, T* matrix, int workers);

// Writes the entries below the diagonal of a [d, d] matrix: copies of those above.
template <class T>
void mirror(T* matrix, std::int32_t d, int workers);

template <class T>
void scale(std::span<T> values, T factor, int workers);

}  // namespace curvfast
