// The stages for processors with AVX-512 that count bits in vectors (Ice Lake, Zen 4 and later): sixteen lanes.
#include "tier.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,bmi2,popcnt")
namespace clustered::avx512 {

constexpr int kLanes = 16, kWords = 8;
constexpr int kTallRows = 12, kTallVectors = 2;  // shapes of tiles, see matrix.inc: these fill 32 registers
constexpr int kWideRows = 6, kWideVectors = 4;

#include "vectors.inc"

INLINE static uint32_t where_above(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

INLINE static Words count_bits(Words words) {
  return reinterpret_cast<Words>(_mm512_popcnt_epi64(reinterpret_cast<__m512i>(words)));
}

INLINE static void add_votes(uint8_t* votes, uint64_t word) {
  const __m512i counts = _mm512_loadu_si512(votes);
  _mm512_storeu_si512(votes, _mm512_mask_add_epi8(counts, word, counts, _mm512_set1_epi8(1)));
}

#include "matrix.inc"
#include "clustering.inc"
#include "selection.inc"
#include "attention.inc"

}  // namespace clustered::avx512
#pragma GCC pop_options

namespace clustered {

static bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

const Tier kAvx512Tier = {"avx512", is_supported, avx512::hash, avx512::start_centroids,
    avx512::assign, avx512::move_centroids, avx512::attend};

}  // namespace clustered
#endif
