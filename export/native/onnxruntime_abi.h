// The part of ONNX Runtime's C interface that a custom operator needs, written from its documented layout.
//
// The interface is a table of function pointers that only ever grows at its end, so a slot number means the same in
// every later version. Source of the numbers: the order of `OrtApi` in onnxruntime_c_api.h
// (github.com/microsoft/onnxruntime, MIT), checked by running against ONNX Runtime 1.31.
// Deliberately absent: everything else; sessions, tensors of other devices, and operators that share memory between
// input and output.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // the oldest with every slot below and OrtCustomOp as declared here

struct Status;  // null is success
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct SessionOptions;
struct CustomOpDomain;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };  // OrtErrorCode
enum ElementType { kFloat = 1, kInt32 = 6, kInt64 = 7 };  // ONNXTensorElementDataType
enum MemoryType { kDefaultMemory = 0 };  // OrtMemType
enum Characteristic { kRequired = 0 };  // OrtCustomOpInputOutputCharacteristic

// Position in OrtApi, counted in pointers.
enum Slot {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kGetAttributeFloat = 85,
  kGetAttributeInt64 = 86,
  kGetAttributeString = 87,
  kGetInput = 90,
  kGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorInfo = 99,
  kReleaseCustomOpDomain = 101,
  kParallelFor = 274,
};

// Types of the functions in those slots.
using CreateStatus = Status* (*)(ErrorCode, const char* message);
using CreateCustomOpDomain = Status* (*)(const char* name, CustomOpDomain**);
using CustomOpDomainAdd = Status* (*)(CustomOpDomain*, const struct CustomOp*);
using AddCustomOpDomain = Status* (*)(SessionOptions*, CustomOpDomain*);
using GetTensorMutableData = Status* (*)(Value*, void** data);
using GetDimensionsCount = Status* (*)(const TensorInfo*, size_t* count);
using GetDimensions = Status* (*)(const TensorInfo*, int64_t* sizes, size_t count);
using GetTensorTypeAndShape = Status* (*)(const Value*, TensorInfo**);
using GetAttributeFloat = Status* (*)(const KernelInfo*, const char* name, float*);
using GetAttributeInt64 = Status* (*)(const KernelInfo*, const char* name, int64_t*);
using GetAttributeString = Status* (*)(const KernelInfo*, const char* name, char* text, size_t* size);
using GetInput = Status* (*)(const KernelContext*, size_t index, const Value**);
using GetOutput = Status* (*)(KernelContext*, size_t index, const int64_t* sizes, size_t count, Value**);
using ReleaseStatus = void (*)(Status*);
using ReleaseTensorInfo = void (*)(TensorInfo*);
using ReleaseCustomOpDomain = void (*)(CustomOpDomain*);
using ParallelFor = Status* (*)(const KernelContext*, void (*task)(void*, size_t), size_t count, size_t num_batches,
                                void* data);

// OrtApi: `api.get<CreateStatus>(kCreateStatus)(…)`.
struct Api {
  template <typename Function>
  Function get(Slot slot) const {
    return reinterpret_cast<Function>(reinterpret_cast<void* const*>(this)[slot]);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);  // null if the library is older than that
  const char* (*get_version)();
};

// OrtCustomOp: what an operator tells of itself and how it is run.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);  // not called: version 2 below is there
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);  // null: CPU
  ElementType (*get_input_type)(const CustomOp*, size_t index);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t index);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);  // not called, likewise
  void (*destroy_kernel)(void* kernel);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t index);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t index);
  MemoryType (*get_input_memory_type)(const CustomOp*, size_t index);
  int (*get_variadic_input_min_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void* shape_context);  // null: shapes are known when run
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
};

}  // namespace ort
