"""Latent error, retrieval, probes, rollouts, pixels, and the report."""
