// The order of a call's stages and how they are cut into tasks.
//
// A task is a block of queries or a group of clusters of one head. Where the cuts lie depends on a sample's own lengths
// alone, so every number is computed in the same way whatever the batch and however many threads there are.
#include "engine.h"

#include <algorithm>
#include <atomic>

namespace clustered {

namespace {

int64_t most_kept(const Problem& p) {
  int64_t most = 0;
  for (int64_t head = 0; head < p.heads(); head += p.H) {
    most = std::max(most, p.is_exact(head) ? p.keys(head) : std::min(p.settings.top_k, p.keys(head)));
  }
  return most;
}

class Call {
 public:
  Call(const Problem& problem, const Tier& tier, const Parallel& parallel)
      : p_(problem), tier_(tier), parallel_(parallel), w_(problem) {}

  void run() {
    const int64_t num_blocks = ceil_div(p_.N, kRowBlock);
    each(p_.heads() * num_blocks, [&](Scratch& scratch, int64_t task) {
      prepare(scratch, task / num_blocks, task % num_blocks * kRowBlock);
    });
    cluster(num_blocks);
    each(p_.heads(), [&](Scratch&, int64_t head) { sort_queries(head); });
    int64_t num_groups = 0;
    for (int64_t head = 0; head < p_.heads(); ++head) num_groups = std::max(num_groups, groups(head));
    if (num_groups == 0) return;
    each(p_.heads() * num_groups, [&](Scratch& scratch, int64_t task) {
      const int64_t head = task / num_groups, group = task % num_groups;
      if (group < groups(head)) tier_.attend(p_, w_, scratch, head, group);
    });
  }

 private:
  // Run task(scratch, index) for each index below `count`.
  template <typename Task>
  void each(int64_t count, Task task) {
    struct Frame {
      Call* call;
      Task* task;
      std::atomic<bool> is_out_of_memory{false};
    } frame{this, &task};
    const auto body = [](void* data, size_t index) {
      Frame& frame = *static_cast<Frame*>(data);
      try {
        std::unique_ptr<Scratch> scratch = frame.call->take_scratch();
        (*frame.task)(*scratch, static_cast<int64_t>(index));
        frame.call->give_back(std::move(scratch));
      } catch (const std::bad_alloc&) {
        frame.is_out_of_memory = true;
      }
    };
    parallel_.run(parallel_.context, body, static_cast<size_t>(count), &frame);
    if (frame.is_out_of_memory) throw std::bad_alloc();
  }

  std::unique_ptr<Scratch> take_scratch() {
    {
      const std::lock_guard<std::mutex> lock(w_.mutex);
      if (!w_.idle.empty()) {
        std::unique_ptr<Scratch> scratch = std::move(w_.idle.back());
        w_.idle.pop_back();
        return scratch;
      }
    }
    return std::make_unique<Scratch>(p_);
  }

  void give_back(std::unique_ptr<Scratch> scratch) {
    const std::lock_guard<std::mutex> lock(w_.mutex);
    w_.idle.push_back(std::move(scratch));
  }

  // Blank the outputs of padding, or of all queries where there is no key, and hash the others.
  void prepare(Scratch& scratch, int64_t head, int64_t first) {
    const int64_t end = std::min(first + kRowBlock, p_.N), n = p_.queries(head);
    const int64_t end_of_real = std::clamp(n, first, end), blank = p_.keys(head) == 0 ? first : end_of_real;
    std::fill(p_.out + (head * p_.N + blank) * p_.D, p_.out + (head * p_.N + end) * p_.D, 0.0f);
    std::fill(p_.clusters + head * p_.N + end_of_real, p_.clusters + head * p_.N + end,
              static_cast<int32_t>(p_.settings.num_clusters));
    if (p_.is_short(head)) {
      std::fill(p_.clusters + head * p_.N + first, p_.clusters + head * p_.N + end_of_real, kAlone);
    } else if (!p_.settings.is_l2) {
      tier_.hash(p_, w_, scratch, head, first, end_of_real - first);
    }
  }

  void cluster(int64_t num_blocks) {
    each(p_.heads(), [&](Scratch&, int64_t head) {
      w_.is_settled[head] = p_.queries(head) == 0 || p_.is_short(head);
      if (!w_.is_settled[head]) tier_.start_centroids(p_, w_, head);
    });
    for (int64_t iteration = 0; iteration < p_.settings.num_iterations; ++iteration) {
      if (std::all_of(w_.is_settled + 0, w_.is_settled + p_.heads(), [](uint8_t is_settled) { return is_settled; })) {
        return;
      }
      each(p_.heads() * num_blocks, [&](Scratch& scratch, int64_t task) {
        const int64_t head = task / num_blocks, first = task % num_blocks * kRowBlock;
        const int64_t count = std::min(kRowBlock, p_.queries(head) - first);
        if (!w_.is_settled[head] && count > 0) tier_.assign(p_, w_, scratch, head, first, count);
      });
      if (iteration + 1 == p_.settings.num_iterations) return;
      each(p_.heads(), [&](Scratch& scratch, int64_t head) {
        if (!w_.is_settled[head]) w_.is_settled[head] = !tier_.move_centroids(p_, w_, scratch, head);
      });
    }
  }

