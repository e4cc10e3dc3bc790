"""Are secrets found in every form in which they turn up, and is harmless text left alone?"""

import subprocess
import sys
import time
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
        "-----BEGIN PRIVATE KEY-----\nhunter2, and the file ends here",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\nhunter2\n-----END PGP PRIVATE KEY BLOCK-----",
        "PuTTY-User-Key-File-2: ssh-rsa\nEncryption: none\nhunter2",
        '+    token = "hunter2hunter2"',
        "-TOKEN: str = 'hunter2'",
        'passphrase := "hunter2"',
        "db_pwd=hunter2",
        "Proxy-Authorization: Basic hunter2=",
        "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=hunter2==;EndpointSuffix=core.windows.net",
        "postgresql://me:hunter2@db/mlflow",
        "https://hooks.slack.com/services/T0/B0/hunter2",
        '{"auth": {"credential": "hunter2"}}',
    ],
)
def test_a_secret_is_replaced(text: str) -> None:
    clean = redact(text)
    assert "***" in clean
    assert "hunter2" not in clean.lower()
    assert SECRET not in clean
    assert "%2FnFEMI" not in clean


# Made up here, of the forms that their providers document; in two parts, so that no scanner takes them for real ones.
A, D, H = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 4, "0123456789" * 10, "0123456789abcdef" * 8
KEYS = {
    "AWS": "AK" + "IA" + "Q3EGRIHVTCXJ5ZKN",
    "AWS, temporary": "AS" + "IA" + "Q3EGRIHVTCXJ5ZKN",
    "GitHub": "gh" + "p_" + A[:36],
    "GitHub, fine-grained": "github" + "_pat_" + A[:60],
    "GitLab": "gl" + "pat-" + A[:20],
    "Hugging Face": "h" + "f_" + A[:34],
    "OpenAI": "s" + "k-" + A[:48],
    "OpenAI, project": "s" + "k-proj-" + A[:60] + "_" + A[:20],
    "Anthropic": "s" + "k-ant-api03-" + A[:80],
    "Stripe": "s" + "k_live_" + A[:24],
    "Slack, bot": "xo" + "xb-" + D[:12] + "-" + A[:24],
    "Slack, app": "xa" + "pp-1-" + A[:40],
    "Google": "AI" + "za" + A[:35],
    "Google, access": "ya" + "29." + A[:90],
    "Google, client": "GOC" + "SPX-" + A[:28],
    "npm": "np" + "m_" + A[:36],
    "PyPI": "py" + "pi-AgEIcHlwaS5vcmc" + A[:80],
    "SendGrid": "S" + "G." + A[:22] + "." + A[:43],
    "DigitalOcean": "dop" + "_v1_" + H[:64],
    "Databricks": "da" + "pi" + H[:32],
    "Replicate": "r" + "8_" + A[:37],
    "Shopify": "shp" + "at_" + H[:32],
    "Square": "sq" + "0csp-" + A[:43],
    "Twilio": "A" + "C" + H[:32],
    "Mailchimp": H[:32] + "-us" + "12",
    "Telegram": D[:10] + ":" + A[:35],
    "Discord": "M" + A[:25] + "." + A[:6] + "." + A[:27],
    "JSON web token": "ey" + "J" + A[:30] + ".ey" + "J" + A[:50] + "." + A[:43],
    "age": "AGE-SECRET" + "-KEY-1" + "Q3EGRIHVTCXJ5ZKN" * 3 + "Q3EGRIHVTC",
}


@pytest.mark.parametrize("provider", KEYS)
@pytest.mark.parametrize("around", ["{}", "KEY={}", "GET /?k={}&n=1", "+  client = Client('{}')", '"{}",'])
def test_keys_of_providers_are_known_by_their_form(provider: str, around: str) -> None:
    assert redact(around.format(KEYS[provider])) == around.format("***")


@pytest.mark.parametrize("first", "/~+Aa0")
def test_a_secret_of_the_environment_is_known_whatever_it_begins_with(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", first + A[:39])
    assert redact(f"denied: {first}{A[:39]}") == "denied: ***"


@pytest.mark.parametrize(
    "piece",
    ["a", "0", " ", "_", "-", "/", "1:", "M.", "\\", "secret", "secret ", "secret\n=\n", "token='", "token: ", "pwd",
     "://", "://a", "eyJ", "eyJa.eyJ", "SG.", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "authorization: ",
     "bearer ", "sk-", "xoxb-"],
)  # fmt: skip
def test_time_grows_no_faster_than_the_text(piece: str) -> None:
    """The process's own time, for texts of one length and of eight times that."""

    def seconds(characters: int) -> float:
        text = (piece * characters)[:characters]
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            redact(text)
            best = min(best, time.process_time() - begin)
        return best

    seconds(1000)
    assert seconds(80_000) < 8 * 3 * seconds(10_000) + 0.05


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


def test_what_is_printed_does_not_steer_the_terminal() -> None:
    program = "from trainer.record.redaction import guard_output\nguard_output(); print('run \\x1b]0;x\\x07')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "run \\x1b]0;x\\x07\n"


def test_the_working_directory_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/somebody/checkout")
    monkeypatch.setenv("OLDPWD", "/home/somebody")
    assert redact("cannot write /home/somebody/checkout/runs/x") == "cannot write /home/somebody/checkout/runs/x"
    monkeypatch.setenv("DATABASE_PWD", "/home/somebody")
    assert redact("cannot write /home/somebody/checkout") == "cannot write ***/checkout"
