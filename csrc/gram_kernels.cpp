#include "gram_kernels.h"

#include <bit>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#define CURVFAST_X86 1
#include <immintrin.h>
#define CURVFAST_TARGET(set) __attribute__((target(set)))
#endif

namespace curvfast {

namespace {

// What a word holds. A bfloat16 number is the high half of the float32 of the same value.
struct Single {
  static constexpr int kValues = 1;
  static float value(std::uint32_t word, int) { return std::bit_cast<float>(word); }
};

struct Pair {
  static constexpr int kValues = 2;
  static float value(std::uint32_t word, int odd) {
    // Without a branch, which no compiler makes vectors of.
    return std::bit_cast<float>(word << (odd ? 0 : 16) & 0xFFFF0000u);
  }
};

// As many products as the 16 registers of four floats hold that any 64-bit processor has.
template <class Word>
void portable(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float scale,
              float* out, std::int64_t stride) {
  constexpr int kRows = 4, kColumns = 8;
  for (std::int64_t row = 0; row < kRegisterRows; row += kRows)
    for (std::int64_t column = 0; column < kStrip; column += kColumns) {
      float acc[kRows][kColumns] = {};
      for (std::int64_t k = 0; k < steps; ++k)
        for (int v = 0; v < Word::kValues; ++v) {
          float right[kColumns];
          for (int c = 0; c < kColumns; ++c)
            right[c] = Word::value(b[k * kStrip + column + c], v);
          for (int r = 0; r < kRows; ++r) {
            const float value = Word::value(a[k * kStrip + row + r], v);
            for (int c = 0; c < kColumns; ++c) acc[r][c] += value * right[c];
          }
        }
      float* to = out + row * stride + column;
      for (int r = 0; r < kRows; ++r, to += stride)
        for (int c = 0; c < kColumns; ++c) to[c] += scale * acc[r][c];
    }
}

bool always() { return true; }

#ifdef CURVFAST_X86

#define CURVFAST_AVX2 CURVFAST_TARGET("avx2,fma")

template <class Word>
CURVFAST_AVX2 inline __m256 values(__m256i words, int odd) {
  if constexpr (Word::kValues == 2)
    words = odd ? _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)))
                : _mm256_slli_epi32(words, 16);
  return _mm256_castsi256_ps(words);
}

// Eight accumulators keep both multipliers busy and leave the other half of the registers to rows.
template <class Word>
CURVFAST_AVX2 void avx2(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps,
                        float scale, float* out, std::int64_t stride) {
  constexpr int kRows = 4;
  const __m256 factor = _mm256_set1_ps(scale);
  for (std::int64_t row = 0; row < kRegisterRows; row += kRows)
    for (std::int64_t column = 0; column < kStrip; column += 16) {
      __m256 acc[kRows][2];
      for (auto& own : acc) own[0] = own[1] = _mm256_setzero_ps();
      float* to = out + row * stride + column;
      // By the time its products are there, what they are added to has come from a farther cache.
      for (int r = 0; r < kRows; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(to + r * stride), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(to + r * stride + 15), _MM_HINT_T0);
      }
      const std::uint32_t *left = a + row, *right = b + column;
      for (std::int64_t k = 0; k < steps; ++k, left += kStrip, right += kStrip) {
        const auto* words = reinterpret_cast<const __m256i*>(right);
        const __m256i near = _mm256_loadu_si256(words), far = _mm256_loadu_si256(words + 1);
#pragma GCC unroll 2
        for (int v = 0; v < Word::kValues; ++v) {
          const __m256 first = values<Word>(near, v), second = values<Word>(far, v);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const __m256 value = values<Word>(_mm256_set1_epi32(static_cast<int>(left[r])), v);
            acc[r][0] = _mm256_fmadd_ps(value, first, acc[r][0]);
            acc[r][1] = _mm256_fmadd_ps(value, second, acc[r][1]);
          }
        }
      }
      for (int r = 0; r < kRows; ++r, to += stride)
        for (int half = 0; half < 2; ++half) {
          const __m256 sum = _mm256_fmadd_ps(factor, acc[r][half], _mm256_loadu_ps(to + 8 * half));
          _mm256_storeu_ps(to + 8 * half, sum);
        }
    }
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

