"""Ids of the hub, through the real huggingface_hub, against a server on this machine."""

import fnmatch
import hashlib
import http.server
import json
import subprocess
import sys
import threading

import pytest

from jaxlm.interop import hub, tokenizer_files
from jaxlm.interop.mapping import BadModel
from tests.interop import tiny_hf
from tests.tiny import ROOT, environment, make_store

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes that snapshot_download asks for: what a repository holds, and its files."""

    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if path.startswith(f"/api/models/{REPO}/tree/"):
            entries = [
                {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for n, b in self.files.items()
            ]
            return self.answer(json.dumps(entries).encode(), body)
        if path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}
            about |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
            return self.answer(json.dumps(about).encode(), body)
        if (
            len(parts) >= 5
            and parts[2] == "resolve"
            and (name := "/".join(parts[4:])) in self.files
        ):
            return self.answer(self.files[name], body)
        self.send_error(404)

    def answer(self, blob, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob)))
        self.send_header("ETag", f'"{hashlib.sha256(blob).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(blob)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    source, _ = tiny_hf.write_recorded(tmp_path / "repository", "qwen3")
    Hub.files = {p.name: p.read_bytes() for p in source.iterdir()}
    Hub.files |= {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"import os",
        "onnx/config.json": b"{}",
    }
    Hub.files |= {"flax_model.msgpack": b"large", "consolidated.safetensors": b"the same again"}
    Hub.asked = []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def run(server, tmp_path, *arguments):
    # The endpoint is read when huggingface_hub is imported, so this is another process.
    env = environment() | {"HF_ENDPOINT": server, "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def convert(server, source, target, tmp_path):
    flags = ["--source", source, "--target", target, "--certificate=round_trip"]
    return run(server, tmp_path, "tools/convert_checkpoint.py", "from_hf", *flags)


def test_an_id_is_fetched_without_pickles_and_code_and_its_commit_recorded(server, tmp_path):
    pytest.importorskip("huggingface_hub")
    result = convert(server, f"{REPO}@main", tmp_path / "w", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    manifest = json.loads((tmp_path / "w/checkpoints/0/manifest/metadata").read_text())
    assert manifest["huggingface"]["commit"] == COMMIT
    assert manifest["huggingface"]["source"] == f"{REPO}@main"
    fetched = {p.rsplit("/", 1)[-1] for p in Hub.asked if "/resolve/" in p}
    assert {"config.json", "model.safetensors"} <= fetched
    unwanted = {
        "pytorch_model.bin",
        "modeling.py",
        "flax_model.msgpack",
        "consolidated.safetensors",
    }
    assert not fetched & unwanted
    assert not any("onnx" in path for path in Hub.asked)


def test_every_file_of_a_tokenizer_that_is_kept_is_fetched():
    names = set(tokenizer_files.FILES)
    assert names == {n for p in hub.PATTERNS for n in fnmatch.filter(names, p)}


def test_a_run_that_starts_from_an_id_records_its_commit(server, tmp_path):
    pytest.importorskip("huggingface_hub")
    assert convert(server, REPO, tmp_path / "w", tmp_path).returncode == 0
    store = make_store(tmp_path / "store")
    fields = {
        "init_from": f"hf:{REPO}@main",
        "data.sources": f"('{store}',)",
        "tokenizer.path": store / "tokenizer",
        "model.vocab_size": 264,
        "num_train_steps": 1,
        "batch_size": 2,
        "eval.batch_size": 2,
        "eval.num_batches": 1,
        "seq_len": 16,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    config = f"--config={tmp_path / 'w/config.json'}"
    run_dir = tmp_path / "run"
    result = run(server, tmp_path, "-m", "jaxlm.pretrain", config, f"--workdir={run_dir}", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    origin = json.loads((run_dir / "origin.json").read_text())
    assert origin == {"init_from": f"hf:{REPO}@main", "init": "params", "commit": COMMIT}


def test_an_id_that_the_hub_does_not_have_is_one_line(server, tmp_path):
    pytest.importorskip("huggingface_hub")
    result = convert(server, "someone/else", tmp_path / "w", tmp_path)
    assert result.returncode == 2 and "someone/else" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "name", ["../up", "/absolute/nowhere", "a/b/c", "a b", "", "https://x.y/z"]
)
def test_what_is_neither_folder_nor_id_is_refused(name):
    with pytest.raises(BadModel, match="no such folder"):
        hub.fetch(name)


def test_a_missing_huggingface_hub_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlm\[hf\]'"):
        hub.fetch("someone/tiny")
