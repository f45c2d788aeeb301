"""The fault suite: real processes, broken on purpose while a client keeps its own books."""
