"""Reading a request's body: bounded in bytes and time, raw or as the multipart field `file`."""

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import BodyTooLarge, InvalidInput, RequestTimeout, UnsupportedMediaType
from service.routes.headers import find_header

# Named by clients that do not know better, `curl --data-binary` among them: the first bytes decide.
UNDECIDED = frozenset({"", "application/octet-stream", "application/x-www-form-urlencoded"})
FIELD = "file"
_LARGE_BYTES = 1_000_000  # of a form; a smaller one is parsed in a few milliseconds at most


class _Parser(MultiPartParser):
    def close(self) -> None:
        """Close every file; the form does not know that of a part which was cut off."""
        for file in self._files_to_close_on_error:
            file.close()


async def read_file(
    request: Request, *, media_types: frozenset[str], max_bytes: int, timeout_seconds: float
) -> tuple[bytes, str]:
    """Read the file that a request carries.

    Args:
        request: whose body was not read yet.
        media_types: what the task reads.
        max_bytes: of the whole body.
        timeout_seconds: for the whole body to arrive.
    Returns: its bytes and its media type, "" where its first bytes shall decide.
    Raises: UnsupportedMediaType before the body is read, if it is compressed or of another type; BodyTooLarge,
        RequestTimeout; InvalidInput for broken multipart.
    """
    if (encoding := find_header(request, b"content-encoding")).lower() not in {"", "identity"}:
        raise UnsupportedMediaType(
            f"Content-Encoding is {encoding[:100]}; bodies are read as they come; send the file without this encoding"
        )
    named = _media_type(request.headers.get("content-type", ""))
    if named == "multipart/form-data":
        body = await read_body(request, max_bytes=max_bytes, timeout_seconds=timeout_seconds)
        if len(body) < _LARGE_BYTES:
            body, named = await _read_field(request, body)
        else:  # parsing it would hold up every other request
            body, named = await asyncio.to_thread(lambda: asyncio.run(_read_field(request, body)))
        return body, check_media_type(named, media_types)
    media_type = check_media_type(named, media_types)
    return await read_body(request, max_bytes=max_bytes, timeout_seconds=timeout_seconds), media_type


def check_media_type(named: str, media_types: frozenset[str]) -> str:
    """Check what the client says it sends.

    Returns: the media type, "" where the first bytes shall decide.
    Raises: UnsupportedMediaType.
    """
    if named in UNDECIDED:
        return ""
    if named not in media_types:
        raise UnsupportedMediaType(
            f"Content-Type is {named[:100]}; this task reads {', '.join(sorted(media_types))}; send one of them, or "
            "application/octet-stream to let the first bytes decide"
        )
    return named


async def read_body(request: Request, *, max_bytes: int, timeout_seconds: float) -> bytes:
    """Read a body of limited size in limited time, whether its length was announced or not.

    Raises: BodyTooLarge, RequestTimeout; starlette's ClientDisconnect if the client leaves.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(f"{int(announced)} bytes", max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(f"more than {max_bytes} bytes", max_bytes)
                if chunk:  # the end of a stream is an empty one
                    chunks.append(chunk)
    except TimeoutError as error:
        raise RequestTimeout(
            f"{size} bytes of the body came in {timeout_seconds:g} s; all of it was expected by then; send it faster "
            "or send a smaller file"
        ) from error
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _read_field(request: Request, body: bytes) -> tuple[bytes, str]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    # The body is in memory and bounded already: a spooled copy on disk would only cost time.
    parser = _Parser(request.headers, stream(), max_files=1, max_fields=8, max_part_size=64 * 1024)
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
        upload = form.get(FIELD)
        if isinstance(upload, str):
            raise InvalidInput(
                f"the field `{FIELD}` came as text, without the name of a file; a file was expected; give it a name, "
                f"as `curl -F {FIELD}=@photo.jpg` does"
            )
        if not isinstance(upload, UploadFile):
            names = ", ".join(sorted({name[:40] for name, _ in form.multi_items()})) or "no field"
            raise InvalidInput(
                f"the form has {names}; a file in the field `{FIELD}` was expected; name the field `{FIELD}`"
            )
        return await upload.read(), _media_type(upload.content_type or "")
    except MultiPartException as error:
        raise InvalidInput(
            f"the multipart body cannot be read; one file in the field `{FIELD}` was expected; send it with "
            f"`curl -F {FIELD}=@photo.jpg`, or send the file itself as the body"
        ) from error
    finally:
        parser.close()


def _media_type(header: str) -> str:
    return parse_options_header(header)[0].decode("latin-1").strip().lower()


def _too_large(size: str, max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {size}; this model takes at most {max_bytes}; send a smaller file")
