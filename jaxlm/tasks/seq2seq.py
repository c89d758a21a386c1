"""From one text to another: translation, summarisation, and whatever else pairs of texts show.

    decoder            tokens          <bos>  s   s  <sep>  t   t
                       labels            s    s <sep>  t    t <eos>
                       weights           0    0   0    1    1   1

    encoder-decoder    encoder_tokens    s    s   s  <eos>
                       tokens         <start> t   t                  teacher forcing: what the decoder reads is right
                       labels            t    t <eos>
                       weights           1    1   1

s is the source with what steers it before it: `prefix`, the same for all records ("summarize: "), and the record's own
`control` ("formal"). <start> is what the model's family begins with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.tasks.base import Feature
from jaxlm.tasks.text_scores import TEXT_SCORES
from jaxlm.tasks.writing import Writer, WritingTask, next_tokens

BASELINES = ("", "lead")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[\"'(\[]*[A-Z0-9])")


class Seq2Seq(WritingTask):
    """Sources to targets. A record with several targets is an example of each, and is scored by all.

    prefix: text before every source. baseline: '' or 'lead', the source's first sentence, scored beside the model's texts.
    target_len: tokens of a target at most, its end counted; what is longer is cut, as a source is that leaves no room.
    """

    kind = "seq2seq"
    families = ("gpt", "encoder_decoder")

    def __init__(
        self,
        tokenizer: Any,
        writer: Writer,
        fitted: Mapping[str, Any],
        *,
        prefix: str = "",
        baseline: str = "",
        **options: Any,
    ):
        super().__init__(tokenizer, writer, fitted, **options)
        self.prefix, self.baseline = prefix, baseline
        if baseline not in BASELINES:
            raise ValueError(f"task.baseline={baseline!r}: use {' or '.join(map(repr, BASELINES))}")

    def problem(self, record: Any, training: bool) -> str:
        """Why a record cannot be used, or ''."""
        if not self._source(record).strip():
            return "the source is empty"
        return "" if not training or self.reference(record) else "the target is missing"

    def features(self, record: Any) -> tuple[list[Feature], bool]:
        """A feature for each reference of the source; and whether text was cut."""
        source, source_cut = self._encode_source(record)
        targets = self.tokenizer.encode_batch(self.reference(record) or [""])
        before = self.writer.prefix if self.writer.has_encoder else ()  # BART's <s>, T5 has none
        room, end = self.target_len - len(before) - 1, [self.tokenizer.eos_id]
        laid = [np.concatenate([before, target[:room], end]).astype(np.int32) for target in targets]
        made = [self._feature(source, target) for target in laid]
        return made, source_cut or any(len(target) > room for target in targets)

    def _feature(self, source: np.ndarray, target: np.ndarray) -> Feature:
        """See the drawing; source as a prompt has it."""
        if self.writer.has_encoder:
            start = np.array([self.writer.start_id], np.int32)
            feature = next_tokens(np.concatenate([start, target]), np.ones(len(target) + 1, bool))
            return {**feature, "encoder_tokens": source}
        ids = np.concatenate([source, target])
        return next_tokens(ids, np.arange(len(ids)) >= len(source))

    def prompt(self, record: Any) -> np.ndarray:
        """The ids (n,) that the target follows: of an encoder-decoder what its encoder reads."""
        return self._encode_source(record)[0]

    def _encode_source(self, record: Any) -> tuple[np.ndarray, bool]:
        """(ids (n,) with all that stands around a source, whether some were cut off)."""
        w, t = self.writer, self.tokenizer
        after = t.eos_id if w.has_encoder else t.sep_id
        # A row of a decoder holds all but the target's last token, which is a label only.
        room = w.seq_len - (0 if w.has_encoder else self.target_len - 1) - len(w.prefix) - 1
        ids = t.encode(self._source(record))
        kept = np.concatenate([w.prefix, ids[: max(0, room)], [after]]).astype(np.int32)
        return kept, len(ids) > room

    def _source(self, record: Any) -> str:
        control = record.fields.get("control") or ""
        source = record.fields.get("source") or record.fields.get("text") or ""
        return self.prefix + (f"{control} " if control else "") + source if source.strip() else ""

    def reference(self, record: Any) -> list[str]:
        """The targets that are not empty."""
        return [text for text in record.fields.get("target") or () if text.strip()]

    def scores(self, records: Sequence[Any], predictions: Sequence[Mapping]) -> dict[str, float]:
        """The metrics, and as lead_… those of the baseline on the same records."""
        found = super().scores(records, predictions)
        if self.baseline and found:
            leads = [
                {"text": first_sentence(record.fields["source"])} if "text" in said else {}
                for record, said in zip(records, predictions, strict=True)
            ]
            texts, references = self._written(records, leads)
            for name in self.metrics:
                scores = TEXT_SCORES[name](texts, references)
                found |= {f"{self.baseline}_{key}": value for key, value in scores.items()}
        return found


def first_sentence(text: str) -> str:
    """Up to the first . ! or ? that a new sentence seems to follow: the baseline that summaries have to beat.

    >>> first_sentence("We use e.g. two. They work.")
    'We use e.g. two.'
    """
    text = text.strip()
    end = _SENTENCE_END.search(text)
    return text[: end.end()] if end else text
