"""`isthmus train sae`: a dictionary for activations that lie in shards, and the page of its features.

- command: the options
- settings: all of them that the result depends on
- trainer: data, model and optimizer; one step
- processes: what there is to do with others
- run: the loop, with progress, log and checkpoints
- checkpoint: what a run resumes from, and the trained autoencoder as a file
- evaluate: explained variance, firing counts, strongest rows
- page, charts: the feature page
"""
