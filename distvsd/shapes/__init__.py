"""The embedded `shapes` prior: its world, captions and training, and the classifier that recognises its labels."""
