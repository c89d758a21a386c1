"""Continues prompts with a trained decoder: `python -m jaxlm.generate --checkpoint=W --prompt='def '`.

A prompt of an encoder has [MASK] in it, and the likeliest tokens in its place are printed.
"""

from absl import app, flags

from jaxlm import build
from jaxlm.flags import require
from jaxlm.inference.samples import MASK, continue_prompts, fill_prompts

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's workdir, or one of its checkpoints.")
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint of the workdir; default the newest.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; may be given several times.")
_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 100, "How many tokens to add at most.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", lower_bound=0)
_TOP_K = flags.DEFINE_integer("top_k", 50, "Sample from that many; 0 = from all.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed gives another text.")


def main(argv):
    del argv
    loaded = build.load_checkpoint(_CHECKPOINT.value, step=_STEP.value)
    parts = (loaded.model, loaded.params, loaded.tokenizer, _PROMPT.value)
    max_len = loaded.config.seq_len
    if loaded.config.family == "bert":
        wrong = [prompt for prompt in _PROMPT.value if MASK not in prompt]
        if wrong:
            raise app.UsageError(f"an encoder fills {MASK}; these prompts have none: {wrong}")
        texts = fill_prompts(*parts, max_len=max_len)
    else:
        texts = continue_prompts(
            *parts,
            max_new_tokens=_TOKENS.value,
            max_len=max_len,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            seed=_SEED.value,
        )
    for prompt, text in zip(_PROMPT.value, texts, strict=True):
        print(f"{prompt}{text}" if loaded.config.family == "gpt" else f"{prompt}\n  {text}")


if __name__ == "__main__":
    require("checkpoint", "prompt")
    app.run(main)
