// The operator as ONNX Runtime sees it: registration, attributes, checks of inputs, and its threads.
//
// The domain `clustered_attention` holds the operator on the best tier that the processor has. To measure and test the
// others, the domain `clustered_attention.<tier>` holds each of those that it has.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "onnxruntime_abi.h"

namespace {

using clustered::Problem;
using clustered::Settings;
using clustered::Tier;

constexpr const char* kDomain = "clustered_attention";
constexpr std::array<const char*, 6> kInputs = {"q", "k", "v", "planes", "query_lengths", "key_lengths"};

struct Operator : ort::CustomOp {
  const Tier* tier;
};

struct Kernel {
  const ort::Api& api;
  const Tier& tier;
  Settings settings;
};

// What is wrong with a node or its inputs; ends up in an OrtStatus.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A status of ONNX Runtime that is handed on as it came.
struct Failure {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status != nullptr) throw Failure{status};
}

// Run `body`; no exception may reach ONNX Runtime.
template <typename Body>
ort::Status* guarded(const ort::Api& api, Body body) {
  const auto fail = [&](ort::ErrorCode code, const std::string& message) {
    return api.get<ort::CreateStatus>(ort::kCreateStatus)(code, ("ClusteredAttention: " + message).c_str());
  };
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const Refusal& refusal) {
    return fail(ort::kInvalidArgument, refusal.what());
  } catch (const std::bad_alloc&) {
    return fail(ort::kFail, "out of memory; send shorter or fewer samples, or use fewer clusters");
  } catch (const std::exception& error) {
    return fail(ort::kFail, error.what());
  }
}

// Attributes

template <typename Getter, typename... Out>
void read_attribute(const ort::Api& api, const ort::KernelInfo* info, ort::Slot slot, const char* name, Out... out) {
  ort::Status* status = api.get<Getter>(slot)(info, name, out...);
  if (status == nullptr) return;
  api.get<ort::ReleaseStatus>(ort::kReleaseStatus)(status);
  throw Refusal(std::string("attribute ") + name + " is missing or has another type; export the model again");
}

int64_t read_count(const ort::Api& api, const ort::KernelInfo* info, const char* name, int64_t least, int64_t most) {
  int64_t count = 0;
  read_attribute<ort::GetAttributeInt64>(api, info, ort::kGetAttributeInt64, name, &count);
  if (count < least || count > most) {
    throw Refusal(std::string("attribute ") + name + "=" + std::to_string(count) + " must lie in [" +
                  std::to_string(least) + ", " + std::to_string(most) + "]");
  }
  return count;
}

bool read_is_l2(const ort::Api& api, const ort::KernelInfo* info) {
  size_t size = 0;
  read_attribute<ort::GetAttributeString>(api, info, ort::kGetAttributeString, "metric", static_cast<char*>(nullptr),
                                          &size);
  std::string metric(size, '\0');
  read_attribute<ort::GetAttributeString>(api, info, ort::kGetAttributeString, "metric", metric.data(), &size);
  metric.resize(std::strlen(metric.c_str()));  // the size counts the closing zero
  if (metric != "lsh" && metric != "l2") throw Refusal("attribute metric=" + metric + " must be lsh or l2");
  return metric == "l2";
}

Settings read_settings(const ort::Api& api, const ort::KernelInfo* info) {
  constexpr int64_t any = std::numeric_limits<int64_t>::max(), most_ids = std::numeric_limits<int32_t>::max() - 1;
  Settings settings;
  settings.num_clusters = read_count(api, info, "num_clusters", 1, most_ids);
  settings.num_iterations = read_count(api, info, "num_iterations", 1, any);
  settings.top_k = read_count(api, info, "top_k", 0, any);
  settings.full_below = read_count(api, info, "full_below", 0, any);
  settings.is_l2 = read_is_l2(api, info);
  read_attribute<ort::GetAttributeFloat>(api, info, ort::kGetAttributeFloat, "scale", &settings.scale);
  if (!(settings.scale > 0) || !std::isfinite(settings.scale)) {
    throw Refusal("attribute scale=" + std::to_string(settings.scale) + " must be positive and finite");
  }
  return settings;
}

// Inputs

struct Tensor {
  const void* data;
  std::vector<int64_t> sizes;
};

