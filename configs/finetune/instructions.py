"""Instructions and dialogues for decoders: the model learns what the assistant answers.

    python -m jaxlm.finetune --config=configs/finetune/instructions.py:train=chats.jsonl --config.init_from=W --workdir=F
    python -m jaxlm.finetune --config=configs/finetune/instructions.py:train=data.json,num_epochs=2,learning_rate=1e-5 \\
        --config.init_from=hf:Qwen/Qwen3-0.6B --workdir=F

Files: JSON, JSONL or Parquet with `messages` ([{"role": "user", "content": …}, …], or ShareGPT's from and value), or with
`instruction`, `input` (may be missing) and `output`. A dialogue may have many turns: each answer is learned.
Dialogues are written as the chat template of the model's tokenizer says, where it has one, else by ours
(jaxlm/tasks/chat.py); template=FILE is another. Held-out answers: their loss (nll, perplexity), and what the model writes
instead, in predictions.jsonl. With --config.tuning.train=lora only adapters are trained.
"""

from ml_collections import ConfigDict

from configs.finetune.writing import writing


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,target_len=…][,metrics=chrf+rouge][,learning_rate=…]…'."""
    task = dict(
        name="dialogue",
        # '' is the tokenizer's own, or ours
        template="",
        # what the system says where a dialogue does not
        system="",
        # tokens of a written answer at most
        target_len=128,
        label_smoothing=0.0,
        # of written answers: some of exact_match, bleu, chrf, rouge, with + between
        metrics="exact_match",
    )
    columns = ("messages", "instruction", "input", "output", "system")
    return writing(task, arg, learning_rate=2e-5, columns=columns, seq_len=512)
