"""The only package that imports torch.distributed. One code path: with one rank every collective is the identity."""
