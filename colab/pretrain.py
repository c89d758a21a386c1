# %% [markdown]
# # Pretrain a language model with jaxlm
#
# From plain text to a language model, on a TPU, a GPU or a CPU. Without an accelerator everything below runs on
# the CPU, only slower.
#
# Run the cells from top to bottom. A run that was cut off goes on where it stopped when the cells run again with
# the same `WORKDIR`; in Colab, let `DRIVE` name a folder for that.

# %%
# @title Settings { display-mode: "form" }
# @markdown A config is `configs/FILE.py:VARIANT`: `configs/gpt.py`, `configs/bert.py` and so on list theirs.
CONFIG = "configs/gpt.py:tiny"  # @param ["configs/gpt.py:tiny", "configs/gpt.py:gpt2", "configs/bert.py:tiny", "configs/bert.py:base", "configs/t5.py:tiny"] {allow-input: true}
# @markdown Text: `stdlib` (the standard library of this Python), or a file, folder or glob of .txt,
# @markdown .jsonl or .parquet.
TEXT = "stdlib"  # @param {type: "string"}
# @markdown A folder in `runs`, or on the Drive.
WORKDIR = "pretrained"  # @param {type: "string"}
# @markdown 0 keeps the config's own number.
NUM_TRAIN_STEPS = 0  # @param {type: "integer"}
PROMPT = "def main("  # @param {type: "string"}
# @markdown A minute's trial of the whole notebook with a model of no use.
FAST = False  # @param {type: "boolean"}

# %% [include] setup

# %% [markdown]
# ## The run
# The fields of a config can all be changed: `overrides["optimizer.learning_rate"] = 1e-3`.

# %% [include] small_run

# %%
from jaxlm import config_files

overrides = SMALL_RUN if FAST else {"data.sources": (TEXT,)}
if NUM_TRAIN_STEPS:
    overrides["num_train_steps"] = NUM_TRAIN_STEPS
config = config_files.read_config(CONFIG, overrides)
print(config)

# %% [markdown]
# Training. The same cell again goes on from the newest checkpoint.

# %%
from jaxlm.pretrain import pretrain

workdir = RUNS / WORKDIR
last = pretrain(config, workdir, recipe=CONFIG)
print({name: round(value, 4) for name, value in last.items() if isinstance(value, float)})

# %%
from IPython.display import Image, display

for picture in sorted((workdir / "plots").glob("*.png")):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## How good is it?
# All of the held-out text, beside what has to be beaten: gzip and xz in bits per byte, which compare
# whatever the tokenizer; for a masked language model the tokens' own frequencies.

# %%
from jaxlm.evaluate import compare_with_baselines, evaluate

metrics = evaluate(workdir)
for name, value in metrics.items():
    print(f"{name:<22} {value}")
title, rows = compare_with_baselines(workdir, metrics)
print(f"\n{title}")
for name, figure in rows.items():
    print(f"{name:<22} {figure:.3f}")

# %% [markdown]
# ## What does it write?
# A decoder goes on from the prompt, an encoder-decoder answers it, an encoder names the likeliest words in the
# place of `[MASK]`.

# %% [include] writes

# %% [markdown]
# ## Next
# - Train longer: a larger `NUM_TRAIN_STEPS` and the training cell again goes on from the last checkpoint.
# - Your own text: put a file or folder into `TEXT`, with a new `WORKDIR`.
# - BERT: `CONFIG = "configs/bert.py:tiny"`, with a new `WORKDIR`; T5: `configs/t5.py:tiny`.
# - Look into the run: `read_a_run.ipynb`. Fine-tune it: `finetune.ipynb`, with `INIT_FROM` this `WORKDIR`.
# - Runs side by side: `tools/compare_runs.py`, `tools/sweep.py`.
