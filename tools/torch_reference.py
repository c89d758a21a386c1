"""The yardstick of `tools/benchmark.py --against=torch`: transformers' model of a config's sizes, run by torch.

Needs the `oracles` extra (torch and transformers).
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

# transformers' names of our activations.
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def make_torch_step(config: ConfigDict, *, threads: int, seed: int = 0) -> Callable[[], float]:
    """A function that runs one float32 train step and returns its seconds.

    SDPA attention, AdamW, the config's clipping, random tokens of `batch_size` x `seq_len`; for BERT the
    labels of all but a share `objective.rate` of the positions are ignored, as transformers' collator makes them.

    Raises:
      ValueError: if transformers has no GPT-2 or BERT of these sizes.
    """
    import torch
    import transformers

    check_has_twin(config)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    sizes = config.model
    model = (make_gpt2 if config.family == "gpt" else make_bert)(transformers, sizes).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)

    rng = np.random.default_rng(seed)
    shape = (config.batch_size, config.seq_len)
    tokens = torch.from_numpy(rng.integers(0, sizes.vocab_size, shape))
    labels = tokens.clone()
    if config.family == "bert":
        labels[torch.from_numpy(rng.random(shape) >= config.objective.rate)] = -100

    def step() -> float:
        started = time.perf_counter()
        adamw.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        if config.optimizer.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm)
        adamw.step()
        loss.item()
        return time.perf_counter() - started

    return step


def make_torch_generate(
    config: ConfigDict, prompts: np.ndarray, new_tokens: int, *, threads: int, seed: int = 0
) -> Callable[[], list[float]]:
    """A function that generates greedily (float32, SDPA, cache) and returns the seconds of each new token.

    prompts: (B, P) ids. The first new token's seconds are those of the prompts. Raises ValueError as `make_torch_step`.
    """
    import torch
    import transformers

    check_has_twin(config)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    model = make_gpt2(transformers, config.model).eval()
    model.generation_config.eos_token_id = None  # nothing ends early
    tokens = torch.from_numpy(prompts.astype(np.int64))
    options = dict(max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0)

    def generate() -> list[float]:
        clock = Clock()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=clock, **options)
        return np.diff(clock.times).tolist()

    return generate


class Clock:
    """What transformers calls a streamer: it is given the prompts, and then each new column of tokens."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def check_has_twin(config: ConfigDict) -> None:
    """Raises with all that GPT2LMHeadModel or BertForMaskedLM cannot be; biases may differ, they cost nothing."""
    sizes = config.model
    wanted = {
        "position": (sizes.position, ("learned",)),
        "norm": (sizes.norm, ("layer_norm",)),
        "norm_position": (sizes.norm_position, ("pre" if config.family == "gpt" else "post",)),
        "activation": (sizes.activation, tuple(ACTIVATIONS)),
        "num_kv_heads": (sizes.num_kv_heads, (sizes.num_heads,)),
        "head_dim": (sizes.head_dim * sizes.num_heads, (sizes.emb_dim,)),
        "tie_embeddings": (sizes.tie_embeddings, (True,)),
        "qk_norm": (sizes.qk_norm, (False,)),
    }
    problems = [
        f"  model.{field}: found {found!r}, expected {' or '.join(map(repr, expected))}"
        for field, (found, expected) in wanted.items()
        if found not in expected
    ]
    if problems:
        raise ValueError(
            "transformers has no GPT-2 or BERT like this; take configs/gpt.py:gpt2, :nanogpt or "
            "configs/bert.py:base, or change\n" + "\n".join(problems)
        )


def make_gpt2(transformers: Any, sizes: ConfigDict) -> Any:
    config = transformers.GPT2Config(
        vocab_size=sizes.vocab_size,
        n_positions=sizes.max_len,
        n_embd=sizes.emb_dim,
        n_layer=sizes.num_layers,
        n_head=sizes.num_heads,
        n_inner=sizes.mlp_dim,
        activation_function=ACTIVATIONS[sizes.activation],
        resid_pdrop=sizes.dropout_rate,
        embd_pdrop=sizes.dropout_rate,
        attn_pdrop=sizes.attention_dropout_rate,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.GPT2LMHeadModel(config)


def make_bert(transformers: Any, sizes: ConfigDict) -> Any:
    config = transformers.BertConfig(
        vocab_size=sizes.vocab_size,
        max_position_embeddings=sizes.max_len,
        hidden_size=sizes.emb_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        intermediate_size=sizes.mlp_dim,
        hidden_act=ACTIVATIONS[sizes.activation],
        hidden_dropout_prob=sizes.dropout_rate,
        attention_probs_dropout_prob=sizes.attention_dropout_rate,
        attn_implementation="sdpa",
    )
    return transformers.BertForMaskedLM(config)
