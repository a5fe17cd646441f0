"""The site that `make docs` has built, opened from files in a browser that has no network.

Needs a browser: that of `python -m playwright install chromium`, or the system's `chromium`.
"""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep
playwright = pytest.importorskip("playwright.sync_api", reason="make docs installs it")
SITE = Path(__file__).parent.parent / "docs" / "_build" / "html"
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if not path.relative_to(SITE).as_posix().startswith("_")
)
# The images of an article that cannot be shown. (Waiting until a page is idle takes 0.5 s more.)
MISSING = """async () => {
    const images = [...document.querySelectorAll('article img')];
    images.forEach(image => image.loading = 'eager');
    const shown = image => image.decode().then(() => image.naturalWidth > 0, () => false);
    const areShown = await Promise.all(images.map(shown));
    return images.filter((_, i) => !areShown[i]).map(image => image.src);
}"""
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def context():
    if not PAGES:
        pytest.skip("There is no site; make docs builds it.")
    with playwright.sync_playwright() as started:
        system = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = started.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"There is no browser: {str(error).splitlines()[0]}")
        with browser, browser.new_context(offline=True) as opened:
            yield opened


@pytest.fixture
def open_page(context):
    """Opens a page; errors of its scripts, and what it failed to load, are in the second."""
    page, complaints = context.new_page(), []
    page.set_default_timeout(180_000)  # on a machine that has other things to do
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))

    def go(name):
        page.set_viewport_size(DESK)
        page.goto(f"{SITE.as_uri()}/{name}")
        return page, complaints

    yield go
    page.close()


def test_every_page_opens_without_a_complaint_and_fits_a_telephone(open_page):
    """Hundreds of pages, each of which takes a good part of a second."""
    for name in PAGES:
        page, complaints = open_page(name)
        assert page.locator("article").count() == 1, name
        assert page.evaluate(MISSING) == [], name
        page.set_viewport_size(PHONE)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{name} is {width} pixels wide."
        assert not complaints, name


def test_formulas_are_formulas(open_page):
    for name in ("index.html", "start/concepts.html", "api/drop_muon.html", "api/norms.Norm.html"):
        page, _ = open_page(name)
        sizes = page.eval_on_selector_all("math", "all => all.map(one => one.clientWidth)")
        assert sizes, name
        assert all(sizes), name
        shown = page.eval_on_selector_all("mi, mo", "all => all.map(one => one.textContent)")
        assert not any("\\" in part for part in shown), name


@pytest.mark.skipif(not PAGES, reason="There is no site; make docs builds it.")
def test_nothing_is_loaded_from_elsewhere():
    for name in PAGES:
        text = (SITE / name).read_text(encoding="utf-8")
        for found in ('src="http', 'rel="stylesheet" type="text/css" href="http', "@import"):
            assert found not in text, name


def test_search_finds_names_and_words(open_page):
    for words, wanted in {
        "drop_muon": "api/drop_muon.html",
        "time_aware_depth": "api/time_aware_depth.html",
        "checkpoints": "checkpoints.html",
    }.items():
        page, complaints = open_page(f"search.html?q={words}")
        page.wait_for_selector("#search-results li")
        found = page.eval_on_selector_all("#search-results li a", "all => all.map(one => one.href)")
        assert any(wanted in link for link in found), words
        assert not complaints


def test_pictures_and_results_are_there(open_page):
    for name in ("results/fashion.html", "results/text.html", "start/concepts.html"):
        page, _ = open_page(name)
        assert page.locator("article img").count() >= 1, name
    page, _ = open_page("results/fashion.html")
    assert page.locator("article table").count() >= 3
    assert "python benchmarks/compare.py" in page.inner_text("article")
