"""`isthmus train sae`: a dictionary for activations that lie in shards, and the page of its features."""
