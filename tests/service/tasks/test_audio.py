import io
import random
import struct
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from pydantic import ValidationError

from service.errors import InvalidInput
from service.tasks.audio import AUDIO_MEDIA_TYPES, AudioSpec, decode_audio
from tests.service.tasks.damaged_files import damage

RATE = 16_000
SPEC = AudioSpec(sample_rate_hz=RATE, min_seconds=0.1, max_seconds=5.0)

LOSSLESS = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAVEX", "PCM_16"), ("RF64", "PCM_16"),
            ("FLAC", "PCM_16"), ("FLAC", "PCM_24")]  # fmt: skip
LOSSY = [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("WAV", "ULAW"), ("WAV", "PCM_U8"),
         ("WAV", "IMA_ADPCM"), ("WAV", "GSM610")]  # fmt: skip
ALL = LOSSLESS + LOSSY

Samples = npt.NDArray[np.float32]


def tone(seconds: float, rate: int = RATE, hz: float = 440.0) -> Samples:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> Samples:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)).astype(np.float32)


def save(samples: Samples, rate: int = RATE, name: str = "WAV", subtype: str = "FLOAT", **options: object) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=name, subtype=subtype, **options)
    return file.getvalue()


def make_wav(
    data: bytes, *, size: int | None = None, rate: int = RATE, channels: int = 1, chunks: bytes = b""
) -> bytes:
    """Put a WAV of 16 bits a sample together; `size` is what its header announces."""
    frame = 2 * channels
    head = b"fmt " + struct.pack("<IHHIIHH", 16, 1, channels, rate, min(rate * frame, 2**32 - 1), frame, 16)
    body = b"WAVE" + head + chunks + b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def announce_in_flac(body: bytes, num_samples: int) -> bytes:
    """Write another number of samples into a FLAC's header: 36 bits from the middle of byte 21 on."""
    high, low = num_samples >> 32, num_samples & 0xFFFFFFFF
    return body[:21] + bytes([body[21] & 0xF0 | high]) + struct.pack(">I", low) + body[26:]


def without_count(mp3: bytes) -> bytes:
    """Take the frame that says how many frames there are away from an MP3."""
    return mp3[mp3.index(mp3[:2], 4) :]


def refusal(body: bytes, spec: AudioSpec = SPEC) -> str:
    """Decode what must be refused, check the message's three parts, return it."""
    with pytest.raises(InvalidInput) as caught:
        decode_audio(body, spec)
    message = str(caught.value)
    assert message.count("; ") == 2, message
    for internal in ("0x", "sndfile", "soxr", "Error", "BytesIO"):
        assert internal not in message
    return message


# Formats


@pytest.mark.parametrize(("name", "subtype"), LOSSLESS)
def test_samples_of_the_right_rate_are_kept(name: str, subtype: str) -> None:
    samples = np.round(noise(0.5) * 32768) / np.float32(32768)
    found = decode_audio(save(samples, name=name, subtype=subtype), SPEC)
    np.testing.assert_array_equal(found, samples, strict=True)


