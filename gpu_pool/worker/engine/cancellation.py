"""How a step ends that nobody waits for any more."""


class Cancelled(Exception):
    """Nobody waits for this chunk any more."""
