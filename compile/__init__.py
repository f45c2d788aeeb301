"""What is made from something else and shipped: models and what they are made of."""
