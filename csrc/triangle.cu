#include "triangle_cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "triangle_kernels.cuh"

namespace curvfast::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

int device_of(const void* address) {
  cudaPointerAttributes found;
  check(cudaPointerGetAttributes(&found, address), "asking where an address lies");
  if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged)
    throw std::invalid_argument("an address is not of a CUDA device's memory");
  return found.device;
}

void use_device_of(const void* one, const void* other) {
  const int device = device_of(one);
  if (device_of(other) != device)
    throw std::invalid_argument("the addresses are of two CUDA devices");
  check(cudaSetDevice(device), "choosing the device");
}

constexpr std::uint64_t kMostX = 0x7FFFFFFF, kMostY = 0xFFFF;

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, std::uintptr_t stream,
            Arguments... arguments) {
  if (grid.x > kMostX || grid.y > kMostY)
    throw std::invalid_argument("d or width is too large for one launch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(kTile, kRows);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

}  // namespace

template <class T>
void pack(const T* matrix, Triangle shape, T* tiles, std::uintptr_t stream) {
  use_device_of(matrix, tiles);
  launch(pack_tiles<T>, pack_grid(shape), stream, matrix, shape, tiles);
}

template <class T>
void unpack(const T* tiles, Triangle shape, T* matrix, std::uintptr_t stream) {
  use_device_of(tiles, matrix);
  launch(reflect<T, Packed<T>>, reflect_grid(shape.d), stream, Packed<T>{tiles, shape}, matrix,
         shape.d);
}

template <class T>
void mirror(T* matrix, std::int32_t d, std::uintptr_t stream) {
  use_device_of(matrix, matrix);
  launch(reflect<T, InPlace<T>>, reflect_grid(d), stream, InPlace<T>{matrix, d}, matrix, d);
}

template <class T>
void scale(std::span<T> values, T factor, std::uintptr_t stream) {
  use_device_of(values.data(), values.data());
  const auto size = static_cast<std::int64_t>(values.size());
  launch(scale_values<T>, scale_grid(size), stream, values.data(), size, factor);
}

#define CURVFAST_INSTANTIATE(T)                                              \
  template void pack(const T*, Triangle, T*, std::uintptr_t);                \
  template void unpack(const T*, Triangle, T*, std::uintptr_t);              \
  template void mirror(T*, std::int32_t, std::uintptr_t);                    \
  template void scale(std::span<T>, T, std::uintptr_t);
CURVFAST_INSTANTIATE(float)
CURVFAST_INSTANTIATE(double)

}  // namespace curvfast::cuda
