"""Text to token stores to batches; numpy only, so that worker processes never start JAX."""
