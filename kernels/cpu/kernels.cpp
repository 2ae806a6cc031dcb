// What lies between the int8 matmuls on a CPU: LayerNorm + quantise, quantise, the split of qkv into heads, and attention.
//
// Plain C interface, no PyTorch headers: built in a few seconds by whatever C++ compiler the machine has (native.py), called
// through ctypes with raw pointers. Numerics follow docs/numerics.md; kernels/reference.py is the truth for every function here.

#include "vnni.h"

extern "C" {

// 1 where attention and linears are compiled in.
int lampq_has_vnni() {
#ifdef LAMPQ_VNNI
  return 1;
#else
  return 0;
#endif
}

// table int8 [256] by signed code from -128 on, or null; here and below.
void lampq_quantize(const float* x, uint8_t* out, int64_t n, float inv, float zero_point, float low, float high, int offset,
                    const int8_t* table, int threads) {
  const Levels levels(table, offset);
  const Codes codes(inv, zero_point, low, high, offset, levels);
  constexpr int64_t kChunk = 1 << 14;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c)
    quantize_row(x + c * kChunk, out + c * kChunk, std::min(kChunk, n - c * kChunk), codes);
}

// Each of n codes becomes its level, in place: for codes that oneDNN made.
void lampq_remap(uint8_t* codes, const int8_t* table, int64_t n, int offset, int threads) {
  const Levels levels(table, offset);
  constexpr int64_t kChunk = 1 << 16;
  const int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) if (chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) look_up(codes + c * kChunk, 1, kChunk, std::min(kChunk, n - c * kChunk), levels.bytes);
}

// x [rows, width] fp32; weight and bias [width] or null; out [rows, width].
void lampq_layernorm_quantize(const float* x, const float* weight, const float* bias, uint8_t* out, int64_t rows, int64_t width,
                              float eps, float inv, float zero_point, float low, float high, int offset, const int8_t* table,
                              int threads) {
  const Levels levels(table, offset);
  const Codes codes(inv, zero_point, low, high, offset, levels);
#pragma omp parallel num_threads(threads) if (rows > 4)
  {
    Buffer<float> row = make_buffer<float>(width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) layernorm_row(x + r * width, weight, bias, eps, width, row.get(), out + r * width, codes);
  }
}

}  // extern "C"

namespace {

#if defined(__x86_64__)
// 16 x 16 bytes: out[j * out_stride + i] = in[i * in_stride + j].
inline void transpose_16x16(const __m128i (&in)[16], int8_t* out, int64_t out_stride) {
  __m128i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm_unpacklo_epi8(in[i], in[i + 8]);
    a[2 * i + 1] = _mm_unpackhi_epi8(in[i], in[i + 8]);
  }
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
    b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
  }
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
    a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
  }
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
    b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
  }
  for (int j = 0; j < 16; ++j) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j * out_stride), b[j]);
}
#endif

inline int8_t clamp_code(int8_t code, int8_t low, int8_t high) { return std::min(std::max(code, low), high); }

// One head's v: src [tokens] rows of `stride` bytes, `head_dim` of them used; dst [head_dim, padded], zero in the padding.
void transpose_head(const int8_t* src, int64_t stride, int8_t* dst, int64_t tokens, int64_t padded, int64_t head_dim, int8_t low,
                    int8_t high) {
  int64_t done = 0;
#if defined(__x86_64__)
  const __m128i lows = _mm_set1_epi8(low), highs = _mm_set1_epi8(high);
  for (int64_t j = 0; j + 16 <= head_dim; j += 16, done = j) {
    for (int64_t n = 0; n < padded; n += 16) {
      __m128i rows[16];
      for (int i = 0; i < 16; ++i) {
        rows[i] = _mm_setzero_si128();
        if (n + i >= tokens) continue;
        __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + (n + i) * stride + j));
#ifdef __SSE4_1__
        row = _mm_min_epi8(_mm_max_epi8(row, lows), highs);
#else
        alignas(16) int8_t bytes[16];
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes), row);
        for (int8_t& byte : bytes) byte = clamp_code(byte, low, high);
        row = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
