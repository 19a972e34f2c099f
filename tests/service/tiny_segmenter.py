"""A bundle for image segmentation, small enough to make in a test: the class of a pixel is its strongest colour.

The program takes `image`, uint8 (B, 24, 32, 3). It gives `logits` (B, 3, 6, 8), the mean colours of squares of 4 x 4
pixels, for the labels red, green and blue.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.service.tiny_bundle import GOLDEN, LABELS, OPSET, PROGRAM, reseal, write_tiny_bundle

SEGMENTER = "tiny-squares-24-colours"
HEIGHT, WIDTH, STRIDE = 24, 32, 4
GRID = (HEIGHT // STRIDE, WIDTH // STRIDE)
FILL = (10, 10, 10)
MAX_PIXELS = 4_000_000


def write_tiny_segmenter(folder: Path) -> Path:
    """Write the bundle.

    Args:
        folder: to be made.
    Returns: the folder.
    """
    write_tiny_bundle(folder)
    (folder / PROGRAM).write_bytes(make_program().SerializeToString())
    images = np.random.default_rng(5).integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8)
    squares = images.reshape(2, GRID[0], STRIDE, GRID[1], STRIDE, 3).mean((2, 4), dtype=np.float32)
    np.savez(folder / GOLDEN, **{"input.image": images, "output.logits": squares.transpose(0, 3, 1, 2)})
    reseal(
        folder,
        name=SEGMENTER,
        task="image-segmentation",
        spec={"height": HEIGHT, "width": WIDTH, "fill": FILL, "max_pixels": MAX_PIXELS, "labels": LABELS},
        inputs=[{"name": "image", "dtype": "uint8", "shape": ["batch", HEIGHT, WIDTH, 3]}],
        outputs=[{"name": "logits", "dtype": "float32", "shape": ["batch", len(LABELS), *GRID]}],
    )
    return folder


def make_program() -> onnx.ModelProto:
    """Build the program."""
    square = [STRIDE, STRIDE]
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["logits"], kernel_shape=square, strides=square),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", HEIGHT, WIDTH, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS), *GRID])
    graph = helper.make_graph(nodes, "squares", [image], [logits])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", OPSET)])
