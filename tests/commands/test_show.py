"""``featx show``: what the page holds, and the page itself in a real browser."""

import base64
import gzip
import json
import os
import re
import shutil
import sys
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import pytest
from conftest import make_image
from tiny import run

from featx.cli import main
from featx.commands.show import page as show
from featx.commands.show import points
from featx.results import load

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HOSTILE = "<script>window.hacked=1<!--.png"
ONERROR = "<img src=x onerror=window.hacked=1>.png"
NAMES = [HOSTILE, ONERROR, "صورة.png", "図.png", "a,\"b'&amp;\n.png", os.fsdecode(b"\xff\xfe.png")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with photos of three classes and 27 rows of them: two are alike, one image cannot be read."""
    folder = tmp_path_factory.mktemp("made")
    for i in range(20):
        (folder / "photos" / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        make_image(i, (60, 40)).save(folder / "photos" / f"class-{i % 2}" / f"image-{i:02}.png")
    shutil.copy(folder / "photos/class-0/image-00.png", folder / "photos/class-1/copy.png")
    (folder / "photos" / "odd").mkdir()
    for i, name in enumerate(NAMES):
        make_image(100 + i, (40, 60)).save(folder / "photos" / "odd" / "x.png")
        os.rename(folder / "photos" / "odd" / "x.png", folder / "photos" / "odd" / name)
    (folder / "photos" / "odd" / "<b>broken.png").write_bytes(b"broken")
    run(folder / "photos", folder / "features")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of the features, with the photos at hand."""
    shutil.copytree(made / "features", tmp_path / "features")
    os.symlink(made / "photos", tmp_path / "photos")
    return tmp_path / "features" / "2.csv"


def shown(path, *options, page=None):
    """Run the command and return what is in the page's data."""
    assert main(["show", str(path), *options]) == 0
    text = (page or path.with_suffix(".html")).read_text("utf-8")
    packed = re.search(r'id="data">([^<]*)<', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def brute(values):
    """The distances of all pairs, ``(N, N) float64``."""
    return np.linalg.norm(values[:, None].astype(np.float64) - values, axis=2)


def values_in(path):
    return load(path)[1]


@pytest.mark.parametrize("total", [1, 2, 5, 300])
def test_nearest_are_exactly_those_of_every_pair(total, monkeypatch):
    monkeypatch.setattr(points, "BLOCK", 7 * total)  # in several blocks
    values = np.random.default_rng(0).normal(1000, 1, (total, 20)).astype(np.float32)
    values[-1] = values[0]
    near, distances = points.nearest(values)
    pairs = brute(values)
    np.fill_diagonal(pairs, np.inf)
    most = min(10, total - 1)
    assert near.shape == distances.shape == (total, most)
    np.testing.assert_allclose(distances, np.sort(pairs)[:, :most], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(pairs, near, 1), distances, rtol=1e-5)
    if total > 1:
        assert near[0, 0] == total - 1 and distances[0, 0] == 0


def test_the_page_holds_every_row_with_its_path_and_what_could_not_be_read(made, copy, capsys):
    page = shown(copy)
    assert capsys.readouterr().out == f"{copy.with_suffix('.html')}\n"
    assert len(page["names"]) == 27 == len(page["thumbnails"])
    assert {f"odd/{name}" for name in NAMES} < set(page["names"])
    assert page["names"][0] == "class-0/image-00.png"
    assert page["classes"] == ["class-0", "class-1", "odd"]
    assert [fault[0] for fault in page["faults"]] == ["odd/<b>broken.png"]
    assert page["faults"][0][1] == "text named .png"
    assert page["record"] == json.loads(copy.with_suffix(".json").read_text())
    assert page["notes"] == []


def test_the_farthest_are_those_whose_nearest_is_farthest(copy):
    page = shown(copy)
    pairs = brute(values_in(copy))
    np.fill_diagonal(pairs, np.inf)
    assert page["alone"] == np.argsort(-pairs.min(axis=1), kind="stable")[:10].tolist()
    assert np.allclose(
        np.frombuffer(base64.b64decode(page["distances"]), "<f4").reshape(-1, 10), np.sort(pairs)[:, :10], rtol=1e-3
    )


def test_near_duplicates_are_the_pairs_nearer_than_a_tenth_of_the_usual_distance(copy):
    page = shown(copy)
    pairs = np.triu(brute(values_in(copy)), 1)
    usual = np.median(pairs[np.triu_indices(27, 1)])
    assert np.isclose(page["usual"], usual)
    pairs[np.tril_indices(27)] = np.inf
    assert sorted(map(tuple, page["twins"])) == list(zip(*map(list, np.nonzero(pairs < usual / 10)), strict=True))
    assert page["twins_all"] == len(page["twins"])
    assert [page["names"][row] for row in page["twins"][0]] == ["class-0/image-00.png", "class-1/copy.png"]


def test_the_same_file_gives_the_same_page(copy):
    for kind in ("pca", "tsne"):
        shown(copy, "--map", kind)
        first = copy.with_suffix(".html").read_bytes()
        assert kind.replace("tsne", "t-SNE").replace("pca", "PCA") in shown(copy, "--map", kind)["map"]
        assert copy.with_suffix(".html").read_bytes() == first


def test_without_room_thumbnails_are_chosen_with_a_note(copy, monkeypatch):
    shown(copy)
    whole = copy.with_suffix(".html").stat().st_size
    monkeypatch.setattr(show, "PAGE_BYTES", whole - 8_000)
    page = shown(copy)
    assert copy.with_suffix(".html").stat().st_size <= whole - 8_000
    assert 5 < len(page["thumbnails"]) < 27
    assert "cluster shows the image nearest to its centre" in page["notes"][0]
    assert {str(row) for pair in page["twins"] for row in pair} < set(page["thumbnails"])


def test_of_too_many_rows_some_are_shown_with_a_note(copy, monkeypatch):
    monkeypatch.setattr(show, "MOST_POINTS", 9)
    page = shown(copy)
    assert len(page["names"]) == 9 and page["columns"] == 8
    assert page["notes"] == ["The page shows 9 of 27 rows, evenly chosen."]


def test_rows_with_nan_are_left_out_and_named(copy):
    lines = copy.read_bytes().split(b"\n")
    lines[1] = lines[1].rsplit(b",", 1)[0] + b",nan"
    copy.write_bytes(b"\n".join(lines))
    page = shown(copy)
    assert len(page["names"]) == 26
    assert page["notes"] == ["Without 1 row with nan or infinity: class-0/image-02.png"]


def test_images_that_are_gone_have_no_thumbnail_and_are_counted(copy, made, tmp_path):
    shutil.copytree(made / "photos" / "odd", tmp_path / "less" / "odd")
    page = shown(copy, "--images", str(tmp_path / "less"))
    assert len(page["thumbnails"]) == 6 and len(page["names"]) == 27
    assert page["notes"] == [
        f"No thumbnail of 21 images that cannot be read in {tmp_path / 'less'} now (--images gives another folder)."
    ]


def test_without_the_list_of_images_rows_go_by_their_names(copy):
    shutil.rmtree(copy.parent / ".featx")
    page = shown(copy)
    assert page["names"][0] == "image-00.png" and page["thumbnails"] == {} and page["classes"] == [""]


@pytest.mark.parametrize("format", ["csv", "npy", ["csv", "npy"], ["parquet", "csv"]])
def test_a_folder_of_shards_has_the_page_of_one_file(made, copy, tmp_path, format, capsys):
    if "parquet" in format:
        pytest.importorskip("pyarrow")
    run(made / "photos", tmp_path / "out", shard_rows=8, format=format)
    page, whole = shown(tmp_path / "out" / "2"), shown(copy)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out' / '2.html'}\n")
    assert page["names"] == whole["names"] and page["faults"] == whole["faults"]
    for key in ("near", "distances", "points", "thumbnails", "twins", "alone"):
        assert page[key] == whole[key]


def test_one_shard_has_a_page_of_its_own_images_next_to_the_folder(made, copy, tmp_path):
    run(made / "photos", tmp_path / "out", shard_rows=8)
    shards = sorted((tmp_path / "out" / "2").iterdir())
    pages = [shown(shard, page=tmp_path / "out" / f"2-{shard.stem}.html") for shard in shards]
    assert [len(page["names"]) for page in pages] == [8, 8, 7, 4]  # of 28 images one cannot be read
    assert [name for page in pages for name in page["names"]] == shown(copy)["names"]
    assert [len(page["faults"]) for page in pages] == [0, 0, 1, 0]
    assert all(len(page["thumbnails"]) == len(page["names"]) for page in pages)
    assert "<title>2/00003: 4 images<" in (tmp_path / "out" / "2-00003.html").read_text()
    assert sorted((tmp_path / "out" / "2").iterdir()) == shards  # where a page would be read as one of them


@pytest.mark.parametrize("total", [1, 2, 3])
def test_few_images_have_a_page_too(tmp_path, total):
    (tmp_path / "photos").mkdir()
    for i in range(total):
        make_image(i, (60, 40)).save(tmp_path / "photos" / f"{i}.png")
    run(tmp_path / "photos", tmp_path / "features")
    page = shown(tmp_path / "features" / "2.csv")
    assert len(page["names"]) == total and page["columns"] == total - 1


def test_images_that_are_all_alike_have_a_page_too(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        make_image(0, (60, 40)).save(tmp_path / "photos" / f"{i}.png")
    run(tmp_path / "photos", tmp_path / "features")
    page = shown(tmp_path / "features" / "2.csv")
    assert page["usual"] == 0 and page["twins_all"] == 10


def error_of(capsys, *argv):
    assert main(["show", *map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") <= 4
    return error


def test_thumbnails_come_from_an_archive(made, tmp_path):
    path = shutil.make_archive(tmp_path / "photos", "tar", made / "photos")
    run(path, tmp_path / "features")
    page = shown(tmp_path / "features" / "2.csv")
    assert len(page["thumbnails"]) == len(page["names"]) and page["folder"] == ""


def test_thumbnails_come_from_a_table(made, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    paths = sorted((made / "photos").glob("class-*/*.png"))
    columns = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    parquet.write_table(table(columns | {"path": [path.name for path in paths]}), tmp_path / "photos.parquet")
    run(tmp_path / "photos.parquet", tmp_path / "features")
    (tmp_path / "photos.parquet").rename(tmp_path / "moved.parquet")
    page = shown(tmp_path / "features" / "2.csv", "--images", str(tmp_path / "moved.parquet"))
    assert page["classes"] == ["class-0", "class-1"] and len(page["thumbnails"]) == len(paths) == 21
    assert page["folder"] == ""  # no links to files, for there are none


def test_mistakes_are_short_messages(copy, tmp_path, capsys, monkeypatch):
    assert "3.csv: no such file. Did you mean 2.csv?" in error_of(capsys, copy.with_name("3.csv"))
    (tmp_path / "x.csv").touch()
    assert "no record x.json next to it" in error_of(capsys, tmp_path / "x.csv")
    assert "--images nowhere: no such folder" in error_of(capsys, copy, "--images", "nowhere")
    assert "invalid choice: 'som'" in error_of(capsys, copy, "--map", "som")
    assert "FILE" in error_of(capsys)
    copy.write_bytes(copy.read_bytes() + b"more,1,2,3,4\n")
    assert "28 rows, expected 27" in error_of(capsys, copy)
    copy.write_bytes(copy.read_bytes().replace(b"more,1,2,3,4\n", b"").replace(b"\n", b",1\n", 1))
    assert "4 values, expected 5" in error_of(capsys, copy)
    monkeypatch.setitem(sys.modules, "bokeh.resources", None)
    assert "pip install 'featx[show]'" in error_of(capsys, copy)


def test_a_path_that_is_not_a_set_of_shards_is_a_short_message(made, tmp_path, capsys):
    out = tmp_path / "out"
    run(made / "photos", out, shard_rows=8)
    assert "out/fc7.csv: no such file. Expected a file that featx predict wrote" in error_of(capsys, out / "fc7.csv")
    assert "out: no record out.json next to it that lists it.\nExpected what featx predict" in error_of(capsys, out)
    assert "2/00004.csv: no such file. Did you mean 00003.csv" in error_of(capsys, out / "2" / "00004.csv")
    assert "2/00003.npy: no such file" in error_of(capsys, out / "2" / "00003.npy")
    (out / "2" / "00001.csv").write_bytes(b"".join((out / "2" / "00001.csv").read_bytes().splitlines(True)[1:]))
    assert "out/2: 26 rows, expected 27. It was changed." in error_of(capsys, out / "2")
    assert "2/00001.csv: 7 rows, expected 8. It was changed." in error_of(capsys, out / "2" / "00001.csv")
    (out / "2" / "00001.csv").unlink()
    assert "3 shards, the last is 00003.csv. Some are missing." in error_of(capsys, out / "2")


def test_help_is_short(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["show", "--help"])
    assert capsys.readouterr().out.count("\n") < 18


# -- in a browser ----------------------------------------------------------------------------------------------------


class Browser:
    """Chromium with the page open in it."""

    def __init__(self, folder):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for word in (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
            f"disable-component-update disable-sync user-data-dir={folder}"
        ).split():
            options.add_argument(f"--{word}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.get("about:blank")  # its own page for a new tab asks for much

    def open(self, path, width=1280, dark=False):
        size = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 600}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(path.as_uri())
        self.wait("return document.documentElement.dataset.ready")
        return self

    def wait(self, script, *arguments):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 30).until(lambda driver: driver.execute_script(script, *arguments), script)

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).innerText", selector)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def press(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        actions = ActionChains(self.driver)
        for key in keys:
            actions.send_keys(getattr(Keys, key, key))
        actions.perform()

    def mouse(self, kind, x, y, buttons=0):
        event = {"type": kind, "x": x, "y": y, "button": "left" if buttons else "none", "buttons": buttons}
        self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {**event, "clickCount": 1})

    def touch(self, *places):
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
        for at, (x, y) in enumerate(places):
            event = {"type": "touchMove" if at else "touchStart", "touchPoints": [{"x": x, "y": y}]}
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})

    def ring(self):
        """Where the selected image is, in pixels of the window."""
        return self.js(
            "const box = document.querySelector('#marks i').getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]"
        )

    def search(self, words):
        self.find("#search input").send_keys(words)
        self.wait("return document.querySelector('#found button')")
        self.press("ENTER")
        self.wait("return document.querySelector('#one figure')")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: Debian's chromium and chromium-driver are not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def page(made):
    assert main(["show", str(made / "features" / "2.csv")]) == 0
    return made / "features" / "2.html"


@pytest.fixture
def browser(chromium, page):
    """The page, opened; after the test its console must be empty, and only files requested."""
    for log in ("browser", "performance"):
        chromium.driver.get_log(log)
    yield chromium.open(page)
    assert [entry for entry in chromium.driver.get_log("browser") if entry["source"] != "rendering"] == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert {url for url in asked if url.startswith("file")} == {page.as_uri()}


def test_pointing_shows_a_thumbnail_and_a_click_the_nearest_with_their_distances(browser, copy):
    browser.search("image-04")
    x, y = browser.ring()
    browser.press("ESCAPE")
    assert browser.find("#tip").is_displayed() is False
    browser.mouse("mouseMoved", x + 2, y + 1)
    browser.wait("return !document.querySelector('#tip').hidden")
    assert browser.text("#tip") == "class-0/image-04.png"
    assert browser.js("return document.querySelector('#tip img').naturalWidth") == 60
    browser.mouse("mousePressed", x, y, 1)
    browser.mouse("mouseReleased", x, y, 1)
    browser.wait("return document.querySelector('#one figure')")
    assert browser.text("#one figcaption").startswith("class-0/image-04.png")
    pairs = np.sort(brute(values_in(copy))[2])[1:11]  # row 2
    found = browser.js("return [...document.querySelectorAll('#one .card b')].map((b) => Number(b.textContent))")
    np.testing.assert_allclose(found, pairs, rtol=6e-3)
    browser.find("#one .card").click()
    assert not browser.text("#one figcaption").startswith("class-0/image-04.png")


def test_dragging_moves_the_map_and_the_wheel_enlarges_it(browser):
    browser.search("image-04")
    x, y = browser.ring()
    browser.mouse("mousePressed", 300, 300, 1)
    for step in (10, 30, 50):
        browser.mouse("mouseMoved", 300 + step, 300 - step, 1)
    browser.mouse("mouseReleased", 350, 250, 1)
    browser.wait("return !document.querySelector('#moved').style.transform")
    np.testing.assert_allclose(browser.ring(), (x + 50, y - 50), atol=2)
    assert browser.text("#one figcaption").startswith("class-0/image-04.png")  # no click
    wide = "return Bokeh.documents[0].roots()[0].x_range.end - Bokeh.documents[0].roots()[0].x_range.start"
    before = browser.js(wide)
    browser.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent", {"type": "mouseWheel", "x": 300, "y": 300, "deltaX": 0, "deltaY": -100}
    )
    browser.wait(f"{wide} < arguments[0]", before)
    browser.find("#legend .whole").click()
    browser.wait(f"{wide} > arguments[0]", 0.999 * before)
    np.testing.assert_allclose(browser.ring(), (x, y), atol=2)


