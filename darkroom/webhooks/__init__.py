"""Webhooks: endpoints, payloads, signatures, and the queue of deliveries."""
