"""Keys that clients send, compared in a time that does not depend on how much of one is right."""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from shoal.serve.http.messages import HttpRequest


def digests(keys: Sequence[str]) -> list[bytes]:
    return [sha256(key.encode()).digest() for key in keys]


def matching(request: HttpRequest, known: Sequence[bytes]) -> str:
    """A name for the key that the request brings (a piece of its hash); "" when it is none of the known ones.

    Every known key is compared."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    digest = sha256(given.encode("utf-8", "replace")).digest()
    found = [hmac.compare_digest(digest, key) for key in known]
    return f"key {digest.hex()[:16]}" if any(found) else ""
