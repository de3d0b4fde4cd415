"""Reads one's own characters: programs of images, and the search for them."""