#endif
        rows[i] = row;
      }
      transpose_16x16(rows, dst + j * padded + n, padded);
    }
  }
  (void)lows;
  (void)highs;
#endif
  for (int64_t j = done; j < head_dim; ++j)
    for (int64_t n = 0; n < padded; ++n) dst[j * padded + n] = n < tokens ? clamp_code(src[n * stride + j], low, high) : 0;
}

void copy_rows(const int8_t* src, int64_t stride, int8_t* dst, int64_t tokens, int64_t head_dim, int8_t low, int8_t high) {
  for (int64_t n = 0; n < tokens; ++n) {
    const int8_t* in = src + n * stride;
    int8_t* out = dst + n * head_dim;
#pragma omp simd
    for (int64_t j = 0; j < head_dim; ++j) out[j] = clamp_code(in[j], low, high);
  }
}

}  // namespace

extern "C" {

// qkv int8 [batch, tokens, 3, heads, head_dim], saturated at 8 bits; q, k [batch, heads, tokens, head_dim];
// v [batch, heads, head_dim, padded]. Codes are clamped to the ranges given (fewer than 8 bits).
void lampq_split_heads(const int8_t* qkv, int8_t* q, int8_t* k, int8_t* v, int64_t batch, int64_t tokens, int64_t heads,
                       int64_t head_dim, int64_t padded, int qk_low, int qk_high, int v_low, int v_high, int threads) {
  const int64_t width = heads * head_dim, stride = 3 * width;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < batch * heads; ++task) {
    const int8_t* src = qkv + (task / heads) * tokens * stride + (task % heads) * head_dim;
    const int64_t block = task * tokens * head_dim;
    copy_rows(src, stride, q + block, tokens, head_dim, qk_low, qk_high);
    copy_rows(src + width, stride, k + block, tokens, head_dim, qk_low, qk_high);
    transpose_head(src + 2 * width, stride, v + task * padded * head_dim, tokens, padded, head_dim, v_low, v_high);
  }
}

}  // extern "C"

#ifdef LAMPQ_VNNI
namespace {

enum Scheme : int { kRowMax, kLog2, kCubic };  // in the order of SCHEMES in native.py

inline __m512 cube(__m512 x) { return _mm512_mul_ps(_mm512_mul_ps(x, x), x); }

// One row of logits to the integer weights of its unnormalised softmax; gives the sum of exponentials.
// acc int32 [16*vectors], columns >= tokens are garbage; p_q u8 [16*vectors], zero there. Codes of kLog2 are weights
// unit >> code of up to 16 bits: the low byte goes to p_q, the high one to p_high, where that is given.
// Codes of kCubic, 0..top, are of the cube root of an exponential, and the cubes of both are a product away.
template <Scheme kScheme>
inline float softmax_row(const int32_t* acc, uint8_t* p_q, uint8_t* p_high, int64_t tokens, int64_t vectors, float scale,
                         float unit, float top) {
  const auto mask_of = [tokens](int64_t v) -> __mmask16 {
    const int64_t left = tokens - 16 * v;
    return left >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << std::max<int64_t>(left, 0)) - 1);
  };
  __m512i most = _mm512_set1_epi32(INT32_MIN);
  for (int64_t v = 0; v < vectors; ++v)
    most = _mm512_mask_max_epi32(most, mask_of(v), most, _mm512_loadu_si512(acc + 16 * v));
  const __m512 c = _mm512_set1_ps(scale);
  const __m512 shift = _mm512_set1_ps(static_cast<float>(_mm512_reduce_max_epi32(most)) * scale);
  const __m512 units = _mm512_set1_ps(unit);
  const __m512i one = _mm512_set1_epi32(static_cast<int32_t>(unit));
  const __m512 third = _mm512_set1_ps(1.f / 3.f), tops = _mm512_set1_ps(top);
  const __m512 cube_unit = _mm512_set1_ps(static_cast<float>(unit / (static_cast<double>(top) * top * top)));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512 logit = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(acc + 16 * v)), c);
    const __m512 shifted = _mm512_sub_ps(logit, shift);
    // The cube of 2^-42 is a normal number still; others would take a hundred cycles each.
    const __m512 power = kScheme == kCubic ? exp2_nonpositive(_mm512_mul_ps(shifted, third), -42.f) : exp2_nonpositive(shifted);
    const __m512 root = _mm512_maskz_mov_ps(mask_of(v), power);  // of e: itself, or the cube root
    const __m512 e = kScheme == kCubic ? cube(root) : root;
    sum = _mm512_add_ps(sum, e);
    __m512i weight;
    if (kScheme == kLog2) {  // a shift by 32 or more gives 0, also by what a code too large for int32 becomes
      weight = _mm512_maskz_srlv_epi32(mask_of(v), one, _mm512_cvtps_epi32(_mm512_sub_ps(shift, logit)));
      if (p_high) _mm_storeu_si128(reinterpret_cast<__m128i*>(p_high + 16 * v), _mm512_cvtepi32_epi8(_mm512_srli_epi32(weight, 8)));
    } else if (kScheme == kCubic) {
      const __m512 code = _mm512_roundscale_ps(_mm512_mul_ps(root, tops), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      weight = _mm512_cvtps_epi32(_mm512_mul_ps(cube(code), cube_unit));
    } else {
      weight = _mm512_cvtps_epi32(_mm512_mul_ps(e, units));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p_q + 16 * v), _mm512_cvtepi32_epi8(weight));
  }
  return _mm512_reduce_add_ps(sum);
}

