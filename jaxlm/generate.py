"""Continues prompts with a trained decoder: `python -m jaxlm.generate --checkpoint=W --prompt='def '`.

A prompt of an encoder has [MASK] in it, and the likeliest tokens in its place are printed.
"""

from absl import app, flags, logging

from jaxlm import build
from jaxlm.inference.samples import MASK, continue_prompts, fill_prompts


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "A run's workdir, or one of its checkpoints.")
    flags.DEFINE_integer("step", None, "Which checkpoint of the workdir; default the newest.")
    flags.DEFINE_multi_string("prompt", None, "Text to continue; may be given several times.")
    flags.DEFINE_integer("max_new_tokens", 100, "How many tokens to add at most.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0 takes the likeliest token.", lower_bound=0)
    flags.DEFINE_integer("top_k", 50, "Sample from that many; 0 = from all.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Another seed gives another text.")
    flags.mark_flags_as_required(["checkpoint", "prompt"])


def main(argv):
    del argv
    args = flags.FLAGS
    logging.set_verbosity(logging.ERROR)  # of libraries: Orbax warns of a file that nothing needs
    loaded = build.load_checkpoint(args.checkpoint, step=args.step)
    parts = (loaded.model, loaded.params, loaded.tokenizer, args.prompt)
    max_len = loaded.config.seq_len
    if loaded.config.family == "bert":
        wrong = [prompt for prompt in args.prompt if MASK not in prompt]
        if wrong:
            raise app.UsageError(f"an encoder fills {MASK}; these prompts have none: {wrong}")
        texts = fill_prompts(*parts, max_len=max_len)
    else:
        texts = continue_prompts(
            *parts,
            max_new_tokens=args.max_new_tokens,
            max_len=max_len,
            temperature=args.temperature,
            top_k=args.top_k,
            seed=args.seed,
        )
    for prompt, text in zip(args.prompt, texts, strict=True):
        print(f"{prompt}{text}" if loaded.config.family == "gpt" else f"{prompt}\n  {text}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
