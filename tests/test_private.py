"""What is a secret, and what is not."""

import pytest

from jaxlm.private import find_secrets, redact, refuse_secrets

CANARY = "c4n4ry-0f-th3-c04l-m1n3"
SECRETS = {
    "a password in a URL": f"https://user:{CANARY}@host/data.jsonl",
    "a token before a host": f"git+https://{CANARY}@github.com/x/y",
    "a signed URL": f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={CANARY}&a=1",
    "a parameter": f"gs://bucket/x?access_token={CANARY}",
    "a token of the hub": f"hf_{CANARY}",
    "a variable's value": f"Authorization: {CANARY}",
}
PLAIN = [
    "gs://bucket/run@1000/params",
    "hf:org/model@main",
    "https://host:8476/path?step=3&keys=all",
    "('wiki=wiki/*.jsonl.zst', 'books')",
    "a tokenizer of sk-learn, and hf_hub",
    "user@example.com wrote to http://example.com",
]


@pytest.fixture(autouse=True)
def variable(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", CANARY)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "the word that is in no list")
    monkeypatch.setenv("SHORT_TOKEN", "step")


@pytest.mark.parametrize("case", SECRETS)
def test_a_secret_is_found_and_replaced(case, monkeypatch):
    if case != "a variable's value":
        monkeypatch.delenv("MY_API_KEY")
    text = f"before {SECRETS[case]} after"
    assert find_secrets(text)
    assert CANARY not in redact(text)
    assert redact(text).startswith("before ") and redact(text).endswith(" after")
    with pytest.raises(ValueError, match="data.sources: holds") as error:
        refuse_secrets({"data.sources": (text,)})
    assert CANARY not in str(error.value)


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text
    refuse_secrets({"data.sources": text})


def test_words_of_a_variable_that_is_not_named_like_a_secret_stay():
    assert redact("the word that is in no list, step 3") == "the word that is in no list, step 3"
