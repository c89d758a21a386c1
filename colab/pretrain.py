# %% [markdown]
# # Pretrain a language model with jaxlm
#
# From plain text to a language model, on a TPU, a GPU or a CPU. In Colab choose *Runtime → Change
# runtime type → TPU* first; without one everything below runs on the CPU, only slower.
#
# Run the cells from top to bottom. A run that was cut off goes on where it stopped when its cell runs
# again with the same `WORKDIR`; in Colab, a folder on a mounted Drive outlives the machine.

# %%
# @title Settings { display-mode: "form" }
# @markdown A config is `configs/FILE.py:VARIANT`: `configs/gpt.py` and `configs/bert.py` list theirs.
CONFIG = "configs/gpt.py:tiny"  # @param ["configs/gpt.py:tiny", "configs/gpt.py:gpt2", "configs/bert.py:tiny", "configs/bert.py:base"] {allow-input: true}
# @markdown Text: `stdlib` (the standard library of this Python), or a file, folder or glob of .txt,
# @markdown .jsonl or .parquet.
TEXT = "stdlib"  # @param {type: "string"}
WORKDIR = "runs/notebook"  # @param {type: "string"}
# @markdown 0 keeps the config's own number.
NUM_TRAIN_STEPS = 0  # @param {type: "integer"}
PROMPT = "def main("  # @param {type: "string"}
# @markdown A minute's trial of the whole notebook with a model of no use.
FAST = False  # @param {type: "boolean"}
# @markdown Where the code comes from, if it is not here yet: the address of a git repository.
REPOSITORY = ""  # @param {type: "string"}

# %% [markdown]
# ## Code and packages
# What this machine has already (jax and its TPU library, above all) stays as it is.

# %%
import os
import subprocess
import sys
from pathlib import Path

if Path("../jaxlm").is_dir():
    os.chdir("..")
if not Path("jaxlm").is_dir():
    if not Path("jaxlm-code").is_dir():
        assert REPOSITORY, "set REPOSITORY in the settings: the code is not here"
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "jaxlm-code"], check=True)
    os.chdir("jaxlm-code")
sys.path.insert(0, os.getcwd())
subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"], check=True
)

# %% [markdown]
# ## Devices

# %%
import jax

try:
    devices = jax.devices()
except RuntimeError as error:
    print(f"No accelerator could be started ({error}); on to the CPU.")
    jax.config.update("jax_platforms", "cpu")
    devices = jax.devices()
print(f"jax {jax.__version__} with {len(devices)} x {devices[0].device_kind}")

# %% [markdown]
# ## The run
# The fields of a config can all be changed: `overrides["optimizer.learning_rate"] = 1e-3`.

# %%
from jaxlm import build

overrides = {"data.sources": (TEXT,)}
if NUM_TRAIN_STEPS:
    overrides["num_train_steps"] = NUM_TRAIN_STEPS
if FAST:
    import json

    overrides |= {
        "data.sources": (f"text={Path(json.__file__).parent}/*.py",),
        "data.split": "tail",
        "tokenizer.vocab_size": 512,
        "model.vocab_size": 512,
        "model.emb_dim": 32,
        "model.num_layers": 2,
        "batch_size": 8,
        "seq_len": 32,
        "num_train_steps": 20,
        "eval_every_steps": 10,
        "checkpoint_every_steps": 10,
        "log_every_steps": 5,
        "eval.batch_size": 8,
        "eval.num_batches": 2,
    }
config = build.read_config(CONFIG, overrides)
print(config)

# %% [markdown]
# Training. The curves are drawn at the end, and also by `tools/plot_run.py`.

# %%
from jaxlm.pretrain import pretrain

last = pretrain(config, Path(WORKDIR))
print({name: round(value, 4) for name, value in last.items()})

# %%
from IPython.display import Image, display

for picture in sorted((Path(WORKDIR) / "plots").glob("*.png")):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## How good is it?
# All of the held-out text, beside what has to be beaten: gzip and xz in bits per byte, which compare
# whatever the tokenizer; for a masked language model the tokens' own frequencies.

# %%
from jaxlm.evaluate import compare_with_baselines, evaluate

metrics = evaluate(WORKDIR)
for name, value in metrics.items():
    print(f"{name:<22} {value}")
title, rows = compare_with_baselines(WORKDIR, metrics)
print(f"\n{title}")
for name, figure in rows.items():
    print(f"{name:<22} {figure:.3f}")

# %% [markdown]
# ## What does it write?
# A decoder goes on from the prompt; an encoder names the likeliest words in the place of `[MASK]`.

# %%
from jaxlm.inference.samples import continue_prompts, fill_prompts

loaded = build.load_checkpoint(WORKDIR)
parts = (loaded.model, loaded.params, loaded.tokenizer)
if loaded.config.family == "bert":
    prompt = PROMPT if "[MASK]" in PROMPT else f"{PROMPT} [MASK]"
    print(prompt, "\n  ", fill_prompts(*parts, [prompt], max_len=loaded.config.seq_len)[0])
else:
    (text,) = continue_prompts(*parts, [PROMPT], max_new_tokens=100, max_len=loaded.config.seq_len)
    print(PROMPT + text)

# %% [markdown]
# ## Next
# - Train longer: a larger `NUM_TRAIN_STEPS` and the training cell again goes on from the last checkpoint.
# - Your own text: put a folder into `TEXT`, with a new `WORKDIR`.
# - BERT: `CONFIG = "configs/bert.py:tiny"`, with a new `WORKDIR`.
# - Runs side by side: `tools/compare_runs.py`, `tools/sweep.py`.
