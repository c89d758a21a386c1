"""Encoder-decoders through the API and the command line: from Hugging Face, converted, and runs of ours."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import flags

from jaxlm import api, config_files, generate
from jaxlm.inference.source_text import encode_source
from jaxlm.inputs import encode_prompts
from jaxlm.interop import convert
from tests.interop import tiny_hf
from tests.interop.test_encoder_decoders import write_spiece
from tests.tiny import ROOT

PROMPTS = ["the cat", "a dog ran <extra_id_0> now"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a Hugging Face folder of a tiny T5, its workdir, the same as if we had trained it)."""
    folder = tmp_path_factory.mktemp("t5")
    recorded = tiny_hf.read_recorded()["t5"]
    ids = dict(vocab_size=160, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    shapes = recorded["shapes"] | {"shared.weight": [160, 24]}
    tiny_hf.write_source(folder / "hf", recorded["config"] | ids, tiny_hf.make_weights(shapes))
    config = json.loads((folder / "hf" / "config.json").read_text())
    write_spiece(folder / "hf", **config)
    templates = {"encoder_decoder": config_files.read_config(str(ROOT / "configs/t5.py:tiny"))}
    convert.from_hf(str(folder / "hf"), folder / "w", templates, against="round_trip")
    shutil.copytree(folder / "w", folder / "ours")
    manifest = folder / "ours" / "checkpoints" / "0" / "manifest" / "metadata"
    about = json.loads(manifest.read_text())
    del about["huggingface"]
    manifest.write_text(json.dumps(about))
    return folder / "hf", folder / "w", folder / "ours"


@pytest.fixture(scope="module")
def models(folders):
    return [api.load(f"hf:{folders[0]}"), *map(api.load, folders[1:])]


def test_every_way_to_the_model_knows_how_its_texts_begin(models):
    for lm in models:
        assert lm.family == "encoder_decoder" and lm.prefix == () and not lm.no_lm
        assert lm.writing["start_id"] == lm.tokenizer.pad_id == 0
        first, second = encode_prompts(lm, PROMPTS)
        assert first.tolist() == [*lm.tokenizer.encode("the cat"), lm.tokenizer.eos_id]
        assert lm.tokenizer.sentinel_ids[0] in second.tolist()


def test_generate_stream_and_the_command_line_give_one_text(models, folders, capsys):
    lm = models[1]
    options = dict(temperature=0, max_new_tokens=4)
    answers = api.generate(lm, PROMPTS[:1], **options)
    ((text,),) = [[made.text for made in made_for] for made_for in answers]
    assert "".join(piece.text for piece in api.stream(lm, PROMPTS[0], **options)) == text
    values = flags.FlagValues()
    generate.define_flags(values)
    said = [f"--checkpoint={folders[1]}", f"--prompt={PROMPTS[0]}"]
    values(["generate", *said, "--temperature=0", "--max_new_tokens=4"])
    generate.run(values)
    assert capsys.readouterr().out == text + "\n"  # an answer stands alone, without its prompt


def test_a_fine_tuned_runs_task_says_what_its_texts_begin_with(folders, tmp_path):
    shutil.copytree(folders[2], tmp_path / "w")
    (tmp_path / "w" / "task.json").write_text(json.dumps(dict(prefix=[4], start_id=1)))
    lm = api.load(tmp_path / "w")
    assert (lm.prefix, lm.writing) == ((4,), dict(start_id=1))


def test_tokens_that_transformers_forces_are_forced(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "hf")
    file = tmp_path / "hf" / "generation_config.json"
    file.write_text(json.dumps(dict(forced_bos_token_id=5, forced_eos_token_id=1)))
    assert api.load(f"hf:{tmp_path / 'hf'}").writing == dict(start_id=0, first_id=5, must_end=True)
    file.write_text(json.dumps(dict(forced_bos_token_id=1 << 40)))
    with pytest.raises(api.BadInput, match="forced_bos_token_id=1099511627776"):
        api.load(f"hf:{tmp_path / 'hf'}")


def test_what_an_encoder_decoder_does_not_do_is_refused(models):
    for use in (api.score, api.embed, api.fill_mask):
        with pytest.raises(api.BadInput, match="an encoder-decoder"):
            use(models[0], ["the cat"])
    with pytest.raises(api.BadInput, match="empty"):
        api.generate(models[0], [""])
    with pytest.raises(api.BadInput, match="tokens, and the context holds"):
        api.generate(dataclasses.replace(models[0], max_len=3), ["the cat sat on the mat"])


def test_hidden_parts_take_the_space_before_them_along(models):
    t = models[0].tokenizer
    first, second = t.sentinel_ids[:2]
    ids = encode_source(t, "the cat <extra_id_0> on<extra_id_1>", prefix=(7,))
    on, cat = t.encode("on"), t.encode("the cat")
    np.testing.assert_array_equal(ids, [7, *cat, first, *on, second, t.eos_id])
