"""Suppression: edits chosen on one split of the images, set on the second, and tested once on the third."""
