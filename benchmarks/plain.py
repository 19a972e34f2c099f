"""The peer: a plain FastAPI route around ONNX Runtime, `python -m benchmarks.plain BUNDLE PORT`.

What a good engineer writes in 20 lines: a synchronous route, which FastAPI runs in its thread pool, the raw body, one
shared session, no batching, uvicorn as it comes. It decodes with the service's own function and gives ONNX Runtime one
thread a call, so that only the servers differ.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import Depends, FastAPI, Request

from service.tasks.image_classification import ImageClassificationSpec
from service.tasks.pictures import decode_picture

PATH = "/predict"
TOP_K = 5


async def read_body(request: Request) -> bytes:
    """Read the raw body, which a synchronous route cannot."""
    return await request.body()


def create_app(folder: Path) -> FastAPI:
    """Make the application for the bundle in a folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    spec = ImageClassificationSpec.model_validate_json(json.dumps(manifest["spec"]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / manifest["programs"]["onnx"], options, providers=["CPUExecutionProvider"]
    )
    app = FastAPI()

    @app.post(PATH)
    def predict(body: Annotated[bytes, Depends(read_body)]) -> dict[str, Any]:
        (logits,) = session.run(["logits"], {"image": decode_picture(body, spec)[None]})
        weights = np.exp(logits[0] - logits[0].max())
        scores = weights / weights.sum()
        best = np.argsort(-scores)[:TOP_K].tolist()
        return {"predictions": [{"label": spec.labels[i], "index": i, "score": float(scores[i])} for i in best]}

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(Path(sys.argv[1])), host="127.0.0.1", port=int(sys.argv[2]))
