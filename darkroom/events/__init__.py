"""Events of jobs and batches: written in order, read as a feed, sent to webhooks."""
