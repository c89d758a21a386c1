# %% [markdown]
# # A Hugging Face model in, LoRA, and out again with jaxlm
#
# A published model is brought in, small adapters (LoRA, arXiv:2106.09685) are trained on your file, merged into its
# weights, and written as a folder that `transformers` and vLLM load. Each conversion proves itself.
#
# Run the cells from top to bottom. A run that was cut off goes on where it stopped when the cells run again with
# the same `WORKDIR`; in Colab, let `DRIVE` name a folder for that.

# %%
# @title Settings { display-mode: "form" }
# @markdown A Hugging Face id, or a folder with config.json, model.safetensors and a tokenizer.
MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # @param ["sentence-transformers/all-MiniLM-L6-v2", "google-bert/bert-base-uncased", "openai-community/gpt2", "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-0.6B"] {allow-input: true}
# @markdown What kind of task it is: each config's docstring says which files it takes. Decoders write
# @markdown (instructions, summarisation); encoders and decoders classify.
CONFIG = "configs/finetune/classification.py"  # @param ["configs/finetune/classification.py", "configs/finetune/instructions.py", "configs/finetune/summarisation.py"] {allow-input: true}
# @markdown Your file. `demo:package:train` is which package a function of the standard library is from;
# @markdown `demo:summary:train`, for summarisation, what its docstring says.
TRAIN = "demo:package:train"  # @param {type: "string"}
# @markdown A folder in `runs`, or on the Drive.
WORKDIR = "lora"  # @param {type: "string"}
NUM_EPOCHS = 2.0  # @param {type: "number"}
SEQ_LEN = 128  # @param {type: "integer"}
LEARNING_RATE = 1e-3  # @param {type: "number"}
LORA_RANK = 8  # @param {type: "integer"}
# @markdown How a conversion is proved. `transformers`: both sides run on the same text; `round_trip`: all tensors are
# @markdown compared bit by bit; `auto`: the first where transformers and torch are installed.
CERTIFICATE = "auto"  # @param ["auto", "transformers", "round_trip"]
# @markdown A trial of the whole notebook: a few steps, short texts.
FAST = False  # @param {type: "boolean"}

# %% [include] setup

# %% [markdown]
# ## In
# Each tensor is read, renamed and laid out as ours, then compared with the original. Neither torch nor transformers is
# needed; pickles and code from the folder are refused.

# %%
import json

base, workdir = RUNS / f"{WORKDIR}-base", RUNS / WORKDIR
if not base.exists():
    run_tool(
        "convert_checkpoint",
        "from_hf",
        "--source",
        MODEL,
        "--target",
        base,
        f"--certificate={CERTIFICATE}",
    )


def show_certificate(folder):
    certificate = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    for name in ("passed", "against", "max_abs_difference", "top1_agreement"):
        if name in certificate:
            print(f"{name:<20} {certificate[name]}")
    print(f"{'tensors':<20} {certificate['round_trip']['tensors']}")


show_certificate(base)

# %% [markdown]
# What it says as it came: vectors of texts, and the continuation of a prompt if it is a decoder.

# %%
from jaxlm import api

TEXTS = ["def read(path):", "import os", "class Reader:"]


def try_out(checkpoint):
    """Prints what the model makes of a prompt, if it writes; returns its vectors of TEXTS, (3, D)."""
    lm = api.load(checkpoint)
    if lm.family == "gpt" and not lm.no_lm:
        ((made,),) = api.generate(lm, TEXTS[:1], max_new_tokens=20, temperature=0)
        print(TEXTS[0] + made.text)
    return api.embed(lm, TEXTS, pooling="mean")


before = try_out(base)
print("cosines\n", (before @ before.T).round(3))

# %% [markdown]
# ## LoRA
# The weights stand still; beside each matrix of `tuning.lora_targets` a product of two thin ones is learned, and
# the head.

# %%
from jaxlm import config_files
from jaxlm.finetune import finetune

overrides = {
    "init_from": str(base),
    "data.train": TRAIN,
    "num_epochs": float(NUM_EPOCHS),
    "seq_len": SEQ_LEN,
    "optimizer.learning_rate": LEARNING_RATE,
    "tuning.train": "lora",
    "tuning.lora_rank": LORA_RANK,
    "tuning.lora_targets": ("query", "value"),
}
if FAST:
    overrides |= {"num_epochs": 0.05, "seq_len": min(SEQ_LEN, 96)}  # room for a summary
config = config_files.read_config(CONFIG, overrides)
report = finetune(config, workdir, recipe=CONFIG)

# %%
from IPython.display import Image, display

for picture in sorted((workdir / "plots").glob("*.png")):
    display(Image(filename=str(picture)))

# %% [markdown]
# ## Out
# The adapters are merged into the matrices beside which they stood; the folder has the tokenizer, the names of the
# labels and the certificate.

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
        f"--certificate={CERTIFICATE}",
    )
show_certificate(target)
for file in sorted(target.iterdir()):
    print(f"{file.stat().st_size:>12,} {file.name}")

# %% [markdown]
# ## Proof
# The folder, read as anybody would read it, gives what the run gives; and not what the model gave before.

# %%
import numpy as np

tuned, exported = try_out(workdir), try_out(f"hf:{target}")
print("largest difference, run and export  ", np.abs(tuned - exported).max())
print("largest difference, run and original", np.abs(tuned - before).max())
np.testing.assert_allclose(exported, tuned, atol=1e-4 if devices[0].platform == "cpu" else 1e-2)

# %% [markdown]
# ## Next
# - In transformers: `pipeline("text-classification", model=TARGET)`, or `AutoModelForCausalLM.from_pretrained(TARGET)`.
# - To the hub: `huggingface-cli upload USER/NAME TARGET`.
# - Dialogues: `CONFIG = "configs/finetune/instructions.py"` and a file of `messages`.
