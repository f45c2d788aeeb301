"""How the demo model is made: pictures from open packages, training, pictures again, scores."""
