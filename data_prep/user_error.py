"""The exception for mistakes of users, shared by both packages."""


class UserError(ValueError):
    """A mistake in a recipe, file or command line, described in one line.

    The text names the key or file, the value found, what was expected and what to do. The command prints it as
    `error: ...` on rank 0 and ends every rank with exit status 2, without a traceback.
    """