@pytest.mark.parametrize(("name", "subtype"), LOSSY)
def test_compressed_recordings_sound_the_same(name: str, subtype: str) -> None:
    rate = 8000 if subtype == "GSM610" else RATE
    samples = tone(1.0, rate)
    found = decode_audio(save(samples, rate, name=name, subtype=subtype), SPEC)
    assert abs(len(found) - RATE) <= 1024  # codecs fill their last block
    middle = slice(4000, 12_000)
    spectrum = np.abs(np.fft.rfft(found[middle] * np.hanning(8000)))
    assert np.argmax(spectrum) == 220  # 440 Hz in bins of 2 Hz
    assert np.sqrt(np.mean(found[middle] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


def test_a_big_endian_wav_is_read() -> None:
    body = save(tone(0.5), subtype="PCM_16", endian="BIG")
    assert body.startswith(b"RIFX")
    np.testing.assert_allclose(decode_audio(body, SPEC), tone(0.5), rtol=0, atol=1 / 32768)


@pytest.mark.parametrize("size", [0, 10, 300, 20_000])
@pytest.mark.parametrize(("name", "subtype"), [("MP3", "MPEG_LAYER_III"), ("FLAC", "PCM_16")])
def test_a_tag_before_the_recording_is_skipped(name: str, subtype: str, size: int) -> None:
    body = save(tone(0.5), name=name, subtype=subtype)
    tag = b"ID3\x04\x00\x00" + bytes([0, size >> 14, size >> 7 & 0x7F, size & 0x7F]) + bytes(size)
    np.testing.assert_array_equal(decode_audio(tag + body, SPEC), decode_audio(body, SPEC), strict=True)


def test_blocks_leave_no_seams() -> None:
    long = AudioSpec(sample_rate_hz=RATE, min_seconds=0.1, max_seconds=100)
    samples = np.round(noise(40) * 32768) / np.float32(32768)  # more than two blocks
    np.testing.assert_array_equal(decode_audio(save(samples, name="FLAC", subtype="PCM_16"), long), samples)


# Sample rates


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_any_rate_is_resampled(rate: int) -> None:
    found = decode_audio(save(tone(1.0, rate), rate), SPEC)
    assert abs(len(found) - RATE) <= 1
    assert found.dtype == np.float32
    inner = slice(800, -800)  # the filter rings at the ends
    np.testing.assert_allclose(found[inner], tone(1.0)[: len(found)][inner], rtol=0, atol=2e-4)


def test_what_the_model_s_rate_cannot_hold_is_filtered_out() -> None:
    found = decode_audio(save(tone(1.0, 48_000, hz=12_000), 48_000), SPEC)
    assert np.abs(found[800:-800]).max() < 1e-4


def test_resampling_leaves_no_seams_between_blocks() -> None:
    long = AudioSpec(sample_rate_hz=8_000, min_seconds=0.1, max_seconds=100)
    found = decode_audio(save(tone(40, 16_000), 16_000), long)
    np.testing.assert_allclose(found[400:-400], tone(40, 8_000)[400:-400], rtol=0, atol=2e-4)


@pytest.mark.parametrize("rate", [1, 3_999, 384_001, 2**31 - 1])
def test_a_rate_out_of_range_is_refused(rate: int) -> None:
    message = refusal(make_wav(bytes(32_000), rate=rate))
    assert message == f"the recording has a sample rate of {rate} Hz; 4000 to 384000 Hz are read; resample it"


# Channels


@pytest.mark.parametrize("num_channels", [2, 3, 8])
@pytest.mark.parametrize(("name", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("WAV", "FLOAT")])
def test_channels_are_averaged(name: str, subtype: str, num_channels: int) -> None:
    channels = np.stack([noise(0.5, seed=seed) for seed in range(num_channels)], axis=1)
    found = decode_audio(save(channels, name=name, subtype=subtype), SPEC)
    np.testing.assert_allclose(found, channels.mean(axis=1), rtol=0, atol=2 / 32768)


def test_eight_channels_at_192_khz_are_read() -> None:
    channels = np.repeat(tone(0.5, 192_000)[:, None], 8, axis=1)
    found = decode_audio(save(channels, 192_000, subtype="PCM_16"), SPEC)
    np.testing.assert_allclose(found[800:-800], tone(0.5)[800:-800], rtol=0, atol=3e-4)


def test_too_many_values_a_second_are_refused() -> None:
    assert decode_audio(make_wav(bytes(2 * 96 * 2_000), channels=96), SPEC).shape == (2_000,)
    assert refusal(make_wav(bytes(2 * 97 * 2_000), channels=97)) == (
        "the recording has 97 channels at 16000 Hz, together 1552000 values a second; at most 1536000 are read; "
        "mix it down to one channel"
    )


# Loudness


def test_silence_is_silence() -> None:
    for name, subtype in ALL:
        found = decode_audio(save(np.zeros(16_000, np.float32), name=name, subtype=subtype), SPEC)
        assert np.abs(found).max() < 0.01  # 8 bits have no exact zero in some codecs


def test_nothing_is_normalised() -> None:
    quiet = tone(0.5) * np.float32(1e-3)
    np.testing.assert_array_equal(decode_audio(save(quiet), SPEC), quiet)
    loud = tone(0.5) * np.float32(30)
    np.testing.assert_array_equal(decode_audio(save(loud), SPEC), loud)


@pytest.mark.parametrize(
    ("value", "told"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "inf"), (1e30, "1e+30"), (-40.0, "40")]
)
@pytest.mark.parametrize("position", [0, 7_777, 15_999])
def test_values_that_are_no_sound_are_refused(value: float, told: str, position: int) -> None:
    samples = tone(1.0)
    samples[position] = value
    message = refusal(save(np.stack([tone(1.0), samples], axis=1)))
    assert message == (
        f"the recording has a value of {told}; numbers up to ±16 are read, ±1 being full scale; "
        "save it anew with 16 bits a sample"
    )


def test_a_double_beyond_float32_is_refused() -> None:
    samples = np.zeros(16_000)
    samples[5] = 1e300
    assert "a value of inf" in refusal(save(samples, subtype="DOUBLE"))


# Length


@pytest.mark.parametrize(("name", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
def test_a_hundredth_of_a_second_is_too_short(name: str, subtype: str) -> None:
    message = refusal(save(tone(0.01), name=name, subtype=subtype))
    assert message.endswith(" s; this model takes at least 0.1 s; send a longer recording")


def test_the_message_tells_the_length_that_came() -> None:
    assert refusal(save(tone(0.01))).startswith("the recording has 0.01 s;")


@pytest.mark.parametrize(
    ("name", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]
)
def test_a_recording_without_samples_is_refused(name: str, subtype: str) -> None:
    refusal(save(np.zeros(0, np.float32), name=name, subtype=subtype))


def test_no_samples_are_0_seconds() -> None:
    assert refusal(make_wav(b"")) == ("the recording has 0 s; this model takes at least 0.1 s; send a longer recording")


def test_as_short_and_as_long_as_allowed_is_taken() -> None:
    assert len(decode_audio(save(tone(0.1)), SPEC)) == 1_600
    assert "at least 0.1 s" in refusal(save(tone(0.1)[:-1]))
    assert len(decode_audio(save(tone(5.0)), SPEC)) == 80_000
    assert "at most 5 s" in refusal(save(np.append(tone(5.0), np.float32(0))))


@pytest.mark.parametrize(("name", "subtype"), ALL)
def test_a_recording_over_the_limit_is_refused(name: str, subtype: str) -> None:
    rate = 8000 if subtype == "GSM610" else RATE
    message = refusal(save(tone(6.0, rate), rate, name=name, subtype=subtype))
    assert message == "the recording has more than 5 s; this model takes at most 5 s; split the recording"


def test_a_file_that_unpacks_to_hours_costs_no_more_than_the_limit() -> None:
    body = save(np.zeros((48_000 * 300, 2), np.int16), 48_000, name="FLAC", subtype="PCM_16")
    assert len(body) < 150_000
    tracemalloc.start()
    started = time.thread_time()
    assert "more than 5 s" in refusal(body)
    seconds = time.thread_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.3
    assert peak < 5_000_000


# Bytes that are no recording, or not all of one


def test_an_empty_body_is_refused() -> None:
    assert refusal(b"").startswith("the body is empty")


@pytest.mark.parametrize(
    "body",
    [
        b"x",
        b"hello, this is text",
        "größer".encode(),
        "text".encode("utf-16"),
        b"RIFF\x24\0\0\0WEBPVP8 ",
        b"RIFF",
        b"ID3",
        b"ID3\x04\x00\x00\x00\x00\x00\x05hello, this is text",
        b"ID3\x04\x00\x00\x7f\x7f\x7f\x7fshort",
        b"\x1aE\xdf\xa3 webm",
        b"\0\0\0\x20ftypM4A ",
        b"\xff\xf1\x50\x80 aac",
        b"FORM\0\0\0\0AIFF",
        b".snd\0\0\0\x18",
        b"NIST_1A\n   1024\n",
        b"\x00\x00\x01\xba",
    ],
)
def test_what_does_not_start_as_one_of_the_four_formats_is_refused(body: bytes) -> None:
    assert refusal(body).startswith("the body does not start as a recording does")


@pytest.mark.parametrize("start", [b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"\xff\xfb\x90\x00"])
@pytest.mark.parametrize("rest", [b"", b" is only text", bytes(2000)], ids=["alone", "text", "zeros"])
def test_a_start_alone_is_refused(start: bytes, rest: bytes) -> None:
    assert "damaged" in refusal(start + rest)


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(("name", "subtype"), [("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
def test_a_truncated_recording_is_refused(name: str, subtype: str, part: float) -> None:
    body = save(noise(4.0), name=name, subtype=subtype)
    message = refusal(body[: int(len(body) * part)])
    assert message.endswith(("send it again", "send it again, or save it anew as WAV or FLAC"))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_of_a_truncated_ogg_what_came_is_taken(subtype: str) -> None:
    body = save(noise(4.0), name="OGG", subtype=subtype)  # a stream: nothing announces its length
    assert 2 * RATE < len(decode_audio(body[: int(len(body) * 0.9)], SPEC)) < 4 * RATE


def test_a_wav_that_announces_more_than_there_is_is_refused() -> None:
    assert refusal(make_wav(bytes(32_000), size=64_000)) == (
        "the WAV file announces 64000 bytes of samples and has 32000 of them; a complete file was expected; "
        "send it again"
    )


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x80000000])
def test_a_wav_that_was_written_without_knowing_its_length_is_taken_whole(size: int) -> None:
    samples = np.round(tone(0.5) * 32767).astype("<i2")
    found = decode_audio(make_wav(samples.tobytes(), size=size), SPEC)
    np.testing.assert_allclose(found, samples / 32768, rtol=0, atol=1e-7)


def test_a_wav_that_announces_less_than_there_is_ends_there() -> None:
    samples = np.round(tone(0.5) * 32767).astype("<i2")
    found = decode_audio(make_wav(samples.tobytes(), size=8_000), SPEC)
    np.testing.assert_allclose(found, samples[:4000] / 32768, rtol=0, atol=1e-7)


def test_a_flac_that_announces_more_than_there_is_is_refused() -> None:
    body = save(tone(1.0), name="FLAC", subtype="PCM_16")
    assert "cut off" in refusal(announce_in_flac(body, 20_000))
    assert "cut off" in refusal(announce_in_flac(body, 2**36 - 1))


def test_a_flac_that_announces_nothing_or_less_is_taken() -> None:
    body = save(tone(1.0), name="FLAC", subtype="PCM_16")
    assert len(decode_audio(announce_in_flac(body, 0), SPEC)) == 16_000  # 0 is for unknown
    assert len(decode_audio(announce_in_flac(body, 8_000), SPEC)) == 8_000


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("tag", [b"", b"TAG" + bytes(125)], ids=["", "ID3v1"])
def test_an_mp3_without_a_count_of_frames_is_read_to_its_end(mode: str, tag: bytes) -> None:
    samples = np.concatenate([noise(1.0, 48_000), np.zeros(48_000 * 2, np.float32), tone(1.0, 48_000)])
    body = save(samples, 48_000, "MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.3)
    found = decode_audio(without_count(body) + tag, SPEC)
    assert 4.0 * RATE <= len(found) < 4.1 * RATE  # the encoder's delay and its last frame are not cut off then
    assert np.abs(found[int(3.2 * RATE) : int(3.8 * RATE)]).max() == pytest.approx(0.5, rel=0.05)


# What would take long


def ogg_page(*, num_segments: int = 0) -> bytes:
    return b"OggS" + bytes(22) + bytes([num_segments]) + bytes(num_segments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: save(tone(0.5), name="OGG", subtype="OPUS")[:47] + b"OggS" * 1_000_000,
        lambda: save(tone(0.5), name="OGG", subtype="VORBIS")[:58] + ogg_page() * 100_000,
        lambda: make_wav(bytes(32_000), chunks=(b"junk" + bytes(4)) * 500_000),
        lambda: b"\xff\xfb\x90\xc4" * 500_000,
        lambda: b"ID3\x04\x00\x00\x00\x00\x00\x00" * 400_000,
        lambda: save(tone(0.5), name="FLAC", subtype="PCM_16")[:42] + b"\x01\0\0\0" * 1_000_000,
    ],
    ids=["OGG pages", "empty OGG pages", "WAV chunks", "MP3 headers", "ID3 tags", "FLAC blocks"],
)
def test_files_of_headers_alone_are_refused_quickly(make: Callable[[], bytes]) -> None:
    body = make()
    started = time.thread_time()
    refusal(body)
    assert time.thread_time() - started < 0.3


# Whatever the bytes are


@pytest.mark.parametrize(("name", "subtype"), ALL)
def test_damaged_bytes_give_samples_or_invalid_input(name: str, subtype: str) -> None:
    rng = random.Random(name + subtype)
    body = save(noise(0.3, 8000), 8000, name=name, subtype=subtype)
    num_refused = 0
    for _ in range(100):
        try:
            found = decode_audio(damage(body, rng, header_bytes=(48, 200)), SPEC)
        except InvalidInput:
            num_refused += 1
        else:
            assert 0 < len(found) <= 80_001
            assert np.isfinite(found).all()
    assert num_refused > 0


def test_the_cause_stays_with_the_error_for_the_log() -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_audio(save(noise(1.0), name="FLAC", subtype="PCM_16")[:-5000], SPEC)
    assert isinstance(caught.value.__cause__, soundfile.SoundFileError)


# The spec


@pytest.mark.parametrize(
    "change",
    [
        {"sample_rate_hz": 3_999},
        {"min_seconds": 0.0},
        {"max_seconds": 0.05},
        {"max_seconds": float("inf")},
        {"loud": 1},
    ],
)
def test_a_spec_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AudioSpec.model_validate({**SPEC.model_dump(), **change})


def test_media_types_are_those_that_clients_send() -> None:
    assert {"audio/wav", "audio/x-wav", "audio/flac", "audio/ogg", "audio/mpeg"} <= AUDIO_MEDIA_TYPES
