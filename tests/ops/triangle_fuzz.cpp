// Packed sums of random sizes, on the CPU and by the CUDA kernels run there, against plain loops.
#include "cuda_on_host.h"
#include "triangle.h"
#include "triangle_kernels.cuh"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

namespace {

namespace cuda = curvfast::cuda;
using curvfast::Triangle;

std::mt19937_64 random_bits(20251028);

int up_to(int most) { return 1 + static_cast<int>(random_bits() % static_cast<unsigned>(most)); }

// Each tile of the triangle once, and none besides.
constexpr bool every_tile_once(std::uint32_t n) {
  bool seen[12][12] = {};
  for (std::uint32_t i = 0; i < curvfast::tiles_of(n); ++i) {
    const curvfast::Tile tile = curvfast::tile_at(i, n);
    if (tile.column >= n || tile.row > tile.column || seen[tile.row][tile.column]) return false;
    seen[tile.row][tile.column] = true;
  }
  return true;
}
static_assert(every_tile_once(1) && every_tile_once(2) && every_tile_once(3) &&
              every_tile_once(4) && every_tile_once(11) && every_tile_once(12));
// The last tile of the largest grid there is: nothing overflows.
static_assert(curvfast::tile_at(curvfast::tiles_of(65534) - 1, 65534).column == 32766);

template <class T>
using Values = std::vector<T>;

template <class T>
void expect(const Values<T>& found, const Values<T>& expected, const char* what) {
  if (std::memcmp(found.data(), expected.data(), found.size() * sizeof(T)))
    throw std::logic_error(what);
}

// The definition: tile after tile, column after column of tiles.
template <class T>
Values<T> packed(const Values<T>& matrix, int d, int width) {
  Values<T> tiles;
  for (int left = 0; left < d; left += width)
    for (int top = 0; top <= left; top += width)
      for (int row = top; row < top + width; ++row)
        for (int column = left; column < left + width; ++column)
          tiles.push_back(row < d && column < d ? matrix[row * d + column] : T{0});
  return tiles;
}

// The same operations, by threads and by the kernels.
template <class T>
struct Host {
  int workers;
  void pack(const T* m, Triangle shape, T* tiles) { curvfast::pack(m, shape, tiles, workers); }
  void unpack(const T* tiles, Triangle shape, T* m) { curvfast::unpack(tiles, shape, m, workers); }
  void mirror(T* m, int d) { curvfast::mirror(m, d, workers); }
  void scale(std::span<T> values, T factor) { curvfast::scale(values, factor, workers); }
};

template <class T>
struct Kernels {
  template <class Kernel>
  void run(cuda::Grid grid, Kernel kernel) {
    launch({static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)},
           {cuda::kTile, cuda::kRows}, kernel);
  }
  void pack(const T* m, Triangle shape, T* tiles) {
    run(cuda::pack_grid(shape), [=] { cuda::pack_tiles(m, shape, tiles); });
  }
  void unpack(const T* tiles, Triangle shape, T* m) {
    run(cuda::reflect_grid(shape.d),
        [=] { cuda::reflect(cuda::Packed<T>{tiles, shape}, m, shape.d); });
  }
  void mirror(T* m, int d) {
    run(cuda::reflect_grid(d), [=] { cuda::reflect(cuda::InPlace<T>{m, d}, m, d); });
  }
  void scale(std::span<T> values, T factor) {
    const auto size = static_cast<std::int64_t>(values.size());
    run(cuda::scale_grid(size), [=] { cuda::scale_values(values.data(), size, factor); });
  }
};

template <class T, class Operations>
void round(Operations by, int d, int width) {
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  const Triangle shape{d, width};
  Values<T> matrix(static_cast<std::size_t>(d) * static_cast<std::size_t>(d));
  for (T& value : matrix) value = static_cast<T>(random_bits() % 2000) - 1000;
  const Values<T> tiles = packed(matrix, d, width);

  Values<T> found(tiles.size(), nan);
  by.pack(matrix.data(), shape, found.data());
  expect(found, tiles, "pack");

  Values<T> symmetric = matrix;
  for (int row = 0; row < d; ++row)
    for (int column = 0; column < row; ++column)
      symmetric[row * d + column] = matrix[column * d + row];
  Values<T> whole(matrix.size(), nan);
  by.unpack(tiles.data(), shape, whole.data());
  expect(whole, symmetric, "unpack");
  by.mirror(matrix.data(), d);
  expect(matrix, symmetric, "mirror");

  Values<T> scaled = found;
  for (T& value : scaled) value *= T{0.75};
  by.scale(found, T{0.75});
  expect(found, scaled, "scale");
}

}  // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  for (int i = 0; i < rounds; ++i) {
    const int d = up_to(200), width = up_to(i % 2 ? 40 : 250), workers = up_to(4);
    round<float>(Host<float>{workers}, d, width);
    round<double>(Host<double>{workers}, d, width);
    // 256 threads are many for a CPU.
    if (i % 10 == 0) round<float>(Kernels<float>{}, up_to(100), width);
    if (i % 10 == 5) round<double>(Kernels<double>{}, up_to(100), width);
  }
  std::printf("%d rounds\n", rounds);
  return 0;
}
