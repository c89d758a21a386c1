"""What a process keeps to itself: secrets stay out of what it says and writes, and its files out of others' hands.

Secrets are the values of environment variables that are named like one (HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, …),
what stands before the @ of a URL or signs it, and tokens of well-known forms. A config may hold none, for it is written into
config.json and every checkpoint; in what is logged and printed they are replaced.
"""

import functools
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

_SECRET_WORDS = frozenset(
    "TOKEN TOKENS SECRET SECRETS PASSWORD PASSWD PASSPHRASE KEY APIKEY CREDENTIAL CREDENTIALS".split()
)
_LEAST_CHARS = 8  # shorter values stand in any text
# What is found -> what it is called.
_FORMS = {
    re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"): "a password in a URL",
    re.compile(
        r"(?i)(?<=[?&;])((?:[\w-]*token|[\w-]*signature|[\w-]*credential|sig|key|secret|password)=)[^&\s'\"]+"
    ): "a secret in a URL",
    re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-|sk-|AKIA|ya29\.)[\w-]{16,}"): "a token",
}
_HIDDEN = "[secret]"


def redact(text: str) -> str:
    """`text` with every secret replaced by the name of its variable, or by [secret]."""
    for name, value in _secret_variables().items():
        text = text.replace(value, f"[${name}]")
    for form in _FORMS:
        text = form.sub(lambda match: f"{match[1] if match.re.groups else ''}{_HIDDEN}", text)
    return text


def find_secrets(text: str) -> list[str]:
    """What secrets `text` holds, in words that do not show them."""
    found = [
        f"the value of ${name}" for name, value in _secret_variables().items() if value in text
    ]
    return found + [what for form, what in _FORMS.items() if form.search(text)]


def refuse_secrets(texts: Mapping[str, Any]) -> None:
    """texts: by where they stand, such as a config's fields.

    Raises:
      ValueError: if one holds a secret; the message says where, and shows none.
    """
    problems = [
        f"  {where}: holds {what}"
        for where, text in texts.items()
        for what in find_secrets(str(text))
    ]
    if problems:
        raise ValueError(
            "a config is written into config.json, checkpoints and logs, so no secret may be in it:\n"
            + "\n".join(problems)
            + "\nLeave it in the environment or in the credentials file of the program that needs it."
        )


@functools.cache  # once for the process
def keep_private() -> None:
    """From here on new files are not writable by all, and log lines, warnings and tracebacks are redacted."""
    os.umask(os.umask(0o077) | 0o002)
    make = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redact(_formatted(*record.exc_info))
        return record

    logging.setLogRecordFactory(make_redacted)
    show = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: redact(show(*args, **kwargs))
    sys.excepthook = lambda *error: _print(_formatted(*error))
    threading.excepthook = lambda args: _print(
        f"in thread {args.thread.name if args.thread else '?'}:\n"
        + _formatted(args.exc_type, args.exc_value, args.exc_traceback)
    )


def _secret_variables() -> dict[str, str]:
    """The longest values first, as one may be a part of another."""
    found = {
        name: value
        for name, value in os.environ.items()
        if not _SECRET_WORDS.isdisjoint(name.upper().split("_")) and len(value) >= _LEAST_CHARS
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _formatted(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> str:
    return "".join(traceback.format_exception(kind, error, trace))


def _print(text: str) -> None:
    print(redact(text), end="", file=sys.stderr, flush=True)