def test_images_few_enough_to_see_are_on_the_map_themselves(browser, page):
    shown = "return document.querySelectorAll('#thumbnails img:not(.dim)').length"
    assert browser.js(shown) == 27
    browser.find("#legend button:nth-child(3)").click()
    assert browser.js(shown) == 6
    browser.find("#legend button:nth-child(3)").click()
    browser.search("image-04")
    x, y = browser.ring()
    browser.press("ESCAPE")
    browser.mouse("mouseMoved", x + 20, y)  # on the thumbnail, far from where a point would be
    browser.wait("return !document.querySelector('#tip').hidden")
    browser.open(page, 390)
    assert browser.js(shown) == 0
    for _ in range(3):
        event = {"type": "mouseWheel", "x": 195, "y": 350, "deltaX": 0, "deltaY": -100}
        browser.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    browser.wait(shown)


def test_a_finger_drags_the_map_and_a_tap_shows_an_image(browser, page):
    browser.open(page, 390)
    browser.search("image-04")
    browser.js("scrollTo(0, 0)")
    x, y = browser.ring()
    browser.touch((x, y), (x - 20, y + 5), (x - 40, y + 10))
    browser.wait("return !document.querySelector('#moved').style.transform")
    np.testing.assert_allclose(browser.ring(), (x - 40, y + 10), atol=2)
    browser.press("ESCAPE")
    browser.touch((x - 40, y + 10))
    browser.wait("return document.querySelector('#one figure')")
    assert browser.text("#one figcaption").startswith("class-0/image-04.png")


