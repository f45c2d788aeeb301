"""Files of rows: read, validated, and turned into a batch."""
