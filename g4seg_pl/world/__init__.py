"""The embedded world: procedural scenes and small models trained on them by our own recipe."""
