"""Plumbing without any modelling: command line, devices, logs, checkpoints, text metrics, filmstrip."""


class UserError(Exception):
    """A mistake the user can repair: one sentence that says what is wrong and what to do. Exit code 2, no traceback."""
