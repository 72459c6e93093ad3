"""Turns raw data into a prepared set: packed, labelled rows on disk. Independent of the trainer."""
