"""Who may ask, and how much: API keys, request ids, bodies within their limits."""

from __future__ import annotations

import gzip
import hmac
import io
import os
import re
import secrets
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from yunque.errors import InputError
from yunque.serving.problems import Problem

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MIN_KEY_CHARS = 16

Parsed = TypeVar("Parsed", bound=BaseModel)


class KeyRing:
    """Keys that a request's key is compared with, all of them whatever the first ones give."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._secret = secrets.token_bytes(32)
        self._digests = [self._digest(key.encode()) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def holds(self, key: bytes) -> bool:
        """Whether ``key`` is one of the keys; takes the same time for every key of its length."""
        given = self._digest(key)
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found

    def _digest(self, key: bytes) -> bytes:
        # Digests under a secret have one length and tell nothing about how near a guess was.
        return hmac.digest(self._secret, key, "sha256")

    def check(self, authorization: list[bytes]) -> None:
        """Check the values of a request's ``Authorization`` headers.

        Raises:
            Problem: 401, no key or a wrong one.
        """
        scheme, _, key = authorization[0].partition(b" ") if len(authorization) == 1 else (b"", b"", b"")
        if not (self.holds(key.strip()) and scheme.lower() == b"bearer"):
            raise Problem(
                401,
                "no valid API key in the Authorization header; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def read_keys(file: Path | None, variable: str, option: str) -> list[str]:
    """Keys from a file, one per line, and from an environment variable, comma separated.

    Raises:
        InputError: the file cannot be read or holds no key; a key is too short to be a secret.
    """
    keys = [key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{option}: {file} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise InputError(f"{option}: {file} holds no key; write one per line")
        keys += found
    if any(len(key) < _MIN_KEY_CHARS or not key.isascii() or not key.isprintable() for key in keys):
        raise InputError(
            f"{option}: a key is shorter than {_MIN_KEY_CHARS} characters or not plain ASCII; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return keys


def check_host(headers: Iterable[tuple[bytes, bytes]], allowed: Collection[str]) -> None:
    """Check the host that a request names; ``allowed`` are names, or ``*.name`` for all below it; all when empty.

    A page that lets its own name point to this machine is told apart by it (DNS rebinding).

    Raises:
        Problem: 400, none of these.
    """
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    name = re.sub(r":\d+$", "", host).lower()
    if allowed and not any(
        name == each or each == "*" or (each.startswith("*.") and name.endswith(each[1:]))
        for each in map(str.lower, allowed)
    ):
        raise Problem(400, "this server does not answer to the host of the Host header", code="invalid_host")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's ``x-request-id`` where it is harmless in a header and a log, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(given := value.decode("latin-1")):
            return given
    return secrets.token_hex(12)


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body of a JSON request, unpacked where it is sent as gzip.

    Raises:
        Problem: 413, larger than ``limit_bytes``, packed or not; 415, not said to be JSON; 400, broken off.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send text/plain unasked, but JSON only where this server allows it.
        raise Problem(415, "Content-Type: send application/json", code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip"):
        raise Problem(
            415, "Content-Encoding: send gzip, or the body as it is", code="unsupported_media_type",
            headers={"Accept-Encoding": "gzip"},
        )  # fmt: skip
    too_large = Problem(
        413, f"the body is larger than {limit_bytes} bytes", code="body_too_large", headers={"Connection": "close"}
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit_bytes:
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit_bytes:
                raise too_large
    except ClientDisconnect as error:
        raise Problem(400, "the body broke off", code="body_incomplete") from error
    if encoding != "identity":
        try:
            body = bytearray(gzip.GzipFile(fileobj=io.BytesIO(body)).read(limit_bytes + 1))
        except (OSError, EOFError, zlib.error) as error:
            raise Problem(400, "the body is not the gzip that Content-Encoding says", code="invalid_gzip") from error
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


_HINTS = {
    "prompt": "give a text, a list of texts, token ids or lists of token ids, none of them empty",
    "stop": "give a text or up to 16 texts of 1 to 256 characters",
    "text": "give a text or a list of texts",
    "content": "give a text or a list of text parts; images and audio are not supported",
    **{
        name: f"is not supported here; leave it out or give {neutral}"
        for name, neutral in {
            **dict.fromkeys(("frequency_penalty", "presence_penalty"), "0"),
            **dict.fromkeys(("tools", "functions", "tool_calls"), "[]"),
            **dict.fromkeys(("echo", "store"), "false"),
            **{"logit_bias": "{}", "best_of": "1", "suffix": '""', "response_format": '{"type": "text"}'},
        }.items()
    },
}


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """A request's JSON as ``kind``.

    Raises:
        Problem: 400, not JSON, or a field that is missing, unknown or of a wrong value.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    fields = set(kind.model_fields)
    path = [str(part) for part in first["loc"]]
    name = next((part for part in reversed(path) if part in _HINTS), None)
    if not path:
        raise Problem(400, f"the body is not the JSON this route takes: {first['msg']}", code="invalid_json")
    param = ".".join(path) if name is None else ".".join(path[: path.index(name) + 1])
    if first["type"] == "extra_forbidden":
        reason = "is not supported here"
    elif name is not None and first["type"] != "missing":
        reason = _HINTS[name]
    elif path[0] in fields and first["type"] == "literal_error":
        reason = f"is not supported with this value; {first['msg'][0].lower()}{first['msg'][1:]}"
    else:
        reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    raise Problem(400, f"{param}: {reason}", param=param, code="invalid_value")
