"""Maps to walk through in Chromium: pointer, keyboard, filters, search, clips, names of controls; nothing from elsewhere."""

import copy
import json
import time

import pytest

from tests import clips, walks
from tests.browser import CHROMIUM, Browser
from tests.reports import unpacked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to look at the page with"),
]

PRELUDE = """
const walk = document.querySelector('.walk'), part = (name) => walk.querySelector(`[data-part=${name}]`);
const all = (selector) => [...walk.querySelectorAll(selector)];
const change = (name, value, what = 'change') => { part(name).value = value; part(name).dispatchEvent(new Event(what)); };
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    clip = folder / "clips" / "a clip.webm"
    clip.parent.mkdir()
    clips.write(clip, [k / 25 for k in range(25)], codec="libvpx")
    dataset = walks.data_set(folder, (40, 12, 12), missing=0.3, clip=str(clip))
    found = walks.map_of(dataset, folder)
    found["ids"][1] = "n" * 80
    return walks.page_of(folder / "page.html", found), found


@pytest.fixture
def browser(page, tmp_path):
    with Browser(tmp_path / "profile") as one:
        one.open(page[0], width=1280)
        one.run(PRELUDE)
        yield one
        assert one.problems == []


def key(browser, name):
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=13 * (name == "Enter")
        )


def mouse(browser, kind, x, y):
    browser.call(
        "Input.dispatchMouseEvent",
        type=kind,
        x=x,
        y=y,
        button="left",
        buttons=int(kind == "mousePressed"),
        clickCount=1,
    )


def place(browser, found, i):
    """Where a point is in the window; the map is brought there first."""
    x, y = walks.unpacked_places(found, 0)[i] / 10_000 - 0.5
    left, top, width, height = browser.run(
        "part('canvas').scrollIntoView({block: 'center'}); "
        "(({left, top, width, height}) => [left, top, width, height])(part('canvas').getBoundingClientRect())"
    )
    side = min(width, height) - 24
    return left + width / 2 + x * side, top + height / 2 + y * side


def lone(found):
    """A point that is far from all others, and has words."""
    at = walks.unpacked_places(found, 0).astype(float)
    apart = ((at[:, None] - at[None]) ** 2).sum(axis=2)
    apart[range(len(at)), range(len(at))] = 1e12
    return int(apart.min(axis=1).argmax())


def test_pointing_shows_and_clicking_selects(browser, page):
    found, i = page[1], lone(page[1])
    x, y = place(browser, found, i)
    mouse(browser, "mouseMoved", x, y)
    tip = browser.run("part('tip').hidden ? '' : part('tip').innerText")
    assert found["ids"][i] in tip
    assert found["words"][i] in tip
    assert f"label {found['labels'][i]}" in tip
    assert " %" in tip
    size = "(({naturalWidth, naturalHeight}) => [naturalWidth, naturalHeight])(part('tip').querySelector('img'))"
    assert browser.run(size) == [64, 64]
    assert browser.run("part('tip').querySelector('p:nth-of-type(2)').dir") == "auto"
    mouse(browser, "mousePressed", x, y)
    mouse(browser, "mouseReleased", x, y)
    lists = browser.run("all('.near').map(one => [...one.querySelectorAll('button > bdi')].map(b => b.textContent))")
    for names, space in zip(lists, found["spaces"], strict=True):
        near = unpacked(space["near"]).reshape(-1, 10)[i]
        assert names[: len(near)] == [found["ids"][k] for k in near]
    headings = browser.run("all('.near h4').map(h => h.textContent)")
    assert headings == ["Nearest by method 0", "Nearest by raw features"]
    browser.run("part('detail').querySelector('.near button').click()")
    assert browser.run("part('detail').querySelector('.about p').textContent") == lists[0][0]


def test_clips_play_where_they_are(browser, page):
    browser.run("part('search').value = 'train0'; part('search').dispatchEvent(new Event('input'))")
    browser.run("part('matches').querySelector('button').click()")
    until = time.monotonic() + 20
    while not (ready := browser.run("all('video').map(v => [v.videoWidth, v.duration])[0]")) or not ready[0]:
        assert time.monotonic() < until, ready
        time.sleep(0.1)
    assert ready[0] == 64
    assert browser.run("document.querySelector('video').controls")
    assert browser.run("document.querySelector('video').currentSrc").endswith("/clips/a%20clip.webm")


def test_keyboard_goes_from_point_to_point_and_selects(browser):
    browser.run("part('canvas').focus()")
    key(browser, "ArrowRight")
    first = browser.run("part('status').textContent")
    assert "label" in first
    seen = {first}
    for name in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        key(browser, name)
        seen.add(browser.run("part('status').textContent"))
    assert len(seen) >= 3
    assert browser.run("!part('tip').hidden")
    key(browser, "Enter")
    assert "is selected" in browser.run("part('status').textContent")
    assert browser.run("!part('detail').hidden && all('.near').length") == 2
    key(browser, "Escape")
    assert browser.run("part('detail').hidden")


def test_legend_filters_and_colours_change(browser, page):
    found = page[1]
    calm = found["labels"].count("calm")
    assert browser.run("all('[data-part=legend] button')[0].textContent") == f"calm ({calm})"
    browser.run("all('[data-part=legend] button')[0].click()")
    assert browser.run("part('status').textContent") == f"{64 - calm} of 64 points are visible."
    assert browser.run("all('[data-part=legend] button')[0].getAttribute('aria-pressed')") == "false"
    browser.run("all('[data-part=legend] button').find(b => b.textContent === 'none').click()")
    assert browser.run("part('status').textContent") == "0 of 64 points are visible."
    browser.run("all('[data-part=legend] button').find(b => b.textContent === 'all').click()")
    options = browser.run("[...part('colour').options].map(o => o.value)")
    assert options == ["class", "person", "split", "modalities", "cluster", "error"]
    for name in options:
        browser.run(f"change('colour', '{name}')")
        counts = browser.run(
            "all('[data-part=legend] [aria-pressed]').map(b => +b.textContent.match(/\\((\\d+)\\)$/)[1])"
        )
        assert sum(counts) == 64, name
    wrong = browser.run("all('[data-part=legend] [aria-pressed]')[1].textContent")
    predicted = unpacked(found["spaces"][0]["predicted"])
    names = [found["classes"][k] for k in predicted]
    assert wrong == f"wrong ({sum(a != b for a, b in zip(names, found['labels'], strict=True))})"
    browser.run("change('space', '1')")
    assert browser.run("[...part('colour').options].map(o => o.value)") == [
        "class",
        "person",
        "split",
        "modalities",
        "error",
    ]


def test_search_finds_ids_words_and_labels(browser, page):
    found = page[1]
    for asked, count in (("test1", 3), ("شكرا", 22), ("HAPPY", found["labels"].count("happy")), ("nowhere", 0)):
        browser.run(f"change('search', {json.dumps(asked)}, 'input')")
        assert browser.run("part('status').textContent") == f"{count} of 64 match.", asked
        assert browser.run("all('[data-part=matches] button').length") == min(count, 20)
    assert browser.run("part('matches').textContent") == ""


def test_it_can_be_enlarged_and_dragged(browser, page):
    i = lone(page[1])
    x, y = place(browser, page[1], i)
    browser.run("part('in').click()")
    mouse(browser, "mouseMoved", x, y)
    browser.run("part('whole').click()")
    mouse(browser, "mouseMoved", x + 1, y)
    assert page[1]["ids"][i] in browser.run("part('tip').innerText")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_everything_fits_and_has_a_name(page, tmp_path, width, dark):
    found = copy.deepcopy(page[1])
    found["spaces"][0]["name"] = found["colours"]["class"]["names"][0] = "m" * 80
    found["labels"][1] = found["persons"][1] = "ه" * 80
    page = walks.page_of(tmp_path / "page.html", found)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page, width=width, dark=dark)
        browser.run(PRELUDE)
        browser.run(f"change('search', {'n' * 80!r}, 'input'); part('matches').querySelector('button').click()")
        assert browser.run("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
        assert browser.run("part('canvas').clientHeight") > 300
        assert browser.violations() == []
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert browser.run("getComputedStyle(walk).display") == "none"
        assert browser.problems == []
