"""How are secrets kept out of everything that leaves this process: logs, tracebacks, the run's folder, MLflow?

What counts as a secret: the values of environment variables and of credentials files whose names say so, user names and
passwords inside URLs, signatures of pre-signed URLs, authorization headers, and whatever is assigned to a name like
`secret` or `password`. `redact` replaces each by `***`.
"""

import base64
import configparser
import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TextIO, cast
from urllib.parse import quote

HIDDEN = "***"
SHORTEST_SECRET = 6
"""A shorter value would take harmless text with it wherever it occurs."""
CREDENTIAL_FILES = ("~/.aws/credentials", "~/.mlflow/credentials")

_SECRET_NAME = re.compile(
    r"(secret|password|passwd|token(?!i[sz])|credential|private|api_?key|access_?key|auth(?!or)|signature)",
    re.IGNORECASE,
)
_NAME = (
    r"[\w-]*(?:secret|password|passwd|api_?key|access_?key(?:_id)?|(?:session|security|access|auth|bearer)_?token)\w*"
)
_PATTERNS = (
    # scheme://user:password@host, and a token alone before the @
    (re.compile(r"(?<=://)[^/\s@\"']+(?=@)"), HIDDEN),
    (re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|aws4\S*)\s+)[^\s\"',]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b(bearer\s+)[a-z0-9._~+/=-]{16,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b((?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|sig)=)[^&\s\"']+"), rf"\1{HIDDEN}"),  # noqa: E501
    # name = "value", {'name': 'value'}: whatever stands between the quotes
    (re.compile(rf"(?i)\b({_NAME}\\?[\"']?\s*[:=]\s*\\?([\"']))[^\"'\\\n]+"), rf"\1{HIDDEN}"),
    # name=value without quotes: only what has a digit in it, because in a diff of code the value is an expression
    (re.compile(rf"(?i)\b({_NAME}\s*[:=]\s*)(?=[^\s\"',;&(){{}}]*\d)[^\s\"',;&(){{}}]{{5,}}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|hf_[A-Za-z0-9]{30,}|glpat-[\w-]{20,})"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)  # fmt: skip


def redact(text: str) -> str:
    """The text with every secret replaced by `***`."""
    for secret in _known_secrets(_fingerprint()):
        if secret in text:
            text = text.replace(secret, HIDDEN)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redacted(value: Any) -> Any:
    """The same for each text inside dicts, lists and tuples; other values as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def guard_output() -> None:
    """From here on, whatever this process prints or logs goes through `redact`: call it first in every main()."""
    if not isinstance(sys.stdout, _RedactingStream):
        sys.stdout, sys.stderr = (cast(TextIO, _RedactingStream(stream)) for stream in (sys.stdout, sys.stderr))
    # Libraries have handlers that hold the streams of before.
    logging.setLogRecordFactory(_RedactedRecord)


class _RedactingStream:
    """A text stream that redacts what is written; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _RedactedRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return redact(super().getMessage())


def _fingerprint() -> tuple[tuple[str, str], ...]:
    """The environment's secrets, so that the list below is made anew when they change."""
    return tuple(
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and _SECRET_NAME.search(name) and not _is_place(name, value)
    )


def _is_place(name: str, value: str) -> bool:
    """Whether a variable says where a secret is (SSH_AUTH_SOCK, AWS_SHARED_CREDENTIALS_FILE), not what it is."""
    return name.upper().endswith(("_FILE", "_PATH", "_SOCK", "_DIR", "_URI", "_URL")) or value.startswith(("/", "~"))


@cache
def _known_secrets(of_environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Values to look for, with their spellings inside URLs and headers; the longest first."""
    found = {value for _, value in of_environment} | _secrets_in_files()
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user and (password := os.environ.get("MLFLOW_TRACKING_PASSWORD")):
        found.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    return tuple(sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True))


def _secrets_in_files() -> set[str]:
    found = set()
    for name in CREDENTIAL_FILES:
        parser = configparser.RawConfigParser()
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read_string(Path(name).expanduser().read_text())
        for section in parser.sections():
            found |= {
                value
                for key, value in parser.items(section)
                if len(value) >= SHORTEST_SECRET and _SECRET_NAME.search(key)
            }
    return found
