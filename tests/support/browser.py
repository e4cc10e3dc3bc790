"""How do tests drive a real browser: Chromium without a window, through its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
START_SECONDS = 60.0


class Browser:
    """One page in a browser of its own; `async with Browser() as page`."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        self.size = f"{width},{height}"
        self.requests: list[str] = []
        """URLs that the page asked for."""
        self.complaints: list[str] = []
        """What the page wrote to the console as an error, and exceptions that nobody caught."""

    async def __aenter__(self) -> "Browser":
        assert CHROMIUM is not None, "tests are skipped without a browser"
        self.profile = tempfile.mkdtemp(prefix="chromium-")
        command = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", f"--window-size={self.size}",
            f"--user-data-dir={self.profile}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.session = aiohttp.ClientSession()
        self.number = 0
        port = self._port()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=1 << 26)
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        return self

    def _port(self) -> int:
        file = Path(self.profile) / "DevToolsActivePort"
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return int(lines[0])
            assert self.process.poll() is None, "the browser ended at once"
            time.sleep(0.05)
        raise TimeoutError(f"the browser did not open its port in {START_SECONDS:g} s")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.session.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=START_SECONDS)).data)
            if message.get("id") == self.number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert"):
                self.complaints.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.complaints.append(parameters["entry"]["text"])

    async def open(self, url: str) -> None:
        answer = await self.send("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        await self.wait_for("document.readyState == 'complete' && location.href != 'about:blank'")

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, condition: str, seconds: float = 60.0) -> None:
        """Until a JavaScript expression is true."""
        until = time.monotonic() + seconds
        while not await self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"not true within {seconds:g} s: {condition}"

    async def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode((await self.send("Page.captureScreenshot"))["data"]))
