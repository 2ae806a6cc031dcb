// Linears on codes: u8 activations (code + 128) times s8 weights, exact int32 sums, and all that follows a sum in one pass while it
// is still in the first-level cache: scale, bias, GELU, requantise; or the residual addition and the LayerNorm of the finished rows.
//
// A tile is 6 rows by 64 columns, 24 accumulators. Weights lie in blocks of 64 columns: [blocks][K / 4][64][4], zeros beyond the last.

#include "vnni.h"

#ifdef LAMPQ_VNNI
namespace {

constexpr int64_t kColumns = 16 * kVectors;  // of a block
constexpr int64_t kChunk = 32 * kRows;       // rows that stay in the second-level cache while all weights pass by

// erf form of GELU. erf(x / sqrt 2) is x P(x^2) / Q(x^2) on [-5.5, 5.5], fitted for the least largest error (4e-8); beyond, GELU is x or 0.
inline __m512 gelu(__m512 x) {
  const __m512 bound = _mm512_set1_ps(5.5f);
  const __m512 c = _mm512_min_ps(_mm512_max_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), bound)), bound);
  const __m512 w = _mm512_mul_ps(c, c);
  __m512 p = _mm512_set1_ps(2.23507504e-10f);
  p = _mm512_fmadd_ps(p, w, _mm512_set1_ps(-4.41628707e-8f));
  p = _mm512_fmadd_ps(p, w, _mm512_set1_ps(6.48173909e-6f));
  p = _mm512_fmadd_ps(p, w, _mm512_set1_ps(3.40724800e-4f));
  p = _mm512_fmadd_ps(p, w, _mm512_set1_ps(9.01819766e-3f));
  p = _mm512_fmadd_ps(p, w, _mm512_set1_ps(7.18425587e-2f));
  p = _mm512_fmadd_ps(p, w, _mm512_set1_ps(7.97884285e-1f));
  __m512 q = _mm512_set1_ps(6.23220258e-5f);
  q = _mm512_fmadd_ps(q, w, _mm512_set1_ps(1.83058192e-3f));
  q = _mm512_fmadd_ps(q, w, _mm512_set1_ps(2.90909391e-2f));
  q = _mm512_fmadd_ps(q, w, _mm512_set1_ps(2.56705880e-1f));
  q = _mm512_fmadd_ps(q, w, _mm512_set1_ps(1.f));
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  const __m512 y = _mm512_fmadd_ps(half, _mm512_div_ps(_mm512_mul_ps(c, p), q), half);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_sub_ps(_mm512_setzero_ps(), bound), _CMP_NLE_UQ), y);
}

enum Kind { kFloat = 0, kCodes = 1, kResidual = 2 };

struct Linear {
  const uint8_t* x;       // [rows, features]
  const int32_t* weight;  // packed
  const int32_t* start;   // [64 * blocks]: column constant, and what reading codes as code + 128 adds
  const float* scale;     // [channels]
  const float* bias;      // [channels]
  const float* inverse;   // [channels] 1/step of each column, or null for codes.inv
  const float* offset;    // [channels] zero-point of each column, or null for codes.zero_point
  int64_t rows, features, channels;
  int kind;
  bool gelu;
  Codes codes;
  void* out;  // [rows, channels]
  // LayerNorm of the finished rows, where norm_out is given.
  const float* norm_weight;
  const float* norm_bias;
  float eps;
  Codes norm;
  uint8_t* norm_out;

  int64_t blocks() const { return (channels + kColumns - 1) / kColumns; }
};

inline __m512i to_codes(__m512 y, __m512 inverse, __m512 zero_point, const Codes& c) {
  const __m512 scaled = _mm512_add_ps(_mm512_mul_ps(y, inverse), zero_point);
  const __m512 clamped = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(c.low)), _mm512_set1_ps(c.high));
  return _mm512_add_epi32(_mm512_cvtps_epi32(clamped), _mm512_set1_epi32(c.offset));
}

// One number of each of 16 columns: from `each`, or the same for all where that is null.
inline __m512 of_columns(const float* each, int64_t column, __mmask16 mask, float same) {
  return each ? _mm512_maskz_loadu_ps(mask, each + column) : _mm512_set1_ps(same);
}

// What follows the sums of `rows` rows from `first` on in one block of columns.
template <int kKind, bool kGelu>
void finish(const Linear& l, const int32_t* sums, int64_t first, int64_t rows, int64_t block) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = block * kColumns + 16 * v, left = l.channels - column;
    if (left <= 0) return;
    const __mmask16 mask = left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, l.scale + column);
    const __m512 bias = _mm512_maskz_loadu_ps(mask, l.bias + column);
    __m512 inverse, zero_point;  // of columns, not rows: loaded once a tile
    if (kKind == kCodes) {
      inverse = of_columns(l.inverse, column, mask, l.codes.inv);
      zero_point = of_columns(l.offset, column, mask, l.codes.zero_point);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + r * kColumns + 16 * v));
      __m512 y = _mm512_add_ps(_mm512_mul_ps(sum, scale), bias);
      if (kGelu) y = gelu(y);
      const int64_t place = (first + r) * l.channels + column;
      if (kKind == kCodes) {
        const __m128i bytes = _mm512_cvtepi32_epi8(to_codes(y, inverse, zero_point, l.codes));
        _mm_mask_storeu_epi8(static_cast<uint8_t*>(l.out) + place, mask, bytes);
      } else {
        float* out = static_cast<float*>(l.out) + place;
        if (kKind == kResidual) y = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), y);
        _mm512_mask_storeu_ps(out, mask, y);
      }
    }
  }
}

