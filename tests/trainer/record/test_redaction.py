"""Are secrets found in every form in which they turn up, and is harmless text left alone?"""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.record.redaction import redact, redacted

SECRET = "wJalrXUt/nFEMI+K7"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/home/someone/credentials")


@pytest.mark.parametrize(
    "text",
    [
        f"the server said no to {SECRET}",
        f"https://host/?key={SECRET.replace('/', '%2F').replace('+', '%2B')}",
        "https://me:hunter2@mlflow.example/api",
        "https://ghp_hunter2@github.com/me/it",
        "GET https://b.s3/x?X-Amz-Signature=hunter2&partNumber=1",
        "{'Authorization': 'Basic hunter2='}",
        "S3FileSystem(key='id', secret='hunter2')",
        '{"storage_options": {"aws_session_token": "hunter2"}}',
        r"{\"client_secret\": \"hunter2\"}",
        "MLFLOW_TRACKING_PASSWORD=hunter2 python run.py",
        "+  password: hunter2",
        "access AKIAHUNTER2HUNTER2AB denied",
        "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_secret_is_replaced(text: str) -> None:
    clean = redact(text)
    assert "***" in clean
    assert "hunter2" not in clean.lower()
    assert SECRET not in clean
    assert "%2FnFEMI" not in clean


@pytest.mark.parametrize(
    "text",
    [
        "train_url: s3://bucket/imagenet64/train",
        "perf/tokens_per_s: 12288.5, use_cls_token: true, tokens = 3072",
        "+    token = from_rank_0(value)  # password = read()",
        "mlflow ui --backend-store-uri sqlite:///mlflow.db",
        "author: someone@example.org, see /home/someone/credentials",
        "keys and queries in parallel: heads 16, attention_width 1024",
    ],
)
def test_harmless_text_stays(text: str) -> None:
    assert redact(text) == text


def test_passwords_of_the_credentials_files_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "changes the environment")  # so that the files are read again
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/credentials").write_text("[mlflow]\nmlflow_tracking_username = me\n"
                                                  "mlflow_tracking_password = correct-horse\n")  # fmt: skip
    assert redact("401 for me with correct-horse") == "401 for me with ***"


def test_nested_values_keep_their_shape() -> None:
    assert redacted({"a": [1, f"x {SECRET}"], "b": None}) == {"a": [1, "x ***"], "b": None}


def test_prints_logs_and_tracebacks_of_a_program_are_guarded() -> None:
    program = (
        "import logging, sys\n"
        "early = logging.StreamHandler(sys.stdout)\n"  # as DeepSpeed makes one when it is imported
        "from trainer.record.redaction import guard_output\n"
        "guard_output(); guard_output()\n"
        "import os; secret = os.environ['AWS_SECRET_ACCESS_KEY']\n"
        "logger = logging.getLogger('library'); logger.addHandler(early)\n"
        "print('printed', secret); logger.warning('logged %s', secret)\n"
        "raise ValueError(f'raised {secret}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "printed ***" in done.stdout
    assert "logged ***" in done.stdout
    assert "ValueError: raised ***" in done.stderr
    assert SECRET not in done.stdout + done.stderr
