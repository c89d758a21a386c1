# %%
import json

# A model of no use, in seconds on a CPU: what FAST trains, on a few files of this Python's own library.
SMALL_RUN = {
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
