// What every CPU kernel shares: codes and how a row becomes codes. docs/numerics.md is the contract; kernels/reference.py the truth.
// Compiled with -ffp-contract=off, so that multiply, add and round happen in the order of the contract.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LAMPQ_VNNI 1
#endif

namespace {

// A table of levels, int8 [256] by signed code from -128 on, as bytes of the container whose codes have `offset` added.
struct Levels {
  alignas(64) uint8_t bytes[256];  // what each byte becomes
  bool given;

  Levels(const int8_t* table, int offset) : given(table != nullptr) {
    if (!given) return;
    const int start = offset ? 0 : 128;  // of a container with offset 0 the first byte is code 0
    for (int b = 0; b < 128; ++b) {
      bytes[b] = static_cast<uint8_t>(table[start + b] + offset);
      bytes[128 + b] = static_cast<uint8_t>(table[128 - start + b] + offset);
    }
  }
};

// bytes[r * stride + i] = table[bytes[r * stride + i]] for i < n; table [256], aligned to 64.
inline void look_up(uint8_t* bytes, int64_t rows, int64_t stride, int64_t n, const uint8_t* table) {
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
  const __m512i a = _mm512_load_si512(table), b = _mm512_load_si512(table + 64);
  const __m512i c = _mm512_load_si512(table + 128), d = _mm512_load_si512(table + 192);
  const auto levels = [&](__m512i x) {  // a permutation reads the low 7 bits of a code; its top bit says which half of the table
    const __m512i low = _mm512_permutex2var_epi8(a, x, b), high = _mm512_permutex2var_epi8(c, x, d);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
  };
  const __mmask64 rest = (1ull << n % 64) - 1;
  for (uint8_t* row = bytes; row < bytes + rows * stride; row += stride) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) _mm512_storeu_si512(row + i, levels(_mm512_loadu_si512(row + i)));
    if (rest) _mm512_mask_storeu_epi8(row + i, rest, levels(_mm512_maskz_loadu_epi8(rest, row + i)));
  }
#else
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) bytes[r * stride + i] = table[bytes[r * stride + i]];
#endif
}

// clamp(rne(x * inv + zp), lo, hi) + offset, stored as one byte; both containers have the same bits for offset 0 and 128.
struct Codes {
  float inv, zero_point, low, high;
  int32_t offset;
  const uint8_t* levels;  // what becomes of each byte at last (`Levels`), or null

  Codes(float inv, float zero_point, float low, float high, int32_t offset, const Levels& table)
      : inv(inv), zero_point(zero_point), low(low), high(high), offset(offset), levels(table.given ? table.bytes : nullptr) {}

  inline uint8_t operator()(float x) const {
    const float code = std::min(std::max(std::nearbyintf(x * inv + zero_point), low), high);
    return static_cast<uint8_t>(static_cast<int32_t>(code) + offset);
  }
};

inline void quantize_row(const float* x, uint8_t* out, int64_t n, const Codes& codes) {
  const Codes c = codes;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = c(x[i]);
  if (c.levels) look_up(out, 1, n, n, c.levels);
}

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], AlignedFree>;

template <typename T>
Buffer<T> make_buffer(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

// Codes of LayerNorm of one row; weight and bias [width] or null; y [width] is scratch.
inline void layernorm_row(const float* in, const float* weight, const float* bias, float eps, int64_t width, float* y, uint8_t* out,
                          const Codes& codes) {
  float sum = 0.f, squares = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += in[i];
  const float mean = sum / static_cast<float>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    const float d = in[i] - mean;
    squares += d * d;
  }
  const float rstd = 1.f / std::sqrt(squares / static_cast<float>(width) + eps);
  if (weight != nullptr && bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = (in[i] - mean) * rstd * weight[i] + bias[i];
  } else {
    for (int64_t i = 0; i < width; ++i) y[i] = (in[i] - mean) * rstd * (weight ? weight[i] : 1.f) + (bias ? bias[i] : 0.f);
  }
  quantize_row(y, out, width, codes);
}

}  // namespace
