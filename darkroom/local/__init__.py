"""The local stack: starts, watches and stops the real servers as child processes."""
