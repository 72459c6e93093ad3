"""The exception for mistakes of users, shared by both packages."""

LONGEST = 1000  # characters of a message: values of any length are quoted in them


class UserError(ValueError):
    """A mistake in a recipe, file or command line, described in one line.

    The text names the key or file, the value found, what was expected and what to do. The command prints it as
    `error: ...` on rank 0 and ends every rank with exit status 2, without a traceback.
    """

    def __init__(self, text: str) -> None:
        super().__init__(_shortened(_printable(text)))


def _printable(text: str) -> str:
    r"""In one line, and nothing that moves a terminal's cursor: a key or a path may hold \n, \x1b or \u2028."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _shortened(text: str) -> str:
    """Without the middle of what is too long; what is wrong stands at the start, what to do at the end."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST * 2 // 3]} [...] {text[-LONGEST // 3 :]}"
