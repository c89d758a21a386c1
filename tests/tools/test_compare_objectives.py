"""tools/compare_objectives.py: what it runs and in which order, what it goes on with, and the table of what is there."""

import json
import subprocess
import sys

import pytest

from configs import objectives as recipes
from jaxlm import program as programs
from jaxlm.planning.compiling import stand_in_tokenizer
from tests import tiny
from tools import compare_objectives
from tools.compare_objectives import OBJECTIVES, RANDOM, TASKS, Study


def test_all_objectives_read_as_many_tokens():
    read = {}
    for name, (_, _, row_tokens) in recipes.OBJECTIVES.items():
        config = recipes.get_config(name)
        tokenizer = stand_in_tokenizer(config.model.vocab_size, config.tokenizer.num_sentinels)
        objective = programs.make_objective(config, tokenizer)
        assert objective.window(config.seq_len).stride == row_tokens
        read[name] = config.num_train_steps * config.batch_size * row_tokens
    assert set(read) == set(OBJECTIVES)
    assert max(read.values()) / min(read.values()) < 1.01


def test_every_run_of_a_chain_starts_from_its_own_pretraining(tmp_path):
    study = Study(tmp_path, ("--config.num_train_steps=2",), first="causal")
    for objective in (*OBJECTIVES, RANDOM):
        chain = study.chain(objective, 1)
        assert len(chain) == len(TASKS) + (objective != RANDOM)
        base = study.pretraining("causal" if objective == RANDOM else objective, 1)
        for workdir, command in chain[-len(TASKS) :]:
            assert f"--config.init_from={base}" in command and f"--workdir={workdir}" in command
            assert ("--config.init=random" in command) == (objective == RANDOM)
        assert ("--config.num_train_steps=2" in chain[0][1]) == (objective != RANDOM)


def write_report(study, objective, task, seed, value):
    folder = study.finetuning(objective, task, seed)
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"test": {TASKS[task]: value}}))


def test_the_table_has_the_mean_over_the_seeds_that_are_there(tmp_path):
    study = Study(tmp_path)
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        write_report(study, "mlm", "package", seed, value)
    write_report(study, "mlm", "tokens", 0, 0.5)
    found = compare_objectives.scores(study, ["mlm", "causal"], [0, 1, 2])
    assert found == {
        "mlm": {"package": [0.1, 0.2, 0.3], "tokens": [0.5]},
        "causal": {"package": [], "tokens": []},
    }
    text = compare_objectives.make_table(study, found, [0, 1, 2])
    assert "0.2000 ± 0.1000" in text and "0.5000" in text
    compare_objectives.draw(found, tmp_path / "objectives.png")
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_objective_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_objectives.main([f"--work={tmp_path}", "--objectives=mml"])
    assert "mml" in capsys.readouterr().err


def test_random_weights_have_the_shapes_of_the_first_objective_that_is_there(
    tmp_path, monkeypatch, capsys
):
    studies = []
    monkeypatch.setattr(
        compare_objectives, "run_all", lambda study, *_: studies.append(study) or []
    )
    assert compare_objectives.main([f"--work={tmp_path}", "--objectives=random,rtd,mlm"]) == 0
    assert [study.first for study in studies] == ["rtd"]
    with pytest.raises(SystemExit):
        compare_objectives.main([f"--work={tmp_path}", "--objectives=random"])
    assert "random alone" in capsys.readouterr().err


def test_a_study_with_other_flags_for_pretraining_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_objectives, "run_all", lambda *_: [])
    command, flags = [f"--work={tmp_path}", "--seeds=0", "--"], ["--config.num_train_steps=2"]
    assert [compare_objectives.main(command + flags) for _ in range(2)] == [0, 0]
    table = (tmp_path / "table.txt").read_bytes()
    assert compare_objectives.main(command) == 2
    said = capsys.readouterr().err
    assert str(flags) in said and "take another --work" in said
    assert (tmp_path / "table.txt").read_bytes() == table


@pytest.mark.slow
def test_the_study_runs_goes_on_and_says_what_failed(tmp_path):
    command = [sys.executable, "tools/compare_objectives.py", f"--work={tmp_path}", "--seeds=0"]
    command += [
        "--objectives=span_corruption,mlm,random",
        "--finetune_flag=--config.num_epochs=0.1",
    ]
    command += ["--", "--config.num_train_steps=2", "--config.eval.num_batches=1"]
    run = lambda: subprocess.run(
        command,
        cwd=tiny.ROOT,
        env=tiny.environment(1),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(list(tmp_path.glob("*/*/report.json"))) == 3 * len(TASKS)
    again = run()
    assert again.returncode == 0 and "…" not in again.stdout
    assert again.stdout.splitlines() == first.stdout.splitlines()[-len(again.stdout.splitlines()) :]
