# SPDX-License-Identifier: Apache-2.0
"""Finding and fetching weights: the hub's real cache layout, and the real client against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from pidecode.errors import Cancelled, CheckpointError, DownloadError, LicenseError, SettingError
from pidecode.registry.checkpoints import TEXT_ENCODER, get_checkpoint
from pidecode.weights.download import download_checkpoint
from pidecode.weights.resolve import HubCache, asset, cached_encoder_path, resolve_checkpoint

ROW = get_checkpoint("flux", "2k")
COMMIT = "c0ffee" * 6 + "c0ff"
DECODER = bytes(range(256)) * 12_000
FILES = {
    "nvidia/PiD": {ROW.path: DECODER, "checkpoints/ae.safetensors": b"encoder" * 100, "README.md": b"card",
                   "checkpoints/scale_rae/a.json": b"{}", "checkpoints/scale_rae/sub/b.bin": b"b" * 50,
                   get_checkpoint("siglip").path: b"siglip"},
    TEXT_ENCODER: {"config.json": b"{}", "model.safetensors": b"gemma" * 200, "pytorch_model.bin": b"never",
                   "tokenizer.json": b"{}"},
    "google/siglip2-so400m-patch14-224": {"config.json": b"{}", "model.safetensors": b"eyes"},
}  # fmt: skip


class FakeHub(ThreadingHTTPServer):
    """Answers the client's HEAD, GET and listing requests for FILES; breaks off, lies or closes its gates on demand."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.cut_at = None
        self.corrupt = False
        self.gated = False
        self.ranges = []
        self.requests = 0
        self.commit, self.moves = COMMIT, False  # with `moves`, each request finds another commit on the main branch

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub = self.server
        hub.requests += 1
        if hub.moves:
            hub.commit = f"{hub.requests:040x}"
        if hub.gated:
            return self.reply(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        listing = re.fullmatch(r"/api/models/([^/]+/[^/?]+).*", self.path)
        if listing:
            siblings = [{"rfilename": name} for name in FILES[listing[1]]]
            body = json.dumps(
                {"id": listing[1], "modelId": listing[1], "sha": hub.commit, "siblings": siblings}
            ).encode()
            return self.reply(200, {"Content-Type": "application/json"}, body)
        repository, revision, path = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+).*", self.path).groups()
        commit = hub.commit if revision == "main" else revision
        body = FILES.get(repository, {}).get(path)
        if body is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.reply(200, headers | {"Content-Length": str(len(body))})
        return self.send_file(body, headers, path)

    def send_file(self, body, headers, path):
        hub = self.server
        if hub.corrupt and path == ROW.path:
            body = bytes(len(body))
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if path == ROW.path:
            hub.ranges.append(start)
        if hub.cut_at is not None and path == ROW.path:
            if start >= hub.cut_at:
                return self.reply(503, {})
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: hub.cut_at])
            self.close_connection = True
            return None
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.reply(206 if start else 200, headers, body[start:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def hub(server, tmp_path):
    return HubCache(cache_dir=tmp_path / "cache", endpoint=server.url)


def fill_cache(cache, repository, path, content):
    """One file as the hub's client lays it out: a blob by its hash, a snapshot that links to it, a ref."""
    home = cache / f"models--{repository.replace('/', '--')}"
    blob = home / "blobs" / hashlib.sha256(content).hexdigest()
    link = home / "snapshots" / COMMIT / path
    for folder in (blob.parent, link.parent, home / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(blob)
    (home / "refs" / "main").write_text(COMMIT)
    return link


def test_everything_comes_in_one_go_after_the_license(hub, server, tmp_path):
    with pytest.raises(LicenseError, match=r"(?s)NVIDIA Source Code.*not for commercial use.*accept_license=True"):
        download_checkpoint("flux", "2k", hub=hub)
    assert server.requests == 0  # nothing is asked before the license is accepted
    seen = []
    pulled = download_checkpoint("flux", "2k", accept_license=True, on_progress=seen.append, hub=hub)
    assert pulled.decoder.read_bytes() == DECODER
    assert pulled.encoder.read_bytes() == FILES["nvidia/PiD"]["checkpoints/ae.safetensors"]
    assert (pulled.text_encoder / "model.safetensors").is_file()
    assert not (pulled.text_encoder / "pytorch_model.bin").exists()
    assert {step.file for step in seen} >= {ROW.path, "checkpoints/ae.safetensors", "model.safetensors"}
    assert [step for step in seen if step.file == ROW.path][-1].done == len(DECODER)
    before = server.requests
    assert download_checkpoint("flux", "2k", hub=hub) == pulled  # all there: no network, no license
    assert server.requests == before
    assert resolve_checkpoint("nvidia/PiD", space="flux", variant="2k", hub=hub).path == pulled.decoder
    assert resolve_checkpoint("nvidia/PiD", space="zimage", hub=hub).encoder == pulled.encoder
    assert not list((tmp_path / "cache").rglob("*.part*"))


def test_folders_and_further_models(hub):
    pulled = download_checkpoint("siglip", accept_license=True, text=False, hub=hub)
    assert (pulled.encoder / "sub" / "b.bin").read_bytes() == b"b" * 50
    assert pulled.text_encoder is None
    assert [path.name for path in pulled.others] == [COMMIT]
    assert download_checkpoint("siglip", text=False, hub=hub) == pulled
    assert cached_encoder_path("siglip", hub) == pulled.encoder
    (pulled.encoder / "a.json").unlink()
    with pytest.raises(LicenseError):
        download_checkpoint("siglip", text=False, hub=hub)


def test_all_files_of_a_repository_come_from_one_commit(hub, server, tmp_path):
    server.moves = True
    pulled = download_checkpoint("siglip", accept_license=True, text=False, hub=hub)
    home = tmp_path / "cache" / "models--nvidia--PiD"
    (snapshot,) = (home / "snapshots").iterdir()
    assert snapshot.name == (home / "refs" / "main").read_text()
    assert pulled.decoder.is_relative_to(snapshot)
    assert pulled.encoder == snapshot / "checkpoints" / "scale_rae"
    # A newer commit comes for another decoder; what was fetched before is still found without the network.
    download_checkpoint("flux", "2k", accept_license=True, text=False, hub=hub)
    assert len(list((home / "snapshots").iterdir())) == 2
    assert (home / "refs" / "main").read_text() != snapshot.name
    before = server.requests
    assert download_checkpoint("siglip", text=False, hub=hub) == pulled
    assert (server.requests, cached_encoder_path("siglip", hub)) == (before, pulled.encoder)
    assert resolve_checkpoint("nvidia/PiD", space="siglip", hub=hub).path == pulled.decoder


def test_an_interrupted_download_leaves_the_main_revision(hub, server, tmp_path):
    download_checkpoint("siglip", accept_license=True, text=False, hub=hub)
    main = tmp_path / "cache" / "models--nvidia--PiD" / "refs" / "main"
    server.moves, server.cut_at = True, 100
    with pytest.raises(DownloadError):
        download_checkpoint("flux", "2k", accept_license=True, text=False, hub=hub)
    assert main.read_text() == COMMIT


def test_a_broken_fetch_goes_on_where_it_stopped(hub, server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # what is lost at most
    server.cut_at = len(DECODER) // 3
    with pytest.raises(
        DownloadError, match=r"could not be fetched .* What arrived is kept.*`hf download nvidia/PiD checkp"
    ):
        download_checkpoint("flux", "2k", accept_license=True, hub=hub)
    server.cut_at, server.ranges = None, []
    seen = []
    pulled = download_checkpoint("flux", "2k", accept_license=True, on_progress=seen.append, hub=hub)
    (start,) = server.ranges
    assert len(DECODER) // 3 - 1024 <= start <= len(DECODER) // 3
    assert start < seen[0].done <= len(DECODER)
    assert pulled.decoder.read_bytes() == DECODER


def test_cancelling_keeps_what_arrived(hub, server):
    def stop(step):
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        download_checkpoint("flux", "2k", accept_license=True, on_progress=stop, hub=hub)
    assert download_checkpoint("flux", "2k", accept_license=True, hub=hub).decoder.read_bytes() == DECODER


def test_damage_on_the_way_is_noticed(hub, server):
    server.corrupt = True
    with pytest.raises(DownloadError, match="arrived damaged and was deleted"):
        download_checkpoint("flux", "2k", accept_license=True, hub=hub)
    assert hub.cached("nvidia/PiD", ROW.path) is None
    server.corrupt = False
    assert download_checkpoint("flux", "2k", accept_license=True, hub=hub).decoder.read_bytes() == DECODER


def test_gated_and_vanished_files(hub, server):
    with pytest.raises(DownloadError, match="is not in the repository any more"):
        download_checkpoint("sd3", "2k", accept_license=True, hub=hub)
    server.gated = True
    with pytest.raises(DownloadError, match=r"accept its terms at https://huggingface\.co/nvidia/PiD, .*hf auth login"):
        download_checkpoint("flux", "2k", accept_license=True, hub=hub)


def test_no_network_is_one_clear_line(server, tmp_path):
    nowhere = HubCache(cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    with pytest.raises(DownloadError) as fault:
        download_checkpoint("flux", "2k", accept_license=True, hub=nowhere)
    message = str(fault.value)
    assert "\n" not in message
    assert f"`hf download nvidia/PiD {ROW.path}`" in message


def test_offline_mode_is_named(tmp_path):
    with pytest.raises(DownloadError, match=r"offline mode is on \(HF_HUB_OFFLINE\).*hf download"):
        download_checkpoint("flux", "2k", accept_license=True, hub=HubCache(cache_dir=tmp_path))


def test_what_ships_needs_no_fetching():
    with pytest.raises(SettingError, match="no student 'huge'"):
        download_checkpoint("flux", "huge")


def test_another_programs_text_encoder_counts(tmp_path):
    hub = HubCache(cache_dir=tmp_path)
    fill_cache(tmp_path, "nvidia/PiD", ROW.path, b"d")
    fill_cache(tmp_path, "nvidia/PiD", "checkpoints/ae.safetensors", b"e")
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    for name, content in {
        "config.json": b"{}",
        "model.safetensors.index.json": index,
        "model-1.safetensors": b"1",
    }.items():
        fill_cache(tmp_path, TEXT_ENCODER, name, content)
    with pytest.raises(LicenseError):
        download_checkpoint("flux", "2k", hub=hub)
    fill_cache(tmp_path, TEXT_ENCODER, "model-2.safetensors", b"2")
    assert download_checkpoint("flux", "2k", hub=hub).text_encoder.name == COMMIT


def test_files_and_folders(tmp_path):
    only = tmp_path / "one" / "net.safetensors"
    only.parent.mkdir()
    only.touch()
    (tmp_path / "one" / "notes.txt").touch()
    assert resolve_checkpoint(only).path == only
    assert (resolve_checkpoint(str(tmp_path / "one")).path, resolve_checkpoint(only).name) == (only, "net")
    (tmp_path / "one" / "other.pth").touch()
    with pytest.raises(CheckpointError, match=r"2 weights files \(net\.safetensors, other\.pth\)"):
        resolve_checkpoint(tmp_path / "one")
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights file"):
        resolve_checkpoint(tmp_path / "none")
    with pytest.raises(SettingError, match="no file or folder here and no known decoder.*'tiny'"):
        resolve_checkpoint("a nonsense name")
    assert resolve_checkpoint("missing.safetensors").path.name == "missing.safetensors"


def test_what_ships():
    found = resolve_checkpoint("tiny")
    assert (found.path, found.space, found.variant) == (asset("tiny.safetensors"), "flux2", "tiny")
    assert found.encoder == asset("tiny_encoder.safetensors")
    assert resolve_checkpoint("nvidia/PiD", space="flux2", variant="tiny").path == found.path
    with pytest.raises(SettingError, match="of space flux2, not of sd3"):
        resolve_checkpoint("tiny", space="sd3")
    assert download_checkpoint("tiny").decoder == found.path


def test_official_folders(tmp_path):
    decoder = tmp_path / ROW.path
    decoder.parent.mkdir(parents=True)
    decoder.touch()
    assert resolve_checkpoint(tmp_path, space="zimage").path == decoder
    assert resolve_checkpoint(tmp_path / "checkpoints", space="flux", variant="2k").path == decoder
    with pytest.raises(SettingError, match="say space="):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no sd3/2k .* it has flux/2k"):
        resolve_checkpoint(tmp_path, space="sd3")


def test_hub_ids(tmp_path):
    hub = HubCache(cache_dir=tmp_path)
    with pytest.raises(
        DownloadError, match=r"`pidecode pull flux --variant 2k`.*NSCLv1.*`hf download nvidia/PiD checkpoints"
    ):
        resolve_checkpoint("nvidia/PiD", space="flux", hub=hub)
    with pytest.raises(DownloadError, match="--kind teacher"):
        resolve_checkpoint("nvidia/PiD", space="flux", kind="teacher", hub=hub)
    with pytest.raises(SettingError, match="several latent spaces"):
        resolve_checkpoint("nvidia/PiD", hub=hub)
    with pytest.raises(DownloadError, match=r"`hf download someone/theirs`"):
        resolve_checkpoint("someone/theirs", hub=hub)
    assert cached_encoder_path("sd3", hub) is None
    assert cached_encoder_path("siglip", hub) is None
    link = fill_cache(tmp_path, "nvidia/PiD", ROW.path, b"x")
    found = resolve_checkpoint("nvidia/PiD", space="flux", hub=hub)
    assert (found.path, found.space, found.variant, found.kind, found.encoder) == (link, "flux", "2k", "student", None)
    theirs = fill_cache(tmp_path, "someone/theirs", "model.safetensors", b"x")
    assert resolve_checkpoint("someone/theirs", hub=hub).path == theirs


def test_looking_for_weights_needs_no_torch():
    code = "import sys, pidecode.weights.download, pidecode.weights.metadata; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["flux2/2k", "flux2/2kto4k_v1pt5/teacher", "flux2", "zimage", "pixeldit/2kto4k/backbone"]
)
def test_names_as_the_list_prints_them_say_how_to_download(name: str) -> None:
    with pytest.raises(DownloadError, match="pidecode pull"):
        resolve_checkpoint(name)


def test_listed_names_that_ship_are_found_and_contradictions_refused() -> None:
    assert resolve_checkpoint("flux2/tiny").path == resolve_checkpoint("tiny").path
    with pytest.raises(SettingError, match="flux2/2k is variant 2k and a student"):
        resolve_checkpoint("flux2/2k", variant="2kto4k_v1pt5")
    with pytest.raises(SettingError, match="tiny is variant tiny and a feed-forward; leave variant and kind out"):
        resolve_checkpoint("tiny", variant="2k")


def test_a_fetch_is_pinned_where_the_registry_knows_the_file_and_recorded(hub, tmp_path):
    known = hashlib.sha256(DECODER).hexdigest()
    with pytest.raises(DownloadError, match=rf"its SHA-256 is {known}, not {'0' * 64}"):
        hub.fetch("nvidia/PiD", ROW.path, expected="0" * 64)
    assert not list((tmp_path / "cache").rglob("*.pth"))
    path = hub.fetch("nvidia/PiD", ROW.path, expected=known, revision=COMMIT)
    assert path.read_bytes() == DECODER
    assert hub.cached("nvidia/PiD", ROW.path, COMMIT) == path
    (record,) = (tmp_path / "cache" / "pidecode").glob("*.json")
    noted = json.loads(record.read_text())
    assert noted == {"repository": "nvidia/PiD", "path": ROW.path, "revision": COMMIT, "sha256": known}


@pytest.mark.parametrize("etag", ["../../../evil", "/etc/evil", "", "a" * 500])
def test_a_hub_does_not_choose_where_a_file_goes(hub, monkeypatch, tmp_path, etag):
    class About:
        commit_hash, size, location = COMMIT, 3, hub.endpoint

    About.etag = etag
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: About)
    with pytest.raises(DownloadError, match="does not say"):
        hub.fetch("nvidia/PiD", ROW.path)
    assert not list(tmp_path.rglob("evil*"))


def test_small_files_are_checked_against_their_git_hash(hub, server, monkeypatch):
    real = huggingface_hub.get_hf_file_metadata

    def small(*args, **settings):
        about = real(*args, **settings)
        return type(about)(commit_hash=about.commit_hash, etag="1" * 40, location=about.location, size=about.size,
                           xet_file_data=None)  # fmt: skip

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", small)
    with pytest.raises(DownloadError, match="arrived damaged"):
        hub.fetch("nvidia/PiD", "README.md")
