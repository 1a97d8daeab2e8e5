"""How ranks train one shared network together: one file per strategy, the same mathematics in each."""
