import pytest

from service.routes.accept import prefers_picture


@pytest.mark.parametrize(
    "accept",
    [
        "image/png",
        "Image/PNG",
        "image/png, application/json;q=0.9",
        "application/json; q=0.5 , image/png; q=0.6",
        "image/avif,image/webp,image/png,image/svg+xml,image/*;q=0.8,*/*;q=0.5",  # what Firefox asks for pictures
        "text/html, image/png;q=0.1",
        "image/png;q=high",
    ],
)
def test_who_prefers_a_picture_gets_one(accept: str) -> None:
    assert prefers_picture(accept)


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/json",
        "image/*",
        "image/jpeg",
        "image/png, application/json",
        "image/png, */*",
        "image/png;q=0.5, */*;q=0.6",
        "image/png;q=0",
        "image/pngx",
        "text/plain;note=image/png",
        ",;,=;q=,image/png;q=0",
    ],
)
def test_all_others_get_json(accept: str) -> None:
    assert not prefers_picture(accept)
