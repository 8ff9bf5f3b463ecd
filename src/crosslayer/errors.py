"""The one error that a user can cause and mend."""


class UserError(ValueError):
    """Something in the input is wrong.

    The message is one line that names the thing, the value found, the value wanted and what to do next; the
    command line prints it and exits with code 2.
    """
