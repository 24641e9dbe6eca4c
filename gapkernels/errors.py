"""The one exception type for mistakes that lie outside the program."""


class UserError(Exception):
    """An error whose cause is what the user asked for: the command line prints it as one line and exits with code 2."""
