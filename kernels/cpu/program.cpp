// Runs recorded calls of the kernels one after the other; see program.py.

#include "common.h"

extern "C" {

int lampq_has_vnni();
void lampq_quantize(const float*, uint8_t*, int64_t, float, float, float, float, int, const int8_t*, int);
void lampq_layernorm_quantize(const float*, const float*, const float*, uint8_t*, int64_t, int64_t, float, float, float, float, float,
                              int, const int8_t*, int);
void lampq_split_heads(const int8_t*, int8_t*, int8_t*, int8_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, int, int);
void lampq_remap(uint8_t*, const int8_t*, int64_t, int, int);
#ifdef LAMPQ_VNNI
void lampq_linear(const uint8_t*, const int32_t*, const int32_t*, const float*, const float*, const float*, const float*, int64_t,
                  int64_t, int64_t, int, int, float, float, float, float, int, void*, const float*, const float*, float, float, float,
                  float, float, int, uint8_t*, const int8_t*, int);
void lampq_attention(const int8_t*, const int8_t*, const int8_t*, const float*, const float*, void*, int64_t, int64_t, int64_t, int64_t,
                     int64_t, float, int, int, float, float, float, float, int, int, const int8_t*, int);
#endif

// Arguments by type, each in the order in which the function takes them.
struct Call {
  int64_t function;  // its place in SIGNATURES of native.py
  void* p[12];
  int64_t i[10];
  float f[10];
};

void lampq_run(const Call* calls, int64_t count) {
  for (const Call* c = calls; c < calls + count; ++c) {
    void* const* p = c->p;
    const int64_t* i = c->i;
    const float* f = c->f;
    switch (c->function) {
      case 0:
        lampq_quantize(static_cast<float*>(p[0]), static_cast<uint8_t*>(p[1]), i[0], f[0], f[1], f[2], f[3], i[1],
                       static_cast<int8_t*>(p[2]), i[2]);
        break;
      case 1:
        lampq_layernorm_quantize(static_cast<float*>(p[0]), static_cast<float*>(p[1]), static_cast<float*>(p[2]),
                                 static_cast<uint8_t*>(p[3]), i[0], i[1], f[0], f[1], f[2], f[3], f[4], i[2],
                                 static_cast<int8_t*>(p[4]), i[3]);
        break;
      case 2:
        lampq_split_heads(static_cast<int8_t*>(p[0]), static_cast<int8_t*>(p[1]), static_cast<int8_t*>(p[2]),
                          static_cast<int8_t*>(p[3]), i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9]);
        break;
#ifdef LAMPQ_VNNI
      case 3:
        lampq_linear(static_cast<uint8_t*>(p[0]), static_cast<int32_t*>(p[1]), static_cast<int32_t*>(p[2]), static_cast<float*>(p[3]),
                     static_cast<float*>(p[4]), static_cast<float*>(p[5]), static_cast<float*>(p[6]), i[0], i[1], i[2], i[3], i[4],
                     f[0], f[1], f[2], f[3], i[5], p[7], static_cast<float*>(p[8]), static_cast<float*>(p[9]), f[4], f[5], f[6], f[7],
                     f[8], i[6], static_cast<uint8_t*>(p[10]), static_cast<int8_t*>(p[11]), i[7]);
        break;
      case 4:
        lampq_attention(static_cast<int8_t*>(p[0]), static_cast<int8_t*>(p[1]), static_cast<int8_t*>(p[2]), static_cast<float*>(p[3]),
                        static_cast<float*>(p[4]), p[5], i[0], i[1], i[2], i[3], i[4], f[0], i[5], i[6], f[1], f[2], f[3], f[4], i[7],
                        i[8], static_cast<int8_t*>(p[6]), i[9]);
        break;
#endif
      case 5:
        lampq_remap(static_cast<uint8_t*>(p[0]), static_cast<int8_t*>(p[1]), i[0], i[1], i[2]);
        break;
      default:
        std::abort();  // program.py knows no other
    }
  }
}

}  // extern "C"
