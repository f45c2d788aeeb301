"""Recipe of the demo model: images from open packages, training, evaluation, export."""
