#include "scores.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "parallel.h"

namespace curvfast {
namespace {

// Non-negative floats are ordered like their bit patterns: 16 high bits, then 16 low ones.
constexpr std::size_t kBuckets = 1 << 16;
constexpr std::size_t kChunk = 1 << 20;

struct Histogram {
  std::vector<std::int64_t> counts;
  std::vector<std::uint64_t> mantissas;  // sums of integers: exact, and in any order
  Histogram() : counts(kBuckets, 0), mantissas(kBuckets, 0) {}
};

// A float is its mantissa times a power of two that its high bits alone decide.
std::uint32_t mantissa(std::uint32_t bits) {
  const std::uint32_t fraction = bits & 0x7FFFFF;
  return (bits >> 23) ? fraction | 0x800000 : fraction;
}
int exponent(std::uint32_t high) {
  const int biased = static_cast<int>(high >> 7);
  return (biased ? biased : 1) - 150;
}

template <class Visit>
void each_chunk(std::span<const float> scores, int workers, Visit visit) {
  const std::size_t chunks = (scores.size() + kChunk - 1) / kChunk;
  parallel_for(chunks, workers, [&](std::size_t c) {
    const std::size_t start = c * kChunk;
    visit(start, scores.subspan(start, std::min(kChunk, scores.size() - start)));
  });
}

// Integer sums do not depend on who adds what, so a worker keeps one histogram for all its chunks.
template <class Place>
Histogram histogram(std::span<const float> scores, int workers, Place place) {
  const std::size_t parts = static_cast<std::size_t>(std::max(workers, 1));
  std::vector<Histogram> own(parts);
  const std::size_t share = (scores.size() + parts - 1) / parts;
  std::atomic<bool> bad{false};
  parallel_for(parts, workers, [&](std::size_t p) {
    const std::size_t start = std::min(p * share, scores.size());
    const std::size_t stop = std::min(start + share, scores.size());
    for (std::size_t i = start; i < stop; ++i) {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(scores[i] + 0.0f);  // -0 is 0
      if (bits >= 0x7F800000u) {
        bad = true;
        return;
      }
      place(own[p], bits);
    }
  });
  if (bad) throw std::invalid_argument("scores must be finite and non-negative");
  for (std::size_t p = 1; p < parts; ++p)
    for (std::size_t b = 0; b < kBuckets; ++b) {
      own[0].counts[b] += own[p].counts[b];
      own[0].mantissas[b] += own[p].mantissas[b];
    }
  return std::move(own[0]);
}

}  // namespace

Kept scores_by_mass(std::span<const float> scores, double mass, std::span<std::uint8_t> mask,
                    int workers) {
  if (scores.empty()) throw std::invalid_argument("scores is empty");
  if (!(mass > 0 && mass <= 1)) throw std::invalid_argument("mass must be in (0, 1]");
  if (mask.size() != (scores.size() + 7) / 8)
    throw std::invalid_argument("mask must have one bit a score");
  const Histogram high = histogram(scores, workers, [](Histogram& h, std::uint32_t bits) {
    ++h.counts[bits >> 16];
    h.mantissas[bits >> 16] += mantissa(bits);
  });
  const auto sum_of = [&](std::size_t bucket) {
    return std::ldexp(static_cast<double>(high.mantissas[bucket]),
                      exponent(static_cast<std::uint32_t>(bucket)));
  };
  double total = 0.0;
  for (std::size_t b = kBuckets; b-- > 0;) total += sum_of(b);
  if (!(total > 0)) throw std::invalid_argument("the mass of the scores is zero");
  const double target = mass * total;
  double sum = 0.0;
  std::size_t bucket = kBuckets - 1;
  while (bucket > 0 && !(sum + sum_of(bucket) >= target)) sum += sum_of(bucket--);
  const Histogram low = histogram(scores, workers, [bucket](Histogram& h, std::uint32_t bits) {
    if ((bits >> 16) == bucket) ++h.counts[bits & 0xFFFF];
  });
  std::uint32_t bits = 0;
  std::uint64_t mantissas = 0;
  for (std::size_t b = kBuckets; b-- > 0;) {
    if (low.counts[b] == 0) continue;
    bits = static_cast<std::uint32_t>(bucket << 16 | b);
    mantissas += static_cast<std::uint64_t>(low.counts[b]) * mantissa(bits);
    const double reached =
        sum + std::ldexp(static_cast<double>(mantissas), exponent(static_cast<std::uint32_t>(bucket)));
    // All of the mass is every score above zero: a sum that rounds must not drop the smallest.
    if (mass < 1.0 && reached >= target) break;
  }
  if (mass == 1.0) bits = 1;
  const float threshold = std::bit_cast<float>(bits);
  std::atomic<std::int64_t> count{0};
  std::atomic<std::uint32_t> smallest{0x7F800000u};
  each_chunk(scores, workers, [&](std::size_t start, std::span<const float> part) {
    std::int64_t here = 0;
    std::uint32_t least = 0x7F800000u;
    for (std::size_t i = 0; i < part.size(); i += 8) {
      std::uint8_t byte = 0;
      for (std::size_t j = i; j < std::min(i + 8, part.size()); ++j) {
        if (part[j] >= threshold) {
          byte |= static_cast<std::uint8_t>(1u << (j - i));
          ++here;
          least = std::min(least, std::bit_cast<std::uint32_t>(part[j]));
        }
      }
      mask[(start + i) / 8] = byte;
    }
    count += here;
    std::uint32_t known = smallest;
    while (least < known && !smallest.compare_exchange_weak(known, least)) {
    }
  });
  double kept = 0.0;
  const std::uint32_t edge = bits >> 16;
  for (std::size_t b = kBuckets; b-- > edge + 1;) kept += sum_of(b);
  std::uint64_t inside = 0;
  if (edge == bucket)
    for (std::size_t b = kBuckets; b-- > (bits & 0xFFFF);)
      inside += static_cast<std::uint64_t>(low.counts[b]) *
                mantissa(static_cast<std::uint32_t>(edge << 16 | b));
  kept += std::ldexp(static_cast<double>(inside), exponent(edge));
  return {std::bit_cast<float>(smallest.load()), count, mass == 1.0 ? 1.0 : kept / total};
}

}  // namespace curvfast
