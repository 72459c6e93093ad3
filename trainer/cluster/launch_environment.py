"""Selects the launching shell's variables that ranks on other nodes get; ssh forwards none by itself."""

from collections.abc import Mapping
from pathlib import Path

from data_prep.user_error import UserError

FILE = ".deepspeed_env"  # DeepSpeed's file of further variables, in the home or the current folder
PREFIXES = (
    "CUBLAS_", "CUDA_", "DS_", "FI_", "GLOO_", "HF_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTHON", "PYTORCH_",
    "TOKENIZERS_", "TORCH_", "TRANSFORMERS_", "TRITON_", "UCX_",
)  # fmt: skip
NAMES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "LD_LIBRARY_PATH", "PATH")
PER_NODE = ("CUDA_VISIBLE_DEVICES",)  # set on each node from the hostfile's slots


def forwarded_variables(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The shell's variables for ranks, overridden by .deepspeed_env. Raises UserError as `read_file` does."""
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(PREFIXES) or name in NAMES or name.lower() in NAMES
    }
    for path in (Path.home() / FILE, folder / FILE):
        if path.is_file():
            variables |= read_file(path)
    return {name: value for name, value in variables.items() if name not in PER_NODE}


def read_file(path: Path) -> dict[str, str]:
    """Reads NAME=VALUE lines. Raises UserError for others: DeepSpeed's launcher fails on comments and empty lines."""
    variables = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, equals, value = line.partition("=")
        if not equals or not name.strip() or name.lstrip().startswith("#"):
            raise UserError(
                f"{path}, line {number}: {line!r}: expected NAME=VALUE (no comments or empty lines); remove it"
            )
        variables[name.strip()] = value.strip().strip('"')
    return variables
