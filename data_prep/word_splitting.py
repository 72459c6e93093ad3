"""Makes words of any script separable by blanks, for comparisons word by word."""

import regex

_SIGN_OF_ITS_OWN = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*")


def signs_apart(text: str) -> str:
    """The text with blanks around each character, including its combining marks, of scripts that put no blanks between
    words: Chinese, Japanese, Thai, Lao, Khmer, Burmese."""
    return _SIGN_OF_ITS_OWN.sub(r" \g<0> ", text)
