"""API keys: one a line in a file, held as hashes, compared in constant time.

A key is sent as `Authorization: Bearer KEY`, as OpenAI clients do. There is one header for it and no other.
"""

import hashlib
import hmac
import re
from pathlib import Path

from service.errors import SettingError, Unauthorized

SHORTEST_KEY = 24  # characters; of 24 hexadecimal digits, 96 bits
_KEY = re.compile(rf"[A-Za-z0-9._~+/=-]{{{SHORTEST_KEY},}}")  # what a bearer token may hold: RFC 6750, section 2.1


class ApiKeys:
    """The keys that are let in.

    Args:
        path: of the file; it stays readable, for `reread`.
    Raises: SettingError if it cannot be read, holds no key, or one that is too short or could not be sent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests = _read_digests(path)

    def reread(self) -> None:
        """Take over what the file holds by now; where that cannot be used, the keys stay as they are.

        Raises: SettingError.
        """
        self._digests = _read_digests(self._path)

    def check(self, authorization: str) -> None:
        """Let in who has a key.

        Args:
            authorization: the header, or "" where there is none.
        Raises: Unauthorized.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("no key came; `Authorization: Bearer KEY` was expected; ask the operator for a key")
        digest = _hash(key.strip())
        # Every key is compared, in constant time each: how long it takes says nothing of a key.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthorized("the key that came is unknown; a valid one was expected; ask the operator for it")


def _read_digests(path: Path) -> frozenset[bytes]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SettingError(f"SERVICE_API_KEYS_FILE: {path} cannot be read: {error}; it holds one key a line") from error
    keys = {number: line for number, line in enumerate(lines, start=1) if line and not line.startswith("#")}
    if not keys:
        raise SettingError(
            f"SERVICE_API_KEYS_FILE: {path} holds no key; write one a line, such as `openssl rand -hex 32` gives, or "
            "unset it to let everybody in"
        )
    for number, key in keys.items():
        if not _KEY.fullmatch(key):
            raise SettingError(
                f"SERVICE_API_KEYS_FILE: line {number} of {path} is no key; {SHORTEST_KEY} or more letters, digits and "
                "`._~+/=-` were expected; `openssl rand -hex 32` makes one"
            )
    return frozenset(_hash(key) for key in keys.values())


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
