"""EleutherAI's lm-evaluation-harness on a decoder: `python -m jaxlm.harness --checkpoint=W --tasks=arc_easy,lambada_openai`.

Needs lm-eval (`pip install 'jaxlm[eval]'`). Tasks of one's own are YAML files below --include_path; a task
file may name Python code of its folder, which lm-eval runs. From Python, and with all that lm-eval can do:

    import lm_eval, jaxlm.harness
    lm_eval.simple_evaluate(model="jaxlm", model_args={"checkpoint": "W"}, tasks=["arc_easy"])

Text becomes ids, and contexts are cut, as in lm-eval's own `hf` model, so that scores are comparable.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from absl import logging as absl_logging

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
except ImportError as error:
    MISSING = f"the harness needs lm-eval (pip install 'jaxlm[eval]'): {error}"
    if __name__ == "__main__":
        sys.exit(MISSING)
    raise ImportError(MISSING) from error

from jaxlm.compiled import keep_compiled_programs
from jaxlm.entrypoint import run_program
from jaxlm.exits import with_status
from jaxlm.flags import require
from jaxlm.host import keep_freed_memory
from jaxlm.inference import decode, scoring
from jaxlm.inference.batches import in_batches
from jaxlm.inference.sampling import make_sampling
from jaxlm.inference.text import TextStream
from jaxlm.inputs import bos_of, need_lm
from jaxlm.language_model import BadInput, LanguageModel, load

log = logging.getLogger("jaxlm")
MAX_NEW_TOKENS = 256  # where a task says nothing, as lm-eval's `hf` has it
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")

Request = tuple[tuple[str, str], list[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a task wants its continuations. until: strings at which they end."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Any


@register_model("jaxlm")
class JaxLM(TemplateLM):
    """A decoder as the harness asks it.

    checkpoint: as of `jaxlm.language_model.load`, or what it gave. max_length: the context; 0 is the model's.
    batch_size: rows that generate at once. batch_tokens: of the batches that are scored. Neither changes a score.
    device, max_batch_size: what lm-eval's command line passes for torch; they are not used.
    """

    def __init__(
        self,
        checkpoint: str | LanguageModel,
        *,
        step: int | None = None,
        max_length: int = 0,
        batch_size: int | str = 8,
        batch_tokens: int = scoring.BATCH_TOKENS,
        device: Any = None,
        max_batch_size: Any = None,
    ):
        super().__init__()
        del device, max_batch_size
        lm = load(checkpoint, step) if isinstance(checkpoint, str) else checkpoint
        need_lm(lm, "gpt")
        self.lm, self.batch_tokens = lm, batch_tokens
        self.max_length = max_length or lm.max_len
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        if not 2 <= self.max_length <= lm.max_len:
            raise BadInput(f"max_length={max_length}: expected 2 to {lm.max_len}")
        self.scorer = scoring.make_scorer(lm.model, lm.num_ids)
        self.decoder = decode.make_decoder(lm.model, lm.num_tokens, **lm.writing)

    # --- ids ---

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self.lm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text that has no context."""
        return (bos_of(self.lm) or (self.eot_token_id,))[0]

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests: another for every tokenizer."""
        return f"jaxlm-{self.lm.tokenizer.sha256}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, after those that stand before every text unless it is to have none."""
        del kwargs
        encode, start = self.lm.tokenizer.encode, list(self.lm.prefix)
        spelled = self.lm.tokenizer.token(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(spelled):  # a task has written it
            start, string = [self.prefix_token_id], string.removeprefix(spelled)
        return (start if add_special_tokens is not False else []) + encode(string).tolist()

    # --- log-likelihoods ---

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each continuation; a context that is too long loses its beginning."""
        del disable_tqdm, kwargs
        pairs = [self.fit(context, continuation) for _, context, continuation in requests]
        warn_of_cuts(len(r[1]) > len(pair[0]) for r, pair in zip(requests, pairs, strict=True))
        answers = [(found.total, found.is_greedy) for found in self.score(pairs)]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows that count every token once, as lm-eval cuts them."""
        del disable_tqdm
        texts = [request.args[0] for request in requests]
        windows = [self.windows(text) for text in texts]
        found = iter(self.score([pair for pairs in windows for pair in pairs]))
        totals = [sum((next(found).total for _ in pairs), 0.0) for pairs in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def windows(self, text: str) -> list[scoring.Pair]:
        """A long text in windows of the model's length, each token predicted once."""
        windows = utils.get_rolling_token_windows(
            self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
        )
        return [self.fit(*utils.make_disjoint_window(window)) for window in windows]

    def fit(self, context: Sequence[int], continuation: Sequence[int]) -> scoring.Pair:
        """The pair with what fits of the context: the model reads all ids but the last."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise BadInput(
                f"a continuation of {len(continuation)} tokens: the context holds {self.max_length}"
            )
        return np.array(context[-room:], np.int32), np.array(continuation, np.int32)

    def score(self, pairs: Sequence[scoring.Pair]) -> list[scoring.Scored]:
        """The log-probabilities of each pair's continuation."""
        return self.lm.in_mesh(scoring.token_logprobs)(
            self.scorer,
            self.lm.params,
            pairs,
            max_len=self.max_length,
            batch_tokens=self.batch_tokens,
        )

    # --- generation ---

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings."""
        del disable_tqdm
        alike: dict[str, list[int]] = {}  # requests with the same options are generated together
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        for options, numbers in alike.items():
            contexts = [requests[i].args[0] for i in numbers]
            made = self.generate(contexts, self.read_options(json.loads(options)))
            texts |= dict(zip(numbers, made, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[i] for i in range(len(requests))]

    def read_options(self, said: dict[str, Any]) -> Options:
        """What a task's generation_kwargs say.

        Raises:
          BadInput: for an option that is not known here, or out of range.
        """
        options = dict(normalize_gen_kwargs(said, MAX_NEW_TOKENS))
        eos = self.lm.tokenizer.token(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until"), eos)
        new_tokens, is_drawn = options.pop("max_gen_toks"), options.pop("do_sample")
        temperature = options.pop("temperature", 0.0)
        filters = {name: options.pop(name) for name in FILTERS if name in options}
        if options and options != {"num_beams": 1}:
            raise BadInput(
                f"generation_kwargs has {', '.join(options)}: known are until, max_gen_toks, do_sample, temperature, "
                + ", ".join(FILTERS)
            )
        if not 1 <= new_tokens < self.max_length:
            raise BadInput(
                f"max_gen_toks={new_tokens}: expected 1 to {self.max_length - 1}, less than the context"
            )
        sampling = make_sampling(temperature if is_drawn else 0.0, **filters)
        return Options(tuple(filter(None, until)), new_tokens, sampling)

    def generate(self, contexts: Sequence[str], options: Options) -> list[str]:
        """The texts that follow contexts; the beginning of one that is too long is left out."""
        room = self.max_length - options.max_new_tokens
        encoded = [self.tok_encode(text) for text in contexts]
        warn_of_cuts(len(ids) > room for ids in encoded)
        prompts = [np.array(ids[-room:], np.int32) for ids in encoded]
        samples = decode.number_samples(prompts)

        def run(indices: list[int]) -> list[str]:
            made = self.lm.in_mesh(decode.generate)(
                self.decoder,
                self.lm.params,
                [prompts[i] for i in indices],
                max_new_tokens=options.max_new_tokens,
                max_len=self.max_length,
                sampling=options.sampling,
                samples=[samples[i] for i in indices],
                eos_id=self.lm.end_id,
                stop=self.make_stop(options.until, len(indices)),
            )
            texts = [self.lm.tokenizer.decode(new.tokens) for new in made]
            return [postprocess_generated_text(text, list(options.until), None) for text in texts]

        return in_batches(run, [len(p) for p in prompts], self.max_length, self.batch_size)

    def make_stop(self, until: Sequence[str], rows: int) -> decode.Stop:
        """Tells of each row, token by token, whether a stop string is complete."""
        streams = [TextStream(self.lm.tokenizer, until) for _ in range(rows)]

        def stop(row: int, tokens: np.ndarray) -> bool:
            streams[row].push(tokens[-1:])
            return streams[row].stopped

        return stop


def warn_of_cuts(are_cut: Iterable[bool]) -> None:
    """Says in the log how many contexts were cut."""
    if count := sum(are_cut):
        log.warning("%d contexts are longer than the model's: their beginnings are left out", count)


def run_tasks(
    checkpoint: str,
    tasks: Sequence[str],
    *,
    step: int | None = None,
    include_path: str = "",
    num_fewshot: int | None = None,
    limit: float = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` gives of the tasks. limit: examples of each task; below 1 a share; 0 = all.

    Raises:
      BadInput: for tasks that lm-eval does not know, and models that do not generate.
    """
    if include_path and not Path(include_path).is_dir():
        raise BadInput(f"--include_path={include_path} is no folder")
    manager = TaskManager(include_path=include_path or None)
    if unknown := [task for task in tasks if not manager.match_tasks([task])] or not tasks:
        raise BadInput(
            f"no task is named {unknown}: `lm-eval ls tasks` lists lm-eval's; one's own are YAML files below "
            "--include_path"
        )
    return lm_eval.simple_evaluate(
        model="jaxlm",
        model_args={"checkpoint": checkpoint} | ({} if step is None else {"step": step}),
        tasks=manager.match_tasks(list(tasks)),
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        limit=(int(limit) if limit >= 1 else limit) or None,
        task_manager=manager,
        log_samples=False,
    )


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("checkpoint", None, "W, W@STEP, or hf:FOLDER_OR_HUB_ID.")
    flags.DEFINE_integer("step", None, "Which checkpoint of the workdir; default the newest.")
    flags.DEFINE_list("tasks", None, "Names of tasks, groups or tags, also with *.")
    flags.DEFINE_string("include_path", "", "A folder with task files of one's own.")
    flags.DEFINE_integer("num_fewshot", None, "Examples in each context; default the task's.")
    flags.DEFINE_float("limit", 0, "Examples of each task, or a share below 1; 0: all.")
    flags.DEFINE_integer("batch_size", 8, "Rows that generate at once.", lower_bound=1)
    flags.DEFINE_string("output", "", "A JSON file for all that lm-eval reports.")
    require(checkpoint="--checkpoint=W or hf:FOLDER_OR_HUB_ID", tasks="--tasks=NAME,NAME")


@with_status
def main(argv):
    """Runs the tasks, and prints lm-eval's table."""
    del argv
    keep_freed_memory()
    keep_compiled_programs()
    # Of libraries: Orbax warns of a file that nothing needs. Ours say what was cut.
    absl_logging.set_verbosity(absl_logging.ERROR)
    log.setLevel(logging.WARNING)
    args = flags.FLAGS
    names = ("step", "include_path", "num_fewshot", "limit", "batch_size")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise BadInput(f"--output={args.output}: there is no such folder")
    results = run_tasks(args.checkpoint, args.tasks, **{name: args[name].value for name in names})
    if args.output:
        text = json.dumps(results, indent=2, default=utils.handle_non_serializable)
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(utils.make_table(results))


def command() -> None:
    """The console script jaxlm-harness."""
    define_flags()
    run_program(main, __doc__)


if __name__ == "__main__":
    command()
