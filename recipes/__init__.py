"""Recipes for models that this repository ships. No product code imports them."""
