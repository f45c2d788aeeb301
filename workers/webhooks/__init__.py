"""Webhook sender: claims deliveries and sends them."""