def test_search_finds_by_name_and_keys_alone_do(browser):
    browser.find("#search input").send_keys("IMAGE-1")
    assert browser.wait("return document.querySelectorAll('#found button').length") == 10
    browser.press("ARROW_DOWN", "ARROW_DOWN")
    assert browser.js("return document.activeElement === document.querySelectorAll('#found button')[1]")
    assert browser.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("ENTER")
    assert browser.text("#one figcaption").startswith("class-0/image-12.png")
    assert browser.find("#found").is_displayed() is False
    browser.press("ESCAPE")
    assert "Point at the map" in browser.text("#one")
    browser.find("#search input").send_keys("nothing of that name")
    assert "No name contains that." in browser.text("#found")
    browser.press("ESCAPE")
    assert browser.js("return document.querySelector('#search input').value") == ""


def test_arrows_go_from_image_to_image_and_enter_shows_one(browser):
    browser.find("#search input").click()
    browser.press("TAB")
    assert browser.js("return document.activeElement.id") == "map"
    assert browser.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("ARROW_RIGHT")
    first = browser.text("#tip")
    browser.press("ARROW_LEFT")
    assert first and browser.text("#tip") not in ("", first)
    second = browser.text("#tip")
    browser.press("ENTER")
    assert browser.text("#one figcaption").startswith(second)
    browser.press("ESCAPE")
    assert browser.js("return document.querySelector('#one figure')") is None


