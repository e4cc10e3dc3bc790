"""How are secrets kept out of everything that leaves this process: logs, tracebacks, the run's folder, MLflow?

What counts as a secret: the values of environment variables and of credentials files whose names say so, user names and
passwords inside URLs, signatures of pre-signed URLs, authorization headers, keys with the prefixes of well-known
providers, and whatever is assigned to a name like `secret` or `password`. `redact` replaces each by `***`, in time that
is linear in the length of the text, whatever the text is: it runs in the same process as the training.
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

from data_pipeline.terminal import GuardedStream

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Shorter values are not replaced: they occur in harmless text."""
CREDENTIAL_FILES = ("~/.aws/credentials", "~/.mlflow/credentials")

_SECRET_NAME = re.compile(
    r"(secret|passw|passphrase|token(?!i[sz])|credential|private|api_?key|access_?key|auth(?!or)|signature"
    r"|(?:^|_)(?:key|pat|pwd|pass)$)",
    re.IGNORECASE,
)
# Every repetition is bounded or begins at a place of its own, so that no text takes more than linear time.
_NAME = (
    r"(?:secret|passw(?:or)?d|pwd|passphrase|api_?key|access_?key(?:_id)?|private_?key|credentials?"
    r"|token(?!s|i[sz]))\w{0,64}"
)
# What providers begin their keys with, as they document it. (detect-secrets 1.5 knows neither Google's nor today's form
# of OpenAI's, and takes 0.3 s to import.)
_KEYS = (
    r"(?:A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA)[A-Z0-9]{16}",  # AWS
    r"gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_\w{30,255}|gl(?:pat|dt|ft|soat|rt|cbt|ptt|agent|oas|imt)-[\w.-]{20,255}",
    r"hf_[A-Za-z0-9]{30,255}|r8_[A-Za-z0-9]{30,255}|dapi[a-f0-9]{32}(?:-\d)?",  # Hugging Face, Replicate, Databricks
    r"sk-[\w-]{20,255}|(?:sk|rk|pk|whsec)_(?:live_|test_)?[A-Za-z0-9]{16,255}",  # OpenAI, Anthropic, Stripe
    r"xox[a-z](?:\.xox[a-z])?-[\w.-]{10,255}|xapp-[\w-]{10,255}",  # Slack
    r"AIza[\w-]{35}|ya29\.[\w.-]{20,2048}|GOCSPX-[\w-]{20,64}",  # Google
    r"npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,512}|SG\.[\w-]{16,64}\.[\w-]{16,64}|dop_v1_[a-f0-9]{64}",
    r"sq0[a-z]{3}-[\w-]{20,64}|shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|(?:AC|SK)[a-f0-9]{32}|[0-9a-f]{32}-us\d{1,2}",
    r"\d{8,10}:[\w-]{35}|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}|AGE-SECRET-KEY-1[A-Z0-9]{50,64}",
    r"eyJ[\w-]{10,4096}\.eyJ[\w-]{10,8192}(?:\.[\w-]{0,2048})?",  # JSON web tokens
)
_PATTERNS = (
    # scheme://user:password@host, and a token alone before the @
    (re.compile(r"(?<=://)[^/\s@\"']{1,1024}(?=@)"), HIDDEN),
    (re.compile(r"(?i)\b((?:proxy-)?authorization[\"']?\s{0,8}[:=]\s{0,8}[\"']?(?:basic|bearer|token|aws4\S{0,32})\s{1,8})[^\s\"',]+"), rf"\1{HIDDEN}"),  # noqa: E501
    (re.compile(r"(?i)\b(bearer\s{1,8})[a-z0-9._~+/=-]{16,}"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b((?:x-amz-(?:signature|credential|security-token)|signature|awsaccesskeyid|accountkey|sig)=)[^&;\s\"']+"), rf"\1{HIDDEN}"),  # noqa: E501
    (re.compile(r"(https://hooks\.slack\.com/services/)[\w/]+"), rf"\1{HIDDEN}"),
    # name = "value", {'name': 'value'}: whatever stands between the quotes
    (re.compile(rf"(?i)({_NAME}\\?[\"']?\s{{0,8}}(?::\s{{0,8}}\w{{1,16}}\s{{0,8}})?(?::=|=>|[:=])\s{{0,8}}\\?[rbf]?([\"']))[^\"'\\\n]+"), rf"\1{HIDDEN}"),  # noqa: E501
    # name=value without quotes: what has a digit in it and is no call, because in a diff of code it is an expression
    (re.compile(rf"(?i)({_NAME}\s{{0,8}}[:=]\s{{0,8}})(?=[^\s\"',;&(){{}}]{{0,256}}\d)[^\s\"',;&(){{}}]{{5,}}+(?!\()"), rf"\1{HIDDEN}"),  # noqa: E501
    (re.compile(rf"(?<![A-Za-z0-9_])(?:{'|'.join(_KEYS)})"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]{0,32}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]{0,32}PRIVATE KEY(?: BLOCK)?-----|\Z)", re.DOTALL), HIDDEN),  # noqa: E501
    (re.compile(r"(PuTTY-User-Key-File-\d).*", re.DOTALL), rf"\1{HIDDEN}"),
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
    """A copy with all texts inside dicts, lists and tuples redacted. Other values stay as they are."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def guard_output() -> None:
    """Redact whatever this process prints or logs from now on. Every main() calls it first."""
    if not isinstance(sys.stdout, _RedactingStream):
        sys.stdout, sys.stderr = (cast(TextIO, _RedactingStream(stream)) for stream in (sys.stdout, sys.stderr))
    # Handlers of libraries still hold the old streams.
    logging.setLogRecordFactory(_RedactedRecord)


class _RedactingStream(GuardedStream):
    """A text stream that redacts what is written to it."""

    def write(self, text: str) -> int:
        super().write(redact(text))
        return len(text)


class _RedactedRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return redact(super().getMessage())


def _fingerprint() -> tuple[tuple[str, str], ...]:
    """The environment's secrets: the key of the cache below, so that it is filled anew when they change."""
    return tuple(
        (name, value)
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and _SECRET_NAME.search(name) and not _is_place(name)
    )


def _is_place(name: str) -> bool:
    """Whether a variable says where a secret is (SSH_AUTH_SOCK, AWS_SHARED_CREDENTIALS_FILE), not what it is; or is the
    shell's PWD, the working directory, which is no password.

    Its value does not tell: every 64th of AWS's secret keys begins with a slash.
    """
    return name in ("PWD", "OLDPWD") or name.upper().endswith(("_FILE", "_PATH", "_SOCK", "_DIR", "_URI", "_URL"))


@cache
def _known_secrets(of_environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Values to look for, also as they are spelled in URLs and headers. The longest come first."""
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
            parser.read_string(Path(os.path.expanduser(name)).read_text())
        for section in parser.sections():
            found |= {
                value
                for key, value in parser.items(section)
                if len(value) >= SHORTEST_SECRET and _SECRET_NAME.search(key)
            }
    return found


def one_line(error: BaseException) -> str:
    """An error to put into a sentence: its first line without secrets, cut after 300 characters."""
    # Cut first: an answer of a server can be a page of any size.
    line, *_ = str(error)[:4096].strip().splitlines() or [type(error).__name__]
    line = redact(line)
    return line if len(line) <= 300 else f"{line[:300]}..."
