// Products of u8 and s8 on AVX512-VNNI, in tiles that stay in registers, and 2^x.
#pragma once

#include "common.h"

#ifdef LAMPQ_VNNI
namespace {

constexpr int kRows = 6;     // rows of Q a tile
constexpr int kVectors = 4;  // 16-column vectors a tile: 24 accumulators, 5 operands

// acc += a (u8 quadruples) . b (s8 quadruples). Written out because GCC copies every accumulator around the intrinsic and spills.
inline void dot_accumulate(__m512i& acc, __m512i a, __m512i b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }

// acc[r][v] += a[r, 4*s .. 4*s+3] (u8) . b[s][column][0..3] (s8), for all s < steps.
template <int R, int V>
inline void dot_tile(const uint8_t* a, int64_t a_stride, const int32_t* b, int64_t b_stride, int64_t steps, int32_t* out,
                     int64_t out_stride, const int32_t* init) {
  __m512i acc[R][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const __m512i start = init ? _mm512_loadu_si512(init + 16 * v) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][v] = start;
  }
  for (int64_t s = 0; s < steps; ++s) {
    __m512i columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = _mm512_loadu_si512(b + s * b_stride + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, a + r * a_stride + 4 * s, 4);
      const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) dot_accumulate(acc[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(out + r * out_stride + 16 * v, acc[r][v]);
}

template <int R>
void dot_rows(const uint8_t* a, int64_t a_stride, const int32_t* b, int64_t vectors, int64_t steps, int32_t* out,
              const int32_t* init) {
  const int64_t stride = 16 * vectors;
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors)
    dot_tile<R, kVectors>(a, a_stride, b + 16 * v, stride, steps, out + 16 * v, stride, init ? init + 16 * v : nullptr);
  const int32_t* rest = init ? init + 16 * v : nullptr;
  switch (vectors - v) {
    case 3: dot_tile<R, 3>(a, a_stride, b + 16 * v, stride, steps, out + 16 * v, stride, rest); break;
    case 2: dot_tile<R, 2>(a, a_stride, b + 16 * v, stride, steps, out + 16 * v, stride, rest); break;
    case 1: dot_tile<R, 1>(a, a_stride, b + 16 * v, stride, steps, out + 16 * v, stride, rest); break;
    default: break;
  }
}

// out [rows, 16*vectors] = a [rows, 4*steps] (u8) @ b [steps, 16*vectors, 4] (s8) + init, rows <= kRows.
void dot_block(int64_t rows, const uint8_t* a, int64_t a_stride, const int32_t* b, int64_t vectors, int64_t steps, int32_t* out,
               const int32_t* init) {
  switch (rows) {
    case 6: dot_rows<6>(a, a_stride, b, vectors, steps, out, init); break;
    case 5: dot_rows<5>(a, a_stride, b, vectors, steps, out, init); break;
    case 4: dot_rows<4>(a, a_stride, b, vectors, steps, out, init); break;
    case 3: dot_rows<3>(a, a_stride, b, vectors, steps, out, init); break;
    case 2: dot_rows<2>(a, a_stride, b, vectors, steps, out, init); break;
    default: dot_rows<1>(a, a_stride, b, vectors, steps, out, init); break;
  }
}

// 2^x for x <= 0, 2^lowest below that; relative error below 3e-7. 2^f on [-1/2, 1/2] by its Taylor polynomial of degree 6.
inline __m512 exp2_nonpositive(__m512 x, float lowest = -126.f) {
  x = _mm512_max_ps(x, _mm512_set1_ps(lowest));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.540353039338161e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.333355814642844e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618129107628477e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550410866482158e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402265069591007e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931471805599453e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, whole);
}

}  // namespace
#endif  // LAMPQ_VNNI
