"""How a microbatch becomes pixels. Importing this package loads nothing heavy."""
