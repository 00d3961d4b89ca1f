# SPDX-License-Identifier: Apache-2.0
"""`make comfyui COMFYUI=/path/to/ComfyUI`: every example workflow in the application, over HTTP and in Chromium.

Makes an environment of its own with the checkout's requirements, starts the application on the CPU and on loopback, and
for each workflow: loads it in headless Chromium, keeps a screenshot, checks that no node hides another where the window
has drawn them, and runs what the window would send. Loaders of large files are replaced by `stand_ins`, decoders by
random networks of a few thousand parameters; everything else is the application's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

SMALL = 128
"""Side in pixels that text-to-image workflows are run at, in place of their own."""
NOT_NEEDED = ("comfyui-workflow-templates", "comfyui-embedded-docs")
"""Requirements of the application that hold only pictures and texts, by the gigabyte."""
SPACES = ("flux", "flux2", "sd3", "sdxl", "qwenimage")
LOADERS = {
    "UNETLoader": "diffusion_models", "CLIPLoader": "text_encoders", "DualCLIPLoader": "text_encoders",
    "CheckpointLoaderSimple": "checkpoints",
}  # fmt: skip
"""Loaders of large files, and the folder of those."""
WORKFLOWS = sorted((ROOT / "comfyui" / "example_workflows").glob("*.json"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass(frozen=True)
class Application:
    """A running ComfyUI: its address, and the folder of its models, inputs and outputs."""

    url: str
    base: Path

    def ask(self, path: str, content: Any = None) -> Any:
        """Answer of the HTTP API, read as JSON; an error of the application is raised with its text."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path} answered {error.code}: {error.read().decode()[:2000]}") from None
        return json.loads(text) if text else None

    def run(self, prompt: dict[str, Any], seconds: float = 300, interrupt_after: float | None = None) -> dict[str, Any]:
        """Run a prompt to its end; returns its entry of the history."""
        number = self.ask("/prompt", {"prompt": prompt})["prompt_id"]
        if interrupt_after is not None:
            time.sleep(interrupt_after)
            self.ask("/interrupt", {})
        for _ in range(round(seconds / 0.2)):
            history = self.ask(f"/history/{number}")
            if number in history:
                return dict(history[number])
            time.sleep(0.2)
        raise SystemExit(f"A workflow took more than {seconds:g} s.")


def make_environment(checkout: Path, venv: Path) -> Path:
    """An interpreter with the application's requirements and this package."""
    from make_env import CPU_INDEX, make_venv, torch_version

    python = make_venv(venv)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    ours = ("torch", "torchvision", "torchaudio")
    if not torch_version(python):  # CPU builds where they can be reached, else the default ones, which are large
        small = [*install, "--index-url", CPU_INDEX, "--retries", "0", "--timeout", "20", *ours]
        if subprocess.run(small, check=False, stderr=subprocess.DEVNULL).returncode:
            subprocess.run([*install, *ours], check=True)
    wanted = (checkout / "requirements.txt").read_text().splitlines()
    rest = [line for line in wanted if line.strip() and not line.startswith(("#", *ours, *NOT_NEEDED))]
    torchsde = [line for line in wanted if line.startswith("torchsde")]
    subprocess.run([*install, *rest, *torchsde, str(ROOT)], check=True)
    return python


def lay_out(checkout: Path, base: Path) -> None:
    """The application's folders: our nodes, the stand-ins, small decoders, the checkout's example image."""
    from PIL import Image

    from pidecode.registry.configs import debug_config
    from pidecode.registry.spaces import SPACES as ROWS
    from random_networks import save_student

    shutil.rmtree(base, ignore_errors=True)
    for folder in ("custom_nodes", "input", "models/diffusion_models", "models/loras", "output", "user/default"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "pidecode").symlink_to(ROOT / "comfyui")
    (base / "custom_nodes" / "stand_ins").symlink_to(HERE / "stand_ins")
    # Without this the first visit opens a window of templates over the workflow.
    settings = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings))
    for flow in WORKFLOWS:  # empty files, so that the window finds the names in its lists
        for node in json.loads(flow.read_text())["nodes"]:
            folder = base / "models" / LOADERS.get(node["type"], "none")
            for value in node.get("widgets_values", ()):
                if node["type"] in LOADERS and str(value).endswith(".safetensors"):
                    folder.mkdir(exist_ok=True)
                    (folder / value).touch()
    with Image.open(checkout / "input" / "example.png") as image:
        image.convert("RGB").resize((SMALL, SMALL)).save(base / "input" / "example.png")
    for name, text_dim in [(space, 0) for space in SPACES] + [("flux_text", 64)]:
        row = ROWS[name.removesuffix("_text")]
        config = debug_config(
            text_dim=text_dim, latent_channels=row.channels, latent_down=row.down, latent_unpatchify=row.raw_patch
        )
        save_student(config, base / "models" / "diffusion_models" / f"{name}.safetensors", space=row.name)


