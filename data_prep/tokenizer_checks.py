"""Whether a tokenizer gives the ids that its model knows."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tokenizers import Tokenizer

from data_prep.user_error import UserError

_SAMPLES = (
    "Hello world",
    "It's",
    "a   b ",
    "two\n\nlines\n\ttab",
    "1234567 3.14",
    "déjà Ærø ÜBER",
    "e\u0301 ﬁ ½",
    "你好,世界。 日本語 한국어",
    "Привет! مرحبا नमस्ते",
    "🙂 👩\u200d👧",
    "def f(x):\n    return x[0] != {'a': 1}\n",
)
_SPACE = "▁"  # SentencePiece writes it for a space
_AS_THE_FILE_IS = "PreTrainedTokenizerFast"  # the class that transformers 4 knows, too


def check_tokenizer(tokenizer: Any) -> list[str]:
    """Remarks on what the tokenizer and its file do differently, and which of them training follows.

    Raises UserError if the tokenizer gives other ids than its file, or ids that its model has no embedding for.
    """
    rows = embedding_rows(tokenizer)
    if rows is not None:
        _check_added_tokens(tokenizer, rows)
    return _compare_with_file(tokenizer)


def embedding_rows(tokenizer: Any) -> int | None:
    """The rows of the embedding of the model that the tokenizer was loaded beside; None if its folder does not say."""
    if not tokenizer.name_or_path:
        return None
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "config.json").read_text(encoding="utf-8"))
        rows = (config.get("text_config") or config)["vocab_size"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    return rows if isinstance(rows, int) else None


def refuse_beyond_embedding(tokenizer: Any, index: int, rows: int, use: str) -> NoReturn:
    """Raises the UserError for a token without a row in the embedding. use: where the token occurs."""
    raise UserError(
        f"base.model: token {tokenizer.convert_ids_to_tokens(index)!r} ({use}) has id {index}, but the embedding has "
        f"{rows} rows (vocab_size in config.json); use the tokenizer that belongs to the model, or enlarge the model "
        "with resize_token_embeddings and save it"
    )


def notes_on_tokenizer(tokenizer: Any, with_texts: bool) -> list[str]:
    """Remarks on what a tokenizer lacks or has in excess. with_texts: whether documents are plain texts."""
    notes = []
    rows = embedding_rows(tokenizer)
    beyond = [] if rows is None else [t for t, index in tokenizer.get_vocab().items() if index >= rows]
    if beyond:
        notes.append(
            f"{len(beyond):,} tokens of the tokenizer, such as {min(beyond)!r}, are beyond the {rows:,} rows of the "
            "embedding; none occurs in this set, but a prompt that holds one fails"
        )
    if with_texts and tokenizer.eos_token is None:
        notes.append(
            "the tokenizer has no end token (eos_token): a model trained on these plain texts does not learn to stop"
        )
    return notes


def _compare_with_file(tokenizer: Any) -> list[str]:
    """Compares the tokenizer that transformers has made with its tokenizer.json.

    transformers 5 builds the pre-tokenizer anew from the tokenizer's class, whatever tokenizer.json says. Other tools,
    such as llama.cpp, read that file. Without one, there is nothing to compare.

    LlamaTokenizer does so on purpose where the file prepends a space to every piece of text, as Llama 2's does (see
    huggingface/transformers#47700). That shows before leading spaces and after control tokens only.
    """
    path = Path(tokenizer.name_or_path) / "tokenizer.json"
    if not (tokenizer.is_fast and tokenizer.name_or_path and path.is_file()):
        return []
    own, file = tokenizer.backend_tokenizer, Tokenizer.from_file(str(path))
    for backend in (own, file):
        backend.no_truncation()
        backend.no_padding()
    added = {token.content for token in file.get_added_tokens_decoder().values()}
    after_control = [f"{token}word" for token in (tokenizer.bos_token, tokenizer.eos_token) if token in added]
    texts = (*_SAMPLES, " leading space", *after_control)
    different = [text for text in texts if _ids(own, text) != _ids(file, text)]
    name = type(tokenizer).__name__
    for text in different:
        if text in _SAMPLES or _without_spaces(own, text) != _without_spaces(file, text):
            raise UserError(
                f"base.model: {path.parent}: {name} of transformers encodes {text!r} as {_ids(own, text)}, but "
                f"tokenizer.json, which other tools read, as {_ids(file, text)}; {_remedy(path.parent, file, text)}"
            )
    return [_note_on_spaces(name, text, _ids(own, text), _ids(file, text)) for text in different[-1:]]


def _remedy(folder: Path, file: Tokenizer, text: str) -> str:
    """What makes transformers and tokenizer.json agree: the class that takes the file as it is, if that helps.

    For some models (model_type qwen2) transformers takes a class of its own, whatever tokenizer_config.json names.
    """
    from transformers import AutoTokenizer  # imports much

    rewrite = "write tokenizer.json anew with save_pretrained"
    with TemporaryDirectory() as place:
        try:
            for name in ("config.json", "tokenizer.json"):
                shutil.copy(folder / name, place)
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            config["tokenizer_class"] = _AS_THE_FILE_IS
            (Path(place) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
            other = AutoTokenizer.from_pretrained(place)  # nosec B615 # a local folder
            helps = _ids(other.backend_tokenizer, text) == _ids(file, text)
        except Exception:  # whatever such a folder makes transformers raise
            helps = False
    if not helps:
        return f"this version of transformers has no other class for this model: if it was trained so, {rewrite}"
    return (
        f"if the model was trained with the latter, set tokenizer_class in tokenizer_config.json to {_AS_THE_FILE_IS}, "
        f"else {rewrite}"
    )


def _note_on_spaces(name: str, text: str, made: Any, expected: Any) -> str:
    return (
        f"{name} of transformers and tokenizer.json add different spaces before texts or after control tokens "
        f"({text!r} is {made}, not {expected}); this set has the ids of {name}, as apply_chat_template gives them; for "
        "those of tools that read the file, such as llama.cpp, set tokenizer_class in tokenizer_config.json to "
        f"{_AS_THE_FILE_IS}"
    )


def _check_added_tokens(tokenizer: Any, rows: int) -> None:
    """Refuses tokens beyond the embedding that any run or any text may use.

    These are bos, end and pad tokens, and added tokens that are not special. Other special tokens come from the chat
    template only: Gemma 3 has one for images that its text models lack.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and index >= rows:
            refuse_beyond_embedding(tokenizer, index, rows, f"the tokenizer's {name}")
    for index, token in tokenizer.added_tokens_decoder.items():
        if index >= rows and not token.special:
            refuse_beyond_embedding(tokenizer, index, rows, "an added token")


def _ids(backend: Tokenizer, text: str) -> list[int] | str:
    """The ids, or the error of a tokenizer that cannot encode the text."""
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises this class itself
        return str(error)


def _without_spaces(backend: Tokenizer, text: str) -> list[str]:
    """Control tokens, and the text between them as the pieces spell it, without SentencePiece's spaces."""
    added, written = backend.get_added_tokens_decoder(), [""]
    for index in ids if isinstance(ids := _ids(backend, text), list) else ():
        if index in added:
            written += [added[index].content, ""]
        else:
            written[-1] += (backend.id_to_token(index) or "").replace(_SPACE, "")
    return written
