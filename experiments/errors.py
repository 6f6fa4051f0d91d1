"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """A user's mistake or a broken input, told in one line.

    The line names the argument or file, what was received and what would be right. `train.py`
    prints it without a traceback and exits with a non-zero code.
    """
