"""Translation, by a decoder or an encoder-decoder.

    python -m jaxlm.finetune --config=configs/finetune/translation.py:train=train.en+train.de,dev=dev.en+dev.de \\
        --config.init_from=W --workdir=F

Files: two parallel texts, line by line, with + between them; or CSV, TSV, JSONL and Parquet with source and target (src and
tgt, or name them: source_column=en,target_column=de). BLEU and chrF are sacreBLEU's (pip install 'jaxlm[eval]').
prefix: a text before each source ("translate English to German: " for T5); the column `control` is one of each record's own,
such as the language or the style that is wanted. Label smoothing 0.1, beam 4 and length penalty 0.6 are those of Vaswani
et al. 2017, arXiv:1706.03762, section 6.1 (base: 27.3 BLEU on newstest2014 from English to German).
"""

from ml_collections import ConfigDict

from configs.finetune.writing import writing


def get_config(arg: str = "") -> ConfigDict:
    """arg: 'train=FILE|FILE+FILE[,dev=…][,test=…][,prefix=…][,target_len=…][,learning_rate=…]…'."""
    task = dict(
        name="seq2seq",
        prefix="",
        # tokens of a translation at most
        target_len=128,
        label_smoothing=0.1,
        metrics="bleu+chrf",
        baseline="",
        # of encoder-decoders, what the decoder begins with; '' as the pretrained model does
        decoder_start="",
    )
    columns = ("source", "target", "control")
    return writing(task, arg, num_beams=4, learning_rate=3e-4, columns=columns, seq_len=256)
