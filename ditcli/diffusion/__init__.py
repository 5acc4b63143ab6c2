"""Schedules, noising, targets, samplers and guidance: plain arithmetic for torch, numpy and JAX arrays."""