@contextmanager
def running(checkout: Path, python: Path, base: Path) -> Iterator[Application]:
    """The application, started and stopped again; its log is `base`/server.log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base),
        "--database-url", "sqlite:///:memory:", "--disable-api-nodes", "--disable-auto-launch", "--preview-method",
        "auto",
    ]  # fmt: skip
    # This tree's package, whatever an existing environment has.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    app = Application(f"http://127.0.0.1:{port}", base)
    with open(base / "server.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            for _ in range(600):
                if server.poll() is not None:
                    raise SystemExit(f"ComfyUI ended:\n{(base / 'server.log').read_text()[-3000:]}")
                try:
                    urllib.request.urlopen(f"{app.url}/system_stats", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield app
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


SHOW_ALL = """() => {
    app.canvas.selectItems();
    app.canvas.fitViewToSelectionAnimated?.({duration: 50});
    app.canvas.deselectAll();
}"""
CANVAS_BOXES = "() => app.graph.nodes.map(node => [node.type, ...(node.getBounding?.() ?? node.boundingRect)])"
HTML_BOXES = """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
    const box = element.getBoundingClientRect();
    return [app.graph.getNodeById(element.dataset.nodeId).type, box.x, box.y, box.width, box.height];
})"""
NODES_2 = """async on => {
    const settings = app.extensionManager.setting;
    if (settings.get('Comfy.VueNodes.Enabled') === undefined) return false;
    await settings.set('Comfy.VueNodes.Enabled', on);
    return true;
}"""
"""Whether nodes are drawn as HTML (Nodes 2.0) or on a canvas; says false where there is only the canvas."""


def look_at(page: Any, path: Path, screenshot: Path, boxes: str) -> None:
    """Load a workflow in the window, keep a screenshot, and check that no node lies on another."""
    page.evaluate("async flow => { await app.loadGraphData(flow); }", json.loads(path.read_text()))
    page.wait_for_timeout(1500)
    page.evaluate(SHOW_ALL)
    page.wait_for_timeout(1500)
    page.screenshot(path=str(screenshot))
    for (one, left, top, width, height), (other, x, y, w, h) in itertools.combinations(page.evaluate(boxes), 2):
        if left < x + w and x < left + width and top < y + h and y < top + height:
            raise SystemExit(f"{path.name}: {one} and {other} lie on each other in the window.")


def as_drawn(page: Any, path: Path, folder: Path) -> dict[str, Any]:
    """Look at a workflow in the window, both ways that it draws nodes; returns the prompt that it would send."""
    if page.evaluate(NODES_2, True):
        look_at(page, path, folder / f"{path.stem}_nodes2.png", HTML_BOXES)
        page.evaluate(NODES_2, False)
    look_at(page, path, folder / f"{path.stem}.png", CANVAS_BOXES)
    return dict(page.evaluate("async () => (await app.graphToPrompt()).output"))


def with_small_models(prompt: dict[str, Any]) -> dict[str, Any]:
    """The prompt with stand-ins for loaders of large files, and small images."""
    own_samplers = any(node["class_type"] == "PidecodeConditioning" for node in prompt.values())
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in LOADERS:
            node["class_type"] = f"{kind}StandIn"
            name = next(str(value) for value in inputs.values())
            node["inputs"] = {"name": name} | ({"tokens": 10} if inputs.get("type") == "pixeldit" else {})
        elif kind == "PidecodeLoadDecoder" and inputs["model"] != "tiny":
            inputs["model"] = inputs["model"].partition("/")[0] + ("_text" if own_samplers else "") + ".safetensors"
        elif kind.startswith(("Empty", "Flux2Scheduler")):
            inputs |= {"width": SMALL, "height": SMALL}
    return prompt


def check_workflow(app: Application, name: str, prompt: dict[str, Any]) -> list[Path]:
    """Run a workflow; returns its images."""
    began = time.monotonic()
    entry = app.run(with_small_models(prompt))
    status = entry["status"]
    if status["status_str"] != "success":
        message = next((event[1] for event in status["messages"] if event[0] == "execution_error"), status)
        raise SystemExit(f"{name} failed in {message.get('node_type')}: {message.get('exception_message')}")
    files = [app.base / "output" / image["filename"] for out in entry["outputs"].values() for image in out["images"]]
    if not files:
        raise SystemExit(f"{name} made no image.")
    print(f"  ran in {time.monotonic() - began:.1f} s: {', '.join(file.name for file in files)}")
    return files


def error_of(app: Application, prompt: dict[str, Any], **changes: dict[str, Any]) -> str:
    """The message on the node that fails, after inputs of nodes (by class) were changed."""
    prompt = json.loads(json.dumps(prompt))
    for node in prompt.values():
        node["inputs"] |= changes.get(node["class_type"], {})
        node["inputs"] = {name: value for name, value in node["inputs"].items() if value is not None}
    status = app.run(prompt)["status"]
    errors = [event[1] for event in status["messages"] if event[0] == "execution_error"]
    if not errors:
        raise SystemExit(f"{changes} was not refused: {status}")
    return f"{errors[0]['node_type']}: {errors[0]['exception_message'].strip()}"


def expect_message(said: str, words: str) -> None:
    print(f"  {said}")
    if words not in said or any(python in said for python in ("=", "from_pretrained", "()", "Traceback")):
        raise SystemExit(f"Expected a message in the words of a node with {words!r}.")


def check_upscale(app: Application, prompt: dict[str, Any]) -> None:
    """Messages of wrong inputs, how soon an interrupt acts, and `/free`."""
    text = app.base / "notes.txt"
    text.write_text("no decoder\n")
    upscale, loader = "PidecodeUpscale", "PidecodeLoadDecoder"
    expect_message(error_of(app, prompt, **{upscale: {"num_steps": 2}}), "set its widget to the default")
    expect_message(error_of(app, prompt, **{loader: {"file": f'"{text}"'}}), "notes.txt")
    expect_message(error_of(app, prompt, **{loader: {"file": "nowhere.safetensors"}}), "correct the loader's file")
    expect_message(error_of(app, prompt, **{upscale: {"width": 5000}}), "more than 4 times the image")
    inputs = next(node for node in prompt.values() if node["class_type"] == upscale)["inputs"]
    image, large = inputs["image"], {"upscale_method": "bilinear", "width": 1024, "height": 1024, "crop": "disabled"}
    prompt["large"] = {"class_type": "ImageScale", "inputs": {"image": image, **large}}
    inputs["image"] = ["large", 0]  # enough work to be interrupted in
    for wait in (0.3, 1.0, 2.0):
        events = {
            name: about["timestamp"] / 1000
            for name, about in app.run(prompt, interrupt_after=wait)["status"]["messages"]
        }
        seconds = events.get("execution_interrupted", math.inf) - events["execution_start"]
        if seconds > wait + 5:
            raise SystemExit(f"An interrupt after {wait:g} s was not heeded within 5 s: {events}")
        print(f"  interrupted after {wait:g} s, ended after {seconds:.1f} s")
    inputs["image"] = image
    del prompt["large"]
    app.run(prompt)
    for path, cached in ((None, True), ("/free", False)):
        if path is not None:
            app.ask(path, {"unload_models": True, "free_memory": True})
            time.sleep(2)
        messages = dict(app.run(prompt)["status"]["messages"])
        if bool(messages["execution_cached"]["nodes"]) != cached or "execution_success" not in messages:
            raise SystemExit(f"After {path} the nodes were {'not ' * cached}kept, or failed: {messages}")
    print("  /free: decoder and results were given back, and made again")


def check_decode(app: Application, prompt: dict[str, Any]) -> None:
    """Messages of latents that do not fit the decoder."""
    decode, loader, stop = "PidecodeDecode", "PidecodeLoadDecoder", "PidecodeEarlyStop"
    alone, unchecked = {"model": None, "latent_sigma": 0.0}, {"decoder": None, "samples": None}
    other = {loader: {"model": "sdxl.safetensors"}}
    for changes, words in (
        (other, "load the decoder for flux"),  # before sampling
        (other | {stop: unchecked}, "load the decoder for flux"),
        (other | {stop: unchecked, decode: alone}, "load the decoder for the model that made it"),
        ({"EmptySD3LatentImage": {"width": 16384, "height": 16384}}, "Make a smaller image."),
        ({decode: {"model": None}}, "connect the MODEL that made it"),
        ({loader: {"model": "flux_text.safetensors"}, decode: {"prompt": "a cat"}}, "text encoder"),
    ):
        expect_message(error_of(app, prompt, **changes), words)


COUNT_PREVIEWS = """() => {
    window.previews = 0;
    app.api.addEventListener('b_preview', () => window.previews++);
    window.ended = null;
    app.api.addEventListener('execution_success', () => { window.ended = 'success'; });
    app.api.addEventListener('execution_error', event => { window.ended = event.detail.exception_message; });
}"""
CHOOSE = """([type, name, value]) => {
    const node = app.graph.nodes.find(node => node.type === type);
    node.widgets.find(widget => widget.name === name).value = value;
}"""


def watch_run(page: Any, path: Path, folder: Path) -> None:
    """Run the workflow from the window with a decoder of four steps: previews on the node, then the result."""
    page.evaluate("async flow => { await app.loadGraphData(flow); }", json.loads(path.read_text()))
    page.evaluate(CHOOSE, ["PidecodeLoadDecoder", "model", "flux2.safetensors"])
    page.wait_for_timeout(1000)
    page.evaluate(SHOW_ALL)
    page.evaluate(COUNT_PREVIEWS)
    page.evaluate("async () => { await app.queuePrompt(0); }")
    page.wait_for_function("() => window.previews > 1 || window.ended", timeout=120_000)
    page.screenshot(path=str(folder / f"{path.stem}_preview.png"))
    page.wait_for_function("() => window.ended", timeout=120_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=str(folder / f"{path.stem}_done.png"))
    ended, previews = page.evaluate("() => [window.ended, window.previews]")
    print(f"  from the window: {ended}, {previews} previews")
    if ended != "success" or previews < 2:
        raise SystemExit(f"Run from the window: {ended} with {previews} previews.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of ComfyUI")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "comfyui", help="folder for all that is made")
    parser.add_argument(
        "--python", type=Path, help="an interpreter that has the requirements of ComfyUI and of pidecode"
    )
    parser.add_argument("workflows", nargs="*", help="names of workflows; by default all")
    arguments = parser.parse_intermixed_args()
    checkout, base = arguments.checkout.resolve(), (arguments.out / "base").resolve()
    if not (checkout / "main.py").is_file():
        sys.exit(f"{checkout} is no checkout of ComfyUI: it has no main.py. Give one as COMFYUI=/path/to/ComfyUI.")
    if CHROMIUM is None:
        sys.exit("There is no chromium on PATH; install Debian's package chromium.")
    from playwright.sync_api import sync_playwright

    python = arguments.python or make_environment(checkout, ROOT / ".venv-comfyui")
    lay_out(checkout, base)
    paths = [path for path in WORKFLOWS if path.stem in arguments.workflows or not arguments.workflows]
    with running(checkout, python.absolute(), base) as app, sync_playwright() as driver:
        print(f"ComfyUI {app.ask('/system_stats')['system']['comfyui_version']}")
        if "PidecodeLoadDecoder" not in app.ask("/object_info"):
            sys.exit(f"ComfyUI did not load the nodes: {base / 'server.log'} says why.")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1800, "height": 1000})
        page.goto(app.url, wait_until="domcontentloaded")
        page.wait_for_function("() => window.app?.graph && window.app.vueAppReady !== false", timeout=120_000)
        page.wait_for_timeout(3000)
        for path in paths:
            print(path.stem)
            prompt = as_drawn(page, path, arguments.out)
            for image in check_workflow(app, path.stem, prompt):
                shutil.copy(image, arguments.out / f"{path.stem}_result.png")
            if path.stem == "upscale_image":
                check_upscale(app, prompt)
                watch_run(page, path, arguments.out)
            if path.stem == "flux_early_stop":
                check_decode(app, prompt)
        browser.close()
    print(f"All {len(paths)} workflows ran; screenshots and results are in {arguments.out}.")


if __name__ == "__main__":
    main()
