"""The worker's side of a job's life: claim, renew, settle, requeue."""
