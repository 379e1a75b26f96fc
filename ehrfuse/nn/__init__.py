"""Torch modules: what cores are built from. Nothing here knows of frames or estimators."""
