"""JSON files that say their own sha256, so that what has changed in one does not go unseen.

The digest is of the canonical text: keys in order, no spaces. So the file may be laid out for people.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxlm.exits import Damaged

SEAL = "sha256"


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its sha256 in it, as JSON gives it back."""
    content = json.loads(json.dumps({k: v for k, v in content.items() if k != SEAL}))
    return content | {SEAL: digest(content)}


def digest(content: dict[str, Any]) -> str:
    """The sha256 of what a JSON object says, without its seal."""
    unsealed = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_sealed(content: dict[str, Any]) -> bool:
    """Whether the content is what was sealed; False without a seal."""
    return content.get(SEAL) == digest(content)


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file, of which no more than so many bytes are ever in memory.

    Raises:
      Damaged: if it is larger, no JSON, or no object.
    """
    with path.open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise Damaged(
            f"{path}: found more than {most_bytes:,} bytes, which no file of its kind has"
        )
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Damaged(f"{path}: found no JSON ({error}): it is not what was written") from error
    if not isinstance(content, dict):
        raise Damaged(f"{path}: found JSON of a {type(content).__name__}, expected an object")
    return content
