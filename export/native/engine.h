// One call of the operator, from checked inputs to outputs.
#pragma once

#include "problem.h"
#include "tier.h"

namespace clustered {

// Runs task(data, index) for each index below `count`, in any order, on any number of threads; returns when all are
// done.
struct Parallel {
  void (*run)(void* context, void (*task)(void* data, size_t index), size_t count, void* data);
  void* context;
};

// The best tier that this processor has comes first; `count` is how many it has.
const Tier* const* supported_tiers(int64_t* count);

// Throws std::bad_alloc. The outputs do not depend on the number of threads, nor those of a sample on its neighbours.
void attend_clustered(const Problem& problem, const Tier& tier, const Parallel& parallel);

}  // namespace clustered
