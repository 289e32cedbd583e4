"""Makers of real checkpoints. They never import streamconv: they are the independent oracle."""
