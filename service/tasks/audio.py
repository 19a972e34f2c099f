"""Recordings: the bytes of a file → mono samples at the rate that a model wants.

Reads WAV, FLAC, OGG (Vorbis, Opus) and MP3 of any sample rate and number of channels: channels are averaged, then soxr
resamples. libsndfile decodes, in memory and block by block, and is stopped as soon as the recording turns out to be too
long: a small file that unpacks to hours costs no more than the longest recording that is taken.

libsndfile reads two dozen formats, some of them hardly ever tested against hostile bytes. A file is handed to it only
if it starts as one of the four. What is loud or quiet stays so: nothing is normalised here.
"""

import io
import re
import struct
from typing import Self

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.errors import InvalidInput

AUDIO_MEDIA_TYPES = frozenset(
    {"application/ogg"}
    | {f"audio/{name}" for name in ("wav", "x-wav", "wave", "vnd.wave", "flac", "x-flac", "ogg", "opus", "vorbis")}
    | {f"audio/{name}" for name in ("mpeg", "mp3")}
)

_KINDS = "a WAV, FLAC, OGG or MP3 recording was expected"

_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 384_000
_MAX_VALUES_PER_SECOND = 192_000 * 8  # 192 kHz in 8 channels; each value costs up to 20 ns to decode
_BLOCK_VALUES = 1 << 18  # 1 MiB of float32
_MAX_LEVEL = 16.0  # 24 dB above full scale: more is no loud recording but one in other units
_MAX_MISSING_SECONDS = 0.15  # two frames of an MP3 of 8 kHz: encoders disagree on what they count
_UNKNOWN_FRAMES = 2**63 - 1  # SF_COUNT_MAX of libsndfile
_UNKNOWN_BYTES = 0x7FFF_0000  # from here on a WAV's length is what programs write that do not know it yet
_MAX_WAV_CHUNKS = 1_000
_MAX_OGG_PAGES_PER_SECOND = 100  # Opus in packets of 20 ms has at most 50; a page costs about 5 µs whatever it holds

Samples = npt.NDArray[np.float32]


