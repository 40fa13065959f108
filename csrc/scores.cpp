#include "scores.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "parallel.h"

namespace curvfast {
namespace {

// Non-negative floats are ordered like their bit patterns: 16 high bits, then 16 low ones.
constexpr std::size_t kBuckets = 1 << 16;
constexpr std::int64_t kBand = 1 << 10;
// Scores worth a histogram of their own.
constexpr std::size_t kShare = 1 << 14;

struct Bucket {
  std::int64_t count = 0;
  std::uint64_t mantissas = 0;  // a sum of integers: exact, and in any order
};
using Histogram = std::vector<Bucket>;

// As integers, so that a processor told to flush denormals changes nothing. -0 is 0.
std::uint32_t bits_of(float score) {
  const auto bits = std::bit_cast<std::uint32_t>(score);
  return bits == 0x80000000u ? 0 : bits;
}

// A float is its mantissa times a power of two that its high bits alone decide.
std::uint32_t mantissa(std::uint32_t bits) {
  const std::uint32_t fraction = bits & 0x7FFFFF;
  return (bits >> 23) ? fraction | 0x800000 : fraction;
}
double scaled(std::uint64_t mantissas, std::size_t high) {
  const int biased = static_cast<int>(high >> 7);
  return std::ldexp(static_cast<double>(mantissas), (biased ? biased : 1) - 150);
}
double sum_of(const Histogram& high, std::size_t bucket) {
  return scaled(high[bucket].mantissas, bucket);
}
double total_of(const Histogram& high) {
  double total = 0.0;
  for (std::size_t b = kBuckets; b-- > 0;) total += sum_of(high, b);
  return total;
}

void check(const Scores& layer) {
  if (layer.values.empty()) throw std::invalid_argument("scores is empty");
  const auto size = static_cast<std::int64_t>(layer.values.size());
  if (layer.columns <= 0 || size % layer.columns)
    throw std::invalid_argument("scores must fill whole rows of columns");
  if (static_cast<std::int64_t>(layer.mask.size()) != size / layer.columns * ((layer.columns + 7) / 8))
    throw std::invalid_argument("mask must have one bit a score, and whole bytes a row");
}

void add(Histogram& sum, const Histogram& other) {
  for (std::size_t b = 0; b < kBuckets; ++b) {
    sum[b].count += other[b].count;
    sum[b].mantissas += other[b].mantissas;
  }
}

// Integer sums do not depend on who adds what, so each worker takes one share of the scores.
template <class Place>
Histogram histogram(std::span<const float> scores, int workers, Place place) {
  const std::size_t parts = std::min<std::size_t>(std::max(workers, 1), 1 + scores.size() / kShare);
  std::vector<Histogram> own(parts, Histogram(kBuckets));
  const std::size_t share = (scores.size() + parts - 1) / parts;
  std::atomic<bool> bad{false};
  parallel_for(parts, workers, [&](std::size_t p) {
    const std::size_t start = std::min(p * share, scores.size());
    const std::size_t stop = std::min(start + share, scores.size());
    for (std::size_t i = start; i < stop; ++i) {
      const std::uint32_t bits = bits_of(scores[i]);
      if (bits >= 0x7F800000u) {
        bad = true;
        return;
      }
      place(own[p], bits);
    }
  });
  if (bad) throw std::invalid_argument("scores must be finite and non-negative");
  for (std::size_t p = 1; p < parts; ++p) add(own[0], own[p]);
  return std::move(own[0]);
}

Histogram high_halves(const Scores& layer, int workers) {
  return histogram(layer.values, workers, [](Histogram& h, std::uint32_t bits) {
    ++h[bits >> 16].count;
    h[bits >> 16].mantissas += mantissa(bits);
  });
}

Histogram low_halves(const Scores& layer, std::size_t bucket, int workers) {
  return histogram(layer.values, workers, [bucket](Histogram& h, std::uint32_t bits) {
    if ((bits >> 16) != bucket) return;
    ++h[bits & 0xFFFF].count;
    h[bits & 0xFFFF].mantissas += mantissa(bits);
  });
}

// What is kept of a layer: every score above the edge, and so many of those at it.
Kept kept_of(const Histogram& high, const Histogram& low, std::uint32_t edge, std::int64_t at_edge) {
  const std::size_t bucket = edge >> 16;
  Kept kept{at_edge, 0.0};
  for (std::size_t b = kBuckets; b-- > bucket + 1;) {
    kept.count += high[b].count;
    kept.mass += sum_of(high, b);
  }
  std::uint64_t inside = static_cast<std::uint64_t>(at_edge) * mantissa(edge);
  for (std::size_t b = kBuckets; b-- > (edge & 0xFFFF) + 1;) {
    kept.count += low[b].count;
    inside += low[b].mantissas;
  }
  const double total = total_of(high);
  kept.mass = total > 0 ? (kept.mass + scaled(inside, bucket)) / total : 0.0;
  return kept;
}

// Calls visit(chunk, first row, last row) for bands of rows.
template <class Visit>
void each_band(const Scores& layer, int workers, Visit visit) {
  const auto rows = static_cast<std::int64_t>(layer.values.size()) / layer.columns;
  const std::int64_t band = std::max<std::int64_t>(1, kBand / layer.columns);
  parallel_for(static_cast<std::size_t>((rows + band - 1) / band), workers, [&](std::size_t c) {
    const std::int64_t start = static_cast<std::int64_t>(c) * band;
    visit(c, start, std::min(start + band, rows));
  });
}

template <class Keep>
void write_rows(const Scores& layer, std::int64_t start, std::int64_t stop, Keep keep) {
  std::uint8_t* out = layer.mask.data() + start * ((layer.columns + 7) / 8);
  for (std::int64_t row = start; row < stop; ++row) {
    const float* scores = layer.values.data() + row * layer.columns;
    for (std::int64_t first = 0; first < layer.columns; first += 8) {
      const std::int64_t width = std::min<std::int64_t>(8, layer.columns - first);
      unsigned byte = 0;
      for (std::int64_t j = 0; j < width; ++j)
        byte |= static_cast<unsigned>(keep(bits_of(scores[first + j]))) << j;
      *out++ = static_cast<std::uint8_t>(byte);
    }
  }
}

void write(const Scores& layer, std::uint32_t edge, int workers) {
  each_band(layer, workers, [&](std::size_t, std::int64_t start, std::int64_t stop) {
    write_rows(layer, start, stop, [edge](std::uint32_t bits) { return bits >= edge; });
  });
}

// Of the scores at the edge the first few only, so it is known before how many each band has.
void write_first(const Scores& layer, std::uint32_t edge, std::int64_t at_edge, int workers) {
  std::vector<std::int64_t> before(layer.values.size() / layer.columns + 1, 0);
  each_band(layer, workers, [&](std::size_t c, std::int64_t start, std::int64_t stop) {
    const auto part = layer.values.subspan(start * layer.columns, (stop - start) * layer.columns);
    before[c + 1] =
        std::count_if(part.begin(), part.end(), [edge](float v) { return bits_of(v) == edge; });
  });
  std::partial_sum(before.begin(), before.end(), before.begin());
  each_band(layer, workers, [&](std::size_t c, std::int64_t start, std::int64_t stop) {
    std::int64_t left = at_edge - before[c];
    write_rows(layer, start, stop, [edge, &left](std::uint32_t bits) {
      return bits > edge || (bits == edge && left-- > 0);
    });
  });
}

}  // namespace

std::vector<Kept> scores_by_mass(std::span<const Scores> layers, double mass, int workers) {
  if (layers.empty()) throw std::invalid_argument("there is no layer");
  if (!(mass > 0 && mass <= 1)) throw std::invalid_argument("mass must be in (0, 1]");
  std::vector<Histogram> high, low;
  Histogram all(kBuckets), edges(kBuckets);
  for (const Scores& layer : layers) check(layer);
  for (const Scores& layer : layers) add(all, high.emplace_back(high_halves(layer, workers)));
  const double target = mass * total_of(all);
  if (!(target > 0)) throw std::invalid_argument("the mass of the scores is zero");
  // All of the mass is every score above zero: a sum that rounds must not drop the smallest.
  std::uint32_t edge = 1;
  double sum = 0.0;
  std::size_t bucket = mass < 1.0 ? kBuckets - 1 : 0;
  while (bucket > 0 && !(sum + sum_of(all, bucket) >= target)) sum += sum_of(all, bucket--);
  for (const Scores& layer : layers)
    add(edges, low.emplace_back(low_halves(layer, bucket, workers)));
  if (mass < 1.0) {
    std::uint64_t mantissas = 0;
    std::size_t b = kBuckets;
    do mantissas += edges[--b].mantissas;
    while (b > 0 && !(sum + scaled(mantissas, bucket) >= target));
    edge = static_cast<std::uint32_t>(bucket << 16 | b);
  }
  std::vector<Kept> kept;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    kept.push_back(kept_of(high[l], low[l], edge, low[l][edge & 0xFFFF].count));
    write(layers[l], edge, workers);
  }
  return kept;
}

Kept scores_by_pairs(const Scores& layer, std::int64_t pairs, int workers) {
  check(layer);
  if (pairs < 0 || pairs > static_cast<std::int64_t>(layer.values.size()))
    throw std::invalid_argument("pairs must be between 0 and rows times columns");
  const Histogram high = high_halves(layer, workers);
  if (pairs == 0) {
    std::fill(layer.mask.begin(), layer.mask.end(), std::uint8_t{0});
    return {0, 0.0};
  }
  std::int64_t missing = pairs;
  std::size_t bucket = kBuckets - 1, b = kBuckets - 1;
  while (missing > high[bucket].count) missing -= high[bucket--].count;
  const Histogram low = low_halves(layer, bucket, workers);
  while (missing > low[b].count) missing -= low[b--].count;
  const auto edge = static_cast<std::uint32_t>(bucket << 16 | b);
  if (missing == low[b].count)
    write(layer, edge, workers);
  else
    write_first(layer, edge, missing, workers);
  return kept_of(high, low, edge, missing);
}

}  // namespace curvfast
