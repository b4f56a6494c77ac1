"""report.html: what it holds, that it counts as the metrics do, and that it works in a browser.

The browser tests need Chromium (Debian: chromium-headless-shell), those of the rules Node.js; each
skips by name where its program is absent.
"""

import base64
import contextlib
import fcntl
import html.parser
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from helpers import command, samples_and_maps, write_report

from fdep_jax import data, report
from fdep_jax.metrics import hse

# One image alone may have no target.
pytestmark = pytest.mark.filterwarnings("ignore:No mask of")

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
RATES = ("iou", "niou", "pd", "fa", "precision", "recall", "f1")
COUNTS = ("hits", "targets", "false_alarms")


def unpack(text, shape):
  return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def expected(samples, maps, threshold):
  """The metrics at a threshold: those at 0.5 of the thresholded maps."""
  masks = [sample.mask for sample in samples]
  at = [(prob > np.float32(threshold)).astype(np.float32) for prob in maps]
  return hse.score(at, masks).as_dict()


def test_a_level_map_gives_the_mask_at_every_threshold_of_the_page():
  rng = np.random.default_rng(0)
  prob = rng.random((40, 50), np.float32)
  edges = np.concatenate([report.THRESHOLDS, np.nextafter(report.THRESHOLDS, np.float32(2))])
  prob.ravel()[: len(edges)] = edges
  prob.ravel()[-2:] = 0, 1
  level = report.levels(prob)
  for k, threshold in enumerate(report.THRESHOLDS):
    np.testing.assert_array_equal(level > k, prob > threshold)
  assert np.isin(hse.THRESHOLDS, report.THRESHOLDS).all()


class Resources(html.parser.HTMLParser):
  """Everything in a page that could name something outside it."""

  def __init__(self):
    super().__init__()
    self.named, self.policy = [], ""

  def handle_starttag(self, tag, attributes):
    given = dict(attributes)
    self.named += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
    if given.get("http-equiv") == "Content-Security-Policy":
      self.policy = given["content"]


