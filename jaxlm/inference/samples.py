"""What a model makes of fixed prompts while it trains: continuations, or the likeliest words under a mask."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.files import Appender
from jaxlm.inference import decode
from jaxlm.inference.fill_mask import encode_masked, fill_mask
from jaxlm.inference.sampling import make_sampling

FILL_MASKS = ("bert", "electra", "xlnet")  # families whose prompts have masks


def continue_prompts(
    model: Any,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_len: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    is_prefix_lm: bool = False,
) -> list[str]:
    """The continuation of each prompt by a decoder. A prompt that leaves no room keeps its last tokens.

    is_prefix_lm: see `decode.make_decoder`.
    """
    room = max_len - min(max_new_tokens, max_len // 2)
    bos = np.array([tokenizer.bos_id], np.int32)
    ids = [np.concatenate([bos, tokenizer.encode(prompt)])[-room:] for prompt in prompts]
    new = decode.generate(
        decode.make_decoder(model, tokenizer.vocab_size, is_prefix_lm=is_prefix_lm),
        params,
        ids,
        max_new_tokens=max_new_tokens,
        max_len=max_len,
        sampling=make_sampling(temperature=temperature, top_k=top_k),
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    return [tokenizer.decode(row.tokens) for row in new]


def fill_prompts(
    model: Any, params: Any, tokenizer: Any, prompts: Sequence[str], *, max_len: int, top_k: int = 5
) -> list[str]:
    """For each prompt with [MASK], the likeliest tokens in its places: 'the 0.31, a 0.12 | …'."""
    end = np.array([tokenizer.sep_id], np.int32)
    rows = [encode_masked(tokenizer, prompt)[:-1] for prompt in prompts]
    filled = fill_mask(
        model,
        params,
        [np.concatenate([row[: max_len - 1], end]) for row in rows],
        mask_id=tokenizer.mask_id,
        num_ids=tokenizer.vocab_size,
        max_len=max_len,
        top_k=top_k,
    )
    describe = lambda place: ", ".join(
        f"{tokenizer.token(int(i))} {p:.2f}" for i, p in zip(*place, strict=True)
    )
    return [" | ".join(map(describe, places)) for places in filled]


def make_sampler(run: Any, writer: Any):
    """A callback (state, step) for `fit` that writes samples to `samples.jsonl` and TensorBoard.

    Averaged parameters are used where the run keeps them, as in its evaluation.
    """
    config, path = run.config, run.workdir / "samples.jsonl"
    prompts = list(config.eval.prompts)

    def sample(state, step: int) -> None:
        if not prompts:
            return
        params = state.params if state.ema is None else state.ema
        if config.family in FILL_MASKS:
            texts = run.in_mesh(fill_prompts)(
                run.model, params, run.tokenizer, prompts, max_len=config.seq_len
            )
        else:
            texts = run.in_mesh(continue_prompts)(
                run.model,
                params,
                run.tokenizer,
                prompts,
                max_new_tokens=config.eval.sample_tokens,
                max_len=config.seq_len,
                seed=config.seed,
                is_prefix_lm=config.objective.name == "prefix_lm",
            )
        if not writer.is_writer:
            return
        lines = Appender(path)
        for prompt, text in zip(prompts, texts, strict=True):
            record = {"step": step, "prompt": prompt, "text": text}
            lines.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
        lines.close()
        joined = "\n\n".join(f"**{p}** {t}" for p, t in zip(prompts, texts, strict=True))
        writer.write_text(step, "samples", joined)

    return sample
