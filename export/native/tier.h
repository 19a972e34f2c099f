// The stages of a call that are compiled once for each kind of processor.
//
// A tier's code stands between `#pragma GCC target` lines in a namespace of its own and uses nothing of the standard
// library: a function that two tiers share would be compiled for one of them and crash on the processor of the other.
#pragma once

#include "problem.h"

namespace clustered {

struct Tier {
  const char* name;
  bool (*is_supported)();
  // Bits of the queries [first, first + count) of a head.
  void (*hash)(const Problem&, Workspace&, Scratch&, int64_t head, int64_t first, int64_t count);
  // First centroids of a head that has queries.
  void (*start_centroids)(const Problem&, Workspace&, int64_t head);
  // Nearest centroid of the queries [first, first + count) of a head; `first` is a multiple of kRowBlock.
  void (*assign)(const Problem&, Workspace&, Scratch&, int64_t head, int64_t first, int64_t count);
  // Moves a head's centroids to the middle of their members; returns whether any moved.
  bool (*move_centroids)(const Problem&, Workspace&, Scratch&, int64_t head);
  // Outputs of the members of clusters filled[group · kGroup …], or of a block of kExactBlock queries.
  void (*attend)(const Problem&, Workspace&, Scratch&, int64_t head, int64_t group);
};

extern const Tier kBaselineTier;
#if defined(__x86_64__)
extern const Tier kAvx2Tier, kAvx512Tier;
#endif

}  // namespace clustered
