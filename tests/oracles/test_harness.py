"""lm-evaluation-harness on a tiny GPT-2 with a real tokenizer: our adapter against the harness's own `hf` model."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from jaxlm.inference import scoring
from jaxlm.language_model import load
from jaxlm.text_evaluation import evaluate_text
from jaxlm.tokenizers import train_tokenizer
from tests import tiny

pytestmark = pytest.mark.oracles
MISSING = "missing: bash tools/check.sh --oracles"
torch = pytest.importorskip("torch", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
lm_eval = pytest.importorskip("lm_eval", reason="missing: pip install 'jaxlm[eval]'")
from lm_eval.tasks import TaskManager  # noqa: E402

from tests.oracles.test_convert import make_workdir, to_hf  # noqa: E402

CONTEXT = 64
GPT2 = dict(
    emb_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=48,
    max_len=CONTEXT,
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
WORDS = "the cat sat on a mat and saw two grey birds fly over our old house in the rain".split()
TEXT = " ".join(WORDS[(7 * i * i + 3 * i) % len(WORDS)] for i in range(400)) + ".\n"


def sentence(seed, size):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, size))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a workdir, the folder that it was exported to)."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer("byte_bpe", [TEXT], 330, num_sentinels=0)
    make_workdir(folder / "w", tokenizer, **GPT2)
    to_hf(folder / "w", folder / "out")
    return str(folder / "w"), str(folder / "out")


def make_task(folder, name, rows, **fields):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = dict(task=name, dataset_path="json", dataset_kwargs=kwargs, test_split="test", **fields)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def write_answers(run, prompts, until):
    """What our model says to half of the prompts: the answers that are right for it."""
    from jaxlm.harness import JaxLM

    lm = JaxLM(run[0])
    options = lm.read_options({"until": until, "max_gen_toks": 12})
    texts = lm.generate(prompts, options)
    return [text if number % 2 else "other" for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tasks(run, tmp_path_factory):
    """A folder with three tasks. Some contexts and texts are longer than the model's context."""
    folder = tmp_path_factory.mktemp("tasks")
    prompts, until = [sentence(i, [2, 9, 90][i % 3]) for i in range(9)], ["e", "\n"]
    answers = write_answers(run, prompts, until)
    make_task(
        folder,
        "tiny_choice",
        [
            {
                "question": sentence(i, [3, 12, 90][i % 3]),
                "choices": [sentence(100 * i + j, 1 + j % 3) for j in range(4)],
                "answer": i % 4,
            }
            for i in range(20)
        ],
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    make_task(
        folder,
        "tiny_perplexity",
        [{"text": sentence(i, size)} for i, size in enumerate((5, 40, 200, 1))],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            {"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    )
    make_task(
        folder,
        "tiny_generation",
        [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": until, "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match"}],
    )
    return folder


NAMES = ["tiny_choice", "tiny_perplexity", "tiny_generation"]


def evaluate(folder, model, names=NAMES, **model_args):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=names,
        batch_size=4,
        task_manager=manager,
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def theirs(run, tasks):
    return evaluate(tasks, "hf", pretrained=run[1], dtype="float32", device="cpu")


def check_same_scores(ours, theirs):
    """Every figure of every task, and every single answer behind them."""
    for task, figures in theirs["results"].items():
        assert ours["results"][task].keys() == figures.keys()
        for name, value in figures.items():
            if isinstance(value, float):
                np.testing.assert_allclose(ours["results"][task][name], value, atol=1e-4, rtol=1e-4)
    for task, samples in theirs["samples"].items():
        for mine, sample in zip(ours["samples"][task], samples, strict=True):
            answers = [flat(x["resps"]) for x in (mine, sample)]
            if task == "tiny_generation":
                assert answers[0] == answers[1]
            else:
                np.testing.assert_allclose(*(np.array(a, float) for a in answers), atol=1e-3)


def flat(resps):
    return [y for x in resps for y in (flat(x) if isinstance(x, (list, tuple)) else [x])]


def test_every_score_of_every_task_is_the_hf_models(run, tasks, theirs):
    import jaxlm.harness  # registers the model

    assert jaxlm.harness.JaxLM.__name__ == "JaxLM"
    assert set(theirs["results"]) == set(NAMES)
    assert theirs["results"]["tiny_generation"]["exact_match,none"] == pytest.approx(4 / 9)
    made = [flat(sample["resps"])[0] for sample in theirs["samples"]["tiny_generation"]]
    assert len(set(made)) > 4 and len({len(text) for text in made}) > 2  # some end at a stop string
    check_same_scores(evaluate(tasks, "jaxlm", checkpoint=run[0]), theirs)


def test_the_check_fails_for_a_shorter_context(run, tasks, theirs):
    import jaxlm.harness  # noqa: F401

    with pytest.raises(AssertionError):
        check_same_scores(evaluate(tasks, "jaxlm", checkpoint=run[0], max_length=40), theirs)


def test_the_hugging_face_folder_itself_has_the_same_scores_and_few_programs_are_compiled(
    run, tasks, theirs
):
    from jaxlm.harness import JaxLM

    lm = JaxLM(f"hf:{run[1]}", batch_tokens=256)
    lm.scorer = scoring.Scorer(lm.lm.model, lm.lm.num_ids)  # that no other test has used
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    ours = lm_eval.simple_evaluate(
        model=lm, tasks=NAMES[:2], task_manager=manager, bootstrap_iters=0
    )
    check_same_scores(
        ours, {k: {n: theirs[k][n] for n in NAMES[:2]} for k in ("results", "samples")}
    )
    assert sum(len(s["resps"]) for n in NAMES[:2] for s in ours["samples"][n]) == 84
    assert lm.scorer.score_batch._cache_size() <= 7  # 16, 4, 1 rows of 16; 8, 2 of 32; 4, 1 of 64


def test_the_command_prints_a_table_and_writes_its_figures(run, tasks, theirs, tmp_path):
    command = [sys.executable, "-m", "jaxlm.harness", f"--checkpoint={run[0]}", "--limit=6"]
    command += ["--tasks=tiny_choice", f"--include_path={tasks}", f"--output={tmp_path / 'f.json'}"]
    result = subprocess.run(
        command, env=tiny.environment(), cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "|tiny_choice|" in result.stdout and "8 contexts are longer" in result.stderr
    written = json.loads((tmp_path / "f.json").read_text())
    acc = np.mean([s["acc"] for s in theirs["samples"]["tiny_choice"][:6]])
    np.testing.assert_allclose(written["results"]["tiny_choice"]["acc,none"], acc, atol=1e-6)


def test_text_becomes_the_ids_of_the_hf_model(run):
    from lm_eval.models.huggingface import HFLM

    from jaxlm.harness import JaxLM

    ours, theirs = JaxLM(run[0]), HFLM(pretrained=run[1], device="cpu", dtype="float32")
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id and ours.max_length == theirs.max_length
    begun = theirs.tokenizer.decode(theirs.prefix_token_id) + "the cat"
    for text in ("", "the cat", " the  cat\n", begun):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        if text != begun:
            special = dict(add_special_tokens=False)
            assert ours.tok_encode(text, **special) == theirs.tok_encode(text, **special)


def test_contexts_that_are_cut_are_counted(run, caplog):
    from jaxlm.harness import JaxLM

    lm = JaxLM(run[0])
    lm._loglikelihood_tokens([(("", ""), [1] * size, [2]) for size in (3, 64, 65, 80)])
    assert "2 contexts are longer than the model's" in caplog.text


def test_what_it_cannot_do_is_said(run, tasks, monkeypatch):
    from jaxlm import harness

    # lm-eval's own are thousands of files, which take a while to find
    own = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", own)
    with pytest.raises(ValueError, match=r"no task is named \['tiny_chess'\]"):
        harness.run_tasks(run[0], ["tiny_choice", "tiny_chess"], include_path=str(tasks))
    lm = harness.JaxLM(load(run[0]))
    with pytest.raises(ValueError, match="generation_kwargs has num_beams, typical_p"):
        lm.read_options({"until": "a", "num_beams": 3, "typical_p": 0.5})
    with pytest.raises(ValueError, match="max_gen_toks=64: expected 1 to 63"):
        lm.read_options({"max_gen_toks": 64})
    with pytest.raises(ValueError, match="a continuation of 65 tokens"):
        lm.fit([1], [2] * 65)


# --- evaluate's perplexity --------------------------------------------------------------------------------------------


def strided_recipe(model, input_ids, max_length, stride):
    """transformers' docs, "Perplexity of fixed-length models", with the exact count of predicted tokens of a window.

    (Their text takes the count of its targets less one, which is right for the first window alone.)
    """
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, input_ids.size(1), stride):
        end_loc = min(begin_loc + max_length, input_ids.size(1))
        ids = input_ids[:, begin_loc:end_loc]
        target_ids = ids.clone()
        target_ids[:, : -(end_loc - prev_end_loc)] = -100
        with torch.no_grad():
            loss = model(ids, labels=target_ids).loss
        num_loss_tokens = int((target_ids[:, 1:] != -100).sum())
        nll_sum += loss.double() * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == input_ids.size(1):
            break
    return float(torch.exp(nll_sum / n_tokens)), n_tokens


@pytest.mark.parametrize("stride", [8, 20])
def test_strided_perplexity_is_the_value_of_transformers_recipe(stride, run, tmp_path):
    """A window that reads 32 tokens predicts as many: in the recipe it is 33 long."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    lm = load(f"hf:{run[1]}")
    found = evaluate_text(lm, str(tmp_path / "text.txt"), window=32, stride=stride)
    reader = transformers.AutoTokenizer.from_pretrained(run[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(run[1], dtype=torch.float32).eval()
    ids = [*reader(TEXT)["input_ids"], reader.eos_token_id]
    assert ids[0] == reader.bos_token_id
    perplexity, count = strided_recipe(model, torch.tensor([ids]), 33, stride)
    assert found["tokens"] == count == len(ids) - 1
    np.testing.assert_allclose(found["perplexity"], perplexity, rtol=1e-4)