def test_a_report_names_nothing_outside_itself_and_holds_the_maps(tmp_path):
  samples, maps = samples_and_maps()
  samples[0] = samples[0]._replace(name="</script><script>alert(1)</script>")
  path = write_report(tmp_path / "run", samples, maps)
  text = path.read_text()
  resources = Resources()
  resources.feed(text)
  assert resources.named == ["data:,"]  # the icon, empty
  assert resources.policy.startswith("default-src 'none'") and "http" not in resources.policy
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\bimport\b *\(", text)
  assert "alert(1)" in text and "<script>alert(1)" not in text
  held = report._read(path)
  for image, packed, sample, prob in zip(
    held["images"], held["runs"][0]["branches"]["light"]["maps"], samples, maps, strict=True
  ):
    assert image["name"] == sample.name
    np.testing.assert_array_equal(unpack(image["mask"], prob.shape), sample.mask)
    np.testing.assert_array_equal(unpack(packed, prob.shape), report.levels(prob))
  assert {image["part"] for image in held["images"]} == {""}
  assert held["runs"][0]["metrics"]["flops"] is None  # NaN is no JSON
  assert held["runs"][0]["config"]["train.batch_size"] == 16
  assert not list(tmp_path.rglob("*.partial"))


def test_a_set_without_targets_has_a_report(tmp_path):
  samples, maps = samples_and_maps(2)
  samples = [sample._replace(mask=np.zeros_like(sample.mask)) for sample in samples]
  path = write_report(tmp_path / "run", samples, maps)
  metrics = report._read(path)["runs"][0]["metrics"]["light"]
  assert metrics["hse"] is None and metrics["intervals"]["hse"] == [None, None]


def test_reports_of_several_runs_become_one(tmp_path):
  samples, maps = samples_and_maps(3)
  for name in ("a", "b"):
    write_report(tmp_path / name, samples, maps)
    (tmp_path / f"sweep_{name}").mkdir()
    write_report(tmp_path / f"sweep_{name}/seed0", samples, maps)
  held = report._read(report.of([tmp_path / "a", tmp_path / "b"], tmp_path / "new/both.html"))
  assert [run["name"] for run in held["runs"]] == ["a", "b"] and len(held["images"]) == 3
  seeds = [tmp_path / "sweep_a/seed0", tmp_path / "sweep_b/seed0"]
  held = report._read(report.of(seeds, tmp_path / "seeds.html"))
  assert [run["name"] for run in held["runs"]] == ["sweep_a/seed0", "sweep_b/seed0"]


def test_runs_that_cannot_share_a_report_are_named(tmp_path):
  samples, maps = samples_and_maps(3)
  write_report(tmp_path / "a", samples, maps)
  write_report(tmp_path / "b", samples[:2], maps[:2])
  with pytest.raises(ValueError, match="b: evaluated on different images or masks than .*a"):
    report.of([tmp_path / "a", tmp_path / "b"], tmp_path / "out.html")
  others = [sample._replace(mask=~sample.mask) for sample in samples]  # of the same images
  write_report(tmp_path / "d", others, maps)
  with pytest.raises(ValueError, match="d: evaluated on different images or masks than .*a"):
    report.of([tmp_path / "a", tmp_path / "d"], tmp_path / "out.html")
  with pytest.raises(FileNotFoundError, match="no .*c/report.html.*--mode eval"):
    report.of([tmp_path / "a", tmp_path / "c"], tmp_path / "out.html")
  (tmp_path / "a/report.html").write_text("<html>")
  with pytest.raises(ValueError, match="damaged or of a different version"):
    report.of([tmp_path / "a"], tmp_path / "out.html")
  assert not (tmp_path / "out.html").exists()


def test_the_command_line_makes_one_report_of_several_runs(tmp_path):
  samples, maps = samples_and_maps(3)
  runs = [write_report(tmp_path / name, samples, maps).parent for name in ("a", "b")]
  arguments = ["--mode", "report", "--runs", ",".join(map(str, runs))]
  done = command(*arguments, "--out", tmp_path / "out.html")
  assert done.returncode == 0, done.stderr
  assert len(report._read(tmp_path / "out.html")["runs"]) == 2
  done = command(*arguments)
  assert done.returncode == 2 and "--out" in done.stderr


@pytest.mark.slow
def test_a_report_of_the_real_test_set_is_small(shared, tmp_path):
  samples = data.load(shared / "data/NUAA-SIRST", "test")
  assert len(samples) == 214
  # As ragged as a network's map: how far each pixel is above the mean of its row and column.
  maps = []
  for sample in samples:
    grey = sample.image[..., 0] / np.float32(255)
    contrast = grey - (grey.mean(0, keepdims=True) + grey.mean(1, keepdims=True)) / 2
    maps.append(1 / (1 + np.exp(np.float32(30) * (np.float32(0.3) - contrast))))
  path = write_report(tmp_path / "run", samples, maps)
  assert path.stat().st_size <= 15e6


def judged_by_node(path, thresholds):
  """The page's own functions, run without a page: {"total", "hits" …} a threshold."""
  page = path.read_text()
  rules = re.search(r'<script id="counting">(.*?)</script>', page, re.DOTALL)[1]
  held = report._read(path)
  images, maps = [], []
  for image, packed in zip(
    held["images"], held["runs"][0]["branches"]["light"]["maps"], strict=True
  ):
    shape = image["height"], image["width"]
    images.append({**image, "mask": unpack(image["mask"], shape).ravel().tolist()})
    maps.append(unpack(packed, shape).ravel().tolist())
  levels = [round(t * report.STEPS) - 1 for t in thresholds]
  given = {"images": images, "maps": maps, "levels": levels, "limit": held["max_distance"]}
  program = f"""{rules}
    const given = JSON.parse(require("fs").readFileSync(0));
    for (const image of given.images) image.mask = sparse(image.mask);
    const maps = given.maps.map(sparse);
    console.log(JSON.stringify(given.levels.map((above) =>
      total(given.images.map((image, i) => judge(image, maps[i], above, given.limit))))));"""
  done = subprocess.run(
    [shutil.which("node"), "-e", program],
    input=json.dumps(given), capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def check_equal(found, samples, maps, threshold):
  wanted = expected(samples, maps, threshold)
  for name in RATES:
    value = np.nan if wanted[name] is None else wanted[name]
    shown = np.nan if found[name] is None else found[name]
    np.testing.assert_allclose(shown, value, rtol=1e-14, err_msg=f"{name} at {threshold}")
  assert [found[k] for k in ("hits", "targets", "falseAlarms")] == [wanted[k] for k in COUNTS]


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js (node)")
def test_the_pages_rules_are_those_of_the_metrics(tmp_path):
  samples, maps = samples_and_maps(24)
  # At exactly 3 pixels a prediction is too far; two targets near one prediction share it not.
  mask, prob = np.zeros((2, 20, 20), bool)
  mask[5, 5] = mask[5, 11] = mask[15, 3] = mask[15, 5] = prob[5, 8] = prob[15, 4] = True
  samples.append(data.Sample("near", np.zeros((20, 20, 3), np.uint8), mask))
  maps.append(prob.astype(np.float32) * np.float32(0.7))
  path = write_report(tmp_path / "run", samples, maps)
  thresholds = (0.005, 0.05, 0.1, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95, 0.995)
  for found, threshold in zip(judged_by_node(path, thresholds), thresholds, strict=True):
    check_equal(found, samples, maps, threshold)


class Page:
  """A page in headless Chromium, driven over its DevTools pipe."""

  def __init__(self, send, receive):
    self._send, self._receive, self._number = send, receive, itertools.count(1)
    self._buffer, self.events, self._session = b"", [], None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
      self.call(f"{domain}.enable")

  def call(self, method, **parameters):
    number = next(self._number)
    message = {"id": number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._send, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._next()
      if answer.get("id") == number:
        assert "error" not in answer, answer
        return answer["result"]
      self.events.append(answer)

  def _next(self):
    while b"\0" not in self._buffer:
      part = os.read(self._receive, 1 << 20)
      assert part, "the browser has ended"
      self._buffer += part
    message, self._buffer = self._buffer.split(b"\0", 1)
    return json.loads(message)

  def evaluate(self, expression):
    """The value of a JavaScript expression; promises are waited for."""
    answer = self.call(
      "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
    )
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def wait(self, expression, seconds=60):
    end = time.monotonic() + seconds
    while not self.evaluate(expression):
      assert time.monotonic() < end, f"{expression} did not come true"
      time.sleep(0.05)

  def open(self, path, width=1000, height=800):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    self.call("Emulation.setDeviceMetricsOverride", **size)
    self.call("Page.navigate", url=path.resolve().as_uri())
    self.wait("document.body?.dataset.ready !== undefined")

  def press(self, key, code):
    for kind in ("keyDown", "keyUp"):
      self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

  def set(self, control, value):
    """As a user's change of a control; the page has painted after it."""
    self.evaluate(
      f"{{const c = document.getElementById({control!r}); c.value = {value!r};"
      "c.dispatchEvent(new Event('input', {bubbles: true}));"
      "new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))}"
    )

  def errors(self):
    """Uncaught exceptions, and what the console shows as an error: a refused request, too."""

    def bad(method, said):
      return (
        method == "Runtime.exceptionThrown"
        or (method == "Log.entryAdded" and said["entry"]["level"] == "error")
        or (method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"))
      )

    return [event for event in self.events if bad(event["method"], event["params"])]

  def requests(self):
    sent = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
    return {e["params"]["request"]["url"].split(":")[0] for e in sent}, len(sent)

  def screenshot(self, path):
    path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def chromium(folder):
  """A `Page`, or a skip where no browser is."""
  program = next(filter(None, map(shutil.which, BROWSERS)), None)
  if program is None:
    pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
  # Chromium reads its pipe at descriptor 3 and writes at 4; ours are moved out of their way.
  pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for _ in range(2) for end in os.pipe()]
  their_in, send, receive, their_out = pipes
  start = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); "
  start += "os.execv(sys.argv[3], sys.argv[3:])"
  options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
  options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
  options += [f"--user-data-dir={folder}", "--remote-debugging-pipe", "--hide-scrollbars"]
  process = subprocess.Popen(
    [sys.executable, "-c", start, str(their_in), str(their_out), program, *options],
    pass_fds=(their_in, their_out),
    stderr=subprocess.DEVNULL,
  )
  try:
    os.close(their_in), os.close(their_out)
    yield Page(send, receive)
  finally:
    process.kill()
    process.wait()
    os.close(send), os.close(receive)


# Expressions of the page: the rows of its table, the images that its gallery shows.
ROWS = "[...document.querySelectorAll('#at tr')].map(r => [...r.cells].map(c => c.innerText))"
CARDS = "[...document.querySelectorAll('.card')].map(c => +c.dataset.image)"


def check_gallery(page, samples, maps):
  """Worst first, more on demand, filters, parts, names."""
  page.set("threshold", "0.5")
  alone = [expected([s], [m], 0.5) for s, m in zip(samples, maps, strict=True)]
  wrong = [a["targets"] - a["hits"] + a["false_alarms"] for a in alone]
  shown = page.evaluate(CARDS)
  assert len(shown) == 24 and [wrong[i] for i in shown] == sorted(wrong, reverse=True)[:24]
  page.evaluate("document.getElementById('more').click()")
  assert sorted(page.evaluate(CARDS)) == list(range(30))
  page.set("filter", "with misses")
  missed = [i for i, a in enumerate(alone) if a["hits"] < a["targets"]]
  assert sorted(page.evaluate(CARDS)) == missed and 0 < len(missed) < 30
  page.set("part", "2")
  assert sorted(page.evaluate(CARDS)) == [i for i in missed if i >= 12]
  page.set("filter", "all")
  page.set("part", "NUAA-SIRST")
  assert sorted(page.evaluate(CARDS)) == list(range(12))
  page.set("part", "all parts")
  page.set("search", "SCENE_2")
  assert sorted(page.evaluate(CARDS)) == [2, *range(20, 30)]
  page.set("search", "")


def test_the_report_works_in_a_browser(tmp_path):
  samples, maps = samples_and_maps(30)
  other = [np.float32(0.5) * (prob + m[::-1]) for prob, m in zip(maps, maps, strict=True)]
  path = write_report(tmp_path / "run", samples, maps, {"NUAA-SIRST": 12, "2": 18}, main=other)
  with chromium(tmp_path / "profile") as page:
    page.open(path)
    # The slider, moved as a user moves it: metrics of the set, and of an image.
    page.evaluate("document.getElementById('threshold').focus()")
    page.press("ArrowRight", 39)
    page.wait("document.getElementById('value').textContent === '0.505'")
    for threshold in (0.1, 0.35, 0.5, 0.9):
      page.set("threshold", str(threshold))
      for d, of_branch in enumerate((maps, other)):
        check_equal(page.evaluate(f"totals.get(chosen[{d}])"), samples, of_branch, threshold)
        wanted = expected(samples, of_branch, threshold)
        factors = [("iou", 100), ("niou", 100), ("pd", 100), ("fa", 1e6)]
        shown = page.evaluate(ROWS)[1 + d]
        assert shown[1:5] == [f"{wanted[k] * f:.2f}" for k, f in factors]
        assert shown[8:] == [str(wanted["hits"]), str(wanted["targets"] - wanted["hits"]),
                             str(wanted["false_alarms"])]  # fmt: skip
      first = page.evaluate(CARDS)[0]
      alone = expected([samples[first]], [maps[first]], threshold)
      caption = page.evaluate("document.querySelector('.card figcaption').innerText")
      assert f"hits {alone['hits']}, misses {alone['targets'] - alone['hits']}" in caption
      assert f"false alarms {alone['false_alarms']}" in caption
      marks = page.evaluate(
        "['hit', 'miss', 'false'].map((c) => document.querySelectorAll("
        "`.card:first-child figure:first-child .${c}`).length)"
      )
      assert marks == [alone["hits"], alone["targets"] - alone["hits"], alone["false_alarms"]]
      painted = page.evaluate(
        "(() => {const c = document.querySelector('.card canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [...d].filter((v, i) => i % 4 === 3 && v).length})()"
      )
      assert painted == ((maps[first] > np.float32(threshold)) | samples[first].mask).sum()

    check_gallery(page, samples, maps)
    page.evaluate("document.querySelectorAll('#detectors input')[1].click()")
    page.wait("chosen.length === 1 && document.querySelectorAll('#at tr').length === 2")
    assert page.evaluate("document.querySelectorAll('.card canvas').length") == 24

    # An image, large, at another threshold; then the next.
    page.evaluate("document.querySelector('.card').click()")
    assert page.evaluate("document.getElementById('dialog').open")
    page.set("threshold", "0.995")
    place = page.evaluate("opened")
    found = expected([samples[place]], [other[place]], 0.995)
    rows = page.evaluate("document.querySelectorAll('#facts tr').length")
    assert rows == 1 + found["targets"] + found["false_alarms"]
    assert page.evaluate("document.querySelectorAll('#large .miss').length") == (
      found["targets"] - found["hits"]
    )
    before = page.evaluate("document.getElementById('name').textContent")
    page.evaluate("document.getElementById('next').click()")
    assert page.evaluate("document.getElementById('name').textContent") != before
    page.evaluate("document.getElementById('close').click()")
    page.wait("document.querySelector('#place #bar') !== null")

    text = page.evaluate("document.getElementById('summary').innerText")
    total = hse.score(maps, [s.mask for s in samples])
    assert f"{100 * total.hse:.2f}" in text and f"{100 * total.hse_p:.2f}" in text
    light, main = page.evaluate(
      "[...document.querySelectorAll('#summary tr')].slice(1).map((r) => r.cells[8].innerText)"
    )
    assert (light, main) == ("0.39", "4.79")  # P: of the deployed branch without SAMF
    page.open(path, width=375)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.errors() == []
    assert page.requests()[0] <= {"file", "data"} and page.requests()[1] > 0


def test_four_runs_stand_side_by_side_in_a_browser(tmp_path):
  samples, maps = samples_and_maps(4)
  runs = []
  for k in range(5):
    scaled = [prob ** np.float32(1 + k / 2) for prob in maps]
    runs.append(write_report(tmp_path / f"run{k}", samples, scaled, main=maps).parent)
  with chromium(tmp_path / "profile") as page:
    page.open(report.of(runs, tmp_path / "all.html"))
    labels = page.evaluate("chosen.map((d) => d.label)")
    assert labels == [f"run{k}, light" for k in range(4)]
    assert (
      page.evaluate("document.querySelectorAll('.card')[0].querySelectorAll('canvas').length") == 4
    )
    assert page.evaluate("[...document.querySelectorAll('#detectors input')]"
                         ".filter((c) => !c.disabled).length") == 4  # fmt: skip
    for k in range(4):
      scaled = [prob ** np.float32(1 + k / 2) for prob in maps]
      check_equal(page.evaluate(f"totals.get(chosen[{k}])"), samples, scaled, 0.5)
    page.set("order", "largest difference")
    page.set("filter", "with differences")
    assert page.errors() == [] and page.requests()[0] <= {"file", "data"}
