"""The tokenizer goes along both ways and gives the same ids."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from jaxlm.interop import tokenizer_files as files
from jaxlm.interop.mapping import BadModel
from jaxlm.tokenizers import load_tokenizer, train_tokenizer

LIBRARY = sorted(Path(os.__file__).parent.glob("[a-c]*.py"))[:8]
TEXTS = [path.read_text(encoding="utf-8")[:20_000] for path in LIBRARY]
KINDS = ("bytes", "chars", "byte_bpe", "unigram", "bpe")


def export(tokenizer, folder, *, ends=files.TEXT_ENDS["gpt"]):
    tokenizer.save(folder / "ours")
    (folder / "theirs").mkdir()
    saved = load_tokenizer(folder / "ours")
    files.write_tokenizer(saved, folder / "ours", folder / "theirs", ends=ends, max_len=64)
    return folder / "theirs"


def check_same_ids(ours, theirs, texts=TEXTS):
    """Hugging Face's own library, from the exported file alone, gives our ids and reads them back."""
    for text in texts:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_ours_exports_as_a_tokenizer_json_with_the_same_ids(kind, tmp_path):
    ours = train_tokenizer(kind, TEXTS, 600, num_sentinels=3)
    theirs = hf.Tokenizer.from_file(str(export(ours, tmp_path) / "tokenizer.json"))
    check_same_ids(ours, theirs)
    assert theirs.get_vocab_size() == ours.vocab_size == files.num_model_ids(ours)
    for role, id in ours.roles.items():
        assert theirs.token_to_id(ours.token(id)) == id, role
    assert theirs.decode([ours.bos_id, *ours.encode("def")]) == "def"


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram"])
def test_how_many_ids_a_file_has_is_known_without_reading_it_again(kind):
    ours = train_tokenizer(kind, TEXTS, 600, num_sentinels=0)
    ours.blob = b"read no more"
    assert files.num_model_ids(ours) == 600


def test_another_tokenizers_ids_are_caught(tmp_path):
    ours, other = (train_tokenizer("byte_bpe", TEXTS, size, 3) for size in (600, 500))
    theirs = hf.Tokenizer.from_file(str(export(other, tmp_path) / "tokenizer.json"))
    with pytest.raises(AssertionError):
        check_same_ids(ours, theirs)
    with pytest.raises(BadModel, match="other ids"):
        files.check_same_ids(ours, tmp_path / "theirs")


@pytest.mark.parametrize(
    "family, first, last",
    [
        ("gpt", ["bos"], []),
        ("bert", ["cls"], ["sep"]),
        ("encoder_decoder", [], ["eos"]),
        ("bart", ["bos"], ["eos"]),
    ],
)
def test_the_exported_tokenizer_puts_around_a_text_what_our_models_see(
    family, first, last, tmp_path
):
    ours = train_tokenizer("byte_bpe", TEXTS, 600, num_sentinels=0)
    folder = export(ours, tmp_path, ends=files.TEXT_ENDS[family])
    around = hf.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("def").ids
    before, after = ([ours.roles[role] for role in roles] for roles in (first, last))
    assert around == [*before, *ours.encode("def"), *after]


def test_vocab_json_and_merges_are_read_as_what_they_describe(tmp_path):
    plain = hf.Tokenizer(hf.models.BPE())
    plain.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
    )
    plain.train_from_iterator(TEXTS, trainer)
    plain.model.save(str(tmp_path))
    ours = files.read_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text).tolist() == plain.encode(text).ids
    assert ours.bos_id == ours.eos_id == 0


def test_a_foreign_tokenizers_files_come_back_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefgh",
        *(f"##{c}" for c in "abcdefgh"),
    ]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "x": 1}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    ours = files.read_tokenizer(source)
    ours.save(tmp_path / "tokenizer")
    files.keep_files(source, tmp_path / "tokenizer")
    out = tmp_path / "out"
    out.mkdir()
    saved = load_tokenizer(tmp_path / "tokenizer")
    np.testing.assert_array_equal(saved.encode("Bad face"), ours.encode("Bad face"))
    files.write_tokenizer(
        saved, tmp_path / "tokenizer", out, ends=files.TEXT_ENDS["bert"], max_len=8
    )
    for file in source.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": null}'),
        ("tokenizer.model", "no model"),
        ("vocab.json", "[]"),
    ],
)
def test_files_that_are_no_tokenizer_are_one_error(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ValueError, match=str(tmp_path)):
        files.read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert files.read_tokenizer(tmp_path) is None
