"""Headless Chromium for tests, driven over the pipes of its own remote debugging protocol."""

import json
import os
import shutil
import subprocess
import tempfile
import time

BINARY = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
PHONE = (390, 844)
DESKTOP = (1280, 900)

_QUIET = (
    *("--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
)


# Contrast of each text to what lies behind it, as WCAG 2 counts it.
_CONTRAST = """(() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = parse(c).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(c)) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = [...document.querySelectorAll('p, td, th, dt, dd, h1, h2, h3, label, small, button, input, select,'
    + ' textarea, summary, .tag, .verdict, .good, .bad, mark, .text')];
  return Math.min(...texts.filter((e) => e.textContent.trim() && e.getClientRects().length).map((e) => {
    const [dark, bright] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => x - y);
    return (bright + 0.05) / (dark + 0.05);
  }));
})()"""


class Chromium:
    """A page; ``requests`` and ``problems`` are what it asked for and what it complained of."""

    def __enter__(self):
        self._profile = tempfile.mkdtemp()
        ours_out, theirs_in = os.pipe()[::-1]
        theirs_out, ours_in = os.pipe()[::-1]
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [BINARY, *_QUIET, *sandbox, f"--user-data-dir={self._profile}"]
        # Chromium reads commands from descriptor 3 and writes to 4
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        self._number, self._left, self._session = 0, b"", None
        self.requests, self.problems, self._events = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self):
        while b"\0" not in self._left:
            part = self._in.read(65536)
            if not part:
                raise RuntimeError("chromium closed its pipe")
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        answer = json.loads(message)
        method, params = answer.get("method"), answer.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.problems.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"dialog: {params['message']}")
        elif method == "Page.loadEventFired":
            self._events.append(method)
        return answer

    def open(self, path, size=DESKTOP, dark=False, hash=""):
        width, height = size
        mobile = size == PHONE
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url="about:blank")
        while not self._events:
            self._read()
        self._events.clear()
        address = path if isinstance(path, str) else path.absolute().as_uri()
        self.call("Page.navigate", url=f"{address}{hash}")
        while not self._events:
            self._read()

    def evaluate(self, expression):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def type(self, selector, text):
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)

    def click(self, selector):
        box = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})(document.querySelector({selector!r}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        time.sleep(0.05)

    def lowest_contrast(self):
        return self.evaluate(_CONTRAST)
