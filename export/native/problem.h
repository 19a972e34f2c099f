// What one call of the operator is asked, and the memory that its stages share.
//
// Letters are those of the repository's legend: B batch, H heads, N queries, S keys, E and D head dimensions,
// C clusters, K kept keys, P hash planes. A "head" below is an index in [0, B·H). Rows of a matrix lie one after the
// other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace clustered {

constexpr int32_t kAlone = -1;        // the "cluster" of a query that attends by itself
constexpr int64_t kPad = 16;          // floats; rows that vectors of any tier may read whole are a multiple of this
constexpr int64_t kMaxPlanes = 64;    // a query's bits are one word
constexpr int64_t kRowBlock = 1024;   // queries that one task hashes or assigns
constexpr int64_t kWordBlock = 32;    // queries whose distances are taken side by side; divides kRowBlock
constexpr int64_t kGroup = 32;        // clusters that one task attends for: weights on kKeyBlock keys stay in L1
constexpr int64_t kKeyBlock = 192;    // keys between two updates of a softmax; a multiple of every tier's tile
constexpr int64_t kExactBlock = 192;  // queries that one task attends for where attention is full
constexpr int64_t kMemberBlock = 24;  // queries whose own scores are held at a time; a multiple of every tier's tile

constexpr INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr INLINE int64_t padded(int64_t count) { return ceil_div(count, kPad) * kPad; }
constexpr INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The operator's attributes, checked.
struct Settings {
  int64_t num_clusters;    // C ≥ 1
  int64_t num_iterations;  // assignments, ≥ 1
  int64_t top_k;           // K ≥ 0; 0 is plain clustered attention
  int64_t full_below;      // ≥ 0
  float scale;             // > 0, finite
  bool is_l2;
};

// One call's tensors, checked.
struct Problem {
  Settings settings;
  int64_t B, H, N, S, E, D, P;
  const float *q, *k, *v, *planes;  // (B, H, N, E), (B, H, S, E), (B, H, S, D), (P, E + 1)
  const int64_t *query_lengths, *key_lengths;  // (B,) in [0, N] and [0, S]
  float* out;                                  // (B, H, N, D)
  int32_t* clusters;                           // (B, H, N); C at padding, kAlone in a short sample

  INLINE int64_t heads() const { return B * H; }
  INLINE int64_t queries(int64_t head) const { return query_lengths[head / H]; }
  INLINE int64_t keys(int64_t head) const { return key_lengths[head / H]; }
  // Whether the sample is short enough for full attention, and is not clustered.
  INLINE bool is_short(int64_t head) const {
    return queries(head) < settings.full_below && keys(head) < settings.full_below;
  }
  // Whether every query attends to every key by itself: the sample is short, or all of its keys are kept.
  INLINE bool is_exact(int64_t head) const {
    return is_short(head) || (settings.top_k > 0 && settings.top_k >= keys(head));
  }
};

// Uninitialised memory on a cache line's start; throws std::bad_alloc.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t rows, int64_t columns = 1, int64_t depth = 1) {
    int64_t size = sizeof(T);
    for (const int64_t factor : {rows, columns, depth}) {
      if (__builtin_mul_overflow(size, factor, &size)) throw std::bad_alloc();
    }
    if (size > std::numeric_limits<int64_t>::max() - 64) throw std::bad_alloc();
    data_.reset(static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(size / 64 + 1) * 64)));
    if (!data_) throw std::bad_alloc();
  }
  INLINE operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// Memory of one task at a time, made once for each thread of a call.
struct Scratch {
  explicit Scratch(const Problem& problem);

  Buffer<float> scores;  // (kMemberBlock, max(kMaxPlanes, padded C)): projections, or closeness to centroids

  // Moving centroids.
  Buffer<int32_t> sizes;         // (C,) members
  Buffer<int32_t> votes;         // (C, 64) how many members have each bit
  Buffer<uint8_t> recent_votes;  // (C, 64) the same, not yet added to `votes`
  Buffer<int32_t> num_recent;    // (C,) at most 255
  Buffer<double> sums;           // (C, E) of members

  Buffer<float> mean;  // (E,) of members, also for attention

  // Attention of a group of clusters.
  Buffer<float> group_queries;     // (E, kGroup) mean queries, one per column
  Buffer<float> weights;           // (kKeyBlock, kGroup) scores, then weights before they are normalised
  Buffer<float> values;            // (kGroup, padded D) weighted sums of v
  Buffer<float> maxima, totals;    // (kGroup,) of a cluster's scores and weights
  Buffer<float> value_rows;        // (kKeyBlock, padded D) rows of v, padded
  int64_t candidate_capacity;      // keys noted for a cluster before the weakest are dropped
  Buffer<float> candidate_scores;  // (kGroup, candidate_capacity)
  Buffer<int32_t> candidate_keys;  // (kGroup, candidate_capacity) ascending
  Buffer<int64_t> num_candidates;  // (kGroup,)
  Buffer<float> floors;            // (kGroup,) what a score must exceed to be noted

  // Queries' own attention to kept keys.
  Buffer<int32_t> kept;       // (most kept keys of a cluster,)
  Buffer<float> kept_keys;    // (E, padded kept) one key per column
  Buffer<float> kept_values;  // (kept, padded D)
  Buffer<float> members;      // (kMemberBlock, E) queries
  Buffer<float> own_weights;  // (kMemberBlock, padded kept)
  Buffer<float> own_values;   // (kMemberBlock, padded D)
};

// Memory of a whole call.
struct Workspace {
  explicit Workspace(const Problem& problem);

  int64_t word_stride;               // words of a head, a multiple of kWordBlock
  Buffer<float> plane_columns;       // (E, padded P) one plane per column, zeros behind the last
  Buffer<float> offsets;             // (padded P,) infinite behind the last
  Buffer<uint64_t> words;            // (heads, word_stride) bits of the queries
  Buffer<uint64_t> centroid_words;   // (heads, C)
  Buffer<float> centroid_columns;    // (heads, E, padded C) one centroid per column
  Buffer<float> centroid_penalties;  // (heads, padded C) half a centroid's squared length, infinite behind the last
  Buffer<uint8_t> is_settled;        // (heads,) whether assigning again would change nothing
  Buffer<int32_t> order;             // (heads, N) queries by cluster, in their own order within one
  Buffer<int32_t> starts;            // (heads, C + 1) where a cluster starts in `order`
  Buffer<int32_t> filled;            // (heads, C) clusters that have members
  Buffer<int32_t> num_filled;        // (heads,)

  // Scratch that no task uses at the moment.
  std::mutex mutex;
  std::vector<std::unique_ptr<Scratch>> idle;
};

}  // namespace clustered
