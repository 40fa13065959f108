// What crosses the border from Python, checked: addresses and sizes become spans and shapes.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

#include "triangle.h"

namespace curvfast {

template <class T>
std::span<T> view(std::uintptr_t address, std::int64_t size, const char* name) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " is a null address");
  if (size <= 0) throw std::invalid_argument(std::string(name) + " is empty");
  if (address % alignof(T) != 0) throw std::invalid_argument(std::string(name) + " is misaligned");
  return {reinterpret_cast<T*>(address), static_cast<std::size_t>(size)};
}

// The shape of a packed sum of so many values. Divides, since products of wrong sizes overflow.
inline Triangle triangle(std::int64_t d, std::int64_t width, std::int64_t values) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  if (d <= 0 || width <= 0) throw std::invalid_argument("d and width must be positive: empty");
  if (d > most || width > most) throw std::invalid_argument("d and width must be below 2^31");
  const std::int64_t panels = (d - 1) / width + 1, square = width * width;
  if (values % square != 0 || values / square != panels * (panels + 1) / 2)
    throw std::invalid_argument("tiles do not hold d features in panels of width");
  return {static_cast<std::int32_t>(d), static_cast<std::int32_t>(width)};
}

// Calls call(T{}) with the type that has so many bits.
template <class Call>
void with_type(int bits, Call call) {
  if (bits == 32) return call(float{});
  if (bits == 64) return call(double{});
  throw std::invalid_argument("values must be of 32 or 64 bits, got " + std::to_string(bits));
}

}  // namespace curvfast
