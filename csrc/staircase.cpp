#include "staircase.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <stdexcept>
#include <vector>

#include "parallel.h"
#include "products.h"

namespace curvfast {
namespace {

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

void check_mass(double mass) {
  if (!(mass > 0 && mass <= 1)) throw std::invalid_argument("mass must be in (0, 1]");
}

// All of the mass is every product above zero: a sum that rounds must not drop the smallest.
constexpr double kEverything = std::numeric_limits<double>::denorm_min();

Staircase by_mass(const Products& products, double total, double mass,
                  std::span<std::int32_t> widths) {
  const double tau =
      mass == 1.0 ? kEverything
                  : largest(products.top(), [&](double t) { return products.mass(t) >= mass * total; });
  double smallest = std::numeric_limits<double>::infinity();
  products.walk(tau, [&](std::size_t i, std::size_t width) {
    widths[i] = static_cast<std::int32_t>(width);
    if (width > 0) smallest = std::min(smallest, products.at(i, width - 1));
  });
  return finish(products, smallest, widths);
}

double total_of(const Products& products) {
  const double total = products.mass(0.0);
  if (!(total > 0)) throw std::invalid_argument("the curvature mass is zero");
  return total;
}

}  // namespace

Staircase staircase_by_mass(std::span<const double> g, std::span<const double> a, double mass,
                            std::span<std::int32_t> widths) {
  check_all(g, a, widths);
  check_mass(mass);
  const Products products(g, a);
  return by_mass(products, total_of(products), mass, widths);
}

std::vector<Staircase> staircases_by_mass(std::span<const Layer> layers,
                                          std::span<const double> masses, int workers) {
  for (double mass : masses) check_mass(mass);
  for (const Layer& layer : layers) {
    check_all(layer.g, layer.a, layer.widths.subspan(0, layer.g.size()));
    if (layer.widths.size() != layer.g.size() * masses.size())
      throw std::invalid_argument("widths must have one entry a value of g and mass");
  }
  std::vector<Staircase> found(layers.size() * masses.size());
  parallel_for(layers.size(), workers, [&](std::size_t l) {
    const Layer& layer = layers[l];
    const Products products(layer.g, layer.a);
    const double total = total_of(products);
    for (std::size_t m = 0; m < masses.size(); ++m)
      found[l * masses.size() + m] =
          by_mass(products, total, masses[m],
                  layer.widths.subspan(m * layer.g.size(), layer.g.size()));
  });
  return found;
}

double staircases_by_common_mass(std::span<const Layer> layers, double mass) {
  check_mass(mass);
  if (layers.empty()) throw std::invalid_argument("there is no layer");
  std::vector<Products> all;
  int unit = std::numeric_limits<int>::min();
  for (const Layer& layer : layers) {
    check_all(layer.g, layer.a, layer.widths);
    all.emplace_back(layer.g, layer.a);
    if (all.back().mass(0.0) > 0) unit = std::max(unit, all.back().exponent());
  }
  // Layers are scaled apart; a common threshold is in units of the largest scale.
  const auto own = [&](const Products& p, double tau) {
    return std::ldexp(tau, unit - p.exponent());
  };
  const auto sum = [&](double tau) {
    double total = 0.0;
    for (const Products& p : all) total += std::ldexp(p.mass(own(p, tau)), p.exponent() - unit);
    return total;
  };
  const double total = unit == std::numeric_limits<int>::min() ? 0.0 : sum(0.0);
  if (!(total > 0)) throw std::invalid_argument("the curvature mass is zero");
  double top = 0.0;
  for (const Products& p : all)
    top = std::max(top, std::ldexp(std::bit_cast<double>(p.top()), p.exponent() - unit));
  const double tau = mass == 1.0 ? 0.0
                                 : largest(std::bit_cast<std::uint64_t>(top),
                                           [&](double t) { return sum(t) >= mass * total; });
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const double least = mass == 1.0 ? kEverything : own(all[l], tau);
    all[l].walk(least, [&](std::size_t i, std::size_t width) {
      layers[l].widths[i] = static_cast<std::int32_t>(width);
    });
  }
  return std::ldexp(tau, unit);
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