def test_a_class_is_shown_alone_and_all_again(browser):
    grey = (
        "return Bokeh.documents[0].roots()[0].renderers[0].data_source.data.colour.filter((c) => c === '#8884').length"
    )
    browser.find("#legend button:nth-child(3)").click()
    assert browser.js(grey) == 21
    browser.find("#legend button:nth-child(3)").click()
    assert browser.js(grey) == 0


def test_names_are_text_and_link_to_their_files_whatever_is_in_them(browser, made):
    assert "<b>broken.png" in browser.text("#faults")
    pick = (
        "const input = document.querySelector('#search input');"
        "input.value = 'odd/'; input.dispatchEvent(new Event('input'));"
        "document.querySelectorAll('#found button')[arguments[0]].click();"
        "return [document.querySelector('#one figcaption b').textContent.toWellFormed(),"
        " document.querySelector('#one a').href]"
    )
    found = [browser.js(pick, row) for row in range(6)]
    assert {name for name, _ in found} == {f"odd/{name.replace(NAMES[5], chr(0xFFFD) * 2 + '.png')}" for name in NAMES}
    paths = {unquote_to_bytes(link.removeprefix("file://")) for _, link in found}
    assert paths == {os.fsencode(made / "photos" / "odd" / name) for name in NAMES}
    browser.press("ESCAPE")
    browser.search(HOSTILE)
    assert browser.text("#one figcaption").startswith(f"odd/{HOSTILE}")
    assert browser.js("return window.hacked") is None