  // List a head's queries by cluster; where attention is exact, in their own order.
  void sort_queries(int64_t head) {
    const int64_t C = p_.settings.num_clusters, n = p_.queries(head);
    int32_t* order = w_.order + head * p_.N;
    const int32_t* clusters = p_.clusters + head * p_.N;
    if (p_.is_exact(head)) {
      for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
      return;
    }
    int32_t* starts = w_.starts + head * (C + 1);
    std::fill(starts, starts + C + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++starts[clusters[i]];
    int32_t start = 0;
    w_.num_filled[head] = 0;
    for (int64_t c = 0; c < C; ++c) {
      const int32_t size = starts[c];
      if (size > 0) w_.filled[head * C + w_.num_filled[head]++] = static_cast<int32_t>(c);
      starts[c] = start;
      start += size;
    }
    for (int64_t i = 0; i < n; ++i) order[starts[clusters[i]]++] = static_cast<int32_t>(i);
    for (int64_t c = C; c > 0; --c) starts[c] = starts[c - 1];  // each start has moved to the next one's place
    starts[0] = 0;
  }

  // How many tasks the attention of a head is.
  int64_t groups(int64_t head) const {
    if (p_.keys(head) == 0) return 0;
    return p_.is_exact(head) ? ceil_div(p_.queries(head), kExactBlock) : ceil_div(w_.num_filled[head], kGroup);
  }

  const Problem& p_;
  const Tier& tier_;
  const Parallel& parallel_;
  Workspace w_;
};

}  // namespace

Workspace::Workspace(const Problem& p) : word_stride(ceil_div(p.N, kWordBlock) * kWordBlock) {
  const int64_t C = p.settings.num_clusters;
  if (p.settings.is_l2) {
    const int64_t width = ceil_div(C, kPad) * kPad;
    centroid_columns = Buffer<float>(p.heads(), p.E, width);
    centroid_penalties = Buffer<float>(p.heads(), width);
    std::fill(centroid_columns + 0, centroid_columns + p.heads() * p.E * width, 0.0f);
    std::fill(centroid_penalties + 0, centroid_penalties + p.heads() * width, std::numeric_limits<float>::infinity());
  } else {
    const int64_t width = padded(p.P);
    plane_columns = Buffer<float>(p.E, width);
    offsets = Buffer<float>(width);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t e = 0; e < p.E; ++e) plane_columns[e * width + j] = j < p.P ? p.planes[j * (p.E + 1) + e] : 0;
      offsets[j] = j < p.P ? p.planes[j * (p.E + 1) + p.E] : std::numeric_limits<float>::infinity();
    }
    words = Buffer<uint64_t>(p.heads(), word_stride);
    std::fill(words + 0, words + p.heads() * word_stride, 0);
    centroid_words = Buffer<uint64_t>(p.heads(), C);
  }
  is_settled = Buffer<uint8_t>(p.heads());
  order = Buffer<int32_t>(p.heads(), p.N);
  starts = Buffer<int32_t>(p.heads(), C + 1);
  filled = Buffer<int32_t>(p.heads(), C);
  num_filled = Buffer<int32_t>(p.heads());
}

Scratch::Scratch(const Problem& p) {
  const int64_t C = p.settings.num_clusters, value_width = padded(p.D), kept_count = most_kept(p);
  const int64_t most_noted = std::min(p.settings.top_k, p.S);
  scores = Buffer<float>(kMemberBlock, p.settings.is_l2 ? padded(C) : kMaxPlanes);
  sizes = Buffer<int32_t>(C);
  if (p.settings.is_l2) {
    sums = Buffer<double>(C, p.E);
  } else {
    votes = Buffer<int32_t>(C, kMaxPlanes);
    recent_votes = Buffer<uint8_t>(C, kMaxPlanes);
    num_recent = Buffer<int32_t>(C);
  }
  mean = Buffer<float>(p.E);
  group_queries = Buffer<float>(p.E, kGroup);
  weights = Buffer<float>(kKeyBlock, kGroup);
  values = Buffer<float>(kGroup, value_width);
  maxima = Buffer<float>(kGroup);
  totals = Buffer<float>(kGroup);
  value_rows = Buffer<float>(kKeyBlock, value_width);
  std::fill(value_rows + 0, value_rows + kKeyBlock * value_width, 0.0f);
  candidate_capacity = padded(most_noted + most_noted / 2 + 48);  // measured: few drops, few keys noted in vain
  candidate_scores = Buffer<float>(kGroup, candidate_capacity);
  candidate_keys = Buffer<int32_t>(kGroup, candidate_capacity);
  num_candidates = Buffer<int64_t>(kGroup);
  floors = Buffer<float>(kGroup);
  kept = Buffer<int32_t>(kept_count);
  kept_keys = Buffer<float>(p.E, padded(kept_count));
  kept_values = Buffer<float>(kept_count, value_width);
  members = Buffer<float>(kMemberBlock, p.E);
  own_weights = Buffer<float>(kMemberBlock, padded(kept_count));
  own_values = Buffer<float>(kMemberBlock, value_width);
}

const Tier* const* supported_tiers(int64_t* count) {
  static const std::vector<const Tier*> supported = [] {
    std::vector<const Tier*> tiers;
#if defined(__x86_64__)
    if (kAvx512Tier.is_supported()) tiers.push_back(&kAvx512Tier);
    if (kAvx2Tier.is_supported()) tiers.push_back(&kAvx2Tier);
#endif
    tiers.push_back(&kBaselineTier);
    return tiers;
  }();
  *count = static_cast<int64_t>(supported.size());
  return supported.data();
}

void attend_clustered(const Problem& problem, const Tier& tier, const Parallel& parallel) {
  if (problem.heads() == 0 || problem.N == 0) return;
  Call(problem, tier, parallel).run();
}

}  // namespace clustered
