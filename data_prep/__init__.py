"""Raw data -> prepared set: packed, labelled rows on disk. Knows nothing of the trainer."""
