from service.runtimes.onnx import open_onnx

# Runtime, as manifests name it → function that opens a program: (path, device=…, native_library=…) → Runtime.
RUNTIMES = {"onnx": open_onnx}
