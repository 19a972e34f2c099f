"""Pictures within JSON."""

import base64
from typing import Literal

from pydantic import BaseModel, Field


class EmbeddedPicture(BaseModel):
    """A picture within JSON."""

    media_type: Literal["image/png"] = Field(description="What `data` is.", examples=["image/png"])
    data: str = Field(description="The file in base64.")


def embed(png: bytes) -> EmbeddedPicture:
    """Put a PNG into JSON."""
    return EmbeddedPicture(media_type="image/png", data=base64.b64encode(png).decode("ascii"))
