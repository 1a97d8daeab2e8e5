"""How ranks train one shared network together: one file a strategy, the same mathematics in each."""
