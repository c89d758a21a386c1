# %% [markdown]
# # Fine-tune a language model on your own file with jaxlm
#
# A CSV with a column of texts and a column of labels becomes a classifier, from a Hugging Face model or
# from a model that you pretrained. On a TPU, a GPU or a CPU; in Colab choose *Runtime → Change runtime
# type → TPU* first.
#
# Run the cells from top to bottom. A run that was cut off goes on where it stopped when its cell runs
# again with the same `WORKDIR`; in Colab, a folder on a mounted Drive outlives the machine.

# %%
# @title Settings { display-mode: "form" }
# @markdown What kind of task it is: each config's docstring says which files it takes.
CONFIG = "configs/finetune/classification.py"  # @param ["configs/finetune/classification.py", "configs/finetune/tagging.py", "configs/finetune/question_answering.py", "configs/finetune/relations.py", "configs/finetune/multiple_choice.py", "configs/finetune/embedding.py"]
# @markdown Your file (CSV, TSV, JSON lines, Parquet, …). Columns are guessed; a tenth is held out to measure.
TRAIN = "demo:package:train"  # @param {type: "string"}
# @markdown Empty: guess. Otherwise the names of the columns.
TEXT_COLUMN = ""  # @param {type: "string"}
LABEL_COLUMN = ""  # @param {type: "string"}
# @markdown The model to begin with: a run's folder, or `hf:` and a Hugging Face folder or id.
INIT_FROM = "hf:sentence-transformers/all-MiniLM-L6-v2"  # @param {type: "string"}
WORKDIR = "runs/finetuned"  # @param {type: "string"}
NUM_EPOCHS = 3.0  # @param {type: "number"}
# @markdown Tokens of a text at most; what is longer is cut, and counted in the report.
SEQ_LEN = 128  # @param {type: "integer"}
LEARNING_RATE = 5e-5  # @param {type: "number"}
# @markdown LoRA trains small adapters and the head only.
LORA = False  # @param {type: "boolean"}
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
# The fields of a config can all be changed: `overrides["data.augment_dropout"] = 0.1`.

# %%
from jaxlm import build

overrides = {
    "init_from": INIT_FROM,
    "data.train": TRAIN,
    "num_epochs": float(NUM_EPOCHS),
    "seq_len": SEQ_LEN,
    "optimizer.learning_rate": LEARNING_RATE,
    "tuning.train": "lora" if LORA else "all",
}
for role, column in (("text", TEXT_COLUMN), ("label", LABEL_COLUMN)):
    if column:
        overrides[f"data.{role}_column"] = column
config = build.read_config(CONFIG, overrides)
print(config)

# %% [markdown]
# Training. What became of each weight is in `origin.json`, rows that could not be used with their
# lines in `problems.jsonl`. At the end the best checkpoint is measured on what was held out.

# %%
from jaxlm.finetune import finetune

report = finetune(config, Path(WORKDIR))

# %%
from IPython.display import Image, display

for picture in sorted((Path(WORKDIR) / "plots").glob("*.png")):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## What was it wrong about?

# %%
import json

lines = (Path(WORKDIR) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
rows = [json.loads(line) for line in lines]
wrong = [row for row in rows if row.get("label") != row["prediction"].get("label")]
for row in wrong[:5]:
    print(
        str(row.get("text"))[:200],
        "\n   is",
        row.get("label"),
        "and was taken for",
        row["prediction"].get("label"),
    )

# %% [markdown]
# ## Use it
# Rows are texts, or dicts of a record's fields (`{"text": …, "text_pair": …}`). A whole file:
# `python -m jaxlm.evaluate --checkpoint=WORKDIR --data=FILE`.

# %%
from jaxlm.tuning import load_finetuned

model = load_finetuned(WORKDIR)
for row in rows[:3]:
    fields = {k: v for k, v in row.items() if k not in ("source", "line", "label", "prediction")}
    print(model.predict([fields])[0].get("label"))

# %% [markdown]
# ## Take it out
# A folder that `transformers` loads, tokenizer and label names included, adapters merged.

# %%
export = subprocess.run(
    [sys.executable, "tools/convert_checkpoint.py", "to_hf", "--source", WORKDIR]
    + ["--target", f"{WORKDIR}-hf", "--certificate=round_trip"],
    capture_output=True,
    text=True,
)
print(export.stdout[-2000:] or export.stderr[-2000:])