class AudioSpec(BaseModel):
    """Which recordings a model takes, and at which rate it hears them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sample_rate_hz: int = Field(
        ge=_MIN_RATE_HZ, le=_MAX_RATE_HZ, description="Rate that every recording is resampled to."
    )
    min_seconds: float = Field(gt=0, description="Shortest recording that is taken.")
    max_seconds: float = Field(description="Longest recording that is taken; decoding stops beyond it.")

    @model_validator(mode="after")
    def _check_seconds(self) -> Self:
        if self.max_seconds < self.min_seconds:
            raise ValueError(f"max_seconds={self.max_seconds:g} must be at least min_seconds={self.min_seconds:g}")
        return self


# Name → what a file starts with. MP3 is the header of a frame of layer II or III.
_FORMATS: dict[str, re.Pattern[bytes]] = {
    "WAV": re.compile(rb"(?s)(?:RIF[FX]|RF64)....WAVE"),
    "FLAC": re.compile(rb"fLaC"),
    "OGG": re.compile(rb"OggS"),
    "MP3": re.compile(rb"\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]"),
}


class _Recording(soundfile.SoundFile):  # type: ignore[misc]  # the library has no types
    def seekable(self) -> bool:
        """Deny it: otherwise each block read ends in a seek, which is slow in compressed files and not exact in MP3."""
        return False


class _UncountedMp3(io.BytesIO):
    """An MP3 that does not say how many frames it has, posing as a longer one.

    libsndfile estimates such a file's length from its size and its first bit rate, and stops reading there: of a file
    whose bit rate falls later, the end would be lost without a word. With a length that is surely too large it reads on
    to the real end.
    """

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek as in a file that is 40 times as long: bit rates differ by 20 at most (8 to 160 kbit/s of MPEG-2)."""
        if whence == io.SEEK_END:
            return super().seek(40 * self.getbuffer().nbytes + offset)
        return super().seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read; beyond the real end there are zeros, as libsndfile looks for a tag before the supposed end."""
        if self.tell() <= self.getbuffer().nbytes:
            return super().readinto(buffer)
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def decode_audio(body: bytes, spec: AudioSpec) -> Samples:
    """Decode a recording, average its channels, resample it.

    Args:
        body: the file; its first bytes tell the format, after an ID3 tag if there is one.
        spec: the rate to deliver and the limits to keep.
    Returns: (N,) float32, full scale being ±1, N the recording's seconds times `spec.sample_rate_hz` to within 1.
    Raises: InvalidInput.
    """
    name, file = _find_format(body, spec)
    try:
        with _Recording(file) as recording:
            _check_rate(recording)
            return _read(recording, name, spec, is_length_stated=not isinstance(file, _UncountedMp3))
    except soundfile.SoundFileError as error:
        raise _damaged(name) from error


def _find_format(body: bytes, spec: AudioSpec) -> tuple[str, io.BytesIO]:
    if not body:
        raise InvalidInput(f"the body is empty; {_KINDS}; send the file as the body")
    if body.startswith(b"ID3") and len(body) >= 10:  # libsndfile would skip it too, and take any format after it
        size = sum((byte & 0x7F) << shift for byte, shift in zip(body[6:10], (21, 14, 7, 0), strict=True))
        body = body[10 + size :]  # ID3v2.4, section 3.1: 7 bits of size in each byte
    name = next((name for name, start in _FORMATS.items() if start.match(body)), None)
    if name is None:
        raise InvalidInput(
            f"the body does not start as a recording does; {_KINDS}; send the file itself, neither encoded nor "
            "wrapped, and save other formats as one of these"
        )
    if name == "WAV":
        _check_wav_length(body)
    if name == "OGG":
        _check_ogg_pages(body, spec)
    if name == "MP3" and not any(tag in body[:256] for tag in (b"Xing", b"Info", b"VBRI")):
        return name, _UncountedMp3(body)
    return name, io.BytesIO(body)


def _check_wav_length(body: bytes) -> None:
    """Refuse a WAV that was cut off: libsndfile takes what is there for the whole."""
    order = ">" if body.startswith(b"RIFX") else "<"
    position = 12
    for _ in range(_MAX_WAV_CHUNKS):  # then it is libsndfile's turn to refuse them
        if position + 8 > len(body):
            return
        kind, size = struct.unpack_from(f"{order}4sI", body, position)
        position += 8
        if kind == b"data":
            if len(body) - position < size < _UNKNOWN_BYTES:
                raise InvalidInput(
                    f"the WAV file announces {size} bytes of samples and has {len(body) - position} of them; "
                    "a complete file was expected; send it again"
                )
            return
        position += size + size % 2


def _check_ogg_pages(body: bytes, spec: AudioSpec) -> None:
    """Refuse what would take long to take apart however little it holds."""
    num_pages, limit = body.count(b"OggS"), int(_MAX_OGG_PAGES_PER_SECOND * (spec.max_seconds + 10))
    if num_pages > limit:
        raise InvalidInput(
            f"the OGG file has {num_pages} pages; {limit} hold the longest recording that this model takes; "
            "save it anew with larger pages, or as FLAC"
        )


def _check_rate(recording: _Recording) -> None:
    rate, channels = recording.samplerate, recording.channels
    if not _MIN_RATE_HZ <= rate <= _MAX_RATE_HZ:
        raise InvalidInput(
            f"the recording has a sample rate of {rate} Hz; {_MIN_RATE_HZ} to {_MAX_RATE_HZ} Hz are read; resample it"
        )
    if rate * channels > _MAX_VALUES_PER_SECOND:
        raise InvalidInput(
            f"the recording has {channels} channels at {rate} Hz, together {rate * channels} values a second; "
            f"at most {_MAX_VALUES_PER_SECOND} are read; mix it down to one channel"
        )


def _read(recording: _Recording, name: str, spec: AudioSpec, *, is_length_stated: bool) -> Samples:
    """Read to the end or to the limit, whichever comes first."""
    rate, channels = recording.samplerate, recording.channels
    resampler = soxr.ResampleStream(rate, spec.sample_rate_hz, 1) if rate != spec.sample_rate_hz else None
    block = np.empty((_BLOCK_VALUES // channels, channels), np.float32)
    parts: list[Samples] = []
    num_read, is_last = 0, False
    while not is_last:
        values = recording.read(len(block), out=block)
        is_last = len(values) < len(block)
        num_read += len(values)
        if num_read > round(spec.max_seconds * rate):
            raise InvalidInput(
                f"the recording has more than {spec.max_seconds:g} s; "
                f"this model takes at most {spec.max_seconds:g} s; split the recording"
            )
        mono = _average(values)
        parts.append(mono if resampler is None else resampler.resample_chunk(mono, last=is_last))
    stated = recording.frames
    if is_length_stated and num_read + _MAX_MISSING_SECONDS * rate < stated < _UNKNOWN_FRAMES:
        raise _damaged(name)
    if num_read < round(spec.min_seconds * rate):
        raise InvalidInput(
            f"the recording has {num_read / rate:.3g} s; this model takes at least {spec.min_seconds:g} s; "
            "send a longer recording"
        )
    return np.concatenate(parts)


def _average(values: Samples) -> Samples:
    """Average the channels: (N, channels) → (N,).

    Raises: InvalidInput if a value is not finite or beyond all loudness.
    """
    level = float(max(values.max(initial=0), -values.min(initial=0)))
    if not level <= _MAX_LEVEL:  # not a number compares as false
        raise InvalidInput(
            f"the recording has a value of {level:g}; numbers up to ±{_MAX_LEVEL:g} are read, ±1 being full scale; "
            "save it anew with 16 bits a sample"
        )
    mono = values[:, 0].copy()
    for channel in range(1, values.shape[1]):  # by columns, as numpy is slow where it sums a few values a row
        mono += values[:, channel]
    mono /= values.shape[1]
    return mono


def _damaged(name: str) -> InvalidInput:
    return InvalidInput(
        f"the body starts as {name} but is damaged, cut off or of a rare kind; "
        "a complete recording was expected; send it again, or save it anew as WAV or FLAC"
    )
