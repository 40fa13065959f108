// The kernels of triangle.cu. No header of CUDA is named, so that tests can run them on a CPU.
#pragma once

#include <cstdint>

#include "triangle.h"

namespace curvfast::cuda {

// A block of threads is kTile by kRows, and each thread has kTile / kRows entries of a tile.
constexpr int kTile = 32, kRows = 8, kEach = kTile / kRows, kThreads = kTile * kRows;

// Blocks of a launch. Too many for CUDA are refused by the launch.
struct Grid {
  std::uint64_t x, y;
};

constexpr std::uint32_t blocks_of(std::int32_t size) {
  return static_cast<std::uint32_t>((size - 1) / kTile) + 1;
}
constexpr Grid pack_grid(Triangle shape) {
  return {tiles_of(static_cast<std::uint32_t>(shape.panels())), blocks_of(shape.width)};
}
constexpr Grid reflect_grid(std::int32_t d) { return {tiles_of(blocks_of(d)), 1}; }
constexpr Grid scale_grid(std::int64_t size) {
  constexpr std::int64_t most = 1 << 16, values = kThreads * kEach;
  const std::int64_t blocks = (size - 1) / values + 1;
  return {static_cast<std::uint64_t>(blocks < most ? blocks : most), 1};
}

// One tile of the packed form, kTile of its rows: both sides are read and written along rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_tiles(const T* __restrict__ matrix, Triangle shape, T* __restrict__ tiles) {
  const Tile tile = tile_at(blockIdx.x, static_cast<std::uint32_t>(shape.panels()));
  const std::int64_t width = shape.width, d = shape.d;
  T* const out = tiles + shape.panel(static_cast<std::int32_t>(tile.column)) +
                 tile.row * width * width;
  const std::int64_t first = std::int64_t{blockIdx.y} * kTile;
  for (int k = 0; k < kEach; ++k) {
    const std::int64_t r = first + threadIdx.y + k * kRows, row = tile.row * width + r;
    if (r >= width) return;
    for (std::int64_t c = threadIdx.x; c < width; c += kTile) {
      const std::int64_t column = tile.column * width + c;
      out[r * width + c] = row < d && column < d ? matrix[row * d + column] : T{0};
    }
  }
}

// Where the entries above the diagonal are read.
template <class T>
struct Packed {
  static constexpr bool kElsewhere = true;
  const T* tiles;
  Triangle shape;
  __device__ const T* at(std::int32_t row, std::int32_t column) const {
    return tiles + shape.entry(row, column);
  }
};

template <class T>
struct InPlace {
  static constexpr bool kElsewhere = false;
  const T* matrix;
  std::int32_t d;
  __device__ const T* at(std::int32_t row, std::int32_t column) const {
    return matrix + std::int64_t{row} * d + column;
  }
};

// One tile above the diagonal and its mirror image, transposed in shared memory so that both are
// written along rows; the padding spreads a column over all banks.
template <class T, class Above>
__global__ void __launch_bounds__(kThreads) reflect(Above above, T* matrix, std::int32_t d) {
  __shared__ T block[kTile][kTile + 1];
  const Tile tile = tile_at(blockIdx.x, (d - 1u) / kTile + 1);
  const auto top = static_cast<std::int32_t>(tile.row) * kTile;
  const auto left = static_cast<std::int32_t>(tile.column) * kTile;
  const auto x = static_cast<std::int32_t>(threadIdx.x), y = static_cast<std::int32_t>(threadIdx.y);
  // All reads first: they are under way together.
  T values[kEach];
  for (int k = 0; k < kEach; ++k) {
    const std::int32_t row = top + y + k * kRows, column = left + x;
    values[k] = row <= column && column < d ? *above.at(row, column) : T{0};
  }
  for (int k = 0; k < kEach; ++k) {
    const std::int32_t row = top + y + k * kRows, column = left + x;
    block[y + k * kRows][x] = values[k];
    if (Above::kElsewhere && row <= column && column < d)
      matrix[std::int64_t{row} * d + column] = values[k];
  }
  __syncthreads();
  for (int k = 0; k < kEach; ++k) {
    const std::int32_t row = left + y + k * kRows, column = top + x;
    if (column < row && row < d) matrix[std::int64_t{row} * d + column] = block[x][y + k * kRows];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_values(T* values, std::int64_t size, T factor) {
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.y * kTile + threadIdx.x;
  for (std::int64_t i = first; i < size; i += step) values[i] *= factor;
}

}  // namespace curvfast::cuda
