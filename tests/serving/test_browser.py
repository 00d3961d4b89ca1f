# SPDX-License-Identifier: Apache-2.0
"""The page in a real headless Chromium: drop, decode, drag, zoom, download, restore, a bad file, cancel.

Run with `-m slow`. Screenshots of the page are
written to the folder PIDECODE_SCREENSHOTS, if set.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving_kit import NGINX, PATIENCE, Proxy, Served, image_bytes, latent_bytes, running, small_decoder

from pidecode import PixelDecoder
from pidecode.images import read_metadata
from pidecode.serve.app import create_app
from pidecode.serve.schemas import RequestLimits
from pidecode.serve.service import DecodeService

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP images.lan 127.0.0.1",
)  # fmt: skip
WAIT = PATIENCE * 500
LIMITS = RequestLimits(body_bytes=2_000_000, pixels=1024 * 1024, waiting=2)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    decoders = {"small": small_decoder(), "tiny": PixelDecoder.from_pretrained("tiny", device="cpu")}
    service = DecodeService(decoders, limits=LIMITS)
    with running(create_app(service), service) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, served: Served) -> Iterator[Any]:
    with opened(chromium, served.url) as tab:
        yield tab


@contextmanager
def opened(chromium: Any, url: str) -> Iterator[Any]:
    """The page at that address, which must cause no script error and no request to another host."""
    context = chromium.new_context(viewport={"width": 1280, "height": 860}, color_scheme="light", accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    foreign_requests: list[str] = []
    script_errors: list[str] = []
    own = (url, "blob:", "data:")
    tab.on("request", lambda request: foreign_requests.append(request.url) if not request.url.startswith(own) else None)
    tab.on("pageerror", lambda error: script_errors.append(str(error)))
    tab.goto(url)
    tab.wait_for_selector("body[data-ready]")
    yield tab
    context.close()
    assert foreign_requests == []
    assert script_errors == []


def drop(page: Any, name: str, data: bytes) -> None:
    kind = "image/png" if name.endswith(".png") else "application/octet-stream"
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def decode(page: Any) -> None:
    page.wait_for_selector("#go:not([disabled])")
    page.click("#go")
    page.wait_for_selector("#tools", state="visible")
    page.wait_for_selector("#go", state="visible")


def download(page: Any, folder: Path) -> dict[str, Any]:
    with page.expect_download() as waiting:
        page.click("#download")
    target = folder / waiting.value.suggested_filename
    waiting.value.save_as(target)
    metadata = read_metadata(target)
    assert metadata is not None
    return metadata | {"file": target.name}


def test_an_image_is_dropped_decoded_compared_and_downloaded(page: Any, tmp_path: Path) -> None:
    drop(page, "moon.png", image_bytes(48, 32))
    page.wait_for_selector("#go:not([disabled])")
    assert "192×128 pixels. Memory: about" in page.inner_text("#plan")
    page.fill("#seed", "11")
    page.locator("#sigma").fill("0.2")
    decode(page)
    assert page.inner_text("#result-info").startswith("192×128")
    box = page.locator("#handle").bounding_box()
    frame = page.locator("#viewer").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, frame["y"] + frame["height"] / 2)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] * 0.25, frame["y"] + frame["height"] / 2, steps=4)
    page.mouse.up()
    assert page.get_attribute("#handle", "aria-valuenow") == "25"
    page.focus("#handle")
    page.keyboard.press("PageUp")
    assert page.get_attribute("#handle", "aria-valuenow") == "35"
    before = page.inner_text("#zoom-value")
    page.click("#zoom-in")
    assert page.inner_text("#zoom-value") != before
    page.click("#zoom-full")
    assert page.inner_text("#zoom-value") == "100 %"
    metadata = download(page, tmp_path)
    assert (metadata["file"], metadata["seed"], metadata["sigma"]) == ("moon-pid-11.png", 11, 0.2)
    assert (metadata["width"], metadata["height"], metadata["model"]) == (192, 128, "small")


def test_a_size_takes_the_place_of_the_scale_and_texts_of_others_are_shown(page: Any, tmp_path: Path) -> None:
    page.select_option("#model", "tiny")
    texts = PngInfo()
    texts.add_text("parameters", "a lighthouse\nSteps: 20, Seed: 42")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image_bytes(48, 32))).save(buffer, "PNG", pnginfo=texts)
    drop(page, "moon.png", buffer.getvalue())
    page.wait_for_selector("#go:not([disabled])")
    page.fill("#to-width", "100")
    page.press("#to-width", "Tab")
    page.locator("#plan", has_text="100×67 pixels").wait_for()
    assert page.is_disabled("#scale")
    decode(page)
    assert page.inner_text("#result-info").startswith("100×67")
    page.click("#metadata summary")
    assert "Steps: 20, Seed: 42" in page.inner_text("#metadata")
    if folder := os.environ.get("PIDECODE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/size-and-texts.png", full_page=True)
    metadata = download(page, tmp_path)
    assert (metadata["width"], metadata["height"], metadata["model"]) == (100, 67, "tiny")
    page.fill("#to-width", "")
    page.press("#to-width", "Tab")
    page.locator("#plan", has_text="192×128 pixels").wait_for()
    assert page.is_enabled("#scale")


def test_the_color_fix_can_be_chosen(page: Any, tmp_path: Path) -> None:
    page.select_option("#model", "tiny")
    drop(page, "moon.png", image_bytes(32, 32))
    for chosen in ("off", "coarse", "fine", "back-projection"):
        page.select_option("#color_fix", chosen)
        decode(page)
        assert download(page, tmp_path)["color_fix"] == chosen


def test_a_feed_forward_model_has_no_seed_and_no_steps(page: Any, tmp_path: Path) -> None:
    page.select_option("#model", "tiny")
    page.click("summary:text('More')")
    for name in ("#seed", "#num_steps", "#sampler", "#guidance_scale"):
        assert page.locator(name).is_hidden()
    drop(page, "moon.png", image_bytes(32, 32))
    decode(page)
    metadata = download(page, tmp_path)
    assert (metadata["file"], metadata["model"], metadata.get("seed")) == ("moon-pid.png", "tiny", None)


def test_both_images_lie_exactly_over_each_other(page: Any) -> None:
    drop(page, "odd.png", image_bytes(45, 37))
    decode(page)
    assert page.inner_text("#result-info").startswith("180×148")
    before, after = (page.locator(name).bounding_box() for name in ("#before", "#after"))
    assert before == pytest.approx(after, abs=0.5)


def test_history_brings_back_image_and_settings(page: Any, tmp_path: Path) -> None:
    drop(page, "one.png", image_bytes(32, 32))
    page.fill("#seed", "1")
    decode(page)
    page.fill("#seed", "2")
    page.locator("#sigma").fill("0.4")
    decode(page)
    drop(page, "latent.safetensors", latent_bytes(1, 2))
    decode(page)
    entries = page.locator("#history .entry")
    assert [entries.nth(index).inner_text().strip() for index in range(3)] == [
        "latent.safetensors, seed 2, noise 0.4", "one.png, seed 2, noise 0.4", "one.png, seed 1",
    ]  # fmt: skip
    entries.nth(2).click()
    assert page.input_value("#seed") == "1"
    assert page.input_value("#sigma") == "0"
    assert page.inner_text("#source-name") == "one.png"
    assert download(page, tmp_path)["seed"] == 1
    entries.nth(0).click()
    assert page.inner_text("#source-info") == "latent of flux2, 2×1 cells"
    assert page.locator("#viewer.alone").count() == 1  # a latent has no image of its own to compare with


def test_an_image_made_by_pidecode_offers_its_settings(page: Any, tmp_path: Path) -> None:
    drop(page, "first.png", image_bytes(16, 16))
    page.fill("#seed", "77")
    decode(page)
    with page.expect_download() as waiting:
        page.click("#download")
    waiting.value.save_as(tmp_path / "made.png")
    page.fill("#seed", "5")
    drop(page, "made.png", (tmp_path / "made.png").read_bytes())
    page.click("#use-metadata")
    assert page.input_value("#seed") == "77"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("broken.png", image_bytes()[:50], "damaged or truncated"),
        ("notes.png", b"no image", "not an image of a known format"),
        ("cut.safetensors", latent_bytes()[:-9], "truncated"),
        ("large.png", b"x" * 3_000_000, "at most 2 MB can be taken"),
        ("nothing.png", b"", "is empty"),
        ("latent.npy", b"\x93NUMPY", "taken as .safetensors"),
    ],
)
def test_a_bad_file_is_refused(page: Any, name: str, data: bytes, expected: str) -> None:
    drop(page, name, data)
    page.wait_for_selector("#error", state="visible")
    assert expected in page.inner_text("#error")
    assert page.inner_text("#error").startswith(f"{name}: ")
    assert page.locator("#go").is_disabled()
    page.click("#error button")
    assert page.locator("#error").is_hidden()


def test_a_result_that_is_too_large_is_refused_in_the_plan(page: Any) -> None:
    drop(page, "wide.png", image_bytes(400, 400))
    page.wait_for_selector("#plan-card.large")
    assert "1600x1600" in page.inner_text("#plan")
    assert page.locator("#go").is_disabled()


def test_cancelling_frees_the_place_and_the_page_goes_on(page: Any, served: Served) -> None:
    drop(page, "one.png", image_bytes(32, 32))
    page.wait_for_selector("#go:not([disabled])")
    with served.busy():
        page.click("#go")
        page.wait_for_selector("#cancel", state="visible")
        served.until(lambda: served.service.queue.waiting == 1)
        assert "next in the queue" in page.inner_text("#status")
        page.wait_for_timeout(600)  # sooner, it is taken for a double click on Decode
        page.click("#cancel")
        served.until(lambda: served.service.queue.waiting == 0)
    page.wait_for_selector("#go", state="visible")
    assert page.inner_text("#status") == "Cancelled."
    assert page.locator("#error").is_hidden()
    decode(page)


def test_a_double_click_decodes_once_and_does_not_cancel(page: Any) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    page.dblclick("#go")
    page.wait_for_selector("#tools", state="visible")
    assert page.locator("#history .entry").count() == 1


def test_a_model_that_cannot_take_the_file_says_so(page: Any) -> None:
    drop(page, "other.safetensors", latent_bytes(channels=16, space="flux"))
    page.wait_for_selector("#plan-card.large")
    assert "of space flux; small decodes flux2" in page.inner_text("#plan")


def dropped(*names: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "mimeType": "image/png", "buffer": image_bytes(16 + 16 * index, 16)}
        for index, name in enumerate(names)
    ]


def test_several_images_are_done_one_after_another(page: Any) -> None:
    page.set_input_files("#file", [*dropped("a.png", "b.png"), {
        "name": "bad.png", "mimeType": "image/png", "buffer": b"no image",
    }, *dropped("c.png")])  # fmt: skip
    page.wait_for_selector("#error", state="visible")
    assert page.inner_text("#error p").startswith("bad.png: ")
    assert page.inner_text("#queue-title").startswith("2 more follow")
    page.wait_for_selector("#go:not([disabled])")
    page.click("#go")
    page.wait_for_function("() => document.querySelectorAll('#history .entry').length === 3")
    assert page.locator("#history .entry").all_inner_texts() == ["c.png, seed 0", "b.png, seed 0", "a.png, seed 0"]
    assert page.locator("#queue").is_hidden()


def test_an_image_dropped_during_a_run_follows_it(page: Any, served: Served) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    with served.busy():
        page.click("#go")
        page.wait_for_selector("#cancel", state="visible")
        page.set_input_files("#file", dropped("two.png", "three.png"))
        page.wait_for_function("() => document.querySelectorAll('#queue li').length === 2")
        page.click("#queue li:first-child button")
        assert page.inner_text("#source-name") == "one.png"
    page.wait_for_function("() => document.querySelectorAll('#history .entry').length === 2")
    assert page.locator("#history .entry").all_inner_texts() == ["three.png, seed 0", "one.png, seed 0"]


def test_escape_cancels_and_the_focus_stays_useful(page: Any, served: Served) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    with served.busy():
        page.click("#go")
        page.wait_for_selector("#bar[role=progressbar]", state="visible")
        served.until(lambda: served.service.queue.waiting == 1)
        page.keyboard.press("Escape")
        served.until(lambda: served.service.queue.waiting == 0)
    page.wait_for_selector("#go", state="visible")
    assert page.inner_text("#announcement") == "Cancelled."
    page.wait_for_function("() => document.activeElement.id === 'go'")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tools", state="visible")
    page.wait_for_function("() => document.activeElement.id === 'download'")
    assert page.inner_text("#announcement").startswith("Done: 64×64 pixels")


def test_progress_names_the_work_and_never_falls(page: Any) -> None:
    page.select_option("#model", "tiny")
    drop(page, "one.png", image_bytes(64, 64))
    page.wait_for_selector("#go:not([disabled])")
    page.evaluate(
        "() => { window.seen = []; new MutationObserver(() => window.seen.push([document.getElementById('status')"
        ".textContent, Number(document.getElementById('bar').getAttribute('aria-valuenow') ?? 0)]))"
        ".observe(document.getElementById('bar'), {attributes: true}); }"
    )
    page.click("#go")
    page.wait_for_selector("#tools", state="visible")
    seen = page.evaluate("() => window.seen")
    texts = " ".join(text for text, _ in seen)
    assert "Sending" in texts
    assert "Encoding" in texts
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    drop(page, "two.png", image_bytes(64, 64))
    page.wait_for_function("() => document.getElementById('plan').textContent.includes('Time: about')")


def test_two_results_are_compared_and_one_is_used_again(page: Any) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    decode(page)
    page.fill("#seed", "2")
    decode(page)
    page.click("#history button:has-text('Compare')")
    assert page.inner_text("#tag-before") == "one-pid-0.png"
    assert page.inner_text("#tag-after") == "one-pid-2.png"
    before, after = (page.locator(name).bounding_box() for name in ("#before", "#after"))
    assert before == pytest.approx(after, abs=0.5)
    assert page.evaluate("() => getComputedStyle(document.getElementById('before')).imageRendering") == "auto"
    page.check("#before-pixels")
    assert page.evaluate("() => getComputedStyle(document.getElementById('before')).imageRendering") == "pixelated"
    page.click("#reuse")
    page.wait_for_function("() => document.getElementById('source-name').textContent === 'one-pid-2.png'")
    assert page.inner_text("#source-info") == "image, 64×64"


def test_the_quality_acts_where_it_can(page: Any) -> None:
    drop(page, "one.png", image_bytes(32, 32))
    page.click("summary:text('More')")
    assert page.locator("#quality").is_hidden()
    page.select_option("#format", "jpeg")
    sizes = []
    for quality in ("20", "95"):
        page.fill("#quality", quality)
        decode(page)
        sizes.append(int(page.inner_text("#result-info").split(", ")[1].removesuffix(" kB")))
    assert sizes[0] < sizes[1]


def test_the_result_is_copied(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    drop(page, "one.png", image_bytes(16, 16))
    decode(page)
    page.click("#copy")
    page.wait_for_selector("#copy:text('Copied')")
    assert page.evaluate("async () => (await navigator.clipboard.read())[0].types") == ["image/png"]


def reload(page: Any) -> None:
    page.wait_for_timeout(500)  # the page saves 0.1 s after a change
    page.reload()
    page.wait_for_selector("body[data-ready]")


def test_a_reload_brings_back_input_settings_queue_and_history(page: Any, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    drop(page, "first.png", image_bytes(16, 16))
    page.fill("#seed", "3")
    page.click("summary:text('More')")
    page.select_option("#format", "webp")
    page.fill("#quality", "70")
    decode(page)
    page.set_input_files("#file", dropped("second.png", "third.png"))
    page.wait_for_selector("#queue:not([hidden])")
    reload(page)
    assert asked == []
    page.wait_for_selector("#go:not([disabled])")
    assert page.inner_text("#source-name") == "second.png"
    assert page.locator("#queue li span").all_inner_texts() == ["third.png"]
    assert (page.input_value("#seed"), page.input_value("#quality")) == ("3", "70")
    assert page.locator("#history .entry").all_inner_texts() == ["first.png, seed 3"]
    page.click("#history .entry")
    assert download(page, tmp_path)["file"] == "first-pid-3.webp"
    reload(page)
    assert page.locator("#download").get_attribute("download") == "first-pid-3.webp"
    page.click("#go")
    page.wait_for_function("() => document.querySelectorAll('#history .entry').length === 3")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("body[data-ready]")
    assert other.locator("#history").is_hidden()
    page.click("#forget")
    assert page.locator("#history").is_hidden()
    reload(page)
    assert page.locator("#history").is_hidden()


def test_a_reload_does_not_end_the_job(page: Any, served: Served) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    with served.busy():
        page.click("#go")
        served.until(lambda: served.service.queue.waiting == 1)
        reload(page)
        page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Waiting: next')")
        assert page.locator("#cancel").is_visible()
        assert served.service.queue.waiting == 1
    page.wait_for_selector("#tools", state="visible")
    assert page.locator("#history .entry").all_inner_texts() == ["one.png, seed 0"]


def test_a_job_that_is_gone_after_a_reload_is_told(page: Any, served: Served) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    with served.busy():
        page.click("#go")
        served.until(lambda: served.service.queue.waiting == 1)
        page.wait_for_timeout(500)
        served.service.streamed.clear()  # as after a restart
        page.reload()
        page.wait_for_selector("#error", state="visible")
        assert "the server was restarted. Run it again" in page.inner_text("#error p")
        assert page.inner_text("#source-name") == "one.png"
    decode(page)


def test_leaving_asks_where_the_browser_keeps_nothing(page: Any) -> None:
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.add_init_script("Object.defineProperty(window, 'indexedDB', {value: undefined})")
    reload(page)
    reload(page)
    assert asked == []
    drop(page, "one.png", image_bytes(16, 16))
    decode(page)
    reload(page)
    assert asked == ["beforeunload"]


def test_a_latent_shows_what_is_known_of_it(page: Any) -> None:
    drop(page, "latent.safetensors", latent_bytes(2, 3, prompt=["a cat"]))
    page.wait_for_selector("#go:not([disabled])")
    assert page.locator("#known dd").all_inner_texts() == ["flux2", "3×2", "0", "a cat"]
    for name in ("#to-width", "#to-height"):
        assert page.locator(name).bounding_box()["width"] > 70


@pytest.mark.parametrize("width", [1280, 640, 390])  # 640: a window of 1280 at 200 %
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 860})
    page.emulate_media(color_scheme=scheme)
    page.select_option("#model", "tiny")
    source = os.environ.get("PIDECODE_SCREENSHOT_SOURCE")
    drop(page, "image.png", Path(source).read_bytes() if source else image_bytes(64, 48))
    decode(page)
    page.wait_for_timeout(600)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    overflowing = page.evaluate(
        "() => [...document.querySelectorAll('button, select, input, a, p')].filter((one) => one.checkVisibility() "
        "&& one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('#viewer')).map((one) => one.outerHTML)"
    )
    assert overflowing == []
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    folder = os.environ.get("PIDECODE_SCREENSHOTS")
    if folder:
        # A narrow page is shown whole: scrolled to its end, its sticky button is in its own place.
        page.evaluate("scrollTo(0, innerWidth < 800 ? document.documentElement.scrollHeight : 0)")
        page.screenshot(path=str(Path(folder) / f"page-{width}-{scheme}.png"), full_page=width < 800)


def test_progress_result_and_error_are_in_view_at_200_percent(page: Any, served: Served) -> None:
    page.set_viewport_size({"width": 640, "height": 430})
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    in_view = (
        "(id) => { const box = document.getElementById(id).getBoundingClientRect(); "
        "return box.bottom > 0 && box.top < innerHeight; }"
    )
    with served.busy():
        page.click("#go")
        page.wait_for_selector("#bar", state="visible")
        assert page.evaluate(in_view, "status")
        assert page.evaluate(in_view, "cancel")
    page.wait_for_selector("#tools", state="visible")
    assert page.evaluate(in_view, "viewer")
    page.locator("#go").scroll_into_view_if_needed()
    drop(page, "bad.png", b"no image")
    page.wait_for_selector("#error", state="visible")
    assert page.evaluate(in_view, "error")


def test_decode_is_in_view_as_soon_as_it_can_be_pressed(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 700})  # lower than the settings
    page.select_option("#model", "tiny")
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    go = page.locator("#go").bounding_box()
    assert (page.evaluate("scrollY"), go["y"] + go["height"] <= 700) == (0, True)
    page.focus("#color_fix")
    for _ in range(2):  # nothing that has the focus lies under it
        page.keyboard.press("Tab")
        focused, go = page.locator(":focus").bounding_box(), page.locator("#go").bounding_box()
        assert focused["y"] + focused["height"] <= go["y"] + go["height"]


def test_an_image_that_the_browser_cannot_show_is_decoded_all_the_same(page: Any) -> None:
    drop(page, "scan.tif", image_bytes(16, 16, "TIFF"))
    page.wait_for_selector("#unseen", state="visible")
    decode(page)
    assert page.locator("#unseen").is_hidden()
    assert page.locator("#viewer.alone").count() == 1


def test_fidelity_acts_where_detail_is_held(page: Any, tmp_path: Path) -> None:
    assert page.locator("#fidelity").is_hidden()
    page.select_option("#model", "tiny")
    drop(page, "one.png", image_bytes(16, 16))
    page.locator("#fidelity").fill("0.5")
    decode(page)
    assert download(page, tmp_path)["fidelity"] == 0.5
    page.select_option("#color_fix", "coarse")
    assert page.locator("#fidelity").is_hidden()


def test_the_keyboard_alone_suffices(page: Any) -> None:
    drop(page, "one.png", image_bytes(16, 16))
    page.wait_for_selector("#go:not([disabled])")
    page.focus("#seed")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tools", state="visible")
    labels = page.evaluate(
        "() => [...document.querySelectorAll('button, input, select, textarea, a')]"
        ".filter((one) => one.checkVisibility())"
        ".filter((one) => !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).map((one) => one.id)"
    )
    assert json.dumps(labels) == "[]"


def test_the_page_works_behind_the_proxy_of_the_documentation(chromium: Any, tmp_path: Path) -> None:
    if NGINX is None:
        pytest.skip("there is no nginx on this machine: apt-get install nginx")
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    app = create_app(service, hosts=["images.lan"])
    with (
        running(app, service) as served,
        Proxy(served, tmp_path) as proxy,
        opened(chromium, f"http://images.lan:{proxy.port}/pidecode/") as page,
    ):
        drop(page, "one.png", image_bytes(16, 16))
        decode(page)
        assert download(page, tmp_path)["file"] == "one-pid-0.png"
        with served.busy():
            page.click("#go")
            page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Waiting: ')")
            proxy.stop()
            page.wait_for_function("() => document.getElementById('status').textContent.includes('lost')")
            proxy.start()
            page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Waiting: ')")
            assert served.service.queue.waiting == 1
        page.wait_for_function("() => document.querySelectorAll('#history .entry').length === 2")
        with served.busy():
            page.click("#go")
            served.until(lambda: served.service.queue.waiting == 1)
            page.wait_for_function("() => document.getElementById('status').textContent.startsWith('Waiting: ')")
            page.wait_for_timeout(600)  # sooner, it is taken for a double click on Decode
            page.click("#cancel")
            served.until(lambda: served.service.queue.waiting == 0)
        drop(page, "large.png", b"x" * 1_900_000)
        page.wait_for_selector("#error", state="visible")
