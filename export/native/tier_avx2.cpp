// The stages for processors with AVX2 and FMA: eight lanes.
#include "tier.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2,popcnt")
namespace clustered::avx2 {

constexpr int kLanes = 8, kWords = 4;
constexpr int kTallRows = 6, kTallVectors = 2;  // shapes of tiles, see matrix.inc: these fill 16 registers
constexpr int kWideRows = 6, kWideVectors = 2;

#include "vectors.inc"

INLINE static uint32_t where_above(Vector a, Vector b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}

INLINE static Words count_bits(Words words) {  // a table of half bytes: Mula, Kurz, Lemire 2017, section 2.2
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                         2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15), x = reinterpret_cast<__m256i>(words);
  const __m256i counts = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(x, low)),
                                         _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
  return reinterpret_cast<Words>(_mm256_sad_epu8(counts, _mm256_setzero_si256()));
}

INLINE static void add_votes(uint8_t* votes, uint64_t word) {
  const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  for (int half = 0; half < 2; ++half) {
    const int first = half * 4;  // the byte whose bits the first eight lanes get
    const __m256i bytes = _mm256_shuffle_epi8(
        _mm256_set1_epi64x(static_cast<int64_t>(word)),
        _mm256_set_epi64x((first + 3) * 0x0101010101010101, (first + 2) * 0x0101010101010101,
                          (first + 1) * 0x0101010101010101, first * 0x0101010101010101));
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);  // -1 where set
    __m256i* place = reinterpret_cast<__m256i*>(votes + 32 * half);
    _mm256_storeu_si256(place, _mm256_sub_epi8(_mm256_loadu_si256(place), is_set));
  }
}

#include "matrix.inc"
#include "clustering.inc"
#include "selection.inc"
#include "attention.inc"

}  // namespace clustered::avx2
#pragma GCC pop_options

namespace clustered {

static bool is_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt");
}

const Tier kAvx2Tier = {"avx2", is_supported, avx2::hash, avx2::start_centroids,
    avx2::assign, avx2::move_centroids, avx2::attend};

}  // namespace clustered
#endif
