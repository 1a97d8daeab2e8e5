"""The embedded `shapes` prior: its world, its captions, how it is trained, and the classifier that reads its labels."""
