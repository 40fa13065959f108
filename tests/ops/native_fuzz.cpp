// Random spectra, ties, zeros and scores through the native core, for builds that watch memory.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "split.h"
#include "scores.h"
#include "second_moment.h"
#include "staircase.h"

namespace {

std::mt19937_64 random_bits(20251028);

std::vector<double> spectrum() {
  std::vector<double> values(1 + random_bits() % 40);
  for (double& value : values) {
    switch (random_bits() % 4) {
      case 0: value = static_cast<double>(random_bits() % 4); break;
      case 1: value = std::ldexp(1.0, static_cast<int>(random_bits() % 2000) - 1070); break;
      case 2: value = 0.0; break;
      default: value = std::ldexp(static_cast<double>(random_bits() >> 11), -53);
    }
  }
  std::sort(values.begin(), values.end(), std::greater<>());
  return values;
}

double share() { return static_cast<double>(1 + random_bits() % 16) / 16; }

// Refusals are part of the contract: a spectrum of zeros has no mass.
template <class Call>
void allow_refusal(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
  }
}

// Any list at all: one that is no staircase is refused, and no other index is ever read.
void hooks() {
  std::vector<std::int64_t> widths(1 + random_bits() % 300);
  for (std::int64_t& width : widths) width = static_cast<std::int64_t>(random_bits() % 200) - 2;
  if (random_bits() % 4) std::sort(widths.begin(), widths.end(), std::greater<>());
  const auto columns = static_cast<std::int64_t>(random_bits() % 220);
  const auto band = static_cast<std::int64_t>(random_bits() % 140);
  allow_refusal([&] { curvfast::cheapest_split(widths, columns, band); });
}

float exact(int value, float) { return static_cast<float>(value); }
std::uint16_t exact(int value, std::uint16_t) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(float(value)) >> 16);
}

// Small integers are exact in either type, and so are their sums: every entry has one right value.
template <class Value>
void moments(const curvfast::InstructionSet& set, int workers) {
  const auto d = static_cast<std::int64_t>(1 + random_bits() % 100);
  const auto width = static_cast<std::int64_t>(1 + random_bits() % 120);
  const std::int64_t panels = (d + width - 1) / width;
  std::vector<float> tiles(static_cast<std::size_t>(panels * (panels + 1) / 2 * width * width));
  std::vector<Value> x(static_cast<std::size_t>(30 * d));
  std::vector<int> values(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    values[i] = static_cast<int>(random_bits() % 9) - 4;
    x[i] = exact(values[i], Value{});
  }
  std::vector<std::int64_t> offsets(random_bits() % 70);
  for (std::int64_t& offset : offsets) offset = static_cast<std::int64_t>(random_bits() % 30) * d;
  std::vector<float> roots(sizeof(Value) == 4 && random_bits() % 2 ? offsets.size() : 0);
  for (float& root : roots) root = static_cast<float>(random_bits() % 3);
  std::vector<std::uint32_t> room(static_cast<std::size_t>(curvfast::packed_words(
      d, static_cast<std::int64_t>(offsets.size()), 8 * static_cast<int>(sizeof(Value)))));
  curvfast::add_rows({tiles.data(), d, width}, x.data(), {offsets, roots, room}, 2.0f, set,
                     workers);
  for (std::int64_t column = 0; column < d; ++column) {
    const std::int64_t panel = column / width, before = panel * (panel + 1) / 2 * width;
    for (std::int64_t row = 0; row <= column; ++row) {
      int expected = 0;
      for (std::size_t i = 0; i < offsets.size(); ++i) {
        const int root = roots.empty() ? 1 : static_cast<int>(roots[i]);
        expected += 2 * root * root * values[offsets[i] + row] * values[offsets[i] + column];
      }
      if (tiles[(before + row) * width + column - panel * width] != float(expected))
        throw std::logic_error("moments");
    }
  }
}

// What is kept is at least what is not, all of a tie or its first, and bits past the columns are 0.
std::int64_t check_mask(const curvfast::Scores& layer, float& least, float& most) {
  const auto bytes = (layer.columns + 7) / 8;
  std::int64_t count = 0;
  for (std::size_t i = 0; i < layer.mask.size() * 8; ++i) {
    const auto place = static_cast<std::int64_t>(i);
    const std::int64_t row = place / (8 * bytes), column = place % (8 * bytes);
    const bool kept = layer.mask[i / 8] >> (i % 8) & 1;
    if (column >= layer.columns) {
      if (kept) throw std::logic_error("a bit past the last column");
      continue;
    }
    const float score = layer.values[row * layer.columns + column];
    count += kept;
    (kept ? least : most) = kept ? std::min(least, score) : std::max(most, score);
  }
  return count;
}

