"""One run of the prepare benchmark: a preparation, the tokenizer alone on the text that it would encode, or long
conversations."""

import json
import shutil
import sys
import time
from pathlib import Path

BATCH = 1000  # texts that the tokenizer gets at once; more make it no faster


def main() -> None:
    side, recipe = sys.argv[1:]
    from trainer.base.model_config import load_tokenizer
    from trainer.console.library_logs import silence_libraries
    from trainer.recipe_file import load_recipe

    silence_libraries()
    loaded = load_recipe(Path(recipe), [])
    tokenizer = load_tokenizer(loaded.base)
    sides = {"prepare": run_prepare, "tokenizer": run_tokenizer, "long_conversations": run_long_conversations}
    print(json.dumps(sides[side](loaded, tokenizer)))


def run_prepare(recipe, tokenizer) -> dict[str, float]:
    from data_prep.fingerprint import tokenizer_files
    from data_prep.prepare import prepare
    from trainer.base.model_folder import resolve_folder

    files = tokenizer_files(resolve_folder(recipe.base), recipe.data)
    shutil.rmtree(recipe.data.prepared_dir, ignore_errors=True)
    started = time.perf_counter()
    manifest = prepare(recipe.data, tokenizer, files).manifest
    seconds = time.perf_counter() - started
    train, held_out = manifest["splits"]["train"], manifest["splits"]["held_out"]
    encoded = sum(split["tokens"] for split in (train, held_out))
    return {"seconds": seconds, "tokens": encoded, "fill_rate": train["fill_rate"]}


def run_long_conversations(_, tokenizer) -> dict[str, float]:
    from benchmarks.prepare.long_conversations import long_over_short

    return {"ratio": long_over_short(tokenizer)}


def run_tokenizer(recipe, tokenizer) -> dict[str, float]:
    """The tokenizer's own batch encoding (tokenizers.Tokenizer.encode_batch) of the rendered conversations."""
    rows = [json.loads(line)["messages"] for line in recipe.data.sources[0].path.open(encoding="utf-8")]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    encode = tokenizer.backend_tokenizer.encode_batch
    tokens, started = 0, time.perf_counter()
    for start in range(0, len(texts), BATCH):
        encodings = encode(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(min(len(encoding), recipe.data.seq_len) for encoding in encodings)
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


if __name__ == "__main__":
    main()
