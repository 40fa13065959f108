#include "staircase.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace curvfast {
namespace {

void check(std::span<const double> values, const char* name) {
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
int exponent_of(std::span<const double> values) {
  int exponent = 0;
  std::frexp(values.front(), &exponent);
  return values.front() > 0 ? exponent : 0;
}

std::vector<double> scaled(std::span<const double> values, int exponent) {
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

Staircase finish(const Products& products, double tau, std::span<const std::int32_t> widths) {
  std::int64_t pairs = 0;
  for (std::int32_t width : widths) pairs += width;
  const double total = products.mass(0.0);
  return {products.unscaled(tau), pairs, total > 0 ? products.mass_of(widths) / total : 0.0};
}

void check_all(std::span<const double> g, std::span<const double> a,
               std::span<std::int32_t> widths) {
  check(g, "values_g");
  check(a, "values_a");
  if (widths.size() != g.size())
    throw std::invalid_argument("widths must have one entry a value of g");
}

}  // namespace

Staircase staircase_by_mass(std::span<const double> g, std::span<const double> a, double mass,
                            std::span<std::int32_t> widths) {
  check_all(g, a, widths);
  if (!(mass > 0 && mass <= 1)) throw std::invalid_argument("mass must be in (0, 1]");
  const Products products(g, a);
  const double total = products.mass(0.0);
  if (!(total > 0)) throw std::invalid_argument("the curvature mass is zero");
  // All of the mass is every product above zero: a sum that rounds must not drop the smallest.
  const double tau =
      mass == 1.0 ? std::numeric_limits<double>::denorm_min()
                  : largest(products.top(), [&](double t) { return products.mass(t) >= mass * total; });
  double smallest = std::numeric_limits<double>::infinity();
  products.walk(tau, [&](std::size_t i, std::size_t width) {
    widths[i] = static_cast<std::int32_t>(width);
    if (width > 0) smallest = std::min(smallest, products.at(i, width - 1));
  });
  return finish(products, smallest, widths);
}

Staircase staircase_by_pairs(std::span<const double> g, std::span<const double> a,
                             std::int64_t pairs, std::span<std::int32_t> widths) {
  check_all(g, a, widths);
  const Products products(g, a);
  if (pairs < 0 || pairs > products.size())
    throw std::invalid_argument("pairs must be between 0 and rows times columns");
  if (pairs == 0) {
    std::fill(widths.begin(), widths.end(), 0);
    return finish(products, std::numeric_limits<double>::infinity(), widths);
  }
  const double tau = largest(products.top(), [&](double t) { return products.count(t) >= pairs; });
  const double above = std::nextafter(tau, std::numeric_limits<double>::infinity());
  products.walk(above, [&](std::size_t i, std::size_t width) {
    widths[i] = static_cast<std::int32_t>(width);
  });
  std::int64_t missing = pairs - products.count(above);
  products.walk(tau, [&](std::size_t i, std::size_t width) {
    const std::int64_t ties = static_cast<std::int64_t>(width) - widths[i];
    const std::int64_t taken = std::min(ties, missing);
    widths[i] += static_cast<std::int32_t>(taken);
    missing -= taken;
  });
  return finish(products, tau, widths);
}

}  // namespace curvfast
