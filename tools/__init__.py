"""Scripts for contributors; nothing here is installed."""