def test_an_address_with_an_image_begins_with_it(browser, page):
    for name in ("class-0/image-04.png", "odd/%E5%9B%B3.png"):
        browser.js("location.hash = arguments[0]; document.documentElement.dataset.ready = ''", name)
        browser.driver.refresh()
        browser.wait("return document.documentElement.dataset.ready")
        assert browser.text("#one figcaption").startswith(unquote(name))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_readable_on_wide_and_narrow_light_and_dark(browser, page, width, dark):
    browser.open(page, width, dark)
    browser.search("image-04")
    assert browser.js("return document.documentElement.scrollWidth") <= width
    small = browser.js(
        "return [...document.querySelectorAll('body *')].filter((element) => element.innerText)"
        ".filter((element) => parseFloat(getComputedStyle(element).fontSize) < 12).length"
    )
    assert small == 0
    for selector in ("h1", "#what", ".card span", "#one a", "#record dt", "#legend button"):
        assert contrast(browser, selector) > 4.5, selector


def contrast(browser, selector):
    """The contrast of a text with its background, after https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    colours = browser.js(
        "let element = document.querySelector(arguments[0]); const text = getComputedStyle(element).color;"
        "const back = () => getComputedStyle(element).backgroundColor;"
        "while (back() === 'rgba(0, 0, 0, 0)') element = element.parentElement; return [text, back()]",
        selector,
    )
    linear = [[(int(part) / 255) ** 2.2 for part in re.findall(r"\d+", colour)[:3]] for colour in colours]
    low, high = sorted(0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in linear)
    return (high + 0.05) / (low + 0.05)
