from service.runtimes.onnx import open_onnx

# Runtime, as manifests name it → function that opens a program: (path, device=…) → Runtime.
RUNTIMES = {"onnx": open_onnx}
