"""A headless Chromium for tests of pages, spoken to over pipes: nothing has to be installed but the browser.

Source: Chrome DevTools Protocol, --remote-debugging-pipe: messages of JSON, each ended by a zero byte, on descriptors 3
and 4.
"""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """open(path), then js(expression), click(x, y), key(name), move(x, y), picture(path); errors has the page's own."""

    def __init__(self, width=1100, height=900, dark=False):
        found = next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            pytest.skip("needs Chromium, under one of these names: " + ", ".join(NAMES))
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self.out = os.pipe()
        self.inn, theirs_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                 f"--user-data-dir={self.folder.name}", f"--window-size={width},{height}"]

        def wire():
            for to, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)], 3):
                os.dup2(fd, to)

        self.process = subprocess.Popen([found, *flags, "about:blank"], pass_fds=(3, 4), preexec_fn=wire,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.n, self.errors, self.session, self.events = b"", 0, [], None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(10)
        os.close(self.out)
        os.close(self.inn)
        self.folder.cleanup()

    def call(self, method, **params):
        """A command of the protocol, and its result."""
        self.n += 1
        message = {"id": self.n, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.n:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def read(self, seconds=30):
        """The next message; events are noted."""
        while b"\0" not in self.buffer:
            assert select.select([self.inn], [], [], seconds)[0], "Chromium says nothing"
            more = os.read(self.inn, 1 << 20)
            assert more, "Chromium is gone"
            self.buffer += more
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, path):
        """Show a file; it must ask for nothing else."""
        self.events.clear()
        self.call("Page.navigate", url=f"file://{path}")
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            self.read()
        asked = [p["request"]["url"] for name, p in self.events if name == "Network.requestWillBeSent"]
        assert asked == [f"file://{path}"], asked

    def js(self, expression):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def middle(self, selector):
        """The place of an element after scrolling to it: x, y of its middle."""
        return self.js(f"(e=>{{e.scrollIntoView({{block:'center',inline:'center'}});const b=e.getBoundingClientRect();"
                       f"return[b.x+b.width/2,b.y+b.height/2]}})(document.querySelector({json.dumps(selector)}))")

    def move(self, x, y):
        time.sleep(0.1)  # a scrolling before it has settled
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x, y):
        self.move(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def picture(self, path):
        """A PNG of what is seen."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as f:
            f.write(base64.b64decode(data))
