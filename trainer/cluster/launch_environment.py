"""Which variables of the launching shell the ranks on other nodes are given; ssh passes none on."""

from collections.abc import Mapping
from pathlib import Path

from data_prep.user_error import UserError

FILE = ".deepspeed_env"  # DeepSpeed's file of further variables, in the home or the current folder
PREFIXES = (
    "CUBLAS_", "CUDA_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTHON", "PYTORCH_",
    "TOKENIZERS_", "TORCH_", "TRANSFORMERS_", "TRITON_", "UCX_",
)  # fmt: skip
NAMES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "LD_LIBRARY_PATH", "PATH")
OF_ONE_NODE = ("CUDA_VISIBLE_DEVICES",)  # the hostfile's slots say it


def passed_on(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Those for the ranks: the shell's, replaced by .deepspeed_env's. Raises UserError as `read_file` does."""
    found = {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIXES) or name in NAMES or name.lower() in NAMES
    }
    for path in (Path.home() / FILE, folder / FILE):
        if path.is_file():
            found |= read_file(path)
    return {name: value for name, value in found.items() if name not in OF_ONE_NODE}


def read_file(path: Path) -> dict[str, str]:
    """NAME=VALUE lines. Raises UserError for any other: of a comment or empty line DeepSpeed's own launcher dies."""
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, equals, value = line.partition("=")
        if not equals or not name.strip() or name.lstrip().startswith("#"):
            raise UserError(
                f"{path}, line {number}: {line!r}: expected NAME=VALUE, no comment, no empty line; remove it"
            )
        found[name.strip()] = value.strip().strip('"')
    return found
