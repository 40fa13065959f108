// The products of two descending lists, never formed: what every search walks over.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace curvfast {

inline void check(std::span<const double> values, const char* name) {
  const std::string who(name);
  if (values.empty()) throw std::invalid_argument(who + " is empty");
  if (values.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
    throw std::invalid_argument(who + " is longer than 2^31 - 1");
  double last = std::numeric_limits<double>::infinity();
  for (double value : values) {
    if (!std::isfinite(value)) throw std::invalid_argument(who + " holds NaN or infinity");
    if (value < 0) throw std::invalid_argument(who + " holds a negative eigenvalue");
    if (value > last) throw std::invalid_argument(who + " is not in descending order");
    last = value;
  }
}

// Scaling by a power of two keeps ties ties; dividing by the largest value would round them apart.
inline int exponent_of(std::span<const double> values) {
  int exponent = 0;
  std::frexp(values.front(), &exponent);
  return values.front() > 0 ? exponent : 0;
}

inline std::vector<double> scaled(std::span<const double> values, int exponent) {
  std::vector<double> result(values.size());
  std::transform(values.begin(), values.end(), result.begin(),
                 [exponent](double value) { return std::ldexp(value, -exponent); });
  return result;
}

// The two lists, scaled, with prefix sums: what every step of the bisection walks over.
class Products {
 public:
  Products(std::span<const double> g, std::span<const double> a)
      : exponent_(exponent_of(g) + exponent_of(a)),
        g_(scaled(g, exponent_of(g))),
        a_(scaled(a, exponent_of(a))),
        prefix_(a.size() + 1, 0.0) {
    for (std::size_t j = 0; j < a_.size(); ++j) prefix_[j + 1] = prefix_[j] + a_[j];
  }

  std::size_t rows() const { return g_.size(); }
  std::int64_t size() const {
    return static_cast<std::int64_t>(g_.size()) * static_cast<std::int64_t>(a_.size());
  }
  int exponent() const { return exponent_; }
  std::uint64_t top() const { return std::bit_cast<std::uint64_t>(g_.front() * a_.front()); }
  double at(std::size_t i, std::size_t j) const { return g_[i] * a_[j]; }
  double unscaled(double product) const { return std::ldexp(product, exponent_); }

  // Calls visit(row, width) for every row, width being the number of products at least tau in it.
  template <class Visit>
  void walk(double tau, Visit visit) const {
    std::size_t width = a_.size();
    for (std::size_t i = 0; i < g_.size(); ++i) {
      while (width > 0 && g_[i] * a_[width - 1] < tau) --width;
      visit(i, width);
    }
  }

  double mass(double tau) const {
    double sum = 0.0;
    walk(tau, [&](std::size_t i, std::size_t width) { sum += g_[i] * prefix_[width]; });
    return sum;
  }

  std::int64_t count(double tau) const {
    std::int64_t sum = 0;
    walk(tau, [&](std::size_t, std::size_t width) { sum += static_cast<std::int64_t>(width); });
    return sum;
  }

  double mass_of(std::span<const std::int32_t> widths) const {
    double sum = 0.0;
    for (std::size_t i = 0; i < g_.size(); ++i) sum += g_[i] * prefix_[widths[i]];
    return sum;
  }

 private:
  int exponent_;
  std::vector<double> g_, a_, prefix_;
};

// Non-negative doubles are ordered like their bit patterns, so the largest tau that satisfies a
// monotone condition is found by bisecting integers; it always is one of the products.
template <class Enough>
double largest(std::uint64_t top, Enough enough) {
  std::uint64_t low = 0, high = top + 1;
  while (high - low > 1) {
    const std::uint64_t middle = low + (high - low) / 2;
    (enough(std::bit_cast<double>(middle)) ? low : high) = middle;
  }
  return std::bit_cast<double>(low);
}

}  // namespace curvfast