// rows of 32-bit words [rows, words] to [words, columns], zero where column >= rows.
void transpose_words(const int8_t* src, int64_t rows, int64_t src_stride, int64_t words, int32_t* dst, int64_t columns) {
  std::memset(dst, 0, static_cast<size_t>(words * columns) * 4);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t w = 0; w < words; ++w) std::memcpy(dst + w * columns + r, src + r * src_stride + 4 * w, 4);
}

struct Attention {
  int64_t heads, tokens, head_dim, padded;
  float unit;  // what the weight 1 of a row's maximum is as an integer
  Scheme scheme;
  int p_bits;
  Codes codes;
  bool floating;
  bool wide() const { return unit > 255.f; }  // weights of two bytes: powers of two of 4 bits
  float top() const { return static_cast<float>((1 << p_bits) - 1); }
  int64_t key_vectors() const { return (tokens + 15) / 16; }
  int64_t value_vectors() const { return (head_dim + 15) / 16; }
};

struct Scratch {
  explicit Scratch(const Attention& a)
      : keys(make_buffer<int32_t>(a.head_dim / 4 * 16 * a.key_vectors())),
        values(make_buffer<int32_t>(a.key_vectors() * 4 * 16 * a.value_vectors())),
        key_sums(make_buffer<int32_t>(16 * a.key_vectors())),
        logits(make_buffer<int32_t>(kRows * 16 * a.key_vectors())),
        product(make_buffer<int32_t>(kRows * 16 * a.value_vectors())),
        product_high(make_buffer<int32_t>(a.wide() ? kRows * 16 * a.value_vectors() : 0)),
        queries(make_buffer<uint8_t>(kRows * a.head_dim)),
        softmax(make_buffer<uint8_t>(kRows * 16 * a.key_vectors())),
        softmax_high(make_buffer<uint8_t>(a.wide() ? kRows * 16 * a.key_vectors() : 0)) {}
  Buffer<int32_t> keys, values, key_sums, logits, product, product_high;
  Buffer<uint8_t> queries, softmax, softmax_high;
};

// out[d] = store(sum[d] * scale), where the sum of a wide row is 256 * high + low, exact in fp64 whatever the number of tokens.
template <typename T, typename Store>
inline void store_row(const int32_t* low, const int32_t* high, float scale, T* out, int64_t head_dim, const Store& store) {
  if (high) {
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) out[d] = store(static_cast<float>(256.0 * high[d] + low[d]) * scale);
  } else {
#pragma omp simd
    for (int64_t d = 0; d < head_dim; ++d) out[d] = store(static_cast<float>(low[d]) * scale);
  }
}

