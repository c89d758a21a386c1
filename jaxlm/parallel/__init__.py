"""Device meshes and the one table from logical axis names to mesh axes."""
