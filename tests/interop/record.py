"""Writes recorded.json, what the default tests compare with: `python -m tests.interop.record [CASE …]` (needs torch)."""

import json
import sys
import tempfile
from pathlib import Path

from tests.interop import tiny_hf

PLACES = ((0, 0), (0, 12), (1, 7), (1, 19))  # (row, position), all of them real tokens


def record(name: str) -> dict:
    model = tiny_hf.make_theirs(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    outputs = tiny_hf.run_theirs(model)
    return {
        "config": config,
        "shapes": {key: list(p.shape) for key, p in tiny_hf.named_tensors(model).items()},
        "places": PLACES,
        "outputs": [[float(f"{x:.6g}") for x in outputs[place]] for place in PLACES],
    }


if __name__ == "__main__":
    before = tiny_hf.read_recorded() if sys.argv[1:] else {}
    recorded = before | {name: record(name) for name in sys.argv[1:] or tiny_hf.CASES}
    text = json.dumps(recorded, separators=(",", ":")).replace('},"', '},\n"')
    tiny_hf.RECORDED.write_text(text + "\n", encoding="utf-8")
    print(f"{tiny_hf.RECORDED}: {tiny_hf.RECORDED.stat().st_size} bytes")