void masks(double mass, int workers) {
  const std::size_t count = 1 + random_bits() % 3;
  std::vector<std::vector<float>> scores(count);
  std::vector<std::vector<std::uint8_t>> bits(count);
  std::vector<curvfast::Scores> layers;
  for (std::size_t l = 0; l < count; ++l) {
    // Now and then enough for several workers.
    const std::size_t rows = 1 + random_bits() % (random_bits() % 20 ? 40 : 800);
    const std::size_t columns = 1 + random_bits() % 40;
    scores[l].resize(rows * columns);
    for (float& score : scores[l])
      score = random_bits() % 3 ? static_cast<float>(random_bits() % 50)
                                : std::ldexp(1.0f, static_cast<int>(random_bits() % 250) - 149);
    if (random_bits() % 50 == 0) scores[l][random_bits() % scores[l].size()] = -1.0f;
    bits[l].assign(rows * ((columns + 7) / 8), 0xFF);
    layers.push_back({scores[l], static_cast<std::int64_t>(columns), bits[l]});
  }
  allow_refusal([&] {
    float least = INFINITY, most = 0.0f;
    const auto kept = curvfast::scores_by_mass(layers, mass, workers);
    for (std::size_t l = 0; l < count; ++l)
      if (check_mask(layers[l], least, most) != kept[l].count || !(kept[l].mass <= 1))
        throw std::logic_error("kept by mass");
    if (least <= most) throw std::logic_error("a tie is broken");
  });
  const auto pairs = static_cast<std::int64_t>(random_bits() % (scores[0].size() + 2));
  allow_refusal([&] {
    float least = INFINITY, most = 0.0f;
    const auto kept = curvfast::scores_by_pairs(layers[0], pairs, workers);
    if (kept.count != pairs || check_mask(layers[0], least, most) != pairs || least < most)
      throw std::logic_error("kept by number");
  });
  // Shapes that do not fit are refused before anything is written.
  layers[0].columns += static_cast<std::int64_t>(random_bits() % 3) - 1;
  allow_refusal([&] { curvfast::scores_by_pairs(layers[0], pairs, workers); });
}

bool monotone(std::span<const std::int32_t> widths) {
  return std::is_sorted(widths.rbegin(), widths.rend());
}

}  // namespace

int main(int, char** arguments) {
  const int rounds = std::atoi(arguments[1]);
  for (int round = 0; round < rounds; ++round) {
    const std::size_t count = 1 + random_bits() % 4, masses = 1 + random_bits() % 3;
    std::vector<std::vector<double>> g(count), a(count);
    std::vector<std::vector<std::int32_t>> widths(count), common(count);
    std::vector<curvfast::Layer> layers, together;
    std::vector<double> chosen(masses);
    for (double& mass : chosen) mass = share();
    for (std::size_t l = 0; l < count; ++l) {
      g[l] = spectrum();
      a[l] = spectrum();
      widths[l].assign(g[l].size() * masses, -1);
      common[l].assign(g[l].size(), -1);
      layers.push_back({g[l], a[l], widths[l]});
      together.push_back({g[l], a[l], common[l]});
    }
    const int workers = static_cast<int>(random_bits() % 4);
    allow_refusal([&] { curvfast::staircases_by_mass(layers, chosen, workers); });
    allow_refusal([&] {
      curvfast::staircases_by_common_mass(together, chosen[0]);
      for (const auto& own : common)
        if (!monotone(own)) throw std::logic_error("widths increase");
    });
    std::vector<std::int32_t> own(g[0].size());
    allow_refusal([&] { curvfast::staircase_by_mass(g[0], a[0], chosen[0], own); });
    const auto pairs = static_cast<std::int64_t>(random_bits() % (g[0].size() * a[0].size() + 2));
    allow_refusal([&] {
      const auto found = curvfast::staircase_by_pairs(g[0], a[0], pairs, own);
      if (found.pairs != pairs || !monotone(own)) throw std::logic_error("pairs");
    });
    hooks();
    for (const curvfast::InstructionSet& set : curvfast::instruction_sets()) {
      if (set.supported() && round % 10 == 0) moments<std::uint16_t>(set, workers);
      if (set.supported() && round % 10 == 5) moments<float>(set, workers);
    }
    if (round % 4 == 0) masks(chosen[0], workers);
  }
  std::printf("%d rounds\n", rounds);
  return 0;
}
