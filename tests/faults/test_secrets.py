"""Secrets in the environment and in flags: in nothing that a run writes or says, also where it crashes or hangs."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import build, exits
from tests import test_finetune, tiny
from tests.faults.runs import TIMEOUT, at_point, write_config

NAMES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_API_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "MY_PASSWORD",
)
CANARIES = {name: f"canary/{number}+{name[::-1]}" for number, name in enumerate(NAMES)}
URL = "https://user:canary-of-a-password@host/data.jsonl"


def run(command: list[str]) -> subprocess.CompletedProcess:
    """With the canaries in its environment, and a umask that forbids nothing."""
    return subprocess.run(
        command,
        env=tiny.environment() | CANARIES,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        umask=0,
    )


def check_private(folder: Path, *said: str) -> None:
    """No canary in any file, name or word, and nothing that all may write to."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {str(path): path.read_bytes() for path in files}
    texts |= {f"output {i}": text.encode() for i, text in enumerate(said)}
    hits = [
        f"{name} in {where}"
        for where, text in texts.items()
        for name, value in (CANARIES | {"the URL's password": "canary-of-a-password"}).items()
        if value.encode() in text
    ]
    assert not hits, hits
    writable = [str(p) for p in folder.rglob("*") if p.stat().st_mode & stat.S_IWOTH]
    assert not writable, f"all may write: {writable}"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, store):
    """A run that crashes at its second checkpoint with all that it knows in its words, and goes on to its end."""
    folder = tmp_path_factory.mktemp("secrets")
    config = write_config(
        folder,
        "configs/gpt.py:tiny",
        store,
        log__tensorboard=True,
        num_train_steps=6,
        checkpoint_every_steps=3,
    )
    command = tiny.pretrain_command(config, folder / "run")
    crashed = run(at_point(command, "the folder of a step is made", 2, "fail"))
    return folder / "run", crashed, run(command)


def test_a_run_that_crashes_and_goes_on_keeps_its_secrets(pretrained):
    folder, crashed, finished = pretrained
    assert crashed.returncode != 0 and finished.returncode == 0, finished.stderr[-3000:]
    for line in ("error: {", "log: {", "warning: {"):
        assert line in crashed.stderr, f"the crash was to say {line}\n{crashed.stderr[-3000:]}"
    assert crashed.stderr.count("[$HF_TOKEN]") >= 2  # of the error itself only both ends are shown
    check_private(folder, crashed.stdout, crashed.stderr, finished.stdout, finished.stderr)
    assert list(folder.glob("events.out*")) and list(folder.glob("checkpoints/*/manifest"))


def test_fine_tuning_keeps_its_secrets(pretrained, tmp_path):
    rows = test_finetune.write_rows(tmp_path / "rows.csv")
    config = f"--config=configs/finetune/classification.py:train={rows}"
    changes = {
        "init_from": pretrained[0],
        "seq_len": 32,
        "batch_size": 8,
        "num_epochs": 1.0,
        "log.tensorboard": False,
    }
    command = [sys.executable, "-m", "jaxlm.finetune", config, f"--workdir={tmp_path / 'run'}"]
    ended = run([*command, *(f"--config.{name}={value}" for name, value in changes.items())])
    assert ended.returncode == 0, ended.stderr[-3000:]
    check_private(tmp_path / "run", ended.stdout, ended.stderr)
    assert (tmp_path / "run" / "report.json").is_file()


def test_the_stacks_of_a_run_that_hangs_keep_its_secrets(tmp_path, store):
    config = write_config(
        tmp_path, "configs/gpt.py:tiny", store, guards__watchdog_seconds=2, log__progress=False
    )
    command = tiny.pretrain_command(config, tmp_path / "run")
    hung = run(at_point(command, "the folder of a step is made", 1, "hang"))
    assert hung.returncode == exits.HUNG, hung.stderr[-3000:]
    stacks = (tmp_path / "run" / "stacks-0.txt").read_text()
    assert "at_point.py" in stacks
    check_private(tmp_path / "run", hung.stdout, hung.stderr)


@pytest.mark.parametrize(
    "flag", [f"--config.init_from={URL}", f"--config.tokenizer.path={CANARIES['HF_TOKEN']}"]
)
def test_a_secret_in_a_flag_is_refused_before_anything_is_written(flag, tmp_path):
    command = tiny.pretrain_command(Path("configs/gpt.py:tiny"), tmp_path / "run", flag)
    refused = run(command)
    assert refused.returncode == 1
    assert f"{flag.partition('=')[0]}: holds" in refused.stderr
    assert not (tmp_path / "run").exists()
    check_private(tmp_path, refused.stdout, refused.stderr)


def test_a_message_about_an_argument_does_not_show_its_secret(tmp_path):
    ended = run([sys.executable, "-m", "jaxlm.evaluate", f"--checkpoint={URL}"])
    assert ended.returncode == 1 and "https://[secret]@host" in ended.stderr, ended.stderr
    check_private(tmp_path, ended.stdout, ended.stderr)


def test_a_secret_in_a_config_is_refused_before_it_is_written(tmp_path, store, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    for name, value in {"init_from": URL, "data.sources": (f"a={CANARIES['HF_TOKEN']}",)}.items():
        config = tiny.tiny_config("configs/gpt.py:tiny", store)
        config.update_from_flattened_dict({name: value})
        with pytest.raises(ValueError, match=f"{name}: holds") as error:
            build.write_config(config, tmp_path / "config.json")
        check_private(tmp_path, str(error.value))
    assert not os.listdir(tmp_path)


def leak_into_config(folder: Path) -> str:
    (folder / "config.json").write_text(f'{{"sources": "{URL}"}}')
    return ""


def leak_into_a_traceback(folder: Path) -> str:
    return f"KeyError: {CANARIES['AWS_SESSION_TOKEN']}"


def leave_open(folder: Path) -> str:
    (folder / "metrics.jsonl").touch()
    (folder / "metrics.jsonl").chmod(0o666)
    return ""


@pytest.mark.parametrize("wrong", [leak_into_config, leak_into_a_traceback, leave_open])
def test_a_run_that_leaks_is_caught(wrong, tmp_path):
    said = wrong(tmp_path)
    with pytest.raises(AssertionError):
        check_private(tmp_path, said)
