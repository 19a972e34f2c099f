"""Damage done to files by chance, for decoders that must survive it."""

import random


def damage(body: bytes, rng: random.Random, *, header_bytes: tuple[int, int]) -> bytes:
    """Cut, overwrite, repeat or remove something, mostly in the header.

    Args:
        body: the file.
        rng: decides.
        header_bytes: how far damage reaches in two of three cases; in the third it may be anywhere.
    """
    data = bytearray(body)
    reach = min(len(data), rng.choice([*header_bytes, len(data)]))
    start, length = rng.randrange(reach), rng.randrange(1, 40)
    match rng.randrange(4):
        case 0:
            del data[start:]
        case 1:
            del data[start : start + length]
        case 2:
            data[start:start] = data[rng.randrange(len(data)) :][:length]
        case _:
            for _ in range(rng.choice([1, 2, 8])):
                data[rng.randrange(reach)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(data)
