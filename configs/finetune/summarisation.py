"""Summaries, by a decoder or an encoder-decoder.

    python -m jaxlm.finetune --config=configs/finetune/summarisation.py:train=train.jsonl,dev=dev.jsonl,test=test.jsonl \\
        --config.init_from=W --workdir=F

Files: CSV, JSON, JSONL or Parquet with a source (source, article, document, text, …; a list of sentences is joined) and a
target (target, summary, highlights, …; a list is several summaries, by all of which a text is scored). ROUGE is
rouge-score's (pip install 'jaxlm[eval]'); lead_rouge… are those of the source's first sentence, which a summary has to beat.
prefix: a text before each source ("summarize: " for T5); the column `control` is one of each record's own.
BART-large on CNN/DailyMail: ROUGE-1 44.16, -2 21.28, -L 40.90 (arXiv:1910.13461, table 3); on SciTLDR's abstracts: 43.3,
20.8, 35.0 (arXiv:2004.15011, table 5).
"""

from ml_collections import ConfigDict

from configs.finetune.writing import writing


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE[,dev=FILE][,test=FILE][,prefix=…][,target_len=…][,learning_rate=…]…'."""
    task = dict(
        name="seq2seq",
        prefix="",
        # tokens of a summary at most
        target_len=64,
        label_smoothing=0.1,
        metrics="rouge",
        # scored beside the model: '' or 'lead', the first sentence
        baseline="lead",
        # of encoder-decoders, what the decoder begins with; '' as the pretrained model does
        decoder_start="",
    )
    columns = ("source", "target", "control")
    return writing(task, arg, num_beams=4, learning_rate=3e-5, columns=columns, seq_len=512)
