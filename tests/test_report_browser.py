"""The report in a real browser: nothing complains, everything is drawn, nothing overlaps, and it prints."""

import html
import json
import re
import shutil
import subprocess

import pytest

from detection import report
from tests import report_example

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser here (none of {', '.join(NAMES)}): apt-get install chromium"
    ),
]
MEASURE = """
const seen = document.getElementById('frame').contentDocument, view = seen.defaultView, all = q => [...seen.querySelectorAll(q)];
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const texts = chart => [...chart.querySelectorAll('text')].map(e => ({ text: e.textContent, box: box(e) }));
const found = {
  width: view.innerWidth, scroll: seen.documentElement.scrollWidth, dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
  page: view.getComputedStyle(seen.body).backgroundColor, ink: view.getComputedStyle(seen.body).color,
  images: all('img').map(e => [e.naturalWidth, e.naturalHeight, e.getBoundingClientRect().width]),
  svgs: all('svg').map(box), marks: all('.chart path.line, .chart circle, .strip circle').map(box),
  charts: all('svg.chart').map(texts), size: all('.chart text').map(e => parseFloat(view.getComputedStyle(e).fontSize)),
};
document.body.textContent = JSON.stringify(found);
"""


def browse(page, *flags, scheme=1):
    """(stdout, console lines) of a headless run; `scheme`: 0 dark, 1 light."""
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
    done = subprocess.run(
        [BROWSER, *fixed, f"--blink-settings=preferredColorScheme={scheme}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page, folder, width, scheme):
    """What the browser made of the page in a window of this width: asked by a script in a page around it."""
    inner = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><iframe id="frame" style="border:0;width:{width}px;'
        f'height:900px" srcdoc="{html.escape(inner)}"></iframe><script>onload = () => {{{MEASURE}}}</script></body>',
        encoding="utf-8",
    )
    dom, console = browse(outer, f"--window-size={max(width, 500)},900", "--dump-dom", scheme=scheme)
    assert not console
    return json.loads(html.unescape(re.search(r"<body[^>]*>(\{.*\})\s*</body>", dom, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def page():
    made, pairs = report_example.example(), report_example.pairs(6)
    return report.render(made, pairs, redact=False, title="Audit of a test")


@pytest.mark.parametrize(("width", "scheme"), [(360, 1), (360, 0), (1200, 1), (1200, 0)])
def test_all_is_drawn_and_legible(page, tmp_path, width, scheme):
    found = measured(page, tmp_path, width, scheme)
    assert found["width"] == width and found["dark"] == (scheme == 0)
    assert found["scroll"] <= width, "no scrolling sideways"
    assert len(found["images"]) == 18 and all(min(size) > 0 for size in found["images"])
    assert len(found["charts"]) == 8
    assert all(right - left > 1 and bottom - top > 1 for left, top, right, bottom in found["svgs"])
    assert all((right - left) + (bottom - top) > 3 for left, top, right, bottom in found["marks"])
    assert min(found["size"]) >= 12, "pixels"
    for texts in found["charts"]:
        for i, one in enumerate(texts):
            assert one["box"][0] >= 0 and one["box"][2] <= width + 1, one
            for two in texts[:i]:
                assert not overlap(one["box"], two["box"]), (one, two)
    assert contrast(found["page"], found["ink"]) > 7


def overlap(a, b, spare=1.5):
    return (
        min(a[2], b[2]) - max(a[0], b[0]) > spare and min(a[3], b[3]) - max(a[1], b[1]) > 3 + spare
    )  # boxes of lines of text hold room above and below


def contrast(one, two):
    """WCAG 2 contrast ratio of two CSS colours."""

    def luminance(colour):
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_the_console_is_silent_and_would_not_be(page, tmp_path):
    """A second page that fetches and runs something shows that complaints are heard, and that neither happens."""
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    good.write_text(page, encoding="utf-8")
    bad.write_text(
        page.replace(
            "</body>", '<img src="https://example.invalid/x.png"/><script>document.title = "ran"</script></body>'
        ),
        encoding="utf-8",
    )
    assert browse(good, "--dump-dom")[1] == []
    dom, console = browse(bad, "--dump-dom")
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)
    assert "<title>ran" not in dom


@pytest.mark.parametrize("redact", [False, True])
def test_it_prints(tmp_path, redact):
    """A4; fourteen pages or so; one more for eight more pairs, unless they are redacted to a line each."""
    counts = []
    for pairs in (8, 16):
        source, pdf = tmp_path / "r.html", tmp_path / f"{pairs}.pdf"
        made = report_example.example(verdict="FAIL")
        source.write_text(
            report.render(made, report_example.pairs(pairs), redact=redact, title="Audit of a test"), encoding="utf-8"
        )
        console = browse(source, "--no-pdf-header-footer", f"--print-to-pdf={pdf}")[1]
        assert not console
        body = pdf.read_bytes()
        counts.append(len(re.findall(rb"/Type\s*/Page\b", body)))
        box = [float(x) for x in re.search(rb"/MediaBox\s*\[([\d. ]+)\]", body)[1].split()]
        assert box[2] == pytest.approx(595, abs=2) and box[3] == pytest.approx(842, abs=2)
    assert 9 <= counts[0] <= 17 and counts[0] + (not redact) <= counts[1] <= counts[0] + 2