std::string words(const std::vector<int64_t>& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

Tensor read_tensor(const ort::Api& api, const ort::KernelContext* context, size_t index) {
  const ort::Value* value = nullptr;
  check(api.get<ort::GetInput>(ort::kGetInput)(context, index, &value));
  if (value == nullptr) throw Refusal(std::string("input ") + kInputs[index] + " is missing; export the model again");
  ort::TensorInfo* info = nullptr;
  check(api.get<ort::GetTensorTypeAndShape>(ort::kGetTensorTypeAndShape)(value, &info));
  const std::unique_ptr<ort::TensorInfo, ort::ReleaseTensorInfo> owner(
      info, api.get<ort::ReleaseTensorInfo>(ort::kReleaseTensorInfo));
  size_t rank = 0;
  check(api.get<ort::GetDimensionsCount>(ort::kGetDimensionsCount)(info, &rank));
  Tensor tensor{nullptr, std::vector<int64_t>(rank)};
  check(api.get<ort::GetDimensions>(ort::kGetDimensions)(info, tensor.sizes.data(), rank));
  void* data = nullptr;
  check(api.get<ort::GetTensorMutableData>(ort::kGetTensorMutableData)(const_cast<ort::Value*>(value), &data));
  tensor.data = data;
  return tensor;
}

void check_shape(const std::array<Tensor, 6>& inputs, size_t index, const char* letters,
                 const std::vector<int64_t>& expected) {
  if (inputs[index].sizes == expected) return;
  throw Refusal(std::string("input ") + kInputs[index] + " has shape " + words(inputs[index].sizes) + "; expected " +
                letters + " = " + words(expected));
}

void check_rank(const std::array<Tensor, 6>& inputs, size_t index, const char* letters, size_t rank) {
  if (inputs[index].sizes.size() == rank) return;
  throw Refusal(std::string("input ") + kInputs[index] + " has shape " + words(inputs[index].sizes) + "; expected " +
                letters);
}

void check_lengths(const char* name, const int64_t* lengths, int64_t count, int64_t most) {
  for (int64_t b = 0; b < count; ++b) {
    if (lengths[b] < 0 || lengths[b] > most) {
      throw Refusal(std::string(name) + "[" + std::to_string(b) + "]=" + std::to_string(lengths[b]) +
                    " must lie in [0, " + std::to_string(most) + "]");
    }
  }
}

Problem read_problem(const Kernel& kernel, const ort::KernelContext* context) {
  std::array<Tensor, 6> inputs;
  for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = read_tensor(kernel.api, context, i);
  check_rank(inputs, 0, "(B, H, N, E)", 4);
  check_rank(inputs, 1, "(B, H, S, E)", 4);
  check_rank(inputs, 2, "(B, H, S, D)", 4);
  check_rank(inputs, 3, "(P, E + 1)", 2);
  Problem p{};
  p.settings = kernel.settings;
  p.B = inputs[0].sizes[0], p.H = inputs[0].sizes[1], p.N = inputs[0].sizes[2], p.E = inputs[0].sizes[3];
  p.S = inputs[1].sizes[2], p.D = inputs[2].sizes[3], p.P = inputs[3].sizes[0];
  check_shape(inputs, 1, "(B, H, S, E)", {p.B, p.H, p.S, p.E});
  check_shape(inputs, 2, "(B, H, S, D)", {p.B, p.H, p.S, p.D});
  check_shape(inputs, 3, "(P, E + 1)", {p.P, p.E + 1});
  check_shape(inputs, 4, "(B,)", {p.B});
  check_shape(inputs, 5, "(B,)", {p.B});
  if (!p.settings.is_l2 && (p.P < 1 || p.P > clustered::kMaxPlanes)) {
    throw Refusal("input planes has " + std::to_string(p.P) + " rows; metric lsh takes 1 to 64");
  }
  if (std::max(p.N, p.S) > std::numeric_limits<int32_t>::max()) {
    throw Refusal("N=" + std::to_string(p.N) + " and S=" + std::to_string(p.S) + " must be below 2^31");
  }
  p.q = static_cast<const float*>(inputs[0].data);
  p.k = static_cast<const float*>(inputs[1].data);
  p.v = static_cast<const float*>(inputs[2].data);
  p.planes = static_cast<const float*>(inputs[3].data);
  p.query_lengths = static_cast<const int64_t*>(inputs[4].data);
  p.key_lengths = static_cast<const int64_t*>(inputs[5].data);
  check_lengths("query_lengths", p.query_lengths, p.B, p.N);
  check_lengths("key_lengths", p.key_lengths, p.B, p.S);
  return p;
}

// Running

void* make_output(const ort::Api& api, ort::KernelContext* context, size_t index, const std::vector<int64_t>& sizes) {
  ort::Value* value = nullptr;
  check(api.get<ort::GetOutput>(ort::kGetOutput)(context, index, sizes.data(), sizes.size(), &value));
  void* data = nullptr;
  check(api.get<ort::GetTensorMutableData>(ort::kGetTensorMutableData)(value, &data));
  return data;
}

struct Threads {
  const ort::Api& api;
  const ort::KernelContext* context;
};

void run_parallel(void* context, void (*task)(void*, size_t), size_t count, void* data) {
  const Threads& threads = *static_cast<Threads*>(context);
  if (count == 1) {
    task(data, 0);
  } else if (count > 1) {  // num_batches 0: each task by itself goes to the next free thread
    check(threads.api.get<ort::ParallelFor>(ort::kParallelFor)(threads.context, task, count, 0, data));
  }
}

ort::Status* compute(void* self, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(self);
  return guarded(kernel.api, [&] {
    Problem p = read_problem(kernel, context);
    p.out = static_cast<float*>(make_output(kernel.api, context, 0, {p.B, p.H, p.N, p.D}));
    p.clusters = static_cast<int32_t*>(make_output(kernel.api, context, 1, {p.B, p.H, p.N}));
    Threads threads{kernel.api, context};
    clustered::attend_clustered(p, kernel.tier, {run_parallel, &threads});
  });
}

ort::Status* create_kernel(const ort::CustomOp* self, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
  return guarded(*api, [&] {
    *kernel = new Kernel{*api, *static_cast<const Operator*>(self)->tier, read_settings(*api, info)};
  });
}

// Registration

Operator make_operator(const Tier* tier) {
  Operator op{};
  op.version = ort::kApiVersion;
  op.get_name = [](const ort::CustomOp*) { return "ClusteredAttention"; };
  op.get_execution_provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.get_input_type = [](const ort::CustomOp*, size_t index) { return index < 4 ? ort::kFloat : ort::kInt64; };
  op.get_input_count = [](const ort::CustomOp*) { return kInputs.size(); };
  op.get_output_type = [](const ort::CustomOp*, size_t index) { return index == 0 ? ort::kFloat : ort::kInt32; };
  op.get_output_count = [](const ort::CustomOp*) { return size_t{2}; };
  op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.get_input_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.get_output_characteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.get_input_memory_type = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.get_variadic_input_min_arity = [](const ort::CustomOp*) { return 1; };
  op.get_variadic_input_homogeneity = [](const ort::CustomOp*) { return 1; };
  op.get_variadic_output_min_arity = [](const ort::CustomOp*) { return 1; };
  op.get_variadic_output_homogeneity = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = compute;
  op.get_start_version = [](const ort::CustomOp*) { return 1; };
  op.get_end_version = [](const ort::CustomOp*) { return 1; };
  op.tier = tier;
  return op;
}

// A domain with one operator. ONNX Runtime keeps pointers to both for as long as the library is loaded.
struct Domain {
  Domain(const ort::Api& api, const std::string& name, const Tier* tier) : op(make_operator(tier)), api(api) {
    check(api.get<ort::CreateCustomOpDomain>(ort::kCreateCustomOpDomain)(name.c_str(), &domain));
    check(api.get<ort::CustomOpDomainAdd>(ort::kCustomOpDomainAdd)(domain, &op));
  }
  Domain(const Domain&) = delete;
  ~Domain() {
    if (domain != nullptr) api.get<ort::ReleaseCustomOpDomain>(ort::kReleaseCustomOpDomain)(domain);
  }
  const Operator op;
  const ort::Api& api;
  ort::CustomOpDomain* domain = nullptr;
};

const std::vector<std::unique_ptr<Domain>>& domains(const ort::Api& api) {
  static const std::vector<std::unique_ptr<Domain>> all = [&] {
    int64_t count = 0;
    const Tier* const* tiers = clustered::supported_tiers(&count);
    std::vector<std::unique_ptr<Domain>> made;
    made.push_back(std::make_unique<Domain>(api, kDomain, tiers[0]));
    for (int64_t i = 0; i < count; ++i) {
      made.push_back(std::make_unique<Domain>(api, std::string(kDomain) + "." + tiers[i]->name, tiers[i]));
    }
    return made;
  }();
  return all;
}

}  // namespace

// What ONNX Runtime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::ApiBase* base) {
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (api == nullptr) {
    const std::string version = base->get_version();
    return base->get_api(1)->get<ort::CreateStatus>(ort::kCreateStatus)(
        ort::kFail, ("ONNX Runtime " + version + " is too old for this library; install 1.17 or later").c_str());
  }
  return guarded(*api, [&] {
    for (const std::unique_ptr<Domain>& domain : domains(*api)) {
      check(api->get<ort::AddCustomOpDomain>(ort::kAddCustomOpDomain)(options, domain->domain));
    }
  });
}