void one_head(const Attention& a, Scratch& s, const int8_t* q, const int8_t* k, const int8_t* v, float logit_scale, float v_scale,
              void* out, int64_t out_stride) {
  const int64_t kv = a.key_vectors(), vv = a.value_vectors(), words = a.head_dim / 4;
  transpose_words(k, a.tokens, a.head_dim, words, s.keys.get(), 16 * kv);
  transpose_words(v, a.head_dim, a.padded, kv * 4, s.values.get(), 16 * vv);
  // Queries are read as code + 128: take 128 * sum_d k[n, d] off again.
  for (int64_t n = 0; n < 16 * kv; ++n) {
    int32_t sum = 0;
    if (n < a.tokens) {
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < a.head_dim; ++d) sum += k[n * a.head_dim + d];
    }
    s.key_sums[n] = -128 * sum;
  }
  const auto softmax = a.scheme == kLog2 ? softmax_row<kLog2> : a.scheme == kCubic ? softmax_row<kCubic> : softmax_row<kRowMax>;
  float sums[kRows];
  for (int64_t first = 0; first < a.tokens; first += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, a.tokens - first);
    const int8_t* block = q + first * a.head_dim;
    uint8_t* queries = s.queries.get();
#pragma omp simd
    for (int64_t i = 0; i < rows * a.head_dim; ++i) queries[i] = static_cast<uint8_t>(block[i]) ^ 0x80;
    dot_block(rows, s.queries.get(), a.head_dim, s.keys.get(), kv, words, s.logits.get(), s.key_sums.get());
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* logits = s.logits.get() + r * 16 * kv;
      uint8_t* high = a.wide() ? s.softmax_high.get() + r * 16 * kv : nullptr;
      sums[r] = softmax(logits, s.softmax.get() + r * 16 * kv, high, a.tokens, kv, logit_scale, a.unit, a.top());
    }
    dot_block(rows, s.softmax.get(), 16 * kv, s.values.get(), vv, kv * 4, s.product.get(), nullptr);
    if (a.wide()) dot_block(rows, s.softmax_high.get(), 16 * kv, s.values.get(), vv, kv * 4, s.product_high.get(), nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = v_scale / (a.unit * sums[r]);
      const int32_t* low = s.product.get() + r * 16 * vv;
      const int32_t* high = a.wide() ? s.product_high.get() + r * 16 * vv : nullptr;
      const int64_t place = (first + r) * out_stride;
      if (a.floating) {
        store_row(low, high, scale, static_cast<float*>(out) + place, a.head_dim, [](float y) { return y; });
      } else {
        store_row(low, high, scale, static_cast<uint8_t*>(out) + place, a.head_dim, Codes(a.codes));
      }
    }
  }
  // Not row by row: bytes that were just written in smaller pieces would be waited for.
  if (a.codes.levels) look_up(static_cast<uint8_t*>(out), a.tokens, out_stride, a.head_dim, a.codes.levels);
}

}  // namespace

extern "C" {

// q, k int8 [batch, heads, tokens, head_dim]; v int8 [batch, heads, head_dim, padded], zero in the padding, padded a multiple of
// 16; head_dim a multiple of 4. out [batch, tokens, heads * head_dim]: bytes, or fp32 where `floating`.
void lampq_attention(const int8_t* q, const int8_t* k, const int8_t* v, const float* logit_scale, const float* v_scale, void* out,
                     int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, int64_t padded, float unit, int scheme,
                     int p_bits, float inv, float zero_point, float low, float high, int offset, int floating,
                     const int8_t* table, int threads) {
  const Levels levels(floating ? nullptr : table, offset);
  const Codes codes(inv, zero_point, low, high, offset, levels);
  const Attention a{heads, tokens, head_dim, padded, unit, static_cast<Scheme>(scheme), p_bits, codes, floating != 0};
  const int64_t width = heads * head_dim;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(a);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch * heads; ++task) {
      const int64_t start = (task / heads) * tokens * width + (task % heads) * head_dim;
      void* target = floating ? static_cast<void*>(static_cast<float*>(out) + start)
                              : static_cast<void*>(static_cast<uint8_t*>(out) + start);
      const int64_t block = task * tokens * head_dim;
      one_head(a, scratch, q + block, k + block, v + task * padded * head_dim, logit_scale[task % heads], v_scale[task % heads],
               target, width);
    }
  }
}

}  // extern "C"
#endif  // LAMPQ_VNNI
