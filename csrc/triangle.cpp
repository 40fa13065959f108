#include "triangle.h"

#include <algorithm>
#include <cstddef>

#include "parallel.h"

namespace curvfast {
namespace {

// A block and its transpose stay in the first-level cache.
constexpr std::int32_t kBlock = 64;
constexpr std::size_t kChunk = 1 << 16;

constexpr std::int32_t blocks(std::int32_t size) { return (size - 1) / kBlock + 1; }

// Calls visit(first, last) for every kBlock columns, or fewer, of one panel; the longest first.
template <class Visit>
void each_strip(Triangle shape, int workers, Visit visit) {
  const auto strips = static_cast<std::size_t>(blocks(std::min(shape.d, shape.width)));
  parallel_for(static_cast<std::size_t>(shape.panels()) * strips, workers, [&](std::size_t i) {
    const auto panel = shape.panels() - 1 - static_cast<std::int32_t>(i / strips);
    const std::int64_t start = std::int64_t{panel} * shape.width;
    const std::int64_t first = start + static_cast<std::int64_t>(strips - 1 - i % strips) * kBlock;
    const std::int64_t stop = std::min<std::int64_t>(shape.d, start + shape.width);
    if (first < stop)
      visit(static_cast<std::int32_t>(first),
            static_cast<std::int32_t>(std::min(stop, first + kBlock)));
  });
}

// Completes the columns first to last of a matrix from what is on and above its diagonal.
// above(row) is where the entries of a row from column first on are read.
template <bool kElsewhere, class T, class Above>
void reflect(T* matrix, std::int32_t d, std::int32_t first, std::int32_t last, Above above) {
  const auto at = [=](std::int32_t row, std::int32_t column) {
    return matrix + std::int64_t{row} * d + column;
  };
  const std::int32_t columns = last - first;
  T block[kBlock][kBlock];
  for (std::int32_t start = 0; start < first; start += kBlock) {
    const std::int32_t rows = std::min(kBlock, first - start);
    if constexpr (kElsewhere)
      for (std::int32_t r = 0; r < rows; ++r)
        std::copy_n(above(start + r), columns, at(start + r, first));
    for (std::int32_t r = 0; r < rows; ++r) {
      const T* source = above(start + r);
      for (std::int32_t c = 0; c < columns; ++c) block[c][r] = source[c];
    }
    for (std::int32_t c = 0; c < columns; ++c) std::copy_n(block[c], rows, at(first + c, start));
  }
  for (std::int32_t r = 0; r < columns; ++r) {
    const T* source = above(first + r);
    for (std::int32_t c = r; c < columns; ++c)
      *at(first + r, first + c) = *at(first + c, first + r) = source[c];
  }
}

}  // namespace

template <class T>
void pack(const T* matrix, Triangle shape, T* tiles, int workers) {
  const std::int64_t width = shape.width;
  const auto chunks = static_cast<std::size_t>((shape.panels() * width - 1) / kBlock + 1);
  const auto panels = static_cast<std::size_t>(shape.panels());
  parallel_for(panels * chunks, workers, [&](std::size_t i) {
    const auto panel = static_cast<std::int64_t>(panels - 1 - i / chunks);
    const std::int64_t start = panel * width, columns = std::min(width, shape.d - start);
    const auto first = static_cast<std::int64_t>(i % chunks) * kBlock;
    const std::int64_t last = std::min(start + width, first + kBlock);
    T* out = tiles + shape.panel(static_cast<std::int32_t>(panel)) + first * width;
    for (std::int64_t row = first; row < last; ++row, out += width) {
      const std::int64_t filled = row < shape.d ? columns : 0;
      std::copy_n(matrix + row * shape.d + start, filled, out);
      std::fill(out + filled, out + width, T{0});
    }
  });
}

template <class T>
void unpack(const T* tiles, Triangle shape, T* matrix, int workers) {
  each_strip(shape, workers, [&](std::int32_t first, std::int32_t last) {
    reflect<true>(matrix, shape.d, first, last,
                  [&](std::int32_t row) { return tiles + shape.entry(row, first); });
  });
}

template <class T>
void mirror(T* matrix, std::int32_t d, int workers) {
  each_strip({d, d}, workers, [&](std::int32_t first, std::int32_t last) {
    reflect<false>(matrix, d, first, last, [=](std::int32_t row) {
      return matrix + std::int64_t{row} * d + first;
    });
  });
}

template <class T>
void scale(std::span<T> values, T factor, int workers) {
  parallel_for((values.size() + kChunk - 1) / kChunk, workers, [&](std::size_t i) {
    for (T& value : values.subspan(i * kChunk, std::min(kChunk, values.size() - i * kChunk)))
      value *= factor;
  });
}

#define CURVFAST_INSTANTIATE(T)                            \
  template void pack(const T*, Triangle, T*, int);         \
  template void unpack(const T*, Triangle, T*, int);       \
  template void mirror(T*, std::int32_t, int);             \
  template void scale(std::span<T>, T, int);
CURVFAST_INSTANTIATE(float)
CURVFAST_INSTANTIATE(double)

}  // namespace curvfast
