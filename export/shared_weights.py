"""A program that reads its weights from the bundle's own file, so that a bundle holds them once.

ONNX calls it external data: a tensor names a file beside the program, an offset and a length. Safetensors keeps numbers
as they are in memory, so its file serves as it is.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MIN_BYTES = 1024  # below it, telling where a tensor lies takes about as much as the tensor
_TYPES = {"F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        offset, length: bytes.
    """

    offset: int
    length: int


def share_weights(model: onnx.ModelProto, weights: Path) -> None:
    """Let a program take from a file every tensor that stands there, also turned round, as linear layers have it.

    Args:
        model: its tensors that are found lose their numbers.
        weights: safetensors; must lie beside the program wherever that goes.
    """
    places = read_places(weights)
    turns = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes < MIN_BYTES:
            continue
        place = places.get((tensor.data_type, array.tobytes()))
        if place is not None:
            _refer(tensor, place, weights)
        elif array.ndim == 2 and (place := places.get((tensor.data_type, np.ascontiguousarray(array.T).tobytes()))):
            name = tensor.name
            tensor.name = f"{name}.turned"
            tensor.dims[:] = array.shape[::-1]
            _refer(tensor, place, weights)
            # The runtime turns it when it loads the program.
            turns.append(helper.make_node("Transpose", [tensor.name], [name], name=f"{name}.turn", perm=[1, 0]))
    for turn in turns:
        model.graph.node.insert(0, turn)


def read_places(weights: Path) -> dict[tuple[int, bytes], Place]:
    """Find where each tensor of a safetensors file lies: ONNX type and bytes → place."""
    content = weights.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    start = 8 + size  # the header is a number of bytes and so many bytes of JSON
    places: dict[tuple[int, bytes], Place] = {}
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__" or entry["dtype"] not in _TYPES:
            continue
        first, end = entry["data_offsets"]
        key = _TYPES[entry["dtype"]], content[start + first : start + end]
        places[key] = Place(offset=start + first, length=end - first)
    return places


def _refer(tensor: TensorProto, place: Place, weights: Path) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", weights.name), ("offset", str(place.offset)), ("length", str(place.length))):
        tensor.external_data.add(key=key, value=value)
