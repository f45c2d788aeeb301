"""Local stack: starts, supervises and stops the real servers as child processes."""
