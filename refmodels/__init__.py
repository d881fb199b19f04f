"""Numerical reference models."""
