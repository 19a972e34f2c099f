"""What a client wants its answer to be: JSON, unless it prefers a picture."""

PICTURE = "image/png"

# Who takes these as gladly as a picture gets JSON: `Accept: */*` is what clients send that do not mind.
_JSON = ("application/json", "*/*")


def prefers_picture(accept: str) -> bool:
    """Whether a client wants a picture more than JSON.

    Args:
        accept: the header, or "" where there is none.
    Source: RFC 9110, section 12.5.1. Differs: `image/*` is not taken for the wish for a picture.
    """
    if PICTURE not in accept.lower():
        return False
    weights = dict(_parse(part) for part in accept.lower().split(","))
    return weights.get(PICTURE, 0.0) > max(weights.get(name, 0.0) for name in _JSON)


def _parse(part: str) -> tuple[str, float]:
    """Read `type;q=weight`; a weight that is absent or no number is 1."""
    name, *parameters = (word.strip() for word in part.split(";"))
    weight = next((word.removeprefix("q=") for word in parameters if word.startswith("q=")), "1")
    try:
        return name, float(weight)
    except ValueError:
        return name, 1.0
