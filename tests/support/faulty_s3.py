"""How does the way to an S3 server misbehave in tests: a proxy that answers wrongly, breaks off or trickles?"""

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What S3 answers: status, code, and more headers.
ANSWERS = {
    "busy": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "elsewhere": (301, "PermanentRedirect"),
    "forbidden": (403, "AccessDenied"),
    "invalid": (400, "InvalidArgument"),
    "no code": (400, "SomethingElse"),
    "no bucket": (404, "NoSuchBucket"),
    "not allowed": (405, "MethodNotAllowed"),
    "not implemented": (501, "NotImplemented"),
    "full": (507, "InsufficientStorage"),
    "quota": (403, "QuotaExceeded"),
    "slow": (400, "RequestTimeout"),
    "broken": (500, "InternalError"),
    "spoiled": (400, "BadDigest"),
}
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive"}


class FaultyS3:
    """A server of its own in front of an S3 endpoint; the first ``times`` ranged reads, or writes, meet the fault."""

    def __init__(self, endpoint: str) -> None:
        self.target = urlsplit(endpoint).netloc
        self.fault, self.left, self.met, self.writes = "none", 0, 0, False
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                outer.handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def meet(self, fault: str, times: int, *, writes: bool = False) -> None:
        self.fault, self.left, self.met, self.writes = fault, times, 0, writes

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        with self.lock:
            meant = request.command == "PUT" if self.writes else "Range" in request.headers
            strikes = meant and self.left > 0
            self.left -= strikes
            self.met += strikes
        if strikes and self.fault in ANSWERS:
            status, code = ANSWERS[self.fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made up</Message></Error>".encode()
            self.answer(request, status, {"Content-Type": "application/xml", "Content-Length": str(len(text))}, text)
            return
        connection = http.client.HTTPConnection(self.target, timeout=60)
        # The signature covers the header Host, which names this proxy.
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in HOP_HEADERS}
        if strikes and self.fault == "broken off":
            request.close_connection = True
            data = data[: len(data) // 2]
        self.answer(request, answer.status, headers, data, slow=strikes and self.fault == "trickle")
        connection.close()

    def answer(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, slow: bool = False
    ) -> None:
        request.send_response_only(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        try:
            for place in range(len(data) if slow else 0):  # a byte a second until the client has enough
                request.wfile.write(data[place : place + 1])
                request.wfile.flush()
                time.sleep(1.0)
            if request.command != "HEAD" and not slow:
                request.wfile.write(data)
        except OSError:
            request.close_connection = True
