"""The client's side of a job's life: submit, find, cancel, retry, delete."""