// Rows [first, last) and blocks of columns [block, end).
template <int kKind, bool kGelu>
void run(const Linear& l, int64_t first, int64_t last, int64_t block, int64_t end) {
  alignas(64) int32_t sums[kRows * kColumns];
  const int64_t steps = l.features / 4;
  for (; block < end; ++block) {
    const int32_t* weight = l.weight + block * steps * kColumns;
    for (int64_t r = first; r < last; r += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, last - r);
      dot_block(rows, l.x + r * l.features, l.features, weight, kVectors, steps, sums, l.start + block * kColumns);
      finish<kKind, kGelu>(l, sums, r, rows, block);
    }
    if (kKind == kCodes && l.codes.levels) {  // not tile by tile: bytes that were just written in smaller pieces would be waited for
      uint8_t* codes = static_cast<uint8_t*>(l.out) + first * l.channels + block * kColumns;
      look_up(codes, last - first, l.channels, std::min(kColumns, l.channels - block * kColumns), l.codes.levels);
    }
  }
}

void run(const Linear& l, int64_t first, int64_t last, int64_t block, int64_t end) {
  if (l.kind == kCodes) return l.gelu ? run<kCodes, true>(l, first, last, block, end) : run<kCodes, false>(l, first, last, block, end);
  if (l.kind == kResidual) return run<kResidual, false>(l, first, last, block, end);
  return l.gelu ? run<kFloat, true>(l, first, last, block, end) : run<kFloat, false>(l, first, last, block, end);
}

void normalise(const Linear& l, int64_t first, int64_t last, float* scratch) {
  const float* x = static_cast<const float*>(l.out);
  for (int64_t r = first; r < last; ++r)
    layernorm_row(x + r * l.channels, l.norm_weight, l.norm_bias, l.eps, l.channels, scratch, l.norm_out + r * l.channels, l.norm);
}

}  // namespace

extern "C" {

// int8 weights [channels, features] to the layout above; features a multiple of 4. start [64 * blocks]: column[n] - 128 * sum_k w[n, k].
void lampq_pack_weight(const int8_t* weight, const int32_t* column, int64_t channels, int64_t features, int32_t* packed,
                       int32_t* start) {
  const int64_t blocks = (channels + kColumns - 1) / kColumns, steps = features / 4;
  for (int64_t n = 0; n < blocks * kColumns; ++n) {
    int32_t* out = packed + n / kColumns * steps * kColumns + n % kColumns;
    int32_t sum = 0;
    for (int64_t s = 0; s < steps; ++s) {
      int32_t four = 0;
      if (n < channels) {
        const int8_t* in = weight + n * features + 4 * s;
        std::memcpy(&four, in, 4);
        sum += in[0] + in[1] + in[2] + in[3];
      }
      out[s * kColumns] = four;
    }
    start[n] = n < channels ? column[n] - 128 * sum : 0;
  }
}

// See `Linear`; kind 0 fp32 out, 1 codes, 2 out += result in fp32, and then codes of its LayerNorm where norm_out is given.
// table int8 [256] by signed code from -128 on, or null: levels of the codes that leave.
void lampq_linear(const uint8_t* x, const int32_t* weight, const int32_t* start, const float* scale, const float* bias,
                  const float* inverse, const float* zero_points, int64_t rows, int64_t features, int64_t channels, int kind, int gelu,
                  float inv, float zero_point, float low, float high, int offset, void* out, const float* norm_weight,
                  const float* norm_bias, float eps, float norm_inv, float norm_zero_point, float norm_low, float norm_high,
                  int norm_offset, uint8_t* norm_out, const int8_t* table, int threads) {
  const Levels levels(table, norm_out ? norm_offset : offset);
  const Linear l{x, weight, start, scale, bias, inverse, zero_points, rows, features, channels, kind, gelu != 0,
                 Codes(inv, zero_point, low, high, offset, levels), out, norm_weight, norm_bias, eps,
                 Codes(norm_inv, norm_zero_point, norm_low, norm_high, norm_offset, levels), norm_out};
  const int64_t tiles = (rows + kRows - 1) / kRows, blocks = l.blocks();
  if (tiles < 2 * threads && !norm_out) {  // few rows: share the columns
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 1)
    for (int64_t b = 0; b < blocks; ++b) run(l, 0, rows, b, b + 1);
    return;
  }
  // Equal shares of rows, in chunks; a chunk's rows are finished, so their LayerNorm follows at once.
  const int64_t shares = std::min<int64_t>(threads, tiles);
#pragma omp parallel for num_threads(threads) schedule(static) if (shares > 1)
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t end = std::min(rows, tiles * (share + 1) / shares * kRows);
    Buffer<float> scratch = make_buffer<float>(norm_out ? channels : 0);
    for (int64_t first = tiles * share / shares * kRows; first < end; first += kChunk) {
      const int64_t last = std::min(end, first + kChunk);
      run(l, first, last, 0, blocks);
      if (norm_out) normalise(l, first, last, scratch.get());
    }
  }
}

}  // extern "C"
#endif  // LAMPQ_VNNI
