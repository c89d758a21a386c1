"""jaxlm: pretrain and fine-tune Transformer language models with JAX and Flax."""

import sys

__version__ = "0.1.0"

# Here, where an older Python comes first: what follows is written for newer ones.
if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"found Python {found}; expected 3.11, 3.12 or 3.13; change: start one of these")