#define CURVFAST_AVX512 CURVFAST_TARGET("avx512f")

// All products of a call, in half the registers.
using Products = __m512[kRegisterRows][2];

CURVFAST_AVX512 inline void clear(Products& products) {
  for (auto& row : products) row[0] = row[1] = _mm512_setzero_ps();
}

CURVFAST_AVX512 inline void store(const Products& products, float scale, float* out,
                                  std::int64_t stride) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int r = 0; r < kRegisterRows; ++r, out += stride)
    for (int half = 0; half < 2; ++half) {
      float* to = out + 16 * half;
      const __m512 sum = _mm512_fmadd_ps(factor, products[r][half], _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, sum);
    }
}

template <class Word>
CURVFAST_AVX512 inline __m512 values(__m512i words, int odd) {
  if constexpr (Word::kValues == 2)
    words = odd ? _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))
                // GCC 12 warns of its own unmasked shift.
                : _mm512_maskz_slli_epi32(0xFFFF, words, 16);
  return _mm512_castsi512_ps(words);
}

template <class Word>
CURVFAST_AVX512 void avx512(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps,
                            float scale, float* out, std::int64_t stride) {
  Products acc;
  clear(acc);
  for (std::int64_t k = 0; k < steps; ++k, a += kStrip, b += kStrip) {
    const __m512i near = _mm512_loadu_si512(b), far = _mm512_loadu_si512(b + 16);
#pragma GCC unroll 2
    for (int v = 0; v < Word::kValues; ++v) {
      const __m512 first = values<Word>(near, v), second = values<Word>(far, v);
#pragma GCC unroll 8
      for (int r = 0; r < kRegisterRows; ++r) {
        const __m512 value = values<Word>(_mm512_set1_epi32(static_cast<int>(a[r])), v);
        acc[r][0] = _mm512_fmadd_ps(value, first, acc[r][0]);
        acc[r][1] = _mm512_fmadd_ps(value, second, acc[r][1]);
      }
    }
  }
  store(acc, scale, out, stride);
}

bool has_avx512() { return __builtin_cpu_supports("avx512f"); }

// Multiplies both of a pair and adds them in one instruction, which takes subnormals for zero.
CURVFAST_TARGET("avx512f,avx512bf16")
void avx512_bf16(const std::uint32_t* a, const std::uint32_t* b, std::int64_t steps, float scale,
                 float* out, std::int64_t stride) {
  Products acc;
  clear(acc);
  for (std::int64_t k = 0; k < steps; ++k, a += kStrip, b += kStrip) {
    const auto first = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
    const auto second = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + 16));
#pragma GCC unroll 8
    for (int r = 0; r < kRegisterRows; ++r) {
      const auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[r])));
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], value, first);
      acc[r][1] = _mm512_dpbf16_ps(acc[r][1], value, second);
    }
  }
  store(acc, scale, out, stride);
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#endif

const InstructionSet kSets[] = {
    {"portable", always, portable<Single>, portable<Pair>},
#ifdef CURVFAST_X86
    {"avx2", has_avx2, avx2<Single>, avx2<Pair>},
    {"avx512", has_avx512, avx512<Single>, avx512<Pair>},
    {"avx512_bf16", has_avx512_bf16, avx512<Single>, avx512_bf16},
#endif
};

}  // namespace

std::span<const InstructionSet> instruction_sets() { return kSets; }

const InstructionSet& instruction_set(const std::string& name) {
  for (const InstructionSet& set : kSets)
    if (name == set.name) {
      if (!set.supported()) throw std::invalid_argument("this processor has no " + name);
      return set;
    }
  throw std::invalid_argument("there is no instruction set " + name);
}

}  // namespace curvfast
