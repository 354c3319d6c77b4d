"""Trainers: each module imports its trainer, and nothing else in the package does."""
