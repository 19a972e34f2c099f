// The stages for any processor: four lanes, which x86-64 and 64-bit ARM both have.
#include "tier.h"

namespace clustered::baseline {

constexpr int kLanes = 4, kWords = 2;
constexpr int kTallRows = 6, kTallVectors = 2;  // shapes of tiles, see matrix.inc: these fill 16 registers
constexpr int kWideRows = 6, kWideVectors = 2;

#include "vectors.inc"

INLINE static uint32_t where_above(Vector a, Vector b) {
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= static_cast<uint32_t>(a[lane] > b[lane]) << lane;
  return mask;
}

INLINE static Words count_bits(Words words) {  // in parallel within each word: Warren, Hacker's Delight, 5-1
  using Unsigned = uint64_t __attribute__((vector_size(8 * kWords)));
  Unsigned x = reinterpret_cast<Unsigned>(words);
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  x += x >> 8;
  x += x >> 16;
  x += x >> 32;
  return reinterpret_cast<Words>(x & 0x7f);
}

INLINE static void add_votes(uint8_t* votes, uint64_t word) {
  for (int bit = 0; bit < 64; ++bit) votes[bit] = static_cast<uint8_t>(votes[bit] + (word >> bit & 1));
}

#include "matrix.inc"
#include "clustering.inc"
#include "selection.inc"
#include "attention.inc"

}  // namespace clustered::baseline

namespace clustered {

static bool is_supported() { return true; }

const Tier kBaselineTier = {"baseline", is_supported, baseline::hash, baseline::start_centroids,
    baseline::assign, baseline::move_centroids, baseline::attend};

}  // namespace clustered
