// triangle.h on a CUDA device: the same operations, on addresses of device memory.
#pragma once

#include <cstdint>
#include <span>

#include "triangle.h"

namespace curvfast::cuda {

// Each is put on the stream, a cudaStream_t as a number, and does not wait for it. Throws
// std::invalid_argument if an address is not of one device's memory or a size is past a launch's
// limits, std::runtime_error with CUDA's own words if it refuses.
template <class T>
void pack(const T* matrix, Triangle shape, T* tiles, std::uintptr_t stream);

template <class T>
void unpack(const T* tiles, Triangle shape, T* matrix, std::uintptr_t stream);

template <class T>
void mirror(T* matrix, std::int32_t d, std::uintptr_t stream);

template <class T>
void scale(std::span<T> values, T factor, std::uintptr_t stream);

}  // namespace curvfast::cuda
