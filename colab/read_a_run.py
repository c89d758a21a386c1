# %% [markdown]
# # Read a training run of jaxlm
#
# What a run has learned and how: its curves, what it wrote while it trained and writes now, where its heads look,
# how its embeddings lie, and what can be read from each layer. A CPU is enough for small models.
#
# Run the cells from top to bottom.

# %%
# @title Settings { display-mode: "form" }
# @markdown A run of `pretrain.ipynb` or `finetune.ipynb`: a folder in `runs`, or on the Drive. If there is none, a small
# @markdown one is trained first, in minutes.
WORKDIR = "pretrained"  # @param {type: "string"}
# @markdown Other runs to draw beside it, with commas between them.
BESIDE = ""  # @param {type: "string"}
# @markdown A text whose attention maps are drawn.
TEXT = "def read_lines(path): return open(path).read().splitlines()"  # @param {type: "string"}
# @markdown The layer whose heads are drawn large, from 0.
LAYER = 0  # @param {type: "integer"}
PROMPT = "def main("  # @param {type: "string"}
# @markdown A minute's trial of the whole notebook; a run that is trained first is of no use.
FAST = False  # @param {type: "boolean"}

# %% [include] setup

# %% [markdown]
# ## The run

# %% [include] small_run

# %%
from jaxlm import config_files
from jaxlm.pretrain import pretrain
from jaxlm.training.checkpoints import find_step

workdir = RUNS / WORKDIR
if not (workdir / "checkpoints").exists():
    print(f"{workdir} has no checkpoint: training a small model")
    recipe = "configs/gpt.py:tiny"
    small = config_files.read_config(recipe, SMALL_RUN if FAST else {})
    pretrain(small, workdir, recipe=recipe)
config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
environment = json.loads((workdir / "environment.json").read_text(encoding="utf-8"))
print("newest checkpoint", find_step(workdir).name)
print("model            ", config["model"])
print("optimizer        ", config["optimizer"])
print("where            ", environment)

# %% [markdown]
# ## Curves

# %%
from IPython.display import Image, display

from jaxlm.training.plots import plot_runs

pictures = workdir / "pictures"
runs = [workdir, *(RUNS / name.strip() for name in BESIDE.split(",") if name.strip())]
for path in plot_runs(runs, pictures):
    display(Image(filename=str(path)))


def show(name, figure):
    """Keeps a figure as pictures/NAME.png, and shows it."""
    figure.savefig(pictures / f"{name}.png", dpi=100)
    display(Image(filename=str(pictures / f"{name}.png")))


# %% [markdown]
# ## What it wrote while it trained
# The config's prompts, continued at each evaluation.

# %%
samples = workdir / "samples.jsonl"
if samples.is_file():
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    for line in (line for line in lines if line["prompt"] == lines[0]["prompt"]):
        print(f"step {line['step']:>6}  {line['prompt']}{line['text'][:300]}\n")

# %% [markdown]
# ## What it writes now
# A decoder goes on from the prompt, an encoder-decoder answers it, an encoder names the likeliest words in the
# place of `[MASK]`. A score is the whole text's: smaller is likelier.

# %% [include] writes

# %%
text = TEXT[: lm.max_len - 2]  # a token has a character or more
if not lm.no_lm and lm.family != "encoder_decoder":
    print(f"{api.score(lm, [text])[0].bits_per_byte:.3f} bits per byte: {text}")

# %% [markdown]
# ## Where its heads look
# All layers, then the heads of `LAYER`. Rows look, columns are looked at; each row sums to 1.

# %%
from jaxlm import look

for found in look.attention_maps(lm, text):
    show(f"attention-{found.name}", look.draw_attention(found))
    show(f"attention-{found.name}-{LAYER}", look.draw_attention(found, layer=LAYER))

# %% [markdown]
# ## How its embeddings lie
# The table's commonest tokens, on the two directions in which they differ most. Below, texts: functions of the
# standard library, each with the colour of its package.

# %%
words, vectors = look.token_vectors(lm, count=150)
show("tokens", look.draw_projection(look.project(vectors), names=words))

# %%
from jaxlm.data.demos import demo_records

packages = ("email", "idlelib", "tkinter", "unittest")
records = [r.fields for r in demo_records("package", "train") if r.fields["label"] in packages]
records = records[:: 10 if FAST else 1]
texts, labels = [f["text"] for f in records], [f["label"] for f in records]
if lm.family != "encoder_decoder":
    states = look.layer_states(lm, texts)  # (layers + 1, texts, width)
    show("texts", look.draw_projection(look.project(states[-1]), groups=labels))

# %% [markdown]
# ## What each layer knows
# A linear classifier learns the package of a function from each layer's states, and shuffled labels beside it,
# which no layer can know.

# %%
if lm.family != "encoder_decoder":
    show("probe", look.draw_probe(look.probe_states(states, labels)))

# %% [markdown]
# ## One page of it all
# A file to keep or to send: config, curves, samples, machine. Open it from the Files panel.

# %%
run_tool("report", workdir)
