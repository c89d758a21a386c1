# %% [markdown]
# ## Code and packages
# What this machine has already (jax and its TPU library, above all) stays as it is.

# %%
# @title Machine { display-mode: "form" }
# @markdown Where the code comes from, if it is not beside this notebook: the address of a git repository.
REPOSITORY = "$REPOSITORY"  # @param {type: "string"}
# @markdown Where runs are kept. Empty: in `runs`, on this machine's disk, which Colab takes away with the machine.
# @markdown A folder on your Drive outlives it.
DRIVE = ""  # @param ["", "/content/drive/MyDrive/jaxlm"] {allow-input: true}
# @markdown More flags for XLA (`--xla_…=…`). Those that this machine's release does not know are left out.
XLA_FLAGS = ""  # @param {type: "string"}

import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

places = (Path("."), Path(".."), Path("jaxlm-code"))
CODE = next((place for place in places if (place / "jaxlm" / "pretrain.py").is_file()), places[-1])
if not CODE.exists():
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, CODE], check=True)
CODE = CODE.resolve()
sys.path.insert(0, str(CODE))

before = {package.name: package.version for package in metadata.distributions()}
pip = [sys.executable, "-m", "pip", "install", "--quiet", "-r", CODE / "requirements.txt"]
subprocess.run(pip, check=True)
after = {package.name: package.version for package in metadata.distributions()}
packages_of = metadata.packages_distributions()
loaded = {name for module in list(sys.modules) for name in packages_of.get(module, ())}
stale = [name for name in loaded & before.keys() if before[name] != after.get(name)]
assert not stale, (
    f"{', '.join(stale)}: loaded before the version that is needed was installed. "
    "Choose Runtime -> Restart session, then run all cells again."
)

if DRIVE and util.find_spec("google.colab"):
    from google.colab import drive

    drive.mount("/content/drive")
RUNS = Path(DRIVE or "runs").resolve()


def run_tool(name, *arguments):
    """Runs tools/NAME.py, prints what it says, and fails if it does."""
    command = [sys.executable, CODE / "tools" / f"{name}.py", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout[-5000:])
    done.check_returncode()


# %%
import logging

logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("jaxlm").setLevel(logging.INFO)

from jaxlm.compiled import keep_compiled_programs
from jaxlm.parallel.xla_flags import leave_out_unknown_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
if unknown := leave_out_unknown_flags():
    print("left out, unknown to this machine's compilers:", *unknown)

import jax

try:
    devices = jax.devices()
except (RuntimeError, AssertionError) as error:
    print(f"No accelerator could be started ({error}); on to the CPU.")
    jax.config.update("jax_platforms", "cpu")
    devices = jax.devices()
keep_compiled_programs()
print(f"jax {jax.__version__} with {len(devices)} x {devices[0].device_kind}")
