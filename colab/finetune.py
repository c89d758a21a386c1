# %% [markdown]
# # Fine-tune a language model on your own file with jaxlm
#
# A CSV with a column of texts and a column of labels becomes a classifier, from a Hugging Face model or
# from a model that you pretrained. On a TPU, a GPU or a CPU.
#
# Run the cells from top to bottom. A run that was cut off goes on where it stopped when the cells run again with
# the same `WORKDIR`; in Colab, let `DRIVE` name a folder for that.

# %%
# @title Settings { display-mode: "form" }
# @markdown What kind of task it is: each config's docstring says which files it takes.
CONFIG = "configs/finetune/classification.py"  # @param ["configs/finetune/classification.py", "configs/finetune/tagging.py", "configs/finetune/question_answering.py", "configs/finetune/relations.py", "configs/finetune/multiple_choice.py", "configs/finetune/embedding.py"]
# @markdown Your file (CSV, TSV, JSON lines, Parquet, …). Columns are guessed; a tenth is held out to measure.
TRAIN = "demo:package:train"  # @param {type: "string"}
# @markdown Empty: guess. Otherwise the names of the columns.
TEXT_COLUMN = ""  # @param {type: "string"}
LABEL_COLUMN = ""  # @param {type: "string"}
# @markdown The model to begin with: a run's `WORKDIR`, or `hf:` and a Hugging Face folder or id.
INIT_FROM = "hf:sentence-transformers/all-MiniLM-L6-v2"  # @param {type: "string"}
# @markdown A folder in `runs`, or on the Drive.
WORKDIR = "finetuned"  # @param {type: "string"}
NUM_EPOCHS = 3.0  # @param {type: "number"}
# @markdown Tokens of a text at most; what is longer is cut, and counted in the report.
SEQ_LEN = 128  # @param {type: "integer"}
LEARNING_RATE = 5e-5  # @param {type: "number"}
# @markdown LoRA trains small adapters and the head only.
LORA = False  # @param {type: "boolean"}
# @markdown A trial of the whole notebook: a few steps, short texts.
FAST = False  # @param {type: "boolean"}

# %% [include] setup

# %% [markdown]
# ## The run
# The fields of a config can all be changed: `overrides["data.augment_dropout"] = 0.1`.

# %%
from jaxlm import config_files

is_ours = not INIT_FROM.startswith("hf:")
overrides = {
    "init_from": str(RUNS / INIT_FROM) if is_ours else INIT_FROM,
    "data.train": TRAIN,
    "num_epochs": float(NUM_EPOCHS),
    "seq_len": SEQ_LEN,
    "optimizer.learning_rate": LEARNING_RATE,
    "tuning.train": "lora" if LORA else "all",
}
for role, column in (("text", TEXT_COLUMN), ("label", LABEL_COLUMN)):
    if column:
        overrides[f"data.{role}_column"] = column
if FAST:
    overrides |= {"num_epochs": 0.05, "seq_len": min(SEQ_LEN, 32)}
config = config_files.read_config(CONFIG, overrides)
print(config)

# %% [markdown]
# Training. What became of each weight is in `origin.json`, rows that could not be used with their
# lines in `problems.jsonl`. At the end the best checkpoint is measured on what was held out.

# %%
from jaxlm.finetune import finetune

workdir = RUNS / WORKDIR
report = finetune(config, workdir, recipe=CONFIG)

# %%
from IPython.display import Image, display

for picture in sorted((workdir / "plots").glob("*.png")):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## What was it wrong about?

# %%
import json

lines = (workdir / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
rows = [json.loads(line) for line in lines]


def is_wrong(row):
    return any(row[name] != value for name, value in row["prediction"].items() if name in row)


for row in list(filter(is_wrong, rows))[:5]:
    for name in row["prediction"].keys() & row.keys():
        print(str(row.get("text", ""))[:200])
        print(f"   {name}: is {row[name]}, was taken for {row['prediction'][name]}")

# %% [markdown]
# ## Use it
# Rows are texts, or dicts of a record's fields (`{"text": …, "text_pair": …}`). A whole file:
# `python -m jaxlm.evaluate --checkpoint=WORKDIR --data=FILE`.

# %%
from jaxlm.tuning import load_finetuned

model = load_finetuned(workdir)
for row in rows[:3]:
    fields = {k: v for k, v in row.items() if k not in ("source", "line", "label", "prediction")}
    print({k: v for k, v in model.predict([fields])[0].items() if k != "probabilities"})

# %% [markdown]
# ## Take it out
# A folder that `transformers` loads, tokenizer and label names included, adapters merged.

# %%
target = RUNS / f"{WORKDIR}-hf-{report['step']}"
if not target.exists():
    run_tool(
        "convert_checkpoint",
        "to_hf",
        "--source",
        workdir,
        "--target",
        target,
        "--certificate=round_trip",
    )
