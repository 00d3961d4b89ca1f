# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of README and docs runs, every command line there parses, every link leads somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from PIL import Image

from pidecode import PixelDecoder
from pidecode.cli.app import cli
from pidecode.errors import LatentError
from pidecode.latents.latent import Latent, NormalizationWarning
from pidecode.registry.configs import debug_config
from pidecode.weights.metadata import CheckpointMetadata
from random_networks import normal_net

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path
    for path in [ROOT / "README.md", ROOT / "comfyui" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name != "messages.md"
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


# Blocks that need what a reader has and this test has not, by words in them, and what runs their like.
ELSEWHERE = {"base_url=": "tests/serving", "blocks = pidecode.pid_blocks(": "tests/unit/test_modular.py"}
GOES_ON = {"diffusers.md"}  # pages whose first block makes what the others use


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(path.read_text(encoding="utf-8")) if kind == language]


def small_decoder(space: str) -> PixelDecoder:
    """A random network of the real classes, as small as they come, in the place of a released one or tiny."""
    shapes = {
        "flux2": dict(latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0"),
        "flux": dict(latent_channels=16, latent_down=8),
    }
    config = debug_config(text_dim=0, **shapes[space])
    decoder = PixelDecoder(
        normal_net(config),
        CheckpointMetadata(kind="student", config=config, space=space, license="Apache-2.0"),
        name=space,
    )
    if space == "flux2":
        decoder.encoder = lambda images: torch.nn.functional.avg_pool2d(images, 16).repeat(1, 43, 1, 1)[:, :128]
    return decoder


def snippets() -> list[Any]:
    """Page and blocks that run together: one, or, where a page goes on from its first block, all of them."""
    params = []
    for path in PAGES:
        code = blocks(path, "python") if path.parent.name != "spaces" else []
        runs = [code] if path.name in GOES_ON and code else [[block] for block in code]
        for number, run in enumerate(runs, start=1):
            slow = [pytest.mark.slow] if any("Pipeline.from_pretrained" in block for block in run) else []
            params.append(pytest.param(path, run, marks=slow, id=f"{name_of(path)}-{number}"))
    return params


@pytest.mark.parametrize(("path", "code"), snippets())
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning")
def test_snippets_run_alone_and_twice(
    path: Path, code: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would paste them, in a folder with a photo and latents, and then once more."""

    def from_pretrained(name: str, *, space: str | None = None, **_: Any) -> PixelDecoder:
        return small_decoder(space or (name if name in ("flux", "flux2") else "flux2"))

    code = [block for block in code if not any(words in block for words in ELSEWHERE)]
    monkeypatch.setattr(PixelDecoder, "from_pretrained", staticmethod(from_pretrained))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (24, 17), "teal").save("photo.jpg")
    Path("latents").mkdir()
    Latent(torch.randn(1, 128, 1, 1) * 0.7, "flux2").save("latents/one.safetensors")
    if any("FluxPipeline" in block for block in code):
        diffusers = pytest.importorskip("diffusers")
        import tiny_pipelines as pipelines

        tiny = pipelines.build("flux")
        monkeypatch.setattr(diffusers.FluxPipeline, "from_pretrained", lambda *_, **__: tiny)
        small = {"height=512, width=512": "height=64, width=96", 'fog", height': 'fog", num_inference_steps=4, height'}
        for old, new in small.items():
            code = [block.replace(old, new) for block in code]
    for _ in range(2):
        namespace: dict[str, Any] = {}
        for number, block in enumerate(code, start=1):
            exec(compile(block, f"{name_of(path)}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "spaces").glob("*.md")), ids=name_of)
def test_snippets_of_the_spaces_compile(path: Path) -> None:
    """They start from other programs' pipelines and files at full size; tests/test_examples.py runs their like."""
    for number, block in enumerate(blocks(path, "python"), start=1):
        compile(block, f"{name_of(path)}, block {number}", "exec")


def commands(path: Path) -> list[list[str]]:
    """Arguments of every `pidecode ...` line in a page's shell blocks."""
    lines = [line.strip() for block in blocks(path, "sh") for line in block.replace("\\\n", " ").splitlines()]
    # "..." in a line stands for options told before.
    words = [shlex.split(line.replace(" ...", ""), comments=True) for line in lines if "pidecode" in line]
    return [word[word.index("pidecode") + 1 :] for word in words if "pidecode" in word]


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=name_of)
def test_command_lines_parse(path: Path) -> None:
    """Each names a command there is, with options it has; nothing is run."""
    context = click.Context(cli)
    for words in commands(path):
        command = cli.get_command(context, words[0])
        assert command is not None, f"{name_of(path)}: there is no command {words[0]}"
        command.make_context(words[0], list(words[1:]))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    targets = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    made = {"messages.md"}  # written when the site is built
    assert [link for link in targets if link not in made and not (path.parent / link).exists()] == []


def test_manifest_lines_are_json() -> None:
    for path in PAGES:
        for block in blocks(path, "json"):
            for line in block.splitlines() if block.count("\n{") else [block]:
                json.loads(line)


def make_docs() -> Any:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_messages_holds_them_all() -> None:
    page = make_docs().messages()
    for name in ("SettingError", "SizeError", "LatentError", "CheckpointError", "ImageError", "MissingDependencyError"):
        assert f"## {name}\n" in page
    assert "A … latent has … channels; got … in …. … | `latents/latent.py` |" in page
    with pytest.raises(LatentError, match="A flux2 latent has 128 channels; got 16"):
        Latent(torch.zeros(1, 16, 8, 8), space="flux2")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| message")]
    assert len(rows) > 150
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)


def test_the_site_asks_nobody_else_and_lists_every_page() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert site["theme"]["font"] is False
    listed = {
        file
        for entry in site["nav"]
        for value in entry.values()
        for file in ([value] if isinstance(value, str) else [path for inner in value for path in inner.values()])
    }
    there = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.is_relative_to(ROOT / "docs")}
    aside = {"images/README.md"}
    assert there - aside <= listed
    for path in (ROOT / "docs").rglob("*.svg"):
        assert not re.search(r"(href|src)\s*=\s*.https?:|@import|url\(h", path.read_text(encoding="utf-8"))
