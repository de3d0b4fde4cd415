"""Infers programs of images, including the user's own: search, traces, strokes that vary."""
